"""Earlier runs that new runs are compared with: ``compare --against``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apollo_bench.config.recipe import Recipe, RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs import loading
from apollo_bench.runs.compatibility import RunIdentity, code_versions
from apollo_bench.runs.run_directory import differences


class Baseline:
    """The runs of a task in an archive or a folder of runs.

    Args:
        folder: as in ``load_runs``.
        task: name of the task; runs of other tasks are ignored.
        skip: as in ``load_runs``.

    Raises:
        ExperimentError: there is no comparison of the task, or a run is damaged without ``skip``.
    """

    def __init__(self, folder: Path, task: str, skip: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        there = loading.load_runs([folder], skip)
        self.runs = [run for run in there if run.spec.task == task]
        if not self.runs:
            tasks = ", ".join(sorted({run.spec.task for run in there}))
            raise ExperimentError(f"--against is {str(folder)!r}: no runs of {task}, only {tasks}")
        if self.runs[0].spec.sweep is not None:
            raise ExperimentError(
                f"--against must be a comparison, got {str(folder)!r}: it holds the analysis "
                f"{self.runs[0].spec.sweep.kind}"
            )

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return sorted({run.spec.seed for run in self.runs})

    def tables(self, recipe: Recipe) -> dict[str, Any]:
        """Return the tables that replace a recipe's, so that new runs share these runs' settings.

        The optimizers are among them: decay may be coupled to one. The recipe's schedules of single
        optimizers stay.
        """
        first = self.runs[0].spec
        schedules = {run.spec.schedule: run.spec.train.schedule.model_dump() for run in self.runs}
        for name, schedule in recipe.schedules.items():
            if name in schedules:
                overrides = schedule.model_dump()["overrides"]
                schedules[name]["overrides"] = {**overrides, **schedules[name]["overrides"]}
        optimizers = {run.spec.name: run.spec.optimizer.model_dump() for run in self.runs}
        known = {*recipe.optimizers, *optimizers}
        for table in schedules.values():
            table["overrides"] = {k: shape for k, shape in table["overrides"].items() if k in known}
        return {
            "seeds": self.seeds,
            "model": first.model.model_dump(),
            "data": first.data.model_dump(),
            "train": first.train.model_dump(exclude={"schedule"}),
            "schedules": schedules,
            "optimizers": optimizers,
            "quick": {"epochs": 1, "updates": 1, "seeds": 1},  # is not used
            "compare": {},
            "sweeps": {},
            "search": None,
            "paper": {},
        }

    def check(self, specs: Iterable[RunSpec]) -> None:
        """Check that new runs differ from these in the optimizer only.

        Raises:
            ExperimentError: a setting differs, or an optimizer or seed does not fit.
        """
        shared = {run.spec.schedule: run.spec.shared() for run in self.runs}
        there = {run.spec.name for run in self.runs}
        for spec in specs:
            if spec.name in there:
                raise ExperimentError(
                    f"--against is {str(self.folder)!r}: holds runs of {spec.name} already; select "
                    "others with --optimizers, or give yours another name"
                )
            if spec.seed not in self.seeds:
                raise ExperimentError(
                    f"--against is {str(self.folder)!r}: no run of the seed {spec.seed}; there are "
                    f"{', '.join(map(str, self.seeds))}"
                )
            found = differences(shared[spec.schedule], spec.shared())
            if found:
                raise ExperimentError(
                    f"--against is {str(self.folder)!r}: its settings differ "
                    f"({', '.join(found)}); leave out --set of these settings"
                )

    def check_data(self, fingerprints: dict[str, str]) -> None:
        """Raise ExperimentError if these runs were trained on other data, by task."""
        for run in self.runs:
            fingerprint = run.manifest["data"]["fingerprint"]
            wanted = fingerprints.get(run.spec.task)
            if wanted not in (None, fingerprint):
                raise ExperimentError(
                    f"--against is {str(self.folder)!r}: trained on other data (fingerprint "
                    f"{fingerprint[:12]} there, {str(wanted)[:12]} here); give the same --data"
                )

    def identities(self) -> list[RunIdentity]:
        """Return the identities of the runs, to be compared with those of new runs."""
        return [
            RunIdentity(
                run.path,
                run.spec,
                run.manifest["data"]["fingerprint"],
                code_versions(run.manifest.get("code", [])),
            )
            for run in self.runs
        ]
