"""Token files: complete, checked, memory-mapped, and several of them as one stream."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.language_modeling import token_files
from apollo_bench.workloads.language_modeling.token_corpus import TokenIds, TokenStream
from apollo_bench.workloads.language_modeling.token_files import SourceFile

SOURCE = SourceFile("news.en-00001-of-00100", 12, "ab" * 32)
VALUES = numpy.array([3, 0, 793_470, 1, 2], numpy.int32)


def write(path: Path, values: TokenIds = VALUES) -> Path:
    blocks = [values[:2], values[2:2], values[2:]]
    token_files.write(path, blocks, "digest", [SOURCE], {"sentences": 1})
    return path


def test_written_and_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    assert path.read_bytes() == VALUES.astype("<i4").tobytes()
    tokens = token_files.read(path, "digest")
    assert tokens.dtype == numpy.int32
    assert isinstance(tokens.base, numpy.memmap)
    assert not tokens.flags.writeable
    numpy.testing.assert_array_equal(tokens, VALUES)
    description = token_files.describe(path)
    assert description.tokens == 5
    assert description.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert description.sources == (SOURCE,)
    assert description.counts == {"sentences": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tokens", "a.tokens.json"]


@pytest.mark.parametrize(("size", "what"), [(19, "truncated"), (0, "truncated"), (24, "too long")])
def test_wrong_size(tmp_path: Path, size: int, what: str) -> None:
    path = write(tmp_path / "a.tokens")
    path.write_bytes((path.read_bytes() + bytes(8))[:size])
    with pytest.raises(ExperimentError, match=rf"a.tokens: {what}, {size} bytes where 5 tokens"):
        token_files.read(path)


def test_another_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    with pytest.raises(ExperimentError, match=r"a.tokens: made with another vocabulary"):
        token_files.read(path, "other")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', '{"format": 1, "sources": 2}'])
def test_damaged_description(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.tokens")
    token_files.description_path(path).write_text(content)
    with pytest.raises(ExperimentError, match=r"a.tokens.json: damaged"):
        token_files.read(path)


def test_another_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    content = json.loads(token_files.description_path(path).read_text())
    content["format"] = 2
    token_files.description_path(path).write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match=r"a.tokens.json: format 2, not 1"):
        token_files.read(path)


@pytest.mark.parametrize("missing", ["a.tokens", "a.tokens.json"])
def test_missing(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path / "a.tokens")
    (tmp_path / missing).unlink()
    with pytest.raises(ExperimentError, match=rf"{missing}: no such file"):
        token_files.read(path)


def test_failed_writing_leaves_no_description(tmp_path: Path) -> None:
    """The old description must not stay beside half of a new file."""
    path = write(tmp_path / "a.tokens")

    def blocks() -> Iterator[TokenIds]:
        yield VALUES
        raise ExperimentError("no more")

    with pytest.raises(ExperimentError, match="no more"):
        token_files.write(path, blocks(), "digest", [SOURCE], {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.tokens"]
    assert not token_files.is_made_from(path, "digest", [SOURCE])


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=f"{SOURCE.name}: no words in it"):
        token_files.write(tmp_path / "a.tokens", [], "digest", [SOURCE], {})
    with pytest.raises(ExperimentError, match=r"none/a.tokens: cannot be written \(No such file"):
        write(tmp_path / "none" / "a.tokens")


def test_whether_it_must_be_made_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    assert token_files.is_made_from(path, "digest", [SOURCE])
    assert not token_files.is_made_from(path, "other", [SOURCE])
    assert not token_files.is_made_from(path, "digest", [SOURCE._replace(sha256="cd" * 32)])
    content = bytearray(path.read_bytes())
    content[6] ^= 1
    path.write_bytes(content)
    assert not token_files.is_made_from(path, "digest", [SOURCE])
    assert not token_files.is_made_from(tmp_path / "b.tokens", "digest", [SOURCE])


def test_source(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"ab" * 1_000_000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert token_files.describe_source(path) == SourceFile("text", 2_000_000, digest)


def test_parts_are_one_stream() -> None:
    whole = numpy.arange(23, dtype=numpy.int32)
    ends = [0, 0, 4, 5, 5, 15, 23, 23]
    tokens = TokenStream([whole[first:last] for first, last in itertools.pairwise(ends)])
    assert len(tokens) == 23
    for start in range(-3, 26):
        for stop in range(-3, 26):
            found = tokens[start:stop]
            assert found.dtype == numpy.int32
            numpy.testing.assert_array_equal(found, whole[start:stop])
    numpy.testing.assert_array_equal(tokens[:], whole)
    assert numpy.shares_memory(tokens[6:14], whole)
    with pytest.raises(ValueError, match="step 1, this one 2"):
        tokens[::2]


def test_no_parts() -> None:
    assert len(TokenStream([])) == 0
    assert tokens_are_empty(TokenStream([])[0:4])
    assert tokens_are_empty(TokenStream([VALUES[:0]])[:])


def tokens_are_empty(found: TokenIds) -> bool:
    return found.dtype == numpy.int32 and found.shape == (0,)
