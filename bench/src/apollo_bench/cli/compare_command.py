"""``apollo-bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime, selection
from apollo_bench.errors import ExperimentError

_EMBEDDED = ("fashion-mnist", "wordnet", "phrases")  # trained where no task is given


def compare(
    task: Annotated[
        str | None,
        typer.Argument(
            help="A task (see `tasks`), or a recipe's .toml file.  [default: "
            f"{', '.join(_EMBEDDED)}, all small]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder.  [default: runs/compare]")
    ] = None,
    quick: options.Quick = False,
    seeds: options.Seeds = None,
    optimizers: options.OptimizerNames = None,
    schedules: options.ScheduleNames = None,
    settings: options.Settings = None,
    tuned: options.Tuned = None,
    data: options.DataFolder = None,
    jobs: options.Jobs = None,
    accelerator: options.AcceleratorName = "cpu",
    devices: options.Devices = 1,
    strategy: options.StrategyName = "ddp",
    threads: options.Threads = None,
    cluster: options.ClusterName = None,
) -> None:
    """Train a task with several optimizers, schedules and seeds, and write a report.

    Without a task it trains images, a language model and a translator: small versions of the
    paper's tables 1 to 3. Stop it with Ctrl-C; the same command continues.
    """
    with runtime.one_line_errors():
        from apollo_bench.launch.run_experiment import Machines, Request

        if task is None and data is not None:
            raise ExperimentError(
                f"--data is {str(data)!r}; it needs a TASK: apollo-bench compare TASK --data DIR"
            )
        specs = []
        for name in _EMBEDDED if task is None else (task,):
            chosen = selection.select(name, settings, optimizers, schedules, quick, tuned=tuned)
            specs += chosen.recipe.runs(chosen.optimizers, seeds, chosen.schedules)
        runtime.train_and_report(
            Request(
                specs,
                out or Path("runs") / ("compare-quick" if quick else "compare"),
                data,
                Machines(accelerator, devices, jobs, threads, strategy, cluster),
                check_data=selection.data_check(tuned),
            )
        )
