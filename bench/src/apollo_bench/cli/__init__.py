"""The command line ``apollo-bench``: one module per command."""

from __future__ import annotations

import platform
from typing import Annotated

import torch
import typer

import apollo_qn
from apollo_bench import __version__
from apollo_bench.cli.archive_command import archive
from apollo_bench.cli.compare_command import compare
from apollo_bench.cli.prepare_command import prepare
from apollo_bench.cli.report_command import report
from apollo_bench.cli.steptime_command import steptime
from apollo_bench.cli.sweep_command import sweep
from apollo_bench.cli.tasks_command import list_tasks
from apollo_bench.cli.train_command import train

app = typer.Typer(
    help="Train with Apollo and other optimizers, and report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich takes [quick] and [default: ...] in a help text for markup
)
for _command in (compare, sweep, train, report, archive, prepare, steptime):
    app.command()(_command)
app.command("tasks")(list_tasks)


def _print_versions(wanted: bool) -> None:
    if wanted:
        typer.echo(
            f"apollo-bench {__version__} (apollo-qn {apollo_qn.__version__}, "
            f"torch {torch.__version__}, Python {platform.python_version()})"
        )
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print versions and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""
