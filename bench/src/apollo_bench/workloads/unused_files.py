"""Remarks on files in the user's folders that are not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path


def ending(name: str) -> str:
    """Return "hidden", or the ending of a file's name as a reader calls it.

    Example:
        >>> ending("notes.TXT"), ending("README"), ending(".DS_Store")
        ('.txt', 'without an ending', 'hidden')
    """
    if name[0] == ".":
        return "hidden"  # files of an operating system or an editor
    return os.path.splitext(name)[1].lower() or "without an ending"


def files_below(folder: str | os.PathLike[str]) -> int:
    """Return the number of files in a folder and in all folders below it."""
    return sum(len(names) for _, _, names in os.walk(folder))


def remarks_on(folder: Path, unused: Counter[str], used: str) -> list[str]:
    """Return a remark on the number of unused files; none if there are none.

    Args:
        folder: the user's folder.
        unused: number of files by kind.
        used: what is used, as the end of a sentence.
    """
    unused = +unused  # without zeros
    if not unused:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(unused.items()))
    total = sum(unused.values())
    text = f"Files of {folder.name} that are not used: {total:,} ({kinds}). Used are {used}."
    return [text.encode("utf-8", "replace").decode()]  # names may be any bytes


def remarks_beside(folder: Path, used: Collection[Path]) -> list[str]:
    """Return a remark on the files of a folder that are not among the used ones.

    Args:
        folder: the user's folder.
        used: files of the folder that were read.
    """
    unused: Counter[str] = Counter()
    names = {path.name for path in used}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                unused["in folders below"] += files_below(entry)
            elif entry.name not in names:
                unused[ending(entry.name)] += 1
    return remarks_on(folder, unused, ", ".join(path.name for path in used))
