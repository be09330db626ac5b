"""``apollo-bench prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from apollo_bench.available_cores import MAX_PROCESSES
from apollo_bench.cli import runtime
from apollo_bench.errors import ExperimentError
from apollo_bench.interrupts import Interrupted, raise_interrupts


def prepare(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="one-billion-word, wmt14-en-de, multi30k or cifar10."),
    ],
    raw: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the raw download.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder.  [default: data/TASK]")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="1b_word_vocab.txt.  [default: made from the text]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_PROCESSES, metavar="N", help="Processes.  [default: one per core]"
        ),
    ] = None,
    subwords: Annotated[
        int | None,
        typer.Option(
            min=300, metavar="N", help="Size of the joint vocabulary.  [default: the recipe's]"
        ),
    ] = None,
) -> None:
    """Convert a raw download into the fast form that --data takes.

    Stop it with Ctrl-C. The same command continues with the missing shards of one-billion-word; the
    other tasks take minutes and start again.
    """
    with runtime.one_line_errors():
        from apollo_bench.config import recipe
        from apollo_bench.launch.progress import counter
        from apollo_bench.workloads.preparation import PREPARERS, PrepareOptions
        from apollo_bench.workloads.translation.translation_settings import SentencePairData

        if task not in PREPARERS:
            raise ExperimentError(
                f"task is {task!r}, allowed are {', '.join(PREPARERS)}; the others need no "
                "preparation"
            )
        folder = out or Path("data") / task
        data = recipe.load(task).data
        if subwords is None and isinstance(data, SentencePairData):
            subwords = data.subwords
        try:
            with raise_interrupts(), counter(Console(stderr=True)) as report_progress:
                prepared = PREPARERS[task](
                    raw, folder, PrepareOptions(vocabulary, workers, subwords), report_progress
                )
        except Interrupted as interrupt:
            typer.echo("Stopped; run the same command to continue.", err=True)
            raise typer.Exit(128 + interrupt.number) from None
        if prepared.remark:
            typer.echo(prepared.remark)
        typer.echo(f"Prepared: --data {prepared.folder}")
