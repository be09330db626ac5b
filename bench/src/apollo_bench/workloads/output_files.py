"""The files of a preparation: nothing else in the output folder is deleted or overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError

LISTING = "prepared-files.json"  # lists the files of the folder that preparations made
_FORMAT = 1
_MANIFEST = "corpus.json"  # earlier versions wrote no listing, but this


def reserve(folder: Path, names: Iterable[str]) -> None:
    """Create the folder and list the files that a preparation will write, before it writes any.

    Args:
        folder: output folder.
        names: files relative to the folder.

    Raises:
        ExperimentError: a file of such a name is there, and no preparation made it.
    """
    # an atomic write takes a temporary name first
    wanted = {name + ending for name in names for ending in ("", ".tmp")}
    known = _listed(folder, wanted)
    for name in sorted(wanted - known):
        if os.path.lexists(folder / name):
            raise ExperimentError(
                f"{folder / name}: not made by prepare, which would overwrite it; move it away or "
                "choose another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, "files": sorted(wanted | known)}
    write_atomically(folder / LISTING, json.dumps(content, indent=1).encode() + b"\n")


def _listed(folder: Path, wanted: set[str]) -> set[str]:
    """Return the files that preparations made; those of an earlier version are the wanted ones."""
    path = folder / LISTING
    if not os.path.lexists(path):
        return wanted if isinstance(_json(folder / _MANIFEST).get("files"), dict) else set()
    content = _json(path)
    if content.get("format") != _FORMAT or not isinstance(content.get("files"), list):
        raise ExperimentError(
            f"{path}: not a list that prepare wrote; move it away or choose another --out"
        )
    return set(content["files"])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
