"""Multi30k and WMT14 in each of their forms."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads import arrow_tables
from apollo_bench.workloads.translation import multi30k, wmt14
from apollo_bench.workloads.translation.parallel_text import FilterCounts, ParallelCorpus, TextPairs

SHARED = Path(__file__).parents[5] / "shared" / "data" / "multi30k"
TRAIN = TextPairs(
    ["A dog.", "", "Two cats.", "Snow & ice"], ["Ein Hund.", "x", "Zwei Katzen.", "y"]
)
VALID = TextPairs(["A tree.", "A lake."], ["Ein Baum.", "Ein See."])
TEST = TextPairs(["A house.", "A boat."], ["Ein Haus.", "Ein Boot."])
CORPUS = (TRAIN, VALID, TEST)


def write(folder: Path, name: str, pairs: TextPairs, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for language, side in zip(("en", "de"), pairs, strict=True):
        content = "".join(f"{text}\n" for text in side).encode()
        if zipped:
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{name}.{language}").write_bytes(content)


def write_hub(folder: Path, nested: bool) -> Path:
    folder.mkdir()
    for split, pairs in zip(("train", "validation", "test"), CORPUS, strict=True):
        rows = [{"de": german, "en": english} for english, german in zip(*pairs, strict=True)]
        columns = {"translation": rows} if nested else {k: [r[k] for r in rows] for k in rows[0]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}-0.parquet")
    if nested:
        files = [{"split": s, "path": f"{s}-*"} for s in ("train", "validation", "test")]
        configs = json.dumps([{"config_name": "de-en", "data_files": files}])
        (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    return folder


def assert_is_the_corpus(corpus: ParallelCorpus) -> None:
    assert corpus.train == (
        ["A dog.", "Two cats.", "Snow & ice"],
        ["Ein Hund.", "Zwei Katzen.", "y"],
    )
    assert corpus.valid == VALID
    assert corpus.test == TEST
    assert corpus.counts == FilterCounts(read=4, empty=1)
    assert (corpus.source_language, corpus.target_language) == ("en", "de")


@pytest.mark.parametrize("zipped", [False, True])
def test_multi30k_files(tmp_path: Path, zipped: bool) -> None:
    for name, pairs in zip(multi30k.SPLITS, CORPUS, strict=True):
        write(tmp_path, name, pairs, zipped)
    assert_is_the_corpus(multi30k.load(tmp_path))
    (tmp_path / ("val.de.gz" if zipped else "val.de")).unlink()
    with pytest.raises(ExperimentError, match=r"val\.de: no such file, nor val\.de\.gz; --data"):
        multi30k.load(tmp_path)
    with pytest.raises(ExperimentError, match="nowhere: no such folder; --data needs"):
        multi30k.load(tmp_path / "nowhere")


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("_own_cache")
def test_hub(tmp_path: Path) -> None:
    flat, nested = write_hub(tmp_path / "flat", False), write_hub(tmp_path / "nested", True)
    corpora = [multi30k.load(hub=str(flat)), wmt14.load(hub=str(nested))]
    for corpus in corpora:
        assert_is_the_corpus(corpus)
    assert corpora[0].fingerprint == corpora[1].fingerprint
    (flat / "test-0.parquet").unlink()
    with pytest.raises(ExperimentError, match="split test: not there, only train, validation; "):
        multi30k.load(hub=str(flat))
    with pytest.raises(ExperimentError, match=r"loaded from the Hugging Face hub.*--data"):
        multi30k.load(hub=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"en": ["a"], "fr": ["b"]}, "no columns en and de, nor translation, there are en, fr; "),
        ({"en": ["a"], "de": [None]}, "split train, row 0: no text of the language de"),
        ({"translation": [{"en": "a"}]}, "split train, row 0: no text of the language de"),
    ],
)
def test_bad_tables(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[object]], said: str
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(columns)
    splits = {split: rows for split in ("train", "validation", "test")}
    monkeypatch.setattr(arrow_tables, "hub_splits", lambda *_: splits)
    with pytest.raises(ExperimentError, match=said):
        multi30k.load()


def test_wmt14_of_one_file(tmp_path: Path) -> None:
    for name, pairs in zip(("train", "newstest2013", "newstest2014"), CORPUS, strict=True):
        write(tmp_path, name, pairs, zipped=name == "train")
    assert_is_the_corpus(wmt14.load(tmp_path))


def marked(texts: list[str], kind: str) -> bytes:
    segments = "\n".join(f'<seg id="{n}">{text}</seg>' for n, text in enumerate(texts, 1))
    return f'<{kind} setid="x">\n<doc id="1">\n<p>\n{segments}\n</p></doc></{kind}>\n'.encode()


def test_wmt14_as_the_organizers_pack_it(tmp_path: Path) -> None:
    first, rest = (TextPairs(*(side[part] for side in TRAIN)) for part in (slice(2), slice(2, 4)))
    write(tmp_path / "training", "europarl-v7.de-en", first)
    write(tmp_path / "training", "news-commentary-v9.de-en", rest, zipped=True)
    write(tmp_path / "training", "europarl-v7.cs-en", VALID)
    write(tmp_path / "dev", "newstest2013", VALID)
    folder = tmp_path / "test-full"
    folder.mkdir()
    (folder / "newstest2014-deen-src.en.sgm").write_bytes(marked(TEST.source, "srcset"))
    (folder / "newstest2014-deen-ref.de.sgm").write_bytes(marked(TEST.target, "refset"))
    # the test set of the other direction
    (folder / "newstest2014-deen-src.de.sgm").write_bytes(marked(["falsch"], "srcset"))
    assert_is_the_corpus(wmt14.load(tmp_path))
    (folder / "newstest2014-deen-ref.de.sgm").write_bytes(marked(TEST.target[:1], "refset"))
    with pytest.raises(ExperimentError, match=r"src\.en\.sgm has 2 lines, .*ref\.de\.sgm has 1"):
        wmt14.load(tmp_path)
    (folder / "newstest2014-deen-src.en.sgm").unlink()
    with pytest.raises(ExperimentError, match=r"newstest2014\.en: no such file, .*--data needs"):
        wmt14.load(tmp_path)


def test_wmt14_misses_a_side(tmp_path: Path) -> None:
    write(tmp_path, "newstest2013", VALID)
    write(tmp_path, "newstest2014", TEST)
    with pytest.raises(ExperimentError, match=r"train\.en: no such file, nor train\.en\.gz"):
        wmt14.load(tmp_path)
    write(tmp_path / "training", "commoncrawl.de-en", TRAIN)
    assert_is_the_corpus(wmt14.load(tmp_path))
    (tmp_path / "training" / "commoncrawl.de-en.de").unlink()
    with pytest.raises(ExperimentError, match=r"commoncrawl\.de-en\.de: no such file"):
        wmt14.load(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_real_captions() -> None:
    corpus = multi30k.load(SHARED)
    assert [pairs.size for pairs in corpus[:3]] == [29_000, 1_014, 1_000]
    assert corpus.counts.kept == corpus.counts.read
    assert corpus.train.source[0] == "Two young, White males are outside near many bushes."
    assert (
        corpus.train.target[1] == "Mehrere Männer mit Schutzhelmen bedienen ein Antriebsradsystem."
    )
    assert corpus.test.source[0] == "A man in an orange hat starring at something."
