"""Training does not depend on how a batch is divided over processes or micro-batches."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution, available_cores, plan_execution
from apollo_bench.errors import ExperimentError
from apollo_bench.launch.run_scheduler import worker_command
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.loop import train
from bench.tests.conftest import TINY
from bench.tests.helpers import (
    PATIENCE,
    assert_identical,
    prepared,
    result,
    wait_for_checkpoint,
)
from bench.tests.training import train_linear

LINEAR = ["-m", "bench.tests.training.train_linear"]


def run(command: list[str], timeout: float = PATIENCE) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr


def weights(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(RunDirectory(path).checkpoint, weights_only=True)["model"]
    return state


@pytest.mark.slow
def test_two_processes_train_as_one(recipe_file: Path, tmp_path: Path) -> None:
    """The batch is the same, and its mean is that of the processes' means."""
    one, two = tmp_path / "one", tmp_path / "two"
    run([sys.executable, *LINEAR, str(one), str(recipe_file)])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run([*torchrun, *LINEAR, str(two), str(recipe_file)])
    for name, wanted in weights(one).items():
        torch.testing.assert_close(weights(two)[name], wanted, rtol=1e-4, atol=1e-5)
    verdicts = [RunDirectory(path).verdict() for path in (one, two)]
    assert verdicts[0] is not None
    assert verdicts[1] is not None
    assert verdicts[1]["train_loss"] == pytest.approx(verdicts[0]["train_loss"], rel=1e-4)
    assert verdicts[1]["accuracy"] == pytest.approx(verdicts[0]["accuracy"], abs=0.2)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 4"))
    plan = recipe.load(str(recipe_file))
    spec = plan.run("apollo", 3)
    results = []
    for name in ("whole", "killed"):
        directory, _ = prepared(tmp_path / name, spec, Execution(devices=2))
        command = [*worker_command(directory.execution()), str(directory.path)]
        if name == "killed":
            process = subprocess.Popen(command, start_new_session=True)
            wait_for_checkpoint(process, directory)
            subprocess.run(["pkill", "-KILL", "-f", str(directory.path)], check=True)
            process.wait(timeout=PATIENCE)
            assert process.returncode == -signal.SIGKILL
            assert directory.verdict() is None
        run(command)
        results.append(result(directory))
    assert_identical(*results)


@pytest.mark.slow
def test_no_process_outlives_the_command(recipe_file: Path, tmp_path: Path) -> None:
    """Workers end with a killed command, although torchrun stands between."""
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 40"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "apollo_bench", "train", str(recipe_file)]
    command += ["--optimizer", "sgd", "--devices", "2", "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    directory = RunDirectory(out / "runs" / "fashion-mnist-sgd-cosine-seed3")
    wait_for_checkpoint(process, directory)
    process.kill()
    process.wait()
    pattern = ["pgrep", "-f", f"worker {directory.path.resolve()}"]
    deadline = time.monotonic() + PATIENCE
    while subprocess.run(pattern, capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert directory.verdict() is None


def test_parts_of_a_batch_add_up_to_it(recipe_file: Path, tmp_path: Path) -> None:
    """Accumulated parts, also of unequal size, give the mean of the batch."""
    found = []
    for parts in (1, 3):
        recipe_file.write_text(TINY.replace("[train]", f"[train]\naccumulate = {parts}"))
        path = tmp_path / str(parts)
        train_linear.run(path, recipe_file)
        found.append(weights(path))
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_the_same(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    found = []
    for word in ("false", "true"):
        recipe_file.write_text(TINY.replace("[train]", f"[train]\ncompile = {word}"))
        run([sys.executable, *LINEAR, str(tmp_path / word), str(recipe_file)])
        found.append(weights(tmp_path / word))
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-5)


def test_a_clipped_gradient_moves_less(recipe_file: Path, tmp_path: Path) -> None:
    moved = []
    for line in ("", "clip_norm = 1e-4"):
        recipe_file.write_text(TINY.replace("[train]", f"[train]\n{line}"))
        spec = recipe.load(str(recipe_file)).run("sgd", 3)
        directory, task = prepared(tmp_path / f"clip{line[:4]}", spec)
        torch.manual_seed(spec.seed)
        before = {n: p.detach() for n, p in task.model().named_parameters()}
        assert train(directory, spec, task) == "finished"
        after = weights(directory.path)
        moved.append(sum(float((after[n] - p).norm()) for n, p in before.items()))
    assert moved[1] < moved[0] / 20  # weight decay moves them too


def test_bfloat16(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("[train]", '[train]\nprecision = "bf16-mixed"'))
    spec = recipe.load(str(recipe_file)).run("apollo", 3)
    directory, task = prepared(tmp_path / "narrow", spec)
    assert train(directory, spec, task) == "finished"
    assert all(x.dtype in (torch.float32, torch.int64) for x in weights(directory.path).values())


def test_sharing_a_machine() -> None:
    jobs, execution = plan_execution("cpu", 2, 1)
    assert (jobs, execution.devices) == (1, 2)
    there = available_cores()
    assert plan_execution("cpu", 1, None) == (there, Execution())
    assert plan_execution("cpu", 1, None, there) == (1, Execution(threads=there))
    assert plan_execution("cpu", 1, 3, 5) == (3, Execution(threads=5))
    with pytest.raises(ExperimentError, match="--accelerator is 'tpu', allowed are cpu, gpu"):
        plan_execution("tpu", 1, None)
    if not torch.cuda.is_available():
        with pytest.raises(ExperimentError, match="1 GPUs are needed, there are 0"):
            plan_execution("gpu", 1, None)
