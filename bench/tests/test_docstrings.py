"""Examples in docstrings: what they show is what they give."""

from __future__ import annotations

import doctest
import importlib
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "bench" / "src"
RESULTS = ROOT / "results" / "wordnet"
MODULES = [
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for path in sorted(SOURCES.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.fixture
def finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that examples name: a finished comparison, a search, and their recipe."""
    shutil.copytree(RESULTS / "comparison", tmp_path / "runs" / "compare")
    shutil.copytree(RESULTS / "tuning", tmp_path / "runs" / "search")
    shutil.copy(RESULTS / "recipe.toml", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("finished_runs")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed
