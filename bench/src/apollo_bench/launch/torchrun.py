"""Many runs one after the other, each in all the processes that torchrun has started."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_bench.config.execution import leave
from apollo_bench.interrupts import Interrupted, signals
from apollo_bench.launch import worker
from apollo_bench.launch.run_scheduler import Display, RunState
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training import process_group

_SHOWN_EVERY = 0.5  # seconds


def run_all(folders: list[Path], runs: list[RunState], display: Display | None) -> None:
    """Train all runs that are not finished; every process calls this.

    Args:
        folders: of the runs, which the first process has prepared.
        runs: the same in the first process; none in the others. Their status says at the end what
            became of them.
        display: told of them now and then.

    Raises:
        ExperimentError: a run or its data cannot be used, or another process is lost.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for run in runs:
        run.refresh()
        run.settle()
    with signals() as received, _shown(runs, display):
        for i, folder in enumerate(folders):
            if process_group.from_first(bool(runs) and runs[i].status != "waiting"):
                continue
            if runs:
                runs[i].status, runs[i].pid = "running", os.getpid()
            try:
                outcome = worker.work(RunDirectory(folder), lambda: bool(received))
            except BaseException:
                if runs:
                    runs[i].status = "stopped"
                raise
            if runs:
                runs[i].refresh()
                runs[i].settle(worker.STOPPED if outcome == "stopped" else 0)
            if outcome == "stopped":
                raise Interrupted((process_group.from_first(received) or received or [15])[0])
    leave()


@contextmanager
def _shown(runs: list[RunState], display: Display | None) -> Iterator[None]:
    """Show the runs from a thread: this one trains."""
    if display is None:
        yield
        return
    over = threading.Event()

    def show() -> None:
        while not over.wait(_SHOWN_EVERY):
            for run in runs:
                if run.status == "running":
                    run.refresh()
            display.update(runs, 1)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        display.update(runs, 1)
