"""Parts that the commands share: one-line errors, training with a report, caches."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from apollo_bench.errors import ExperimentError
from apollo_bench.interrupts import Interrupted
from apollo_bench.training import process_group

if TYPE_CHECKING:
    from apollo_bench.launch.run_experiment import Request


def command_line() -> str:
    """Return the command line that started this process."""
    return shlex.join(["apollo-bench", *sys.argv[1:]])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that the user can correct in one line, and exit with status 2."""
    try:
        yield
    except ExperimentError as error:
        if process_group.reports_error(error):
            typer.echo(f"apollo-bench: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"apollo-bench: {what}", err=True)
        raise typer.Exit(2) from None


def echo(text: str, err: bool = False) -> None:
    """Print a line from the main process of the process group."""
    if process_group.is_main_process():
        typer.echo(text, err=err)


def train_and_print_failures(request: Request) -> bool:
    """Train runs and print why any failed; return whether any did.

    Raises:
        ExperimentError: an option, a run or its data cannot be used.
        typer.Exit: on SIGINT or SIGTERM, with status 128 plus the signal's number.
    """
    from apollo_bench.launch import run_experiment

    keep_caches_in(request.out)
    try:
        failed = run_experiment.train_runs(
            request, lambda text: echo(f"apollo-bench: {text}", err=True)
        )
    except Interrupted as interrupt:
        echo(f"Stopped; nothing is lost. Continue with:  {command_line()}", err=True)
        raise typer.Exit(128 + interrupt.number) from None
    for run in failed:
        typer.echo(
            f"apollo-bench: {run.name} failed ({run.reason}); see {run.directory.log}; "
            "run the same command to try it again",
            err=True,
        )
    return bool(failed)


def train_and_report(request: Request, more: Sequence[Path] = ()) -> None:
    """Train runs and write the report on all runs of their folder.

    Args:
        request: the runs.
        more: folders whose runs of the same task the report shows too.

    Raises:
        ExperimentError: an option, a run or its data cannot be used.
        typer.Exit: a run failed (status 1), or the command was interrupted.
    """
    failed = train_and_print_failures(request._replace(one_report=True))
    if process_group.is_main_process():
        only = request.specs[0].task if more else None
        write_report([request.out, *more], request.out, only=only)
    if failed:
        raise typer.Exit(1)


def write_report(
    runs: list[Path],
    out: Path,
    target: float | None = None,
    only: str | None = None,
    watched: bool = False,
) -> None:
    """Write the report on runs, and print its tables.

    Args:
        runs: as in ``page.write``.
        out: as in ``page.write``.
        target: as in ``page.write``.
        only: as in ``page.write``.
        watched: whether the report is written again until all runs have ended.

    Raises:
        typer.Exit: a watched report was interrupted.
    """
    from apollo_bench.report import page, watch

    def warn(text: str) -> None:
        typer.echo(f"apollo-bench: {text}", err=True)

    if watched:
        try:
            summaries = watch.watch(runs, out, target, warn, lambda text: echo(text, err=True))
        except Interrupted as interrupt:
            echo(f"Stopped; the report so far: {out / 'report.html'}", err=True)
            raise typer.Exit(128 + interrupt.number) from None
    else:
        summaries = page.write(runs, out, target, warn, only)
    page.show(summaries, Console())
    typer.echo(f"Report: {out / 'report.html'}")


def keep_caches_in(folder: Path) -> None:
    """Make matplotlib and torch write their caches into the output folder, not elsewhere."""
    for variable, name in (("MPLCONFIGDIR", "matplotlib"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(variable, os.path.realpath(folder / "cache" / name))
