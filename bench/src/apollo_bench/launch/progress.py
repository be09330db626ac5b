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
_URGENT: tuple[Status, ...] = ("running", "failed", "diverged", "stopped", "finished")
_AROUND = 4  # lines for titles, the count of hidden runs, the bar and the cursor
_LARGE = 1e6  # numbers from here on are shown with an exponent
_GAP = 2  # between columns
_SHORTEST_NAME = 12
_DISPENSABLE = ("left", "time", "speed")  # columns that a narrow terminal does not show


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
        console = self._live.console
        titles = len({run.spec.task for run in runs})  # each task has a line of its own
        shown = _fitting(runs, console.height - _AROUND - titles)
        rest = [Text(_more(runs, shown), style="dim")] if len(shown) < len(runs) else []
        total, done = sum(run.steps for run in runs), sum(run.step for run in runs)
        line = Table.grid(padding=(0, _GAP))
        left = f", {duration(seconds_left(runs, jobs))} left" if _goes_on(runs) else ""
        line.add_row(
            ProgressBar(total=total, completed=done, width=40),
            Text(f"{100 * done // total} %{left}"),
        )
        self._live.update(Group(*_tables(shown, console.width), *rest, line), refresh=True)


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
        left = seconds_left(runs, jobs) if _goes_on(runs) else None
        for run in runs:
            now = (run.status, run.evaluated)
            if self._shown.get(run.name, ("waiting", run.evaluated)) != now:
                parts = [
                    duration(time.monotonic() - self._started),
                    run.name,
                    run.status,
                    run.progress,
                    f"loss {_number(run.loss, 4)}",
                    f"{run.metric.label} {_number(run.score, 2)} {run.metric.unit}".rstrip(),
                    _number(run.speed, 0, f" {run.unit}/s"),
                    "" if left is None else f"{duration(left)} left in all",
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
    """Return a function that shows the progress of successive pieces of work.

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


def _goes_on(runs: list[RunState]) -> bool:
    return any(run.status in ("waiting", "running") for run in runs)


def _tables(runs: list[RunState], width: int) -> Iterator[Table | Text]:
    """Yield a line and a table per task; their columns have the same widths.

    No number is cut: a narrow terminal shows shorter names and fewer columns.
    """
    columns, by_run = _columns(runs), _short_names(runs)
    for title in _DISPENSABLE:
        if _SHORTEST_NAME + _width_of_numbers(columns) > width:
            del columns[title]
    names = max([len("run"), *map(len, by_run)])
    names = max(_SHORTEST_NAME, min(names, width - _width_of_numbers(columns)))
    for task in dict.fromkeys(run.spec.task for run in runs):
        rows = [index for index, run in enumerate(runs) if run.spec.task == task]
        first = runs[rows[0]]
        yield Text(
            f"{task}: done in {first.spec.train.schedule.unit}s, score is {first.metric.title}, "
            f"speed in {first.unit}/s",
            style="dim",
            no_wrap=True,
            overflow="ellipsis",
        )
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=rows[0] == 0)
        table.add_column("run", width=names, no_wrap=True)
        for title, texts in columns.items():
            table.add_column(
                title.strip(),
                justify="right" if title.strip() else "left",
                width=max(map(len, [title, *texts])),
                no_wrap=True,
            )
        for index in rows:
            table.add_row(
                Text(_shortened(by_run[index], names)),
                *(Text(texts[index]) for texts in columns.values()),
                style=_STYLES[runs[index].status],
            )
        yield table


def _columns(runs: list[RunState]) -> dict[str, list[str]]:
    """Return the columns beside the names: title and a text per run."""
    columns: dict[str, list[str]] = {
        title: [] for title in ("done", "loss", "score", "speed", "time", "left", "")
    }
    for run in runs:
        running = run.status == "running"
        texts = (
            f"{run.done:g}/{run.spec.train.schedule.length}",
            _number(run.loss, 4),
            _number(run.score, 2),
            _number(run.speed if running else None, 0),
            duration(run.seconds) if run.step else "-",
            duration(run.seconds_left) if running else "-",
            run.status,
        )
        for column, text in zip(columns.values(), texts, strict=True):
            column.append(text)
    return columns


def _width_of_numbers(columns: dict[str, list[str]]) -> int:
    return sum(_GAP + max(map(len, [title, *texts])) for title, texts in columns.items())


def _short_names(runs: list[RunState]) -> list[str]:
    """Return the names without the task, and without a schedule that all runs of it share."""
    schedules = {(run.spec.task, run.spec.schedule) for run in runs}
    several = [task for task, count in Counter(task for task, _ in schedules).items() if count > 1]
    return [
        run.name.removeprefix(f"{run.spec.task}-").replace(
            "" if run.spec.task in several else f"-{run.spec.schedule}", "", 1
        )
        for run in runs
    ]


def _shortened(name: str, width: int) -> str:
    """Return a name without its middle, so that optimizer and seed remain visible."""
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def _fitting(runs: list[RunState], rows: int) -> list[RunState]:
    """Return the most important runs that fit, in the given order; waiting runs are left out.

    Runs in training have priority, then the last of the finished runs.
    """

    def rank(item: tuple[int, RunState]) -> tuple[int, int]:
        index, run = item
        return _URGENT.index(run.status), -index if run.status == "finished" else index

    ranked = sorted((item for item in enumerate(runs) if item[1].status != "waiting"), key=rank)
    chosen = {index for index, _ in ranked[: max(1, rows)]}
    return [run for index, run in enumerate(runs) if index in chosen]


def _more(runs: list[RunState], shown: list[RunState]) -> str:
    names = {run.name for run in shown}
    hidden = Counter(run.status for run in runs if run.name not in names)
    return f"and {', '.join(f'{count} {status}' for status, count in hidden.items())}"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    """Return a number with some decimals, or with few digits if it is very large."""
    if value is None:
        return "-"
    return (f"{value:.{digits}f}" if abs(value) < _LARGE else f"{value:.3g}") + unit
