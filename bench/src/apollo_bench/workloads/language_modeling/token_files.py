"""Token files of a format of their own, because ``.npy`` must know its length before it is written.

They are little-endian int32, each with a JSON file that describes it.

The JSON file is written when the tokens are safe on disk: if it exists, they are complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from apollo_bench.atomic_write import replacing, write_atomically
from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import open_regular
from apollo_bench.workloads.language_modeling.token_corpus import TokenIds

FORMAT = 1
_TYPE = numpy.dtype("<i4")
_PIECE = 1 << 20  # bytes
_REMEDY = "prepare the data again"


class SourceFile(NamedTuple):
    """A file that tokens were made from."""

    name: str
    size: int  # bytes
    sha256: str


class Description(NamedTuple):
    """The content of a token file."""

    tokens: int
    sha256: str  # of the tokens' bytes
    vocabulary: str  # its digest
    sources: tuple[SourceFile, ...]
    counts: dict[str, int]  # of whatever was counted on the way


def describe_source(path: Path) -> SourceFile:
    """Return size and checksum of a file; raise ExperimentError if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
    return SourceFile(path.name, size, digest.hexdigest())


def write(
    path: Path,
    blocks: Iterable[TokenIds],
    vocabulary: str,
    sources: Iterable[SourceFile],
    counts: Mapping[str, int],
) -> Description:
    """Write a token file and its description, each whole or not at all.

    Args:
        path: of the tokens; what is there is replaced.
        blocks: the tokens, each shape (any,); written one after the other as they come.
        vocabulary: digest of the vocabulary.
        sources: what the tokens were made from.
        counts: read when the last block is written.

    Raises:
        ExperimentError: the file cannot be written, or there are no tokens.
    """
    digest, tokens = hashlib.sha256(), 0
    try:
        beside(path).unlink(missing_ok=True)
        with replacing(path) as file:
            for block in blocks:
                piece = numpy.ascontiguousarray(block, _TYPE).tobytes()
                digest.update(piece)
                file.write(piece)
                tokens += len(block)
            if not tokens:
                raise ExperimentError(f"{', '.join(one.name for one in sources)}: no words in it")
        description = Description(
            tokens, digest.hexdigest(), vocabulary, tuple(sources), dict(counts)
        )
        record = {"format": FORMAT, **description._asdict()}
        record["sources"] = [one._asdict() for one in description.sources]
        write_atomically(beside(path), json.dumps(record, indent=1).encode() + b"\n")
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be written ({error.strerror})") from None
    return description


def describe(path: Path) -> Description:
    """What a token file holds, its size checked.

    Raises:
        ExperimentError: a file is missing, damaged, of another format, or not of its size.
    """
    place = beside(path)
    try:
        content: dict[str, Any] = json.loads(place.read_bytes())
        if (version := content.pop("format")) != FORMAT:
            raise ExperimentError(f"{place}: format {version!r}, not {FORMAT}; {_REMEDY}")
        sources = tuple(SourceFile(**one) for one in content.pop("sources"))
        description = Description(sources=sources, **content)
        expected = description.tokens * _TYPE.itemsize
        there = path.stat().st_size
    except FileNotFoundError as error:
        raise ExperimentError(f"{error.filename}: no such file; {_REMEDY}") from None
    except OSError as error:
        raise ExperimentError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExperimentError(f"{place}: damaged, not a token file's description") from None
    if there != expected:
        what = "truncated" if there < expected else "too long"
        raise ExperimentError(
            f"{path}: {what}, {there} bytes where {description.tokens} tokens take {expected}; "
            f"{_REMEDY}"
        )
    return description


def read(path: Path, vocabulary: str | None = None) -> TokenIds:
    """The tokens, mapped from the disk, read-only, shape (tokens,), int32.

    Args:
        path: of the tokens.
        vocabulary: digest of the vocabulary that they must have been made with; None: any.

    Raises:
        ExperimentError: as ``describe``, or the vocabulary is another.
    """
    description = describe(path)
    if vocabulary not in (None, description.vocabulary):
        raise ExperimentError(f"{path}: made with another vocabulary; {_REMEDY}")
    # a plain array over the map: its slices are several times as fast to make
    return numpy.asarray(numpy.memmap(path, _TYPE, "r"))


def is_made_from(path: Path, vocabulary: str, sources: Iterable[SourceFile]) -> bool:
    """Whether a whole, undamaged token file of just these sources and this vocabulary is there."""
    try:
        there = describe(path)
        if (there.vocabulary, there.sources) != (vocabulary, tuple(sources)):
            return False
        return describe_source(path).sha256 == there.sha256
    except ExperimentError:
        return False


def beside(path: Path) -> Path:
    """Where a token file's description lies."""
    return path.with_name(path.name + ".json")
