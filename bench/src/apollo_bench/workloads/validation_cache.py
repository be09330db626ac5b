"""A cache of validated files, so that each is read and checked only once."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from apollo_bench.regular_files import open_regular


class ValidationCache:
    """A mapping from names to the digests that were found valid, and to what was found.

    Args:
        name: name of the file that holds the cache.
        cache: folder of the file; None: below the user's cache. A user without a home has none.
    """

    def __init__(self, name: str, cache: Path | None = None) -> None:
        folder = _default_cache() if cache is None else cache
        self._path = None if folder is None else folder / name
        self._saved: dict[str, str] = {}
        # missing or damaged: everything is checked again
        with suppress(OSError, ValueError, TypeError):
            if self._path is not None:
                self._saved = dict(json.loads(self._path.read_text()))
        self._good = dict(self._saved)

    def contains(self, name: str, digest: str) -> bool:
        """Return whether the name was found valid with this digest."""
        return self._good.get(name) == digest

    def add(self, name: str, digest: str) -> None:
        """Note that the name is valid with this digest."""
        self._good[name] = digest

    def found(self, name: str, digest: str) -> str | None:
        """Return what was found when the name had this digest; None if that is unknown."""
        known, separator, found = self._good.get(name, "").partition(" ")
        return found if separator and known == digest else None

    def add_found(self, name: str, digest: str, found: str) -> None:
        """Note that the name is valid with this digest, and what was found.

        Args:
            name: name of the files.
            digest: one word; it changes when a file does.
            found: text that is a function of the files.
        """
        self._good[name] = f"{digest} {found}"

    def holds(self, path: Path, sha256: str) -> bool:
        """Return whether a file has this SHA-256; read it only if it has changed.

        Raises:
            OSError: the file cannot be read.
        """
        there = path.stat()
        digest = f"{sha256} {there.st_size} {there.st_mtime_ns}"
        if not self.contains(str(path.resolve()), digest):
            with open_regular(path) as file:
                if _sha256(file) != sha256:
                    return False
            self.add(str(path.resolve()), digest)
        return True

    def save(self) -> None:
        """Write new entries; if that is impossible, the next run checks again."""
        if self._path is None or self._good == self._saved:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._good))
            os.replace(temporary, self._path)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _default_cache() -> Path | None:
    """Return the folder of the user's cache; None: the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apollo-bench"
    except RuntimeError:
        return None
