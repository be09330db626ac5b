"""Archives give the same report as their runs, and hold no path of the machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.errors import ExperimentError
from apollo_bench.report import page
from apollo_bench.runs import archive, compatibility, loading
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.loop import train
from bench.tests.conftest import settings_of_a_worker
from bench.tests.helpers import prepared


@pytest.fixture(scope="module")
def ended_once(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison with its last run trained to the end, and the trace of a folder of data."""
    folder = tmp_path_factory.mktemp("ended")
    finished = shutil.copytree(finished_once, folder / "compared")
    for directory in compatibility.find_run_directories(finished):
        manifest = directory.read()
        manifest["command"] = [
            *("/opt/bin/apollo-bench", "compare", "--data", "/home/me/data", "--out=/home/me/out"),
            *("--tuned", "../../home/me/tuned", "--set", "optimizer.lr=0.5"),
        ]
        manifest["data"]["folder"] = "/home/me/data"
        directory.manifest.write_text(json.dumps(manifest))
        if directory.verdict() is None:
            spec = directory.spec()
            _, task = prepared(folder / "again", spec)
            with settings_of_a_worker():
                train(directory, spec, task)
    return finished


@pytest.fixture
def ended(ended_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ended_once, tmp_path / "compared")


def test_the_report_of_an_archive_is_that_of_the_runs(ended: Path, tmp_path: Path) -> None:
    assert archive.write(compatibility.find_run_directories(ended), tmp_path / "kept") == 4
    page.write([ended], tmp_path / "of-runs")
    page.write([tmp_path / "kept"], tmp_path / "of-archive")
    for name in ("results.md", "training_loss.svg", "test_accuracy.svg"):
        one, other = ((tmp_path / where / name).read_text() for where in ("of-runs", "of-archive"))
        assert one == other, name
    sizes = [path.stat().st_size for path in (tmp_path / "kept").iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 10_000


def test_nothing_tells_of_the_machines_paths(ended: Path, tmp_path: Path) -> None:
    archive.write(compatibility.find_run_directories(ended), tmp_path / "kept")
    for path in (tmp_path / "kept").iterdir():
        assert "/home" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
        assert "/opt" not in path.read_text()
    [one, *_] = archive.read(tmp_path / "kept")
    assert one.manifest["command"] == [
        *("apollo-bench", "compare", "--data", "data", "--out=out"),
        *("--tuned", "tuned", "--set", "optimizer.lr=0.5"),
    ]
    assert one.manifest["versions"]["torch"]
    assert one.manifest["machine"]["cores"]


def test_what_is_read_is_what_was_written(ended: Path, tmp_path: Path) -> None:
    archive.write(compatibility.find_run_directories(ended), tmp_path / "kept")
    kept = {run.path.name: run for run in archive.read(tmp_path / "kept")}
    for directory in compatibility.find_run_directories(ended):
        run = kept[directory.spec().label]
        assert run.manifest["recipe"] == directory.read()["recipe"]
        assert run.result["accuracy"] == directory.verdict()["accuracy"]  # type: ignore[index]
        lines = [line for line in directory.records() if line["kind"] == "evaluation"]
        assert [line["step"] for line in run.evaluations] == [line["step"] for line in lines]
        for one, other in zip(run.evaluations, lines, strict=True):
            assert one["train_loss"] == other["train_loss"]
            assert one["time"] == other["time"]


def test_only_ended_runs_are_kept(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="not finished; run the command that started"):
        archive.write(compatibility.find_run_directories(finished), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_diverged_run_is_kept_too(ended: Path, tmp_path: Path) -> None:
    directory = RunDirectory(next((ended / "runs").glob("*-sgd-*-seed3")))
    diverged = {"verdict": "diverged", "step": 5, "steps": 24, "time": {"seconds": 1.0}}
    directory.result.write_text(json.dumps(diverged))
    archive.write(compatibility.find_run_directories(ended), tmp_path / "kept")
    [summary] = page.write([tmp_path / "kept"], tmp_path / "report")
    assert summary.rows[0].remark == "1 of 2 finished, 1 diverged"


@pytest.mark.parametrize("damage", ["{", '{"format": 2}', '{"format": 1, "runs": [{}]}'])
def test_damage_is_named(ended: Path, tmp_path: Path, damage: str) -> None:
    archive.write(compatibility.find_run_directories(ended), tmp_path / "kept")
    (tmp_path / "kept" / archive.RUNS).write_text(damage)
    with pytest.raises(ExperimentError, match="kept"):
        page.write([tmp_path / "kept"], tmp_path / "report")


def test_a_table_of_other_runs_is_named(ended: Path, tmp_path: Path) -> None:
    archive.write(compatibility.find_run_directories(ended), tmp_path / "kept")
    table = tmp_path / "kept" / archive.EVALUATIONS
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    with pytest.raises(ExperimentError, match=r"evaluations.csv: does not match runs.json; write"):
        page.write([tmp_path / "kept"], tmp_path / "report")
    # the message says that the command makes all tables again
    assert archive.write(compatibility.find_run_directories(ended), tmp_path / "kept") == 4
    assert table.read_text().splitlines(keepends=True) == lines


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], r"damaged \(an evaluation at step"),
        (lambda rows: [*rows[:2], *rows[1:]], r"damaged \(an evaluation at step"),
        (lambda rows: [*rows, "nobody" + rows[-1][rows[-1].index(",") :]], "lacks: nobody"),
    ],
    ids=["out of order", "twice", "of no run"],
)
def test_rows_that_were_edited_are_named(
    ended: Path, tmp_path: Path, change: Callable[[list[str]], list[str]], expected: str
) -> None:
    archive.write(compatibility.find_run_directories(ended), tmp_path / "kept")
    table, runs = (tmp_path / "kept" / name for name in (archive.EVALUATIONS, archive.RUNS))
    table.write_text("\n".join(change(table.read_text().splitlines())) + "\n")
    content = json.loads(runs.read_text())
    content[archive.EVALUATIONS] = hashlib.sha256(table.read_bytes()).hexdigest()
    runs.write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match=expected):
        loading.load_runs([tmp_path / "kept"])


def test_the_command(ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    kept = tmp_path / "kept"
    done = CliRunner().invoke(app, ["archive", str(ended), "--out", str(kept)])
    assert done.exit_code == 0, done.output
    assert f"Archived 4 runs in {kept}" in done.output
    assert (kept / "results.md").exists()
    again = CliRunner().invoke(app, ["report", str(kept), "--out", str(tmp_path / "report")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "report" / "results.md").read_text() == (kept / "results.md").read_text()
    twice = CliRunner().invoke(app, ["archive", str(kept), "--out", str(tmp_path / "twice")])
    assert twice.exit_code == 2
    assert f"{kept}: an archive already; `apollo-bench report {kept}` reads it" in twice.stderr
    (tmp_path / "empty").mkdir()
    arguments = ["archive", str(tmp_path / "empty"), "--out", str(tmp_path / "none")]
    empty = CliRunner().invoke(app, arguments)
    assert empty.exit_code == 2
