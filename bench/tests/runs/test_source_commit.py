"""The commit that a run records."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from apollo_bench.source_commit import source_commit

NAMES = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *NAMES, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_has_a_commit_and_an_installed_package_none(tmp_path: Path) -> None:
    package, installed = tmp_path / "package", tmp_path / "env" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert source_commit.__wrapped__(package) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit.__wrapped__(package) == commit
    (package / "__init__.py").write_text("changed = True\n")
    assert source_commit.__wrapped__(package) == f"{commit}+changes"
    # inside a checkout whose git does not track it
    assert source_commit.__wrapped__(installed) is None
