"""A prepared corpus: what is read is what was written, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation import encoded_corpus
from apollo_bench.workloads.translation.parallel_text import TextPairs, make_corpus

SIZE = 262


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[encoded_corpus.EncodedCorpus, Path]:
    train = TextPairs(["a cat sat", "a dog ran far", "cats and dogs"] * 3, ["ein tier", "so"] * 4)
    train.target.append("ende")
    test = TextPairs(["a dog sat", "cats ran"], ["der hund", "viele katzen"])
    corpus = make_corpus(train, test, test, ("en", "de"), "here")
    encoded = encoded_corpus.encode(corpus, SIZE, clean=False)
    encoded_corpus.prepare(encoded, tmp_path, lambda *_: None)
    return encoded, tmp_path


def test_what_is_read_is_what_was_written(
    prepared: tuple[encoded_corpus.EncodedCorpus, Path],
) -> None:
    written, folder = prepared
    assert encoded_corpus.is_prepared(folder)
    assert not encoded_corpus.is_prepared(folder / "elsewhere")
    assert not encoded_corpus.is_prepared(None)
    read = encoded_corpus.load(folder, SIZE)
    assert read.references == written.references == ["der hund", "viele katzen"]
    assert (read.counts, read.subwords.size) == (written.counts, SIZE)
    for split in ("train", "valid", "test"):
        for one, other in zip(getattr(read, split), getattr(written, split), strict=True):
            assert numpy.array_equal(one.tokens, other.tokens)
            assert numpy.array_equal(one.offsets, other.offsets)


def test_another_number_of_subwords_is_refused(
    prepared: tuple[encoded_corpus.EncodedCorpus, Path],
) -> None:
    with pytest.raises(ExperimentError, match=f"data.subwords is 300, .* was prepared for {SIZE}"):
        encoded_corpus.load(prepared[1], 300)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.source.tokens", "not the file that was prepared"),
        ("test.target.offsets", "not the file that was prepared"),
        ("references.txt", "not the file that was prepared"),
        ("subwords.json", "does not fit subwords.json"),
        ("corpus.json", "damaged"),
    ],
)
def test_a_changed_file_is_noticed(
    prepared: tuple[encoded_corpus.EncodedCorpus, Path], name: str, expected: str
) -> None:
    path = prepared[1] / name
    content = path.read_bytes()
    path.write_bytes(b"\1" + content[1:])
    with pytest.raises(ExperimentError, match=expected):
        encoded_corpus.load(prepared[1], SIZE)
