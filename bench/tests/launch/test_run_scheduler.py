"""The state of a run after its process has ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.launch.run_scheduler import RunState
from apollo_bench.launch.worker import ERROR_PREFIX, EXIT_STOPPED
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.workloads.image_classification.image_workload import ACCURACY
from bench.tests.report.made_up_runs import made_up


@pytest.mark.parametrize(
    ("status", "shown", "reason"),
    [
        (EXIT_STOPPED, "stopped", ""),
        (-signal.SIGKILL, "failed", "killed by signal 9"),
        (1, "failed", "exit status 1: no such file"),
        (None, "waiting", ""),
    ],
)
def test_the_exit_status_of_a_worker(
    tmp_path: Path, status: int | None, shown: str, reason: str
) -> None:
    spec = recipe.load("fashion-mnist").run("sgd", 1)
    directory = RunDirectory(tmp_path)
    directory.prepare(spec, "made up", None, ["test"], Execution())
    directory.log.write_text(f"a warning\n{ERROR_PREFIX}no such file\ntorchrun's own line\n")
    run = RunState(directory, spec, 100, ACCURACY, "images", 32.0)
    run.update_status(status)
    assert (run.status, run.reason) == (shown, reason)


@pytest.mark.parametrize("verdict", ["finished", "diverged"])
def test_a_run_with_a_result_has_ended_whatever_its_process_did(
    tmp_path: Path, verdict: str
) -> None:
    spec = recipe.load("fashion-mnist").run("sgd", 1)
    directory = made_up(tmp_path, spec, [50.0, 60.0], verdict)
    run = RunState(directory, spec, 2, ACCURACY, "images", 32.0)
    run.update_status(-signal.SIGKILL)
    assert (run.status, run.step) == (verdict, 2)
