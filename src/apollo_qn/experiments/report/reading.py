"""What run directories say, brought together."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apollo_qn.diagnostics import TensorDiagnostics, overall
from apollo_qn.experiments import comparable, curvature
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.recipe import RunSpec
from apollo_qn.experiments.runs import Record, RunDirectory


class Curvature(NamedTuple):
    """Apollo's at a step."""

    step: int
    epoch: float
    tensors: TensorDiagnostics


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    directory: RunDirectory
    spec: RunSpec
    manifest: Record
    verdict: str  # "finished", "diverged" or "unfinished"
    result: Record  # what result.json says; {}: there is none
    evaluations: list[Record]  # the lines of the metrics that say how good the model is
    curvature: list[Curvature]  # of all tensors together; none where it was not asked for
    seconds: float  # of training so far

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
        paths: run directories, or folders with run directories in them or in their ``runs``.

    Raises:
        ExperimentError: there is no run, a run is damaged, or the runs cannot be compared.
    """
    found: dict[Path, RunDirectory] = {}
    for path in paths:
        if not path.is_dir():
            raise ExperimentError(f"{path}: no such folder")
        there = comparable.directories(path)
        if not there:
            raise ExperimentError(f"{path}: no runs in it; `apollo-qn compare` makes some")
        for directory in there:
            found.setdefault(directory.path.resolve(), directory)
    comparable.check(comparable.candidate(directory) for directory in found.values())
    return [_read(directory) for directory in found.values()]


def _read(directory: RunDirectory) -> Run:
    records = list(directory.records())
    verdict = directory.verdict()
    seconds = records[-1]["time"]["seconds"] if records else 0.0
    return Run(
        directory,
        directory.spec(),
        directory.read(),
        "unfinished" if verdict is None else verdict["verdict"],
        verdict or {},
        [record for record in records if record["kind"] == "evaluation"],
        [
            Curvature(line["step"], line["epoch"], overall(curvature.read(line)))
            for line in directory.diagnosed()
        ],
        seconds if verdict is None else verdict["time"]["seconds"],
    )
