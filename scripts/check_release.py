"""Check that everything that names the version agrees with a tag, and that no placeholder is left.

``python scripts/check_release.py v0.2.0`` is the first job of the release workflow.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "https://example.org/apollo-qn"  # where the repository's public address belongs
WITH_ADDRESS = ("pyproject.toml", "bench/pyproject.toml", "CITATION.cff", "CHANGELOG.md")

_VERSION = r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?"
_NAMED = {
    "src/apollo_qn/__init__.py": rf'^__version__ = "({_VERSION})"',
    "bench/src/apollo_bench/__init__.py": rf'^__version__ = "({_VERSION})"',
    "bench/pyproject.toml": rf'^    "apollo-qn>=({_VERSION})",$',  # the evaluation's optimizer
    "CITATION.cff": rf"^version: ({_VERSION})$",
    "CHANGELOG.md": rf"^## \[({_VERSION})\]",  # the topmost one, [Unreleased] aside
}
_DATED = {
    "CHANGELOG.md": r"^## \[{version}\] - (\S+)$",
    "CITATION.cff": r"^date-released: (\S+)$",
}
# at the end of the changelog, where the headings' brackets find their addresses
_LINKS = {
    "[Unreleased]": r"^\[Unreleased\]: \S+/v{version}\.\.\.HEAD$",
    "[{version}]": r"^\[{version}\]: \S+/v{version}$",
}


def versions(root: Path = ROOT) -> dict[str, str]:
    """Return the version that each file names."""
    found = {}
    for name, pattern in _NAMED.items():
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        found[name] = match[1] if match else "no version"
    return found


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what keeps this tag from being released, one sentence each."""
    version = tag.removeprefix("v")
    found = []
    if not re.fullmatch(f"v{_VERSION}", tag):
        found.append(f"the tag {tag!r} is not of the form v1.2.3")
    for name, named in versions(root).items():
        if named != version:
            found.append(f"{name} names {named}, the tag {version}")
    dates = set()
    for name, pattern in _DATED.items():
        text = (root / name).read_text(encoding="utf-8")
        match = re.search(pattern.format(version=re.escape(version)), text, re.MULTILINE)
        try:
            dates.add(datetime.date.fromisoformat(match[1].strip('"') if match else ""))
        except ValueError:
            found.append(f"{name} has no date of the release, such as 2030-01-31")
    if len(dates) > 1:
        found.append(f"the dates differ: {' and '.join(map(str, sorted(dates)))}")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    for heading, pattern in _LINKS.items():
        if not re.search(pattern.format(version=re.escape(version)), changelog, re.MULTILINE):
            label = heading.format(version=version)
            found.append(f"CHANGELOG.md has no address for {label} that names v{version}")
    for name in WITH_ADDRESS:
        if PLACEHOLDER in (root / name).read_text(encoding="utf-8"):
            found.append(f"{name} has {PLACEHOLDER} instead of the repository's address")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/check_release.py v1.2.3")
    if found := problems(sys.argv[1]):
        sys.exit("\n".join(found))
