"""Schedule runs as local processes, as many at once as the cores allow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal, Protocol

from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.interrupts import Interrupted, catch_signals
from apollo_bench.launch.fork_server import WorkerPool, can_fork
from apollo_bench.launch.worker import ERROR_PREFIX, EXIT_STOPPED, PARENT_PID
from apollo_bench.runs.record_schemas import is_metrics_record
from apollo_bench.runs.run_directory import Record, RunDirectory, parsed
from apollo_bench.workloads.workload import Metric

Status = Literal["waiting", "running", "finished", "diverged", "failed", "stopped"]

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0  # seconds that a worker has for its last checkpoint
_TAIL = 16384  # bytes at the end of metrics.jsonl that are read for the newest records


@dataclass
class RunState:
    """The state of one run while it is scheduled."""

    directory: RunDirectory
    spec: RunSpec
    steps: int  # of the whole run
    metric: Metric  # of its evaluations
    unit: str  # that speed is counted in
    units_per_step: float
    status: Status = "waiting"
    step: int = 0
    evaluated: int = 0  # steps at the last evaluation
    loss: float | None = None
    score: float | None = None  # at the last evaluation
    # training time so far, over all processes that trained the run in turn
    seconds: float = 0.0
    speed: float | None = None  # units per second
    reason: str = ""  # why it failed
    pid: int | None = None  # of the process, while the run is training

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.directory.path.name

    @property
    def done(self) -> float:
        """Length that has been evaluated, in the schedule's unit."""
        return round(self.evaluated * self.spec.train.schedule.length / self.steps, 2)

    @property
    def progress(self) -> str:
        """How far the run is, for example "3 of 8 epochs"."""
        return f"{self.done:g} of {self.spec.train.schedule}"

    @property
    def seconds_left(self) -> float | None:
        """Time that the rest of the run needs at the pace so far; None before the first record."""
        if not self.step:
            return None
        return self.seconds / self.step * (self.steps - self.step)

    def read_progress(self) -> None:
        """Read the newest records of the metrics."""
        lines = _tail(self.directory)
        steps = [line for line in lines if line["kind"] == "step"]
        if not steps:
            return
        self.step, self.loss = steps[-1]["step"], steps[-1]["loss"]
        self.seconds = steps[-1]["time"]["seconds"]
        before: Record = steps[-2] if len(steps) > 1 else {"step": 0, "time": {"seconds": 0.0}}
        took = self.seconds - before["time"]["seconds"]
        if took > 0:
            self.speed = (self.step - before["step"]) * self.units_per_step / took
        for line in lines:
            if line["kind"] == "evaluation":
                self.evaluated, self.score = line["step"], line.get(self.metric.name)

    def update_status(self, status: int | None = None) -> None:
        """Set the status from the run directory and the exit status of its process.

        Args:
            status: exit status of the process; None: it was not started.
        """
        self.pid = None
        verdict = self.directory.usable_verdict()
        if verdict is not None:
            self.status = "diverged" if verdict["verdict"] == "diverged" else "finished"
            self.step = verdict["step"]
        elif status == EXIT_STOPPED:
            self.status = "stopped"
        elif status is not None:
            self.status = "failed"
            lines = self.directory.log.read_text(errors="replace").strip().splitlines()
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            # torchrun prints lines of its own after a worker's
            messages = [
                line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)
            ]
            self.reason = f"{how}: {(messages or lines)[-1]}" if lines and status > 0 else how


class WorkerProcess(Protocol):
    """The process of a run."""

    @property
    def pid(self) -> int | None:
        """Process id; None: the process does not exist yet."""

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None before the end."""

    def terminate(self) -> None:
        """Ask the process to write a checkpoint and to end."""

    def kill(self) -> None:
        """End the process at once."""


class Display(Protocol):
    """Shows the runs while they are training."""

    def update(self, runs: list[RunState], jobs: int) -> None:
        """Show the newest state."""


def run_all(runs: list[RunState], jobs: int, display: Display) -> None:
    """Train all unfinished runs; a crash of one does not affect the others.

    Args:
        runs: prepared runs; their status is updated.
        jobs: processes at the same time.
        display: updated several times per second.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after the workers have stopped.
    """
    for run in runs:
        run.read_progress()
        run.update_status()
    workers: dict[int, WorkerProcess] = {}
    slots: dict[int, int] = {}
    pool = WorkerPool(worker_environment())
    with catch_signals() as received:
        try:
            while any(run.status in ("waiting", "running") for run in runs):
                for index, run in enumerate(runs):
                    if run.status == "waiting" and len(workers) < jobs:
                        slots[index] = min(set(range(jobs)) - {slots[i] for i in workers})
                        workers[index] = _start(pool, run, slots[index])
                        run.status = "running"
                for index, process in workers.items():
                    runs[index].pid = process.pid
                display.update(runs, jobs)
                time.sleep(POLL_SECONDS)
                for index, process in list(workers.items()):
                    runs[index].read_progress()
                    status = process.poll()
                    if status is not None:
                        del workers[index]
                        runs[index].update_status(status)
                if received:
                    raise Interrupted(received[0])
        finally:
            _stop(workers, runs, received)
            pool.close()
            display.update(runs, jobs)


def worker_command(execution: Execution) -> list[str]:
    """Return the command that starts a run's processes here, without the run's folder.

    Example:
        >>> worker_command(Execution())[1:]
        ['-m', 'apollo_bench.launch.worker']
        >>> worker_command(Execution(devices=2))[1:4]
        ['-m', 'torch.distributed.run', '--standalone']

    Args:
        execution: how the run is executed.
    """
    worker = ["-m", "apollo_bench.launch.worker"]
    if execution.processes == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    return [sys.executable, *torchrun, f"--nproc-per-node={execution.devices}", *worker]


def worker_environment() -> dict[str, str]:
    """Return the environment variables of a worker."""
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    environment[PARENT_PID] = str(os.getpid())
    # threads that spin while they wait slow down other work on the machine
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def _start(pool: WorkerPool, run: RunState, slot: int) -> WorkerProcess:
    if can_fork(run.directory.execution()):
        return pool.start(run.directory)
    return start_worker(run.directory, _gpus(run, slot))


def start_worker(directory: RunDirectory, gpus: list[str] | None = None) -> subprocess.Popen[bytes]:
    """Start the processes of a prepared run.

    Args:
        directory: directory of the run.
        gpus: names of the GPUs that the run may use; None: all that are visible.

    Returns:
        The process. Its exit status is 0, ``EXIT_STOPPED`` (the run continues from its checkpoint)
        or ``EXIT_USER_ERROR``; its output is in the log of the run.
    """
    environment = worker_environment()
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with directory.log.open("ab") as log:
        # In a session of its own: Ctrl-C reaches only this process, which then stops the workers.
        return subprocess.Popen(
            [*worker_command(directory.execution()), str(directory.path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _gpus(run: RunState, slot: int) -> list[str] | None:
    """Return the GPUs of a run that shares the machine with other runs."""
    execution = run.directory.execution()
    if execution.accelerator != "gpu":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(64)]
    return names[slot * execution.devices : (slot + 1) * execution.devices]


def _stop(workers: dict[int, WorkerProcess], runs: list[RunState], received: list[int]) -> None:
    for process in workers.values():
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for index, process in workers.items():
        # a second Ctrl-C stops at once
        while process.poll() is None and time.monotonic() < deadline and len(received) < 2:
            time.sleep(0.05)
        process.kill()
        while process.poll() is None:
            time.sleep(0.01)
        runs[index].read_progress()
        runs[index].update_status(EXIT_STOPPED)


def _tail(directory: RunDirectory) -> list[Record]:
    try:
        with directory.metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []  # not there yet, or damaged; the worker reports it
    # the first line may be cut off; the last is empty or still being written
    whole = lines[:-1] if size <= _TAIL else lines[1:-1]
    return [record for record in map(parsed, whole) if is_metrics_record(record)]
