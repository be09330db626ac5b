"""Live progress: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from apollo_bench.launch.run_scheduler import RunState, Status

_STYLES: dict[Status, str] = {
    "waiting": "dim",
    "running": "bold",
    "finished": "green",
    "diverged": "red",
    "failed": "red",
    "stopped": "yellow",
}

# order in which runs are shown when the terminal has too few lines
_URGENT: tuple[Status, ...] = ("running", "failed", "diverged", "stopped", "waiting", "finished")
_AROUND = 4  # lines for titles, the count of hidden runs, the bar and the cursor


def duration(seconds: float | None) -> str:
    """Return a time as 1:05 or 1:02:05; a dash if it is unknown.

    Example:
        >>> duration(65.2), duration(3725), duration(None)
        ('1:05', '1:02:05', '-')
    """
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_left(runs: list[RunState], jobs: int) -> float | None:
    """Return the time that all runs together still need; None before the first measurement.

    Args:
        runs: all runs of the command.
        jobs: runs at the same time.
    """
    measured = [run for run in runs if run.step]
    if not measured:
        return None
    pace = sum(run.seconds for run in measured) / sum(run.step for run in measured)
    open_runs = [run for run in runs if run.status in ("waiting", "running")]
    rest = [pace * (run.steps - run.step) for run in open_runs]
    return max([sum(rest) / jobs, *rest], default=0.0)


class LiveTable:
    """A table with one row per run and a bar for all of them; a context manager."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, runs: list[RunState], jobs: int) -> None:
        """Draw the newest state."""
        table = Table(box=None, pad_edge=False)
        table.add_column("run", no_wrap=True)
        for title in ("done", "loss", "score", "speed", "time", "left"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        shown = _fitting(runs, self._live.console.height - _AROUND)
        one_task = len({run.spec.task for run in runs}) == 1
        for run in shown:
            running = run.status == "running"
            table.add_row(
                run.name.removeprefix(f"{run.spec.task}-") if one_task else run.name,
                run.done,
                _number(run.loss, ".4f"),
                _score(run),
                _number(run.speed if running else None, ".0f", f" {run.unit}/s"),
                duration(run.seconds) if run.step else "-",
                duration(run.seconds_left) if running else "-",
                run.status,
                style=_STYLES[run.status],
            )
        total, done = sum(run.steps for run in runs), sum(run.step for run in runs)
        line = Table.grid(padding=(0, 2))
        left = duration(seconds_left(runs, jobs))
        line.add_row(
            ProgressBar(total=total, completed=done, width=40),
            Text(f"{100 * done // total} %, {left} left"),
        )
        rest = [Text(_more(runs, shown), style="dim")] if len(shown) < len(runs) else []
        self._live.update(Group(table, *rest, line), refresh=True)


class PlainLines:
    """A line whenever a run ends an epoch or changes its status."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[Status, int]] = {}
        self._started = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, runs: list[RunState], jobs: int) -> None:
        """Print the changes since the last call."""
        for run in runs:
            now = (run.status, run.evaluated)
            if self._shown.get(run.name, ("waiting", run.evaluated)) != now:
                parts = [
                    duration(time.monotonic() - self._started),
                    run.name,
                    run.status,
                    run.done,
                    f"loss {_number(run.loss, '.4f')}",
                    f"{run.metric.label} {_number(run.score, '.2f')} {run.metric.unit}".rstrip(),
                    _number(run.speed, ".0f", f" {run.unit}/s"),
                    f"{duration(seconds_left(runs, jobs))} left in all",
                    run.reason,
                ]
                text = "  ".join(part for part in parts if part)
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._shown[run.name] = now


def display(console: Console) -> LiveTable | PlainLines:
    """Return a live table on a terminal, and plain lines elsewhere."""
    return LiveTable(console) if console.is_terminal else PlainLines(console)


@contextmanager
def counter(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Return a function that shows one piece of work after the other, with its progress.

    On a terminal it draws a bar; elsewhere it prints one line per piece.

    Example:
        >>> with counter(Console(stderr=True)) as report_progress:
        ...     report_progress("Reading", 3, 10)  # 3 of 10 pieces are done; 0 of 0: unknown
    """
    if not console.is_terminal:
        shown: list[str] = []

        def say(title: str, done: int, total: int) -> None:
            if title not in shown:
                shown.append(title)
                console.print(title, markup=False, highlight=False, soft_wrap=True)

        yield say
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None)

        def show(title: str, done: int, total: int) -> None:
            progress.update(task, description=title, completed=done, total=total or None)

        yield show


def _fitting(runs: list[RunState], rows: int) -> list[RunState]:
    """Return the most important runs that fit, in their order; training runs come first."""
    ranked = sorted(enumerate(runs), key=lambda item: (_URGENT.index(item[1].status), item[0]))
    chosen = {run.name for _, run in ranked[: max(1, rows)]}
    return [run for run in runs if run.name in chosen]


def _more(runs: list[RunState], shown: list[RunState]) -> str:
    names = {run.name for run in shown}
    hidden = Counter(run.status for run in runs if run.name not in names)
    counts = ", ".join(f"{count} {status}" for status, count in hidden.items())
    return f"and {len(runs) - len(shown)} more: {counts}"


def _score(run: RunState) -> str:
    """Return the metric of the last evaluation, with its unit or its name."""
    return _number(run.score, ".2f", f" {run.metric.unit or run.metric.label.split()[-1]}")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit
