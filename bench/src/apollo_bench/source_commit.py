"""The commit of the code that runs, if it runs from a git checkout."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path


@functools.cache
def source_commit(package: Path = Path(__file__).parent) -> str | None:
    """Return the commit of a package's checkout, with "+changes" if files differ from it.

    Args:
        package: folder of the package; by default this one.

    Returns:
        None if git is missing, or does not track the package: it was installed, not checked out.
    """
    if not _git(package, "ls-files", "--error-unmatch", "__init__.py"):
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
