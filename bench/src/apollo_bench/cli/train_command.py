"""``apollo-bench train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime, selection
from apollo_bench.errors import ExperimentError


def train(
    task: options.TaskName,
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="An optimizer of the recipe, a class (my_module:MyOptimizer) or a short name of "
            "one of torch.optim (adagrad).",
        ),
    ],
    seed: options.Seed = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Schedule of the recipe.  [default: the first that `compare` trains]",
        ),
    ] = None,
    settings: options.Settings = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")] = Path("runs/train"),
    data: options.DataFolder = None,
    accelerator: options.AcceleratorName = "cpu",
    devices: options.Devices = 1,
    strategy: options.StrategyName = "ddp",
    threads: options.Threads = None,
    diagnostics: options.Diagnostics = False,
    diagnose_every: options.DiagnoseEvery = None,
) -> None:
    """Train one run.

    With the same --threads its weights are bit-identical to those of the run in `compare`. With
    another number of threads sums are added in another order.
    """
    with runtime.one_line_errors():
        from apollo_bench.launch.run_experiment import Machines, Request, run_folder

        chosen = selection.select(task, settings, optimizer, schedule, data=data)
        seed = chosen.recipe.seeds[0] if seed is None else seed
        if chosen.optimizers is None or len(chosen.optimizers) != 1:
            raise ExperimentError(f"--optimizer must be one name or class, got {optimizer!r}")
        spec = chosen.recipe.run(chosen.optimizers[0], seed, schedule or chosen.schedules[0])
        every = options.measuring_interval(diagnostics, diagnose_every)
        machines = Machines(accelerator, devices, 1, threads, strategy)
        failed = runtime.train_and_print_failures(
            Request([spec], out, data, machines, diagnose_every=every)
        )
        runtime.echo(str(run_folder(out, spec)))
    if failed:
        raise typer.Exit(1)
