"""Helpers that prepare, train, kill and compare runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.workloads import tasks
from apollo_bench.workloads.workload import Workload

# seconds that a real process may take: a bound for hangs, not for busy machines
PATIENCE = 300
ALONE = Execution()
WORKER = [sys.executable, "-m", "apollo_bench.launch.worker"]


def prepared(
    path: Path, spec: RunSpec, execution: Execution = ALONE, folder: Path | None = None
) -> tuple[RunDirectory, Workload]:
    task = tasks.make(spec, folder)
    directory = RunDirectory(path)
    directory.prepare(spec, task.fingerprint, folder, ["test"], execution)
    return directory, task


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "time"}


def result(directory: RunDirectory) -> dict[str, Any]:
    """Return everything that must be equal in two runs of one seed."""
    state = torch.load(directory.checkpoint, weights_only=True)
    verdict = directory.verdict()
    assert verdict is not None
    return {
        "model": state["model"],
        "optimizer": state["optimizer"],
        "processes": state["processes"],
        "metrics": [without_times(record) for record in directory.records()],
        "verdict": without_times(verdict),
    }


def assert_identical(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_identical(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_identical(left, right)
    else:
        assert one == two


def spec_of(recipe_file: Path, name: str, seed: int = 3) -> RunSpec:
    return recipe.load(str(recipe_file)).run(name, seed)


def stop_after(steps: int) -> Callable[[], bool]:
    """Return a ``stop`` for ``train`` that is False for this many steps, and then True."""
    left = iter([False] * steps)
    return lambda: next(left, True)


def wait_for_checkpoint(
    process: subprocess.Popen[bytes],
    directory: RunDirectory,
    ready: Callable[[], bool] = lambda: True,
) -> None:
    """Return once the process has written a checkpoint and is ready; fail if it ends before."""
    deadline = time.monotonic() + PATIENCE
    while not (directory.checkpoint.exists() and ready()):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_worker_when(directory: RunDirectory, ready: Callable[[], bool]) -> None:
    """Train a prepared run in a process; kill it once there is a checkpoint and it is ready."""
    process = subprocess.Popen([*WORKER, str(directory.path)])
    wait_for_checkpoint(process, directory, ready)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert directory.verdict() is None
