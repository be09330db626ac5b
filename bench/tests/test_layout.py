"""The layout: imports between rooms point one way, names are unique, modules are short."""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench" / "src" / "apollo_bench"
OPTIMIZER = ROOT / "src" / "apollo_qn"
SOURCES = {package: sorted(package.rglob("*.py")) for package in (BENCH, OPTIMIZER)}
TESTS = [path for name in ("tests", "bench/tests") for path in (ROOT / name).rglob("*.py")]
MAX_LINES = 450
ROOMS = (
    *("cli", "report", "search", "steptime", "launch"),
    *("training", "runs", "optimizers", "config", "workloads"),
)


def imported(path: Path, package: Path) -> Iterator[str]:
    """Yield the modules of a package that a module imports, also inside functions."""
    modules = {module_name(other, package) for other in SOURCES[package]}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # "from package import module" needs the module, "from package import name" the face
            yield from {name if name in modules else node.module for name in names} & modules
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules


def module_name(path: Path, package: Path) -> str:
    """Return the name under which other modules import this one."""
    name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def test_imports_between_rooms_point_one_way() -> None:
    """From each room of the evaluation to rooms below it, in the order of CONTRIBUTING.md."""
    upward = [
        f"{path.relative_to(BENCH)} imports {name}"
        for path in SOURCES[BENCH]
        for name in imported(path, BENCH)
        if (room := path.relative_to(BENCH).parts[0]) in ROOMS
        and (other := f"{name}.".split(".")[1]) in ROOMS
        and ROOMS.index(other) < ROOMS.index(room)
    ]
    assert upward == []
    assert {path.name for path in BENCH.iterdir() if (path / "__init__.py").exists()} == {*ROOMS}


@pytest.mark.parametrize("package", SOURCES, ids=lambda package: package.name)
def test_no_import_is_circular(package: Path) -> None:
    modules = {module_name(path, package): path for path in SOURCES[package]}
    graph = {name: {*imported(path, package)} - {name} for name, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", SOURCES, ids=lambda package: package.name)
def test_names_are_unique(package: Path) -> None:
    names = [path.name for path in SOURCES[package] if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_modules_are_short() -> None:
    paths = [*itertools.chain(*SOURCES.values()), *TESTS]
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_the_optimizer_does_not_know_the_evaluation() -> None:
    assert not [path for path in SOURCES[OPTIMIZER] if [*imported(path, BENCH)]]
