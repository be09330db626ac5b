"""Which runs can stand in one table: one check before they are trained, and when they are shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import RunDirectory

PATTERNS = ("run.json", "*/run.json", "runs/*/run.json", "*/runs/*/run.json")


class Candidate(NamedTuple):
    """A run as far as it decides what it can be compared with."""

    path: Path
    spec: RunSpec
    fingerprint: str  # of its data


def directories(folder: Path) -> list[RunDirectory]:
    """The runs that a report of this folder shows: itself, in it, or in its ``runs``."""
    manifests = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    return [RunDirectory(manifest.parent) for manifest in manifests]


def candidate(directory: RunDirectory) -> Candidate:
    """Of a run that is there; raises ExperimentError where it is damaged."""
    fingerprint = directory.read()["data"]["fingerprint"]
    return Candidate(directory.path, directory.spec(), fingerprint)


def check(runs: Iterable[Candidate]) -> None:
    """Raise ExperimentError where two runs of a task differ in more than a report tells apart."""
    same: dict[object, tuple[Candidate, object]] = {}
    for run in runs:
        spec = run.spec
        kind = None if spec.sweep is None else spec.sweep.kind
        # what must be equal, for which runs, and what it is called
        for what, scope, value in (
            ("model", (), spec.model),
            ("data", (), (spec.data, run.fingerprint)),
            ("analysis", (), kind),
            ("train", (spec.schedule,), spec.train),
            ("seed", (spec.name, spec.schedule, spec.sweep, spec.seed), run.path.resolve()),
            ("optimizer settings", (spec.name, spec.schedule, spec.sweep), spec.optimizer),
        ):
            other, known = same.setdefault((spec.task, what, scope), (run, value))
            if known == value:
                continue
            if what == "seed":
                raise ExperimentError(f"{run.path} and {other.path} are the same run twice")
            raise ExperimentError(
                f"{run.path} and {other.path} differ in {what}: they cannot stand in one table"
            )
