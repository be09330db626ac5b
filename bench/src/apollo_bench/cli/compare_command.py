"""``apollo-bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime
from apollo_bench.errors import ExperimentError

_EMBEDDED = ("fashion-mnist", "wordnet", "phrases")  # trained where no task is given


@options.with_training_options
def compare(
    training: options.TrainingOptions,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="[TASK]",
            help="A task (see `tasks`), or a recipe's .toml file.  [default: "
            f"{', '.join(_EMBEDDED)}, all small]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Output folder.  [default: runs/compare, or runs/against-TASK]"
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of a finished comparison or archive of TASK: only --optimizers are "
            "trained, with its settings, seeds and data; the report shows all.",
        ),
    ] = None,
) -> None:
    """Train a task with several optimizers, schedules and seeds, and write a report.

    Without a task it trains images, a language model and a translator: small versions of the
    paper's tables 1 to 3. Stop it with Ctrl-C; the same command continues.
    """
    with runtime.one_line_errors():
        if task is None and training.data is not None:
            raise ExperimentError(
                f"--data is {str(training.data)!r}; it needs a TASK: "
                "apollo-bench compare TASK --data DIR"
            )
        if task is None and against is not None:
            raise ExperimentError(
                f"--against is {str(against)!r}; it needs a TASK: "
                "apollo-bench compare TASK --optimizers NAME --against FOLDER"
            )
        specs, baseline = [], None
        for name in _EMBEDDED if task is None else (task,):
            chosen = training.select(name, against=against)
            specs += chosen.recipe.runs(chosen.optimizers, training.seeds, chosen.schedules)
            baseline = chosen.baseline
        folder = out or Path("runs") / ("compare-quick" if training.quick else "compare")
        if baseline is not None:
            baseline.check(specs)
            folder = out or Path("runs") / f"against-{specs[0].task}"
        request = training.request(specs, folder, baseline)
        runtime.train_and_report(request, [] if against is None else [against])
