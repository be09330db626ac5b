"""``apollo-bench sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime, selection
from apollo_bench.config.schema import Analysis


def sweep(
    task: options.TaskName,
    analysis: Annotated[
        Analysis, typer.Argument(help="An analysis of the paper, or the search for settings.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Output folder.  [default: runs/sweep-TASK-ANALYSIS]")
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
    """Train a task at several values of a setting, and write a report.

    lr-robustness multiplies the learning rates by the recipe's factors and divides weight decay by
    them (figure 2 of the paper). weight-decay takes the recipe's values, coupled by eq. (14)
    (figure 4). tuning draws the same number of trials per optimizer from the recipe's ranges and
    scores them on held-out data; --tuned then uses the best. Stop it with Ctrl-C; the same command
    continues.
    """
    with runtime.one_line_errors():
        from apollo_bench.launch.run_experiment import Machines, Request
        from apollo_bench.search import trials

        chosen = selection.select(task, settings, optimizers, schedules, quick, analysis, tuned)
        plan = chosen.recipe
        if analysis == "tuning":
            specs = trials.make_trials(plan, chosen.optimizers, seeds, chosen.schedules)
        else:
            specs = plan.sweep(analysis, chosen.optimizers, seeds, chosen.schedules)
        name = f"sweep-{plan.task}-{analysis}{'-quick' if quick else ''}"
        runtime.train_and_report(
            Request(
                specs,
                out or Path("runs") / name,
                data,
                Machines(accelerator, devices, jobs, threads, strategy, cluster),
                check_data=selection.data_check(tuned),
            )
        )
