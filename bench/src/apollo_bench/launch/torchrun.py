"""Train many runs one after the other, each in all processes that torchrun started."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_bench.interrupts import Interrupted, catch_signals
from apollo_bench.launch import worker
from apollo_bench.launch.run_scheduler import Display, RunState
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training import process_group
from apollo_bench.training.fabric_setup import destroy_process_group

_SHOWN_EVERY = 0.5  # seconds


def run_all(folders: list[Path], runs: list[RunState], display: Display | None) -> None:
    """Train all unfinished runs; every process calls this.

    Args:
        folders: folders of the runs, which the main process has prepared.
        runs: the same runs in the main process, whose status is updated; empty in the others.
        display: updated several times per second; None in the other processes.

    Raises:
        ExperimentError: a run or its data cannot be used, or another process is lost.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for run in runs:
        run.read_progress()
        run.update_status()
    with catch_signals() as received, _shown(runs, display):
        for i, folder in enumerate(folders):
            if process_group.broadcast_from_main(bool(runs) and runs[i].status != "waiting"):
                continue
            if runs:
                runs[i].status, runs[i].pid = "running", os.getpid()
            try:
                outcome = worker.train_prepared_run(RunDirectory(folder), lambda: bool(received))
            except BaseException:
                if runs:
                    runs[i].status = "stopped"
                raise
            if runs:
                runs[i].read_progress()
                runs[i].update_status(worker.EXIT_STOPPED if outcome == "stopped" else 0)
            if outcome == "stopped":
                raise Interrupted(
                    (process_group.broadcast_from_main(received) or received or [15])[0]
                )
    destroy_process_group()


@contextmanager
def _shown(runs: list[RunState], display: Display | None) -> Iterator[None]:
    """Update the display from a thread, because this thread trains."""
    if display is None:
        yield
        return
    over = threading.Event()

    def show() -> None:
        while not over.wait(_SHOWN_EVERY):
            for run in runs:
                if run.status == "running":
                    run.read_progress()
            display.update(runs, 1)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        display.update(runs, 1)
