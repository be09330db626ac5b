"""Many runs, each a process of its own, as many at once as the cores allow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal, Protocol

from apollo_bench.config.execution import Placement
from apollo_bench.config.recipe import RunSpec
from apollo_bench.interrupts import Interrupted, signals
from apollo_bench.launch.worker import COMPLAINT, PARENT, STOPPED
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_bench.workloads.workload import Metric

Status = Literal["waiting", "running", "finished", "diverged", "failed", "stopped"]

POLL = 0.2  # seconds
GRACE = 30.0  # seconds that a worker has for its last checkpoint
_TAIL = 16384  # bytes of the metrics that hold the newest lines


@dataclass
class RunState:
    """What is known of one run while it is going on."""

    directory: RunDirectory
    spec: RunSpec
    steps: int  # in the whole run
    metric: Metric  # of its evaluations
    unit: str  # what speed counts
    units_per_step: float
    status: Status = "waiting"
    step: int = 0
    evaluated: int = 0  # steps at the last evaluation
    loss: float | None = None
    score: float | None = None  # at the last evaluation
    seconds: float = 0.0  # of training so far, over all its processes
    speed: float | None = None  # units a second
    reason: str = ""  # why it failed
    pid: int | None = None  # of its process, while it is running

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.directory.path.name

    @property
    def done(self) -> str:
        """How much of it has been evaluated, as 3/8 epochs."""
        schedule = self.spec.train.schedule
        done = self.evaluated * schedule.length / self.steps
        return f"{round(done, 2):g}/{schedule}"

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes at the pace so far; None before the first line."""
        if not self.step:
            return None
        return self.seconds / self.step * (self.steps - self.step)

    def refresh(self) -> None:
        """Read the newest lines of the metrics."""
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

    def settle(self, status: int | None = None) -> None:
        """Find what became of it: its process has ended with this status, or was not started."""
        self.pid = None
        verdict = self.directory.verdict()
        if verdict is not None:
            self.status = "diverged" if verdict["verdict"] == "diverged" else "finished"
            self.step = verdict["step"]
        elif status == STOPPED:
            self.status = "stopped"
        elif status is not None:
            self.status = "failed"
            lines = self.directory.log.read_text(errors="replace").strip().splitlines()
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            # torchrun has words of its own after a worker's
            told = [line.removeprefix(COMPLAINT) for line in lines if line.startswith(COMPLAINT)]
            self.reason = f"{how}: {(told or lines)[-1]}" if lines and status > 0 else how


class Display(Protocol):
    """Shows the runs while they go on."""

    def update(self, runs: list[RunState], jobs: int) -> None:
        """Show the newest state."""


def run_all(runs: list[RunState], jobs: int, display: Display) -> None:
    """Train all runs that are not finished; a crash of one does not touch the others.

    Args:
        runs: prepared; their status says at the end what became of them.
        jobs: processes at a time.
        display: told several times a second.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after the workers have stopped.
    """
    for run in runs:
        run.refresh()
        run.settle()
    workers: dict[int, subprocess.Popen[bytes]] = {}
    slots: dict[int, int] = {}
    with signals() as received:
        try:
            while any(run.status in ("waiting", "running") for run in runs):
                for index, run in enumerate(runs):
                    if run.status == "waiting" and len(workers) < jobs:
                        slots[index] = min(set(range(jobs)) - {slots[i] for i in workers})
                        workers[index] = start(run.directory, _gpus(run, slots[index]))
                        run.status, run.pid = "running", workers[index].pid
                display.update(runs, jobs)
                time.sleep(POLL)
                for index, process in list(workers.items()):
                    runs[index].refresh()
                    if process.poll() is not None:
                        del workers[index]
                        runs[index].settle(process.returncode)
                if received:
                    raise Interrupted(received[0])
        finally:
            _stop(workers, runs, received)
            display.update(runs, jobs)


def launcher(placement: Placement) -> list[str]:
    """The command that starts a run's processes on this machine; the run's folder follows it."""
    worker = ["-m", "apollo_bench.launch.worker"]
    if placement.processes == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    return [sys.executable, *torchrun, f"--nproc-per-node={placement.devices}", *worker]


def start(directory: RunDirectory, gpus: list[str] | None = None) -> subprocess.Popen[bytes]:
    """Start a prepared run's processes; ``gpus``: which are theirs, None: all that are visible."""
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    environment[PARENT] = str(os.getpid())
    # threads that spin while they wait would bring a machine with other work to a standstill
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with directory.log.open("ab") as log:
        # out of our process group: Ctrl-C reaches this process alone, which then asks the workers
        return subprocess.Popen(
            [*launcher(directory.placement()), str(directory.path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _gpus(run: RunState, slot: int) -> list[str] | None:
    """Those of a run that is one of several at a time."""
    placement = run.directory.placement()
    if placement.accelerator != "gpu":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(64)]
    return names[slot * placement.devices : (slot + 1) * placement.devices]


def _stop(
    workers: dict[int, subprocess.Popen[bytes]], runs: list[RunState], received: list[int]
) -> None:
    for process in workers.values():
        process.terminate()
    deadline = time.monotonic() + GRACE
    for index, process in workers.items():
        # a second Ctrl-C means: now
        while process.poll() is None and time.monotonic() < deadline and len(received) < 2:
            time.sleep(0.05)
        process.kill()
        process.wait()
        runs[index].refresh()
        runs[index].settle(STOPPED)


def _tail(directory: RunDirectory) -> list[Record]:
    try:
        with directory.metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    # the first may have lost its beginning, the last is empty or still being written
    whole = lines[:-1] if size <= _TAIL else lines[1:-1]
    return [json.loads(line) for line in whole]
