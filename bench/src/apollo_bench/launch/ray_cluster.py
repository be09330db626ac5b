"""Runs as tasks of a Ray cluster, which assigns each task its cores or GPUs.

The driver and the tasks share only the run directories, on a file system that all machines see. A
restarted task continues from its directory, and the driver reads progress there.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from apollo_bench.available_cores import available_cores
from apollo_bench.errors import ExperimentError
from apollo_bench.interrupts import Interrupted, catch_signals
from apollo_bench.launch import run_scheduler, worker
from apollo_bench.launch.run_scheduler import Display, RunState
from apollo_bench.optional_imports import import_optional
from apollo_bench.runs.run_directory import RunDirectory

ENGINES = ("ray",)

_RETRIES = 10  # for a machine or Ray worker that died; errors of the run itself are final
_CONNECT = 10.0  # seconds
_CANCEL_EVERY = 5.0  # seconds


def run_all(runs: list[RunState], jobs: int | None, display: Display) -> None:
    """Train all unfinished runs on the cluster of RAY_ADDRESS, or on a local one.

    Args:
        runs: prepared runs; their status is updated.
        jobs: tasks at the same time; None: as many as the cluster has room for.
        display: updated several times per second.

    Raises:
        ExperimentError: Ray is not installed, or the cluster does not answer.
        Interrupted: on SIGINT or SIGTERM, after the tasks have stopped.
    """
    ray = import_optional("ray", "--cluster ray")
    for run in runs:
        run.read_progress()
        run.update_status()
    _join(ray)
    tasks: dict[int, Any] = {}
    before: dict[int, float] = {}
    with catch_signals() as received:
        try:
            while any(run.status in ("waiting", "running") for run in runs):
                for i, run in enumerate(runs):
                    if run.status == "waiting" and i not in tasks and len(tasks) < (jobs or 10**6):
                        before[i] = _begun(run)
                        tasks[i] = _submit(ray, run.directory)
                display.update(runs, max(1, sum(run.status == "running" for run in runs)))
                waiting = list(tasks.values())
                done, _ = ray.wait(
                    waiting, num_returns=len(waiting), timeout=run_scheduler.POLL_SECONDS
                )
                for i, reference in list(tasks.items()):
                    runs[i].read_progress()
                    if reference in done:
                        del tasks[i]
                        _update_status(ray, runs[i], reference)
                    elif runs[i].status == "waiting" and _begun(runs[i]) != before[i]:
                        runs[i].status = "running"
                if received:
                    raise Interrupted(received[0])
        finally:
            _stop(ray, tasks, runs, received)
            display.update(runs, 1)
            ray.shutdown()


def _submit(ray: Any, directory: RunDirectory) -> Any:
    execution = directory.execution()
    resources = {"num_cpus": execution.devices * execution.threads}
    if execution.accelerator == "gpu":
        resources["num_gpus"] = execution.devices
    task = ray.remote(**resources, max_retries=_RETRIES)(train_as_ray_task)
    return task.remote(str(directory.path.resolve()))


def train_as_ray_task(path: str) -> int:
    """Train a prepared run in processes of its own, and return their exit status."""
    process = run_scheduler.start_worker(RunDirectory(Path(path)))
    try:
        while process.poll() is None:
            time.sleep(run_scheduler.POLL_SECONDS)  # Popen.wait() cannot be interrupted
        return process.returncode
    except BaseException:  # cancelled
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(run_scheduler.GRACE_SECONDS)
        process.kill()
        raise


def _join(ray: Any) -> None:
    quiet = {"logging_level": "error", "log_to_driver": False}
    given = os.environ.get("RAY_ADDRESS")
    host, _, port = (given or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():  # Ray itself would retry for minutes
        try:
            socket.create_connection((host, int(port)), _CONNECT).close()
        except OSError as error:
            raise ExperimentError(
                f"--cluster ray: RAY_ADDRESS is {given!r}, where no cluster answers ({error}); "
                "start one there (ray start --head), or unset it for one on this machine"
            ) from None
    try:
        if given:
            ray.init(**quiet)
        else:
            ray.init(num_cpus=available_cores(), include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"at {given}" if given else "on this machine"
        raise ExperimentError(f"--cluster ray: no cluster {where} ({first})") from None


def _begun(run: RunState) -> float:
    """Return the time at which the run's lock was last taken."""
    try:
        return run.directory.lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _update_status(ray: Any, run: RunState, reference: Any) -> None:
    try:
        run.update_status(ray.get(reference))
    except ray.exceptions.RayError as error:
        run.update_status(worker.EXIT_STOPPED)
        if run.status == "stopped":
            run.status, run.reason = "failed", str(error).splitlines()[0]


def _stop(ray: Any, tasks: dict[int, Any], runs: list[RunState], received: list[int]) -> None:
    deadline = time.monotonic() + run_scheduler.GRACE_SECONDS
    left, again = list(tasks.values()), 0.0
    # a second Ctrl-C stops at once
    while left and time.monotonic() < deadline and len(received) < 2:
        if time.monotonic() > again:  # a task that is just starting misses the first request
            again = time.monotonic() + _CANCEL_EVERY
            for reference in left:
                ray.cancel(reference)
        _, left = ray.wait(left, num_returns=len(left), timeout=run_scheduler.POLL_SECONDS)
    for i in tasks:
        runs[i].read_progress()
        runs[i].update_status(worker.EXIT_STOPPED)
