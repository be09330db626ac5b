"""Whether embedded files are the ones that were embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from apollo_bench.errors import ExperimentError


def checksums(folder: Path, names: Iterable[str], remedy: str) -> dict[str, str]:
    """SHA-256 of each file.

    Raises:
        ExperimentError: a file cannot be read; the error ends with the remedy.
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
    """Compare with the folder's SHA256SUMS.

    Raises:
        ExperimentError: it cannot be read, or a file is not the one that it lists.
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
