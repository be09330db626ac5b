"""Text files, vocabularies and the streams that a language model is trained on."""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_qn.experiments.data import streams, wordnet
from apollo_qn.experiments.data.corpus import Stream
from apollo_qn.experiments.data.text_files import read_lines
from apollo_qn.experiments.data.vocabulary import END, UNKNOWN, Vocabulary
from apollo_qn.experiments.errors import ExperimentError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SOURCE = Path("/usr/share/wordnet")


def numbers(count: int) -> Stream:
    return Stream([numpy.arange(count, dtype=numpy.int32)])


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 25), st.integers(0, 25))
def test_a_stream_is_its_parts_in_a_row(lengths: list[int], start: int, stop: int) -> None:
    whole = numpy.arange(sum(lengths), dtype=numpy.int32)
    ends = numpy.cumsum([0, *lengths])
    parts = [whole[a:b] for a, b in itertools.pairwise(ends)]
    stream = Stream(parts)
    assert len(stream) == len(whole)
    assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


@given(st.integers(2, 200), st.integers(1, 7), st.integers(1, 9))
def test_rows_read_on_where_they_stopped(count: int, rows: int, time: int) -> None:
    text = numbers(count)
    steps = list(streams.training(text, rows, time, 0, slice(None)))
    assert len(steps) == streams.count_steps(text, rows, time)
    for tokens, targets in steps:
        assert tokens.shape == targets.shape == (rows, time)
        assert torch.equal(targets, tokens + 1)
    for (before, _), (after, _) in itertools.pairwise(steps):
        assert torch.equal(after[:, 0], before[:, -1] + 1)
    if steps:
        everything = torch.cat([tokens for tokens, _ in steps], 1)
        assert len(everything.unique()) == everything.numel(), "a word twice"
        later = list(streams.training(text, rows, time, len(steps) - 1, slice(None)))
        assert torch.equal(later[0][0], steps[-1][0])


def test_processes_share_the_rows() -> None:
    text = numbers(1000)
    whole = [tokens for tokens, _ in streams.training(text, 4, 10, 3, slice(None))]
    halves = [
        [tokens for tokens, _ in streams.training(text, 4, 10, 3, slice(first, first + 2))]
        for first in (0, 2)
    ]
    for one, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.cat(parts))


@given(st.integers(1, 90), st.integers(1, 8), st.integers(1, 9), st.integers(1, 3))
def test_an_evaluation_predicts_every_word_once(
    count: int, rows: int, time: int, world: int
) -> None:
    text = Stream([numpy.arange(1, count + 1, dtype=numpy.int32)])
    seen = []
    for rank in range(world):
        for tokens, targets, counts in streams.evaluation(text, 0, rows, time, rank, world):
            assert torch.equal(tokens[counts] + 1, targets[counts])  # each after the one before
            seen += targets[counts].tolist()
    assert sorted(seen) == list(range(1, count + 1))


def test_a_vocabulary_of_text() -> None:
    found = Vocabulary.of_text(["b a a", "c a b", ""], 2, "here")
    # 3 ends, 3 times a, 2 times b, once c, which is not known
    assert found.words == [END, "a", "b", UNKNOWN]
    assert list(found.encode_all(["a c b", "b"])) == [1, 3, 2, 0, 2, 0]
    assert "c" not in found.numbers
    assert len(found) == 4
    with pytest.raises(ExperimentError, match="here: no words in it"):
        Vocabulary.of_text(["", " "], 1, "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("</S>\nthe\n", "<UNK> is missing, which stands for a word that is not known"),
        ("<UNK>\nthe\n", "</S> is missing, which stands for a sentence's end"),
        ("</S>\n<UNK>\nthe\nof\nthe\n", "the word 'the' stands there twice"),
        (b"</S>\n<UNK>\n\xff\n", "not UTF-8 at byte 11"),
    ],
)
def test_files_that_are_no_vocabulary(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExperimentError) as caught:
        Vocabulary.read(path)
    assert str(caught.value) == f"{path}: {expected}"


def test_a_vocabulary_keeps_the_files_order(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("</S>\r\n<UNK>\r\nthe\r\n<S>\r\n")
    assert Vocabulary.read(path).words == [END, UNKNOWN, "the", "<S>"]
    with pytest.raises(ExperimentError, match=r"none.txt: cannot be read \(No such file"):
        Vocabulary.read(tmp_path / "none.txt")


def test_files_that_are_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(b"one\ntwo\nthree\n" * 1000)
    path = tmp_path / "text.gz"
    path.write_bytes(whole)
    assert list(read_lines(path))[:3] == ["one", "two", "three"]
    for content in (whole[: len(whole) // 2], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"text.gz: damaged or cut short after line"):
            list(read_lines(path))
    plain = tmp_path / "text"
    plain.write_bytes("gut\nschön\n".encode("latin-1"))
    with pytest.raises(ExperimentError, match=r"text, line 2: not UTF-8 \(byte 4 of the line\)"):
        list(read_lines(plain))
    with pytest.raises(ExperimentError, match=r"none: cannot be read \(No such file"):
        list(read_lines(tmp_path / "none"))


def test_the_embedded_text() -> None:
    corpus = wordnet.load()
    sizes = [len(stream) for stream in (corpus.train, corpus.valid, corpus.test)]
    assert sizes == [674567, 30839, 30960]
    words = corpus.vocabulary.words
    assert len(words) == 22107
    assert {UNKNOWN, END, "the", "a"} <= set(words[:10])
    first = corpus.train.read(0, 6).tolist()
    assert [words[number] for number in first] == ["he", "is", "the", "best", "one", END]
    assert wordnet.load().fingerprint == corpus.fingerprint
    unknown = sum(int((corpus.test.read(0, 40000) == corpus.vocabulary.unknown).sum()) for _ in "x")
    assert 0.01 < unknown / len(corpus.test) < 0.1


@pytest.mark.skipif(not SOURCE.is_dir(), reason="Debian's wordnet-base is not installed")
def test_the_embedded_text_can_be_made_again(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_wordnet.py"
    subprocess.run([sys.executable, str(script), "--target", str(tmp_path)], check=True)
    for path in wordnet.EMBEDDED.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_the_larger_text() -> None:
    corpus = wordnet.load(SHARED)
    assert len(corpus.train) > 1_300_000
    assert corpus.fingerprint != wordnet.load().fingerprint


def test_a_folder_without_the_text(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"wordnet_train.txt.gz: cannot be read"):
        wordnet.load(tmp_path)
    for split in ("train", "valid", "test"):
        (tmp_path / f"wordnet_{split}.txt.gz").write_bytes(gzip.compress(b"\n\n"))
    with pytest.raises(ExperimentError, match=r"wordnet_train.txt.gz: no sentences in it"):
        wordnet.load(tmp_path)
