"""Check embedded files against their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from apollo_bench.errors import ExperimentError


def checksums(folder: Path, names: Iterable[str], remedy: str) -> dict[str, str]:
    """Return the SHA-256 of each file.

    Args:
        folder: folder of the files.
        names: names of the files.
        remedy: what the user should do about a bad file; the message ends with it.

    Raises:
        ExperimentError: a file cannot be read.
    """
    digests = {}
    for name in names:
        try:
            digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except FileNotFoundError:
            raise ExperimentError(f"{folder / name}: no such file; {remedy}") from None
        except OSError as error:
            raise ExperimentError(
                f"{folder / name}: cannot be read ({error.strerror}); {remedy}"
            ) from None
    return digests


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
