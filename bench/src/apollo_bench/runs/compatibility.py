"""Compatibility of runs: which runs can share a table, checked before training and in reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import Record, RunDirectory

PATTERNS = ("run.json", "*/run.json", "runs/*/run.json", "*/runs/*/run.json")


class RunIdentity(NamedTuple):
    """The properties of a run that decide which other runs it can be compared with."""

    path: Path
    spec: RunSpec
    fingerprint: str  # of the data
    code: tuple[str, ...] = ()  # versions of the user's own code


def find_run_directories(folder: Path) -> list[RunDirectory]:
    """Return the run directories of a folder: itself, its children, or those of its ``runs``."""
    manifests = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    return [RunDirectory(manifest.parent) for manifest in manifests]


def identity_of(directory: RunDirectory) -> RunIdentity:
    """Return the identity of an existing run; raise ExperimentError if it is damaged."""
    manifest = directory.read()
    fingerprint, code = manifest["data"]["fingerprint"], code_versions(manifest.get("code", []))
    return RunIdentity(directory.path, directory.spec(), fingerprint, code)


def code_versions(code: Iterable[Record]) -> tuple[str, ...]:
    """Return the versions of the user's own code that a manifest names."""
    return tuple(f"{source['path']} {source['version']}" for source in code)


def check(runs: Iterable[RunIdentity]) -> None:
    """Raise ExperimentError if two runs of a task cannot stand in one table."""
    same: dict[object, tuple[RunIdentity, object]] = {}
    for run in runs:
        spec = run.spec
        kind = None if spec.sweep is None else spec.sweep.kind
        # name in messages, the runs that must agree, and the value they must agree on
        for what, scope, value in (
            ("model", (), spec.model),
            ("data", (), (spec.data, run.fingerprint)),
            ("analysis", (), kind),
            ("train", (spec.schedule,), spec.shared()["train"]),
            ("seed", (spec.name, spec.schedule, spec.sweep, spec.seed), run.path.resolve()),
            (
                "optimizer settings",
                (spec.name, spec.schedule, spec.sweep),
                (spec.optimizer, spec.train.schedule.overrides.get(spec.name)),
            ),
            ("the user's code", (spec.name, spec.schedule), run.code),
        ):
            other, known = same.setdefault((spec.task, what, scope), (run, value))
            if known == value:
                continue
            if what == "seed":
                raise ExperimentError(f"{run.path} and {other.path} are the same run twice")
            raise ExperimentError(
                f"{run.path} and {other.path} differ in {what}: they cannot stand in one table"
            )
