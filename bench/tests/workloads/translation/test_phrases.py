"""The embedded phrases: intact, made by the script, no test phrase in the training set."""

from __future__ import annotations

import gzip
import importlib
import shutil
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation import phrases

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("make_phrases")


def test_sizes() -> None:
    corpus = phrases.load()
    assert [pairs.size for pairs in corpus[:3]] == [20_000, 1_000, 1_000]
    assert corpus.counts == (20_000, 0, 0, 0)
    assert (corpus.source_language, corpus.target_language) == ("en", "de")
    size = sum(path.stat().st_size for path in phrases.EMBEDDED.iterdir())
    assert size < 1_000_000


def test_what_is_tested_was_not_trained_on() -> None:
    train, valid, test = phrases.load()[:3]
    for one, other in ((train, valid), (train, test), (valid, test)):
        for here, there in zip(one, other, strict=True):
            assert not set(here) & set(there)
    for pairs in (train, valid, test):
        assert len(set(pairs.source)) == pairs.size
    # every single word was trained on: a name that only a test has could not be learned
    trained = {word for text in train.source for word in text.split() if word.isalpha()}
    tested = {word for text in test.source for word in text.split() if word.isalpha()}
    assert tested <= trained


def test_a_value_is_in_one_split(script: ModuleType) -> None:
    test, train = phrases.load().test, phrases.load().train
    days = {
        script.datetime.date(year, month, 1 + day)
        for year in range(1900, 2050, 10)
        for month in (1, 7)
        for day in range(28)
    }
    found = {"train": 0, "test": 0}
    for split, pairs in (("train", train), ("test", test)):
        sources = set(pairs.source)
        for day in days:
            for pattern in ("MMMM d, y", "d MMMM y", "y-MM-dd", "M/d/yy", "MMM d, y"):
                if script.dates.format_date(day, pattern, locale="en_US") in sources:
                    found[split] += 1
                    assert pattern == "M/d/yy" or script.split_of(day) == split
    assert min(found.values()) > 0


def test_samples_have_the_right_translation() -> None:
    # translations written by hand
    corpus = phrases.load()
    said = {
        english: german for pairs in corpus[:3] for english, german in zip(*pairs[:2], strict=True)
    }
    assert said["half past four"] == "halb fünf"
    assert said["one o'clock"] == "ein Uhr"
    ends = (("%", " %"), (" PM", " Uhr"), (" euros", " Euro"), (" days ago", " Tagen"))
    for end, german_end in ends:
        matching = [english for english in said if english.endswith(end)]
        assert len(matching) > 20
        assert all(said[english].endswith(german_end) for english in matching)
    for english, german in said.items():
        assert "\u00a0" not in english + german
        assert english == " ".join(english.split())
        digits = sorted(filter(str.isdigit, english))
        if english.endswith(("%", " euros")):
            assert sorted(filter(str.isdigit, german)) == digits


@pytest.mark.slow
def test_the_script_makes_the_embedded_files(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_phrases.py", "--target", str(tmp_path)])
    script.main()
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in phrases.EMBEDDED.iterdir()}
    for name in sorted(made):
        ours, theirs = (tmp_path / name).read_bytes(), (phrases.EMBEDDED / name).read_bytes()
        if name.endswith(".gz"):
            assert gzip.decompress(ours) == gzip.decompress(theirs), name
            assert theirs[4:8] == bytes(4), f"{name} has a time in it"
            assert not theirs[3], f"{name} has a file name in it"
        # zlib-ng compresses the same text to other bytes
        if "ng" not in zlib.ZLIB_RUNTIME_VERSION:
            assert ours == theirs, name


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "phrases"
    shutil.copytree(phrases.EMBEDDED, folder)
    monkeypatch.setattr(phrases, "EMBEDDED", folder)
    assert phrases.load().test.size == 1_000
    (folder / "test.de.gz").write_bytes(gzip.compress(b"eins\n"))
    with pytest.raises(ExperimentError, match=r"test\.de\.gz: corrupt.*make_phrases"):
        phrases.load()
    with pytest.raises(ExperimentError, match=r"has 1,000 lines, .*test\.de\.gz has 1: "):
        phrases.load(folder)
    (folder / "test.de.gz").unlink()
    with pytest.raises(ExperimentError, match=r"test\.de\.gz: no such file"):
        phrases.load()
    with pytest.raises(ExperimentError, match="nowhere: no such folder; --data needs"):
        phrases.load(tmp_path / "nowhere")


def test_not_needed_at_run_time() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        assert "import babel" not in text
        assert "from babel" not in text
        assert "num2words" not in text
