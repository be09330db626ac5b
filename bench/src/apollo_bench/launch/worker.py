"""Train one run in a process of its own: ``python -m apollo_bench.launch.worker RUN``.

On SIGTERM or SIGINT, or when its parent ends, it writes a checkpoint and ends.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch

from apollo_bench import user_code
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_bench.training import process_group
from apollo_bench.training.fabric_setup import destroy_process_group, launch_fabric
from apollo_bench.training.loop import Outcome, train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.workload import Workload

EXIT_STOPPED = 75  # exit status: not finished; the run continues from its checkpoint
EXIT_USER_ERROR = 2  # exit status: an error that the user can correct
PARENT_PID = (
    "APOLLO_BENCH_PARENT_PID"  # the worker ends when this process does; torchrun may stand between
)
_RELEASE = 120.0  # seconds until a worker whose parent was killed must have ended
ERROR_PREFIX = "apollo-bench: "  # of the line that reports such an error


def main() -> int:
    """Train the run that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(description="Train one prepared run.")
    parser.add_argument("run", type=Path)
    return train_in_this_process(RunDirectory(parser.parse_args().run))


def train_in_this_process(directory: RunDirectory, workload: Workload | None = None) -> int:
    """Train a prepared run until its end or a signal, and return the exit status.

    Args:
        directory: directory of the run.
        workload: workload of the run on the CPU; None: made here.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: asked.append(number))
    parent = _parent()
    try:
        outcome = train_prepared_run(
            directory, lambda: bool(asked) or not _is_alive(parent), workload
        )
        destroy_process_group()
    except (ExperimentError, OSError) as error:
        if isinstance(error, OSError):
            traceback.print_exc()
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return EXIT_STOPPED if outcome == "stopped" else 0


def train_prepared_run(
    directory: RunDirectory, stop: Callable[[], bool], workload: Workload | None = None
) -> Outcome:
    """Train a prepared run, in all processes that were started for it.

    Args:
        directory: a run that ``RunDirectory.prepare`` made.
        stop: called after every step; training stops with a checkpoint once it returns True.
        workload: workload of the run on the CPU; None: made here.

    Returns:
        ``"finished"``, ``"diverged"`` or ``"stopped"``.

    Raises:
        ExperimentError: the run or its data cannot be used, or another process is lost.
    """
    lock = process_group.run_on_all(
        lambda: lock_run(directory, stop) if process_group.is_main_process() else None
    )
    with lock or nullcontext():
        # Only one process reads: on a shared file system the others may see a file later.
        reads = process_group.is_main_process() or not process_group.is_distributed()
        found = process_group.run_on_all(lambda: read_manifest(directory) if reads else None)
        found = process_group.broadcast_from_main(found)
        assert found is not None
        spec, execution, data, diagnose_every, code = found
        process_group.run_on_all(lambda: user_code.require_sources(code))
        # The order of additions depends on it: a resumed run keeps its number of threads.
        torch.set_num_threads(execution.threads)
        with process_group.translate_lost_connection():
            fabric = launch_fabric(execution, spec)
            made = workload or process_group.run_on_all(
                lambda: tasks.make(spec, data, fabric.device, execution.threads)
            )
            return train(directory, spec, made, stop, fabric, diagnose_every)


def read_manifest(
    directory: RunDirectory,
) -> tuple[RunSpec, Execution, Path | None, int | None, list[Record]]:
    """Return recipe, execution, data folder, ``diagnose_every`` and the user's code of a run."""
    manifest = directory.read()
    folder = manifest["data"]["folder"]
    data, code = None if folder is None else Path(folder), manifest.get("code", [])
    return directory.spec(), directory.execution(), data, directory.diagnose_every(), code


def _parent() -> int:
    """Return the process that this worker ends with."""
    return int(os.environ.get(PARENT_PID, os.getppid()))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # a process of another user
    try:  # a killed process stays as a zombie until its own parent asks for its status
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # not Linux
    return stat.rpartition(")")[2].split()[0] != "Z"


def lock_run(directory: RunDirectory, stop: Callable[[], bool] = lambda: False) -> TextIO:
    """Lock the run until the returned file is closed.

    A worker whose parent was killed ends after its current step, so this function waits for it. The
    lock is taken with ``lockf``, because processes that decode images do not inherit such a lock.

    Args:
        directory: directory of the run.
        stop: called while another process is waited for; True ends it.

    Raises:
        ExperimentError: another process holds the lock, and its parent is alive or it does not end.
    """
    file = directory.lock.open("a+")
    deadline = time.monotonic() + _RELEASE
    while not _has_locked(file):
        if stop() or _holder_continues(file) or time.monotonic() > deadline:
            file.close()
            raise ExperimentError(f"{directory.path}: another process is training this run")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"{socket.gethostname()} {_parent()}\n")
    file.flush()
    return file


def _has_locked(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _holder_continues(file: TextIO) -> bool:
    """Return whether the parent of the process that holds the lock is known to be alive."""
    file.seek(0)
    host, _, parent = file.read().strip().partition(" ")
    return host == socket.gethostname() and parent.isdecimal() and _is_alive(int(parent))


if __name__ == "__main__":
    sys.exit(main())
