"""``prepare`` and ``archive`` leave alone what they did not make."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.errors import ExperimentError
from apollo_bench.report import page
from apollo_bench.workloads.image_classification import cifar10
from apollo_bench.workloads.language_modeling import one_billion_word
from apollo_bench.workloads.output_files import LISTING, reserve
from apollo_bench.workloads.translation import encoded_corpus, phrases
from bench.tests.workloads.image_classification.test_cifar10 import write_pickles
from bench.tests.workloads.language_modeling.test_one_billion_word import LINES, write_raw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw", {name: text * 3 for name, text in LINES.items()})


def prepare(raw: Path, out: Path) -> None:
    one_billion_word.prepare(raw, out, None, 1, lambda *news: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_other_files_of_the_folders_stay(raw: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "counts").mkdir(parents=True)
    elsewhere.mkdir()
    mine = {
        out / "counts" / "thesis.txt": "my thesis",
        out / "lock": "a key",
        elsewhere / "precious.txt": "x",
    }
    for path, text in mine.items():
        path.write_text(text)
    prepare(raw, out)
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "counts").symlink_to(elsewhere)
    prepare(raw, tmp_path / "out2")
    assert {path: path.read_text() for path in mine} == mine
    assert [path.name for path in (out / "counts").iterdir()] == ["thesis.txt"]
    assert [path.name for path in elsewhere.iterdir()] == ["precious.txt"]
    assert one_billion_word.load(out).fingerprint == one_billion_word.load(tmp_path / "out2")[4]


@pytest.mark.parametrize("name", ["vocabulary.txt", "corpus.json.tmp", "train/00001.tokens"])
def test_a_file_of_the_same_name_is_refused_before_anything_is_written(
    raw: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(ExperimentError, match=f"{name}: not made by prepare, which would overw"):
        prepare(raw, out)
    assert {path: text for path, text in contents(out).items() if text} == {name: b"mine"}
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "nowhere")  # a broken link also occupies the name
    with pytest.raises(ExperimentError, match="not made by prepare"):
        prepare(raw, out)


def test_what_a_preparation_made_is_replaced(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(raw, out)
    before = contents(out)
    prepare(raw, out)
    assert contents(out) == before
    (out / LISTING).unlink()  # as an earlier version left it
    prepare(raw, out)
    assert contents(out) == before
    (out / LISTING).write_text("my list")
    with pytest.raises(ExperimentError, match=f"{LISTING}: not a list that prepare wrote"):
        prepare(raw, out)
    assert (out / LISTING).read_text() == "my list"


def test_the_official_batches_are_not_overwritten(tmp_path: Path) -> None:
    """If --raw and --out are the same folder, prepare would overwrite what it reads."""
    official = write_pickles(tmp_path / cifar10.FOLDER)
    before = contents(tmp_path)
    command = ["prepare", "cifar10", "--raw", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert f"{official / 'data_batch_1'}: not made by prepare" in done.stderr
    assert contents(tmp_path) == before
    out = cifar10.prepare(cifar10.load(official), tmp_path / "out")
    # files that prepare made itself may be overwritten
    assert cifar10.prepare(cifar10.load(out), tmp_path / "out") == out


def test_prepare_does_not_overwrite_a_corpus_of_translations(tmp_path: Path) -> None:
    text = phrases.load()
    text = text._replace(
        train=text.train._replace(source=text.train[0][:9], target=text.train[1][:9])
    )
    corpus = encoded_corpus.encode(text, 300, clean=False)
    (tmp_path / "references.txt").write_text("of my thesis")
    with pytest.raises(ExperimentError, match=r"references.txt: not made by prepare"):
        encoded_corpus.prepare(corpus, tmp_path, lambda *_: None)
    assert contents(tmp_path) == {"references.txt": b"of my thesis"}


def test_a_claim_adds_to_the_list(tmp_path: Path) -> None:
    reserve(tmp_path, ["a"])
    reserve(tmp_path, ["b"])
    listed = json.loads((tmp_path / LISTING).read_text())["files"]
    assert listed == ["a", "a.tmp", "b", "b.tmp"]


def test_ctrl_c_ends_a_preparation_in_order(raw: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_billion_word, "prepare", interrupted)
        command = ["prepare", "one-billion-word", "--raw", str(raw), "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 130
    assert done.stderr == "Stopped; run the same command to continue.\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_archive_is_not_written_among_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report would then find each run twice."""
    for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    shutil.rmtree(finished / "runs" / "fashion-mnist-apollo-cosine-seed4")
    before = contents(finished)

    def refused(out: Path) -> str:
        done = CliRunner().invoke(app, ["archive", str(finished), "--out", str(out)])
        assert done.exit_code == 2
        return done.stderr

    for out in (finished, finished / "runs", finished.parent, finished / "runs/../runs"):
        assert f"--out is {out}, which holds runs; " in refused(out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "curvature.csv").write_text("mine")
    assert f"{other / 'curvature.csv'}: not of an archive" in refused(other)
    assert contents(finished) == before
    assert contents(other) == {"curvature.csv": b"mine"}
    page.collect([finished])
