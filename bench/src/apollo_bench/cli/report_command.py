"""``apollo-bench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime


def report(
    runs: options.RunFolders,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Output folder.  [default: the first of RUNS]"),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="VALUE",
            help="Value of the metric for the time to a target.  [default: chosen from the other "
            "optimizers]",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write the report again while runs go on, until all end."),
    ] = False,
) -> None:
    """Write tables, curves and one HTML page from finished or running runs.

    An open page of --watch loads itself again. Stop it with Ctrl-C.
    """
    with runtime.one_line_errors():
        from apollo_bench.runs.loading import require_runs

        require_runs(runs)  # first: the report's caches would create a misspelt folder
        folder = out or runs[0]
        runtime.keep_caches_in(folder)
        runtime.write_report(runs, folder, target, watched=watch)
