"""Token files in our own format, because ``.npy`` needs the length before the data.

The tokens are little-endian int32. A JSON file beside them describes them. It is written once the
tokens are safe on the disk: if it exists, they are complete.
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
_BLOCK = 1 << 20  # bytes
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
    counts: dict[str, int]  # counts of the preparation, for example of sentences


def describe_source(path: Path) -> SourceFile:
    """Return size and checksum of a file; raise ExperimentError if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            while piece := file.read(_BLOCK):
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
    """Write a token file and its description, each atomically.

    Args:
        path: file of the tokens; an existing one is replaced.
        blocks: arrays of tokens, each of shape (any,), written in their order.
        vocabulary: digest of the vocabulary.
        sources: the files that the tokens were made from.
        counts: counts of the preparation, read after the last block.

    Raises:
        ExperimentError: the file cannot be written, or there are no tokens.
    """
    digest, tokens = hashlib.sha256(), 0
    try:
        description_path(path).unlink(missing_ok=True)
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
        write_atomically(description_path(path), json.dumps(record, indent=1).encode() + b"\n")
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be written ({error.strerror})") from None
    return description


def describe(path: Path) -> Description:
    """Return the description of a token file, whose size is checked.

    Raises:
        ExperimentError: a file is missing, damaged, of another format, or not of its size.
    """
    description_file = description_path(path)
    try:
        content: dict[str, Any] = json.loads(description_file.read_bytes())
        if (version := content.pop("format")) != FORMAT:
            raise ExperimentError(
                f"{description_file}: format {version!r}, not {FORMAT}; {_REMEDY}"
            )
        sources = tuple(SourceFile(**one) for one in content.pop("sources"))
        description = Description(sources=sources, **content)
        expected = description.tokens * _TYPE.itemsize
        there = path.stat().st_size
    except FileNotFoundError as error:
        raise ExperimentError(f"{error.filename}: no such file; {_REMEDY}") from None
    except OSError as error:
        raise ExperimentError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExperimentError(
            f"{description_file}: damaged, not a token file's description"
        ) from None
    if there != expected:
        what = "truncated" if there < expected else "too long"
        raise ExperimentError(
            f"{path}: {what}, {there} bytes where {description.tokens} tokens take {expected}; "
            f"{_REMEDY}"
        )
    return description


def read(path: Path, vocabulary: str | None = None) -> TokenIds:
    """Return the tokens, memory-mapped and read-only, shape (tokens,), int32.

    Args:
        path: file of the tokens.
        vocabulary: digest of the vocabulary that the tokens must have; None: any.

    Raises:
        ExperimentError: as in ``describe``, or the vocabulary is another one.
    """
    description = describe(path)
    if vocabulary not in (None, description.vocabulary):
        raise ExperimentError(f"{path}: made with another vocabulary; {_REMEDY}")
    # slices of a plain array are several times as fast as those of a memmap
    return numpy.asarray(numpy.memmap(path, _TYPE, "r"))


def is_made_from(path: Path, vocabulary: str, sources: Iterable[SourceFile]) -> bool:
    """Return whether there is an undamaged token file of these sources and this vocabulary."""
    try:
        there = describe(path)
        if (there.vocabulary, there.sources) != (vocabulary, tuple(sources)):
            return False
        return describe_source(path).sha256 == there.sha256
    except ExperimentError:
        return False


def description_path(path: Path) -> Path:
    """Return the path of a token file's description."""
    return path.with_name(path.name + ".json")
