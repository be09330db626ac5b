"""What run directories say, brought together."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from apollo_bench.config.execution import Placement
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs import archive, compatibility
from apollo_bench.runs.curvature_log import Curvature, measured
from apollo_bench.runs.run_directory import Record, RunDirectory


@dataclass(frozen=True)
class Run:
    """What a run directory says, or an archive of it."""

    path: Path
    spec: RunSpec
    manifest: Record
    verdict: str  # "finished", "diverged" or "unfinished"
    result: Record  # what result.json says; {}: there is none
    evaluations: list[Record]  # the lines of the metrics that say how good the model is
    curvature: list[Curvature]  # of all tensors together; none where it was not asked for
    seconds: float  # of training so far

    @property
    def placement(self) -> Placement:
        """Where it was trained."""
        return Placement.model_validate(self.manifest["placement"])

    @property
    def finished(self) -> bool:
        """Trained to its end."""
        return self.verdict == "finished"

    @property
    def optimizer_ms(self) -> float | None:
        """Median over the evaluations of the median time of an optimizer step, in milliseconds."""
        return self._median("optimizer_ms")

    @property
    def optimizer_share(self) -> float | None:
        """Percent of a training step (forward, backward, update) that the optimizer takes."""
        step, own = self._median("step_ms"), self.optimizer_ms
        return None if not step or own is None else 100.0 * own / step

    def _median(self, name: str) -> float | None:
        times = [line["time"].get(name) for line in self.evaluations]
        known = [time for time in times if time is not None]
        return statistics.median(known) if known else None

    def final(self, name: str) -> float | None:
        """A metric of a finished run; None: it has none."""
        value: float | None = self.result.get(name) if self.finished else None
        return value

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        schedule = self.spec.train.schedule
        key = "epoch" if schedule.unit == "epoch" else "step"
        done = self.evaluations[-1][key] if self.evaluations else 0
        return f"{done:g} of {schedule}"


def find(paths: list[Path]) -> list[Run]:
    """Read runs that can be compared, those of a task with each other.

    Args:
        paths: run directories, or folders with run directories in them or in their ``runs``, or
            archives.

    Raises:
        ExperimentError: there is no run, a run is damaged, or the runs cannot be compared.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise ExperimentError(f"{path}: no such folder")
        kept = [_unpacked(run) for run in archive.read(path)]
        there = [*kept, *(_read(directory) for directory in compatibility.directories(path))]
        if not there:
            raise ExperimentError(f"{path}: no runs in it; `apollo-bench compare` makes some")
        for run in there:
            found.setdefault(run.path.resolve(), run)
    compatibility.check(
        compatibility.Candidate(run.path, run.spec, run.manifest["data"]["fingerprint"])
        for run in found.values()
    )
    return list(found.values())


def _unpacked(run: archive.Archived) -> Run:
    try:
        spec = RunSpec.model_validate(run.manifest["recipe"])
        Placement.model_validate(run.manifest["placement"])
        return Run(
            run.path,
            spec,
            run.manifest,
            run.result["verdict"],
            run.result,
            run.evaluations,
            run.curvature,
            run.result["time"]["seconds"],
        )
    except (ValidationError, KeyError) as error:
        raise ExperimentError(f"{run.path}: damaged ({error})") from None


def _read(directory: RunDirectory) -> Run:
    records = list(directory.records())
    verdict = directory.verdict()
    directory.placement()  # what is damaged is told here
    seconds = records[-1]["time"]["seconds"] if records else 0.0
    return Run(
        directory.path,
        directory.spec(),
        directory.read(),
        "unfinished" if verdict is None else verdict["verdict"],
        verdict or {},
        [record for record in records if record["kind"] == "evaluation"],
        measured(directory.diagnosed()),
        seconds if verdict is None else verdict["time"]["seconds"],
    )
