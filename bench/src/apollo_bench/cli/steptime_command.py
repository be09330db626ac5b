"""``apollo-bench steptime``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from apollo_bench.available_cores import MAX_PROCESSES
from apollo_bench.cli import runtime
from apollo_bench.interrupts import Interrupted
from apollo_bench.seeds import MAX_SEED


def steptime(
    sets: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Parameter sets: a,b,c; a/8 is an eighth of set a."),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Optimizers, by their names in the table: a,b,c."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of rounds.")
    ] = 40,
    seconds: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="Time limit per set; no more rounds start after it."
        ),
    ] = 45.0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_PROCESSES, metavar="N", help="CPU threads.  [default: torch's]"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16 or float64.")
    ] = "float32",
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, metavar="N", help="Seed of parameters and gradients."),
    ] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 and so on.")
    ] = "cpu",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")] = Path(
        "runs/steptime"
    ),
) -> None:
    """Measure step time, memory and bandwidth of every back end against PyTorch's optimizers.

    The optimizers step alternately in one process, so that a disturbance affects all of them. An
    optimizer that is much slower than the reference takes part in the first rounds only.
    """
    with runtime.one_line_errors():
        from apollo_bench.launch.progress import counter
        from apollo_bench.steptime import benchmark, presentation

        runtime.keep_caches_in(out)
        options = benchmark.BenchmarkOptions(
            None if sets is None else sets.split(","),
            None if optimizers is None else [name.strip() for name in optimizers.split(",")],
            repeats,
            seconds,
            threads,
            dtype,
            seed,
            device,
        )
        console = Console() if sys.stdout.isatty() else Console(width=120)
        try:
            with counter(Console(stderr=True)) as report_progress:
                benchmark.run(
                    options,
                    out,
                    runtime.command_line(),
                    report_progress,
                    lambda result: console.print(presentation.table(result)),
                )
        except Interrupted as interrupt:
            typer.echo(f"Stopped; the complete results are in {out}.", err=True)
            raise typer.Exit(128 + interrupt.number) from None
        typer.echo(f"Tables and bars: {out / 'steptime.md'}, {out / 'steptime.png'}")
