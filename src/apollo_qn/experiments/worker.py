"""One run in a process of its own: ``python -m apollo_qn.experiments.worker RUN``.

Ends at once after a checkpoint when it is asked to (SIGTERM, SIGINT) or when its parent is gone.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch

from apollo_qn.experiments import tasks
from apollo_qn.experiments.engine import train
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.placement import leave
from apollo_qn.experiments.runs import RunDirectory

STOPPED = 75  # exit status: not finished, there is a checkpoint to go on from
UNUSABLE = 2  # exit status: an error that the user can mend
PARENT = "APOLLO_QN_PARENT"  # whose end is a worker's too; between them there may be torchrun
COMPLAINT = "apollo-qn: "  # begins the line that tells such an error


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
        first = os.environ.get("RANK", "0") == "0"  # torchrun's; the others hold no lock
        with _exclusive(directory) if first else nullcontext():
            spec, placement = directory.spec(), directory.placement()
            # the order of sums depends on it: a resumed run keeps the number it began with
            torch.set_num_threads(placement.threads)
            fabric = placement.fabric(spec)
            folder = directory.read()["data"]["folder"]
            data = None if folder is None else Path(folder)
            task = tasks.make(spec, data, fabric.device, placement.threads)
            outcome = train(
                directory, spec, task, lambda: bool(asked) or not _is_alive(parent), fabric
            )
            leave()
    except ExperimentError as error:
        print(f"{COMPLAINT}{error}", file=sys.stderr)
        return UNUSABLE
    return STOPPED if outcome == "stopped" else 0


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _exclusive(directory: RunDirectory) -> TextIO:
    """Hold the run's lock until the file is closed; raises ExperimentError if another has it.

    Of lockf, for processes that decode images must not inherit it and outlive this one.
    """
    file = (directory.path / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ExperimentError(f"{directory.path}: another process is training this run") from None
    return file


if __name__ == "__main__":
    sys.exit(main())
