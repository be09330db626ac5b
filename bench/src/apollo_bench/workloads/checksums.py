"""Read the files of a data set, and check embedded ones against their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import read_regular


def read_file(path: Path, remedy: str) -> bytes:
    """Return the content of a file.

    Args:
        path: a regular file.
        remedy: what the user should do about a bad file; the message ends with it.

    Raises:
        ExperimentError: the file cannot be read.
    """
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None


def checksums(folder: Path, names: Iterable[str], remedy: str) -> dict[str, str]:
    """Return the SHA-256 of each file.

    Args:
        folder: folder of the files.
        names: names of the files.
        remedy: as in ``read_file``.

    Raises:
        ExperimentError: a file cannot be read.
    """
    return {name: hashlib.sha256(read_file(folder / name, remedy)).hexdigest() for name in names}


class DataFiles(NamedTuple):
    """The files of a data set, with their checksums."""

    folder: Path
    digests: dict[str, str]  # SHA-256 by name
    remedy: str  # what the user should do about a bad file


def find_files(
    folder: Path | None, embedded: Path, names: Iterable[str], script: str, needed: str
) -> DataFiles:
    """Find the files of a data set; embedded files are verified.

    Args:
        folder: folder of the user; None: the embedded files.
        embedded: folder of the embedded files.
        names: names of the files.
        script: script that makes the embedded files.
        needed: files that ``--data`` needs, for errors.

    Raises:
        ExperimentError: a file cannot be read, or an embedded file is corrupt.
    """
    if folder is not None:
        remedy = f"--data needs {needed}"
        return DataFiles(folder, checksums(folder, names, remedy), remedy)
    remedy = f"reinstall apollo-bench, or make it again with scripts/{script}"
    digests = checksums(embedded, names, remedy)
    verify(embedded, digests, remedy)
    return DataFiles(embedded, digests, remedy)


def verify(folder: Path, digests: dict[str, str], remedy: str) -> None:
    """Compare checksums with the folder's SHA256SUMS.

    Raises:
        ExperimentError: SHA256SUMS cannot be read, or a checksum differs.
    """
    listing = folder / "SHA256SUMS"
    try:
        lines = listing.read_text().splitlines()
    except OSError as error:
        raise ExperimentError(f"{listing}: cannot be read ({error.strerror}); {remedy}") from None
    recorded = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in digests:
        if recorded.get(name) != digests[name]:
            raise ExperimentError(
                f"{folder / name}: corrupt, its SHA-256 is not the one in SHA256SUMS; {remedy}"
            )
