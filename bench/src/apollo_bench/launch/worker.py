"""One run in a process of its own: ``python -m apollo_bench.launch.worker RUN``.

Ends at once after a checkpoint when it is asked to (SIGTERM, SIGINT) or when its parent is gone.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch

from apollo_bench.config.execution import Placement, leave
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training import process_group
from apollo_bench.training.loop import Outcome, train
from apollo_bench.workloads import tasks

STOPPED = 75  # exit status: not finished, there is a checkpoint to go on from
UNUSABLE = 2  # exit status: an error that the user can mend
PARENT = "APOLLO_QN_PARENT"  # whose end is a worker's too; between them there may be torchrun
COMPLAINT = "apollo-bench: "  # begins the line that tells such an error


def main() -> int:
    """Train the run that the command line names; the exit status says how it ended."""
    parser = argparse.ArgumentParser(description="Train one prepared run.")
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: asked.append(number))
    parent = int(os.environ.get(PARENT, os.getppid()))
    directory = RunDirectory(arguments.run)
    try:
        outcome = work(directory, lambda: bool(asked) or not _is_alive(parent))
        leave()
    except ExperimentError as error:
        print(f"{COMPLAINT}{error}", file=sys.stderr, flush=True)
        return UNUSABLE
    return STOPPED if outcome == "stopped" else 0


def work(directory: RunDirectory, stop: Callable[[], bool]) -> Outcome:
    """Train a prepared run, in as many processes as have been started for it.

    Raises:
        ExperimentError: the run or its data cannot be used, or another process of it is lost.
    """
    lock = process_group.agreed(lambda: exclusive(directory) if process_group.speaks() else None)
    with lock or nullcontext():
        # one process reads: on a shared file system the others may see it later
        reads = process_group.speaks() or not process_group.joined()
        found = process_group.agreed(lambda: _wanted(directory) if reads else None)
        found = process_group.from_first(found)
        assert found is not None
        spec, placement, data, diagnose_every = found
        # the order of sums depends on it: a resumed run keeps the number it began with
        torch.set_num_threads(placement.threads)
        with process_group.losing_none():
            fabric = placement.fabric(spec)
            task = process_group.agreed(
                lambda: tasks.make(spec, data, fabric.device, placement.threads)
            )
            return train(directory, spec, task, stop, fabric, diagnose_every)


def _wanted(directory: RunDirectory) -> tuple[RunSpec, Placement, Path | None, int | None]:
    folder = directory.read()["data"]["folder"]
    data = None if folder is None else Path(folder)
    return directory.spec(), directory.placement(), data, directory.diagnose_every()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def exclusive(directory: RunDirectory) -> TextIO:
    """Hold the run's lock until the file is closed; raises ExperimentError if another has it.

    Of lockf, for processes that decode images must not inherit it and outlive this one.
    """
    file = directory.lock.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ExperimentError(f"{directory.path}: another process is training this run") from None
    return file


if __name__ == "__main__":
    sys.exit(main())
