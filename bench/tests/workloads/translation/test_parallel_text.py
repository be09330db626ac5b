"""Aligned files: reading, filtering and errors."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.parallel_text import (
    FAIRSEQ,
    FilterCounts,
    LengthLimits,
    TextPairs,
    clean,
    find_text,
    make_corpus,
    passes_filter,
    read_pairs,
)


def write(folder: Path, english: bytes, german: bytes) -> tuple[Path, Path]:
    (folder / "a.en").write_bytes(english)
    (folder / "a.de").write_bytes(german)
    return folder / "a.en", folder / "a.de"


def test_every_line_is_read(tmp_path: Path) -> None:
    # a line separator and a form feed within a sentence end no line; the last line needs no end
    english = "A  dog.\r\n\nTwo\u2028lines\x0c here\nLast".encode()
    german = "\ufeffEin\tHund.\n\nZwei\u00a0Zeilen\n Ende \n".encode()
    pairs = read_pairs(*write(tmp_path, english, german), "mend it")
    assert pairs.source == ["A dog.", "", "Two lines here", "Last"]
    assert pairs.target == ["Ein Hund.", "", "Zwei Zeilen", "Ende"]


def test_gzipped_whatever_the_name_says(tmp_path: Path) -> None:
    paths = write(tmp_path, gzip.compress(b"one\ntwo\n"), b"eins\nzwei\n")
    assert read_pairs(*paths, "").source == ["one", "two"]
    (tmp_path / "b.en.gz").write_bytes(b"plain")
    assert find_text(tmp_path, "b.en", "") == tmp_path / "b.en.gz"


def test_misaligned_files(tmp_path: Path) -> None:
    paths = write(tmp_path, b"one\ntwo\nthree\n", b"eins\nzwei\n")
    with pytest.raises(ExperimentError) as caught:
        read_pairs(*paths, "mend it")
    for part in (f"{paths[0]} has 3 lines", f"{paths[1]} has 2", "mend it"):
        assert part in str(caught.value)


@pytest.mark.parametrize("zipped", [False, True])
def test_wrong_encoding(tmp_path: Path, zipped: bool) -> None:
    german = "Tür\nMänner\n".encode("latin-1")
    paths = write(tmp_path, b"door\nmen\n", gzip.compress(german) if zipped else german)
    with pytest.raises(ExperimentError, match=r"a\.de, line 1: not UTF-8, byte 0xfc; mend it"):
        read_pairs(*paths, "mend it")
    paths[1].write_bytes("Tür\n".encode() + "Männer\n".encode("latin-1"))
    with pytest.raises(ExperimentError, match=r"a\.de, line 2: not UTF-8, byte 0xe4"):
        read_pairs(*paths, "mend it")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = gzip.compress(b"one two three\n" * 100)
    damaged = whole[:20] + bytes([whole[20] ^ 255]) + whole[21:]
    for content in (whole[:-9], whole[:4], damaged):
        paths = write(tmp_path, content, b"eins\n")
        with pytest.raises(ExperimentError, match=r"a\.en: cannot be read whole .*; mend it"):
            read_pairs(*paths, "mend it")
    with pytest.raises(ExperimentError, match=r"b\.en: no such file, nor b\.en\.gz; mend it"):
        find_text(tmp_path, "b.en", "mend it")
    with pytest.raises(ExperimentError, match="b: no such file; mend it"):
        read_pairs(tmp_path / "b", paths[1], "mend it")


def words(count: int) -> str:
    return " ".join("w" * count)


def test_cleaning_as_moses_does() -> None:
    lengths = [(1, 1), (0, 3), (3, 0), (250, 250), (251, 250), (200, 251), (3, 2), (2, 3)]
    lengths += [(4, 2), (2, 4), (250, 166), (250, 167)]
    pairs = TextPairs(*([words(pair[side]) for pair in lengths] for side in (0, 1)))
    kept, counts = clean(pairs)
    assert [(len(one.split()), len(other.split())) for one, other in zip(*kept, strict=True)] == [
        *((1, 1), (250, 250), (3, 2), (2, 3), (250, 167))
    ]
    assert counts == FilterCounts(read=12, empty=2, long=2, ratio=3)
    assert counts.kept == 5
    assert str(counts) == "5 of 12 pairs, without 2 empty, 2 too long, 3 of unlike lengths"


sizes = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30)


@given(sizes, st.integers(1, 12), st.sampled_from([1.0, 1.5, 3.0]))
def test_limits_hold_for_every_kept_pair(
    lengths: list[tuple[int, int]], max_length: int, ratio: float
) -> None:
    sides = numpy.array(lengths, numpy.int64).reshape(-1, 2).T
    kept, counts = passes_filter(sides[0], sides[1], LengthLimits(1, max_length, ratio))
    for (one, other), good in zip(lengths, kept.tolist(), strict=True):
        # in the order of Moses's own checks
        assert good == (
            0 < one <= max_length
            and 0 < other <= max_length
            and one / other <= ratio
            and other / one <= ratio
        )
    assert counts.kept == kept.sum()
    assert counts.read == len(lengths)


def test_only_training_pairs_are_dropped() -> None:
    train = TextPairs(["a", "", "c", words(9)], ["x", "y", "", "z"])
    tests = TextPairs(["d", words(300)], ["y", "x"])
    read = make_corpus(train, tests, tests, ("en", "de"), "here")
    assert read.train == (["a", words(9)], ["x", "z"])
    assert read.counts == FilterCounts(read=4, empty=2)
    assert read.valid == tests
    assert read.test == tests
    assert (read.source_language, read.target_language) == ("en", "de")
    with pytest.raises(ExperimentError, match="here: no sentence pairs in the split train"):
        make_corpus(TextPairs([""], [""]), tests, tests, ("en", "de"), "here")
    for splits, name in (
        ((train, TextPairs([], []), tests), "valid"),
        ((train, tests, TextPairs([], [])), "test"),
    ):
        with pytest.raises(ExperimentError, match=f"here: no sentence pairs in the split {name}"):
            make_corpus(*splits, ("en", "de"), "here")
    hole = TextPairs(["a", "b"], ["x", ""])
    for splits, name in (((train, hole, tests), "valid"), ((train, tests, hole), "test")):
        message = f"here: line 2 of the split {name} is empty in de"
        with pytest.raises(ExperimentError, match=message):
            make_corpus(*splits, ("en", "de"), "here")


def test_fingerprint_is_of_the_sentences() -> None:
    one = TextPairs(["a", "b"], ["x", "y"])

    def fingerprint(train: TextPairs, test: TextPairs = one) -> str:
        return make_corpus(train, one, test, ("en", "de"), "here").fingerprint

    same = TextPairs(["a", "", "b"], ["x", "", "y"])
    assert fingerprint(same) == fingerprint(one)
    others = [TextPairs(["a", "b"], ["x", "z"]), TextPairs(["a b"], ["x y"])]
    others += [TextPairs(["b", "a"], ["x", "y"]), TextPairs(["a"], ["x"])]
    found = {fingerprint(one), *map(fingerprint, others), fingerprint(one, others[0])}
    assert len(found) == 6


def test_limits_are_fairseqs() -> None:
    assert FAIRSEQ == (1, 250, 1.5)
