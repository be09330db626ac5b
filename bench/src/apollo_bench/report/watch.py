"""Rewrite a report while its runs are training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from apollo_bench.interrupts import Interrupted, catch_signals
from apollo_bench.report import page
from apollo_bench.report.summary import Summary
from apollo_bench.runs import compatibility

EVERY = 10.0  # seconds between two checks of the runs
_POLL = 0.1  # seconds until a signal is noticed


def watch(
    paths: list[Path],
    out: Path,
    target: float | None,
    warn: Callable[[str], None],
    say: Callable[[str], None],
    every: float = EVERY,
) -> list[Summary]:
    """Write the report whenever a run has new records, until all runs have ended.

    Only the last report, of ended runs, has figures for papers. Each file is written atomically.

    Args:
        paths: as in ``page.write``.
        out: as in ``page.write``.
        target: as in ``page.write``.
        warn: as in ``page.write``; called once per line.
        say: called with a line for each report.
        every: seconds between two checks of the runs.

    Raises:
        ExperimentError: as in ``page.write``.
        Interrupted: on SIGINT or SIGTERM, after a report that no longer refreshes.
    """
    told: set[str] = set()

    def warn_once(text: str) -> None:
        if text not in told:
            told.add(text)
            warn(text)

    before: object = None
    with catch_signals() as received:
        while not received:
            now = _state(paths)
            if now != before:
                before = now
                summaries = page.write(
                    paths, out, target, warn_once, refresh=every, with_figures=False
                )
                ended, count = _ended(summaries)
                say(f"{time.strftime('%H:%M:%S')}  {ended} of {count} runs have ended")
                if ended == count:
                    break
            until = time.monotonic() + every
            while not received and time.monotonic() < until:
                time.sleep(min(_POLL, every))
        summaries = page.write(paths, out, target, warn_once, with_figures=not received)
    if received:
        raise Interrupted(received[0])
    return summaries


def _ended(summaries: list[Summary]) -> tuple[int, int]:
    """Return the number of runs that have ended, and of all."""
    verdicts = [run.verdict for summary in summaries for run in summary.runs]
    return sum(verdict != "unfinished" for verdict in verdicts), len(verdicts)


def _state(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Return name, size and time of every file that a report reads of the runs."""
    found = []
    for path in paths:
        for directory in compatibility.find_run_directories(path):
            for file in (directory.manifest, directory.metrics, directory.result):
                if file.exists():
                    status = file.stat()
                    found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
