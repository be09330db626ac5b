"""``apollo-bench sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime
from apollo_bench.config.schema import Analysis


@options.with_training_options
def sweep(
    training: options.TrainingOptions,
    task: options.TaskName,
    analysis: Annotated[
        Analysis,
        typer.Argument(
            metavar="ANALYSIS", help="An analysis of the paper, or the search for settings."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Output folder.  [default: runs/sweep-TASK-ANALYSIS]"),
    ] = None,
    diagnostics: options.Diagnostics = False,
    diagnose_every: options.DiagnoseEvery = None,
) -> None:
    """Train a task at several values of a setting, and write a report.

    lr-robustness multiplies learning rates by the recipe's factors and divides weight decay by them
    (figure 2 of the paper). weight-decay tries the recipe's values of weight decay, coupled by eq.
    (14) (figure 4). tuning searches the recipe's ranges with the same number of trials per
    optimizer, scored on held-out data. --tuned of other commands uses the best trial. Stop with
    Ctrl-C; the same command continues.
    """
    with runtime.one_line_errors():
        from apollo_bench.search import trials

        chosen = training.select(task, analysis)
        plan = chosen.recipe
        if analysis == "tuning":
            specs = trials.make_trials(plan, chosen.optimizers, training.seeds, chosen.schedules)
        else:
            specs = plan.sweep(analysis, chosen.optimizers, training.seeds, chosen.schedules)
        name = f"sweep-{plan.task}-{analysis}{'-quick' if training.quick else ''}"
        every = options.measuring_interval(diagnostics, diagnose_every)
        request = training.request(specs, out or Path("runs") / name)
        runtime.train_and_report(request._replace(diagnose_every=every))
