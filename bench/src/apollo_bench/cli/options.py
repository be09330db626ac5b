"""Options shared by several commands, and the decorator that adds them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apollo_bench.available_cores import MAX_PROCESSES
from apollo_bench.cli import selection
from apollo_bench.seeds import MAX_SEED

if TYPE_CHECKING:
    from apollo_bench.config.recipe import RunSpec
    from apollo_bench.config.schema import Analysis
    from apollo_bench.launch.run_experiment import Request
    from apollo_bench.runs.baseline import Baseline

TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="A task (see `tasks`), or a recipe's .toml file.")
]
RunFolders = Annotated[
    list[Path],
    typer.Argument(metavar="RUNS...", help="Run directories, or folders that contain some."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Apply the recipe's table [quick]: about a minute.")
]
Seeds = Annotated[int | None, typer.Option(min=1, max=1000, metavar="N", help="Number of seeds.")]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=MAX_SEED, metavar="N", help="Seed of the run.  [default: the recipe's first]"
    ),
]
OptimizerNames = Annotated[
    str | None,
    typer.Option(
        "--optimizers",
        metavar="NAMES",
        help="Optimizers: names of the recipe or all, classes (my_module:MyOptimizer), short names "
        "of torch.optim (adagrad); a,b,c.",
    ),
]
ScheduleNames = Annotated[
    str | None,
    typer.Option("--schedules", metavar="NAMES", help="Schedules of the recipe: a,b or all."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value: train.batch_size=64, optimizer.lr=0.25, ...",
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Folder or file of local data, used instead of the default.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_PROCESSES,
        metavar="N",
        help="Runs at the same time.  [default: as many as fit]",
    ),
]
AcceleratorName = Annotated[str, typer.Option("--accelerator", metavar="NAME", help="cpu or gpu.")]
Devices = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_PROCESSES, metavar="N", help="Processes that share the batches of each run."
    ),
]
StrategyName = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="For several processes: ddp, or fsdp2 (transformers only).",
    ),
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME",
        help="ray: each run is a Ray task, on the cluster of RAY_ADDRESS or a local one.",
    ),
]
Tuned = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of a finished `sweep TASK tuning`; its best settings are used."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_PROCESSES,
        metavar="N",
        help="CPU threads per process.  [default: an equal part of the cores]",
    ),
]

_DIAGNOSE_EVERY = 25  # steps
Diagnostics = Annotated[
    bool,
    typer.Option(
        "--diagnostics",
        help=f"Measure Apollo's curvature every {_DIAGNOSE_EVERY} steps, for TensorBoard, the "
        "report and diagnostics.jsonl.",
    ),
]
DiagnoseEvery = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="STEPS", help="Interval of these measurements, instead of --diagnostics."
    ),
]


def measuring_interval(diagnostics: bool, interval: int | None) -> int | None:
    """Return the steps between two measurements of the curvature; None: none are made."""
    return interval or (_DIAGNOSE_EVERY if diagnostics else None)


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a command that trains many runs."""

    quick: Quick = False
    seeds: Seeds = None
    optimizers: OptimizerNames = None
    schedules: ScheduleNames = None
    settings: Settings = None
    tuned: Tuned = None
    data: DataFolder = None
    jobs: Jobs = None
    accelerator: AcceleratorName = "cpu"
    devices: Devices = 1
    strategy: StrategyName = "ddp"
    threads: Threads = None
    cluster: ClusterName = None

    def select(
        self, task: str, analysis: Analysis | None = None, against: Path | None = None
    ) -> selection.Selection:
        """Load the recipe of a task and apply the options.

        Raises:
            ExperimentError: an option has a wrong value, or the search cannot be used.
        """
        return selection.select(
            task,
            settings=self.settings,
            optimizers=self.optimizers,
            schedules=self.schedules,
            quick=self.quick,
            analysis=analysis,
            tuned=self.tuned,
            against=against,
            data=self.data,
        )

    def request(self, specs: list[RunSpec], out: Path, baseline: Baseline | None = None) -> Request:
        """Return the request to train these runs into a folder, perhaps to compare with others."""
        from apollo_bench.launch.run_experiment import Machines, Request

        machines = Machines(
            self.accelerator, self.devices, self.jobs, self.threads, self.strategy, self.cluster
        )
        checks = [selection.data_check(self.tuned)] if self.tuned else []
        if baseline is not None:
            checks.append(baseline.check_data)
        return Request(
            specs,
            out,
            self.data,
            machines,
            data_checks=tuple(checks),
            compared_with=baseline.identities() if baseline else [],
            search_costs=selection.search_costs(self.tuned),
        )


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of TrainingOptions, in place of ``training``.

    Typer reads the options of a command from its signature.
    """
    signature = inspect.signature(command, eval_str=True)
    fields = inspect.signature(TrainingOptions, eval_str=True).parameters

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        training = TrainingOptions(**{name: values.pop(name) for name in fields})
        command(training=training, **values)

    parameters = [p for p in signature.parameters.values() if p.name != "training"]
    parameters += fields.values()
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options
