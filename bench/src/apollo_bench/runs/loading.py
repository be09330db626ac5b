"""Load finished or running runs, and archived ones, for reports and for the search."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.runs import archive, compatibility
from apollo_bench.runs.curvature_log import Curvature, curvature_of
from apollo_bench.runs.record_schemas import (
    check_evaluations,
    checked_manifest,
    checked_result,
)
from apollo_bench.runs.run_directory import Record, RunDirectory, execution_of
from apollo_bench.workloads import tasks

_MAX_STEPS = 400  # step records of a run that a report draws


@dataclass(frozen=True)
class Run:
    """A run, read from its directory or from an archive."""

    path: Path
    spec: RunSpec
    manifest: Record
    verdict: str  # "finished", "diverged" or "unfinished"
    result: Record  # content of result.json; {} if there is none
    evaluations: list[Record]  # evaluation records of metrics.jsonl
    steps: list[Record]  # step records of metrics.jsonl, a few hundred; empty for an archive
    curvature: list[Curvature]  # of all tensors together; empty without --diagnostics
    seconds: float  # of training so far

    @property
    def execution(self) -> Execution:
        """How the run was executed."""
        return execution_of(self.manifest)

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end."""
        return self.verdict == "finished"

    @property
    def optimizer_ms(self) -> float | None:
        """Median over the evaluations of the median time of an optimizer step, in milliseconds."""
        return self._median("optimizer_ms")

    @property
    def optimizer_share(self) -> float | None:
        """Percentage of a training step (forward, backward, update) that the optimizer takes."""
        step, update = self._median("step_ms"), self.optimizer_ms
        return None if not step or update is None else 100.0 * update / step

    def _median(self, name: str) -> float | None:
        times = [line["time"].get(name) for line in self.evaluations]
        known = [time for time in times if time is not None]
        return statistics.median(known) if known else None

    def final(self, name: str) -> float | None:
        """Return a metric of a finished run; None if there is none."""
        value: float | None = self.result.get(name) if self.finished else None
        return value

    @property
    def progress(self) -> str:
        """How far the run is, for example "3 of 8 epochs"."""
        schedule = self.spec.train.schedule
        key = "epoch" if schedule.unit == "epoch" else "step"
        done = self.evaluations[-1][key] if self.evaluations else 0
        return f"{done:g} of {schedule}"


def load_runs(paths: list[Path], skip: Callable[[str], None] | None = None) -> list[Run]:
    """Load runs, and check that those of a task are compatible with each other.

    Example:
        >>> runs = load_runs([Path("runs/compare")])
        >>> runs[0].spec.task, runs[0].verdict, runs[0].progress
        ('wordnet', 'finished', '400 of 400 updates')

    Args:
        paths: run directories, folders that contain some (also in ``runs``), or archives.
        skip: called with the reason for each damaged run, which is left out; None: such a run is an
            error.

    Raises:
        ExperimentError: there is no run, none can be read, a run is damaged without ``skip``, or
            runs are incompatible.
    """
    require_runs(paths)
    found: dict[Path, Run] = {}
    damaged: list[str] = []
    for path in paths:
        archived = [partial(_unpacked, run) for run in archive.read(path)]
        there = [partial(_read, one) for one in compatibility.find_run_directories(path)]
        for load in (*archived, *there):
            try:
                run = load()
            except ExperimentError as error:
                damaged.append(str(error))
            else:
                found.setdefault(run.path.resolve(), run)
    for reason in damaged:
        if skip is None or not found:
            raise ExperimentError(reason)
        skip(reason)
    compatibility.check(
        compatibility.RunIdentity(
            run.path,
            run.spec,
            run.manifest["data"]["fingerprint"],
            compatibility.code_versions(run.manifest.get("code", [])),
        )
        for run in found.values()
    )
    return list(found.values())


def require_runs(paths: list[Path]) -> None:
    """Raise ExperimentError if a folder is missing or holds no runs."""
    for path in paths:
        if not path.is_dir():
            raise ExperimentError(f"{path}: no such folder")
        if not archive.read(path) and not compatibility.find_run_directories(path):
            raise ExperimentError(f"{path}: no runs in it; `apollo-bench compare` makes some")


def _unpacked(run: archive.Archived) -> Run:
    manifest = checked_manifest(run.manifest, run.path)
    result = checked_result(run.result, run.path)
    try:
        spec = RunSpec.model_validate(manifest["recipe"])
        execution_of(manifest)
    except (ValidationError, KeyError) as error:
        raise ExperimentError(f"{run.path}: damaged ({first_line(error)})") from None
    metric = tasks.entry_of(spec).monitored.name
    end = result["step"] if result["verdict"] == "finished" else None
    check_evaluations(run.evaluations, metric, run.path, end)
    return Run(
        run.path,
        spec,
        manifest,
        result["verdict"],
        result,
        run.evaluations,
        [],
        run.curvature,
        result["time"]["seconds"],
    )


def _read(directory: RunDirectory) -> Run:
    verdict = directory.verdict()  # before the records, which a running worker still writes
    try:
        records = directory.complete_records(verdict)
    except OSError as error:
        raise ExperimentError(f"{error.filename}: cannot be read ({error.strerror})") from None
    curvature = curvature_of(directory)
    directory.execution()  # raises if it is damaged
    seconds = records[-1]["time"]["seconds"] if records else 0.0
    return Run(
        directory.path,
        directory.spec(),
        directory.read(),
        "unfinished" if verdict is None else verdict["verdict"],
        verdict or {},
        [record for record in records if record["kind"] == "evaluation"],
        _thinned([record for record in records if record["kind"] == "step"]),
        curvature,
        seconds if verdict is None else verdict["time"]["seconds"],
    )


def _thinned(records: list[Record]) -> list[Record]:
    """Return at most ``_MAX_STEPS`` records, each with the mean loss of those that it stands for.

    The distance is a power of two: where two runs of unequal length both have records, they have
    common ones.
    """
    distance = 1
    while len(records) // distance > _MAX_STEPS:
        distance *= 2
    parts = [records[i : i + distance] for i in range(0, len(records), distance)]
    return [
        {**part[-1], "loss": statistics.fmean(record["loss"] for record in part)}
        for part in parts
        if len(part) == distance
    ]
