"""Determinism, kills, resumption and verdicts of one run."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.source_commit import source_commit
from apollo_bench.training.loop import train
from bench.tests.conftest import TINY
from bench.tests.helpers import (
    PATIENCE,
    WORKER,
    assert_identical,
    kill_worker_when,
    prepared,
    result,
    spec_of,
    stop_after,
)


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "adam", "radam")), "apollo"],
)
def test_two_runs_are_equal_and_so_is_one_stopped_many_times(
    recipe_file: Path, tmp_path: Path, name: str
) -> None:
    spec = spec_of(recipe_file, name)
    whole, task = prepared(tmp_path / "whole", spec)
    assert train(whole, spec, task) == "finished"
    pieces, task = prepared(tmp_path / "pieces", spec)
    outcomes = []
    while not outcomes or outcomes[-1] == "stopped":
        torch.manual_seed(len(outcomes))  # a new process has another state of the generator
        outcomes.append(train(pieces, spec, task, stop_after(4)))
    assert outcomes == ["stopped"] * 4 + ["finished"]  # 24 steps, five at a time
    assert_identical(result(whole), result(pieces))
    other, task = prepared(tmp_path / "other", spec_of(recipe_file, name, seed=4))
    train(other, spec_of(recipe_file, name, seed=4), task)
    assert result(other)["metrics"] != result(whole)["metrics"]


@pytest.mark.slow
def test_killed_and_resumed_is_equal_to_never_killed(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(
        TINY.replace("epochs = 2", "epochs = 3").replace("log_every = 5", "log_every = 1")
    )
    spec = spec_of(recipe_file, "apollo")
    whole, task = prepared(tmp_path / "whole", spec)
    assert train(whole, spec, task) == "finished"

    killed, _ = prepared(tmp_path / "killed", spec)
    for lines in (4, 20):
        kill_worker_when(killed, lambda lines=lines: len(list(killed.records())) >= lines)  # type: ignore[misc]
        with killed.metrics.open("ab") as file:
            file.write(b'{"kind": "step", "torn')  # a line that the kill cut short
    subprocess.run([*WORKER, str(killed.path)], check=True)
    assert_identical(result(whole), result(killed))
    verdict = killed.verdict()
    assert verdict is not None
    times = [record["time"]["seconds"] for record in killed.records()]
    assert times == sorted(times), "wall time runs on over all processes"
    assert verdict["time"]["seconds"] >= times[-1]


def test_metrics_and_manifest_of_a_run(recipe_file: Path, tmp_path: Path) -> None:
    spec = spec_of(recipe_file, "sgd")
    directory, task = prepared(tmp_path / "run", spec)
    train(directory, spec, task)
    records = list(directory.records())
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in steps] == [5, 10, 12, 15, 20, 24]
    assert [(record["epoch"], record["step"]) for record in epochs] == [(1, 12), (2, 24)]
    shares = [5, 5, 2]
    mean = sum(share * line["loss"] for share, line in zip(shares, steps[:3], strict=True)) / 12
    assert epochs[0]["train_loss"] == pytest.approx(mean)
    assert steps[-1]["lr"] == pytest.approx(0.0, abs=1e-12)  # the cosine's end
    verdict = directory.verdict()
    assert verdict is not None
    assert verdict["accuracy"] == epochs[-1]["accuracy"]
    assert all(0 < epoch["time"]["optimizer_ms"] < epoch["time"]["step_ms"] for epoch in epochs)
    manifest = json.loads(directory.manifest.read_text())
    assert RunSpec.model_validate(manifest["recipe"]) == spec
    assert manifest["seed"] == 3
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["machine"]["cores"] >= 1
    assert manifest["command"] == ["test"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(manifest["created"])
    assert 0 <= age.total_seconds() < PATIENCE
    assert manifest["commit"] == source_commit()
    assert manifest["search"] is None


def test_the_best_weights_are_kept(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 5"))
    spec = spec_of(recipe_file, "adam")
    directory, task = prepared(tmp_path / "run", spec)
    train(directory, spec, task)
    accuracies = [line["accuracy"] for line in directory.records() if line["kind"] == "evaluation"]
    best = torch.load(directory.best, weights_only=True)
    assert best["accuracy"] == max(accuracies)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    network = task.model()
    network.load_state_dict(best["model"])
    network.eval()
    with torch.no_grad():
        assert task.metrics(task.evaluate(network))["accuracy"] == best["accuracy"]


def shown_by_tensorboard(directory: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory.events))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics_once(recipe_file: Path, tmp_path: Path) -> None:
    """Also when a killed run had written events beyond its checkpoint."""
    spec = spec_of(recipe_file, "apollo")
    directory, task = prepared(tmp_path / "run", spec)
    train(directory, spec, task, stop_after(7))
    kept = directory.checkpoint.read_bytes()
    train(directory, spec, task, stop_after(7))
    directory.checkpoint.write_bytes(kept)
    train(directory, spec, task)
    shown = shown_by_tensorboard(directory)
    assert set(shown) == {
        *("step/loss", "step/lr", "step/gradient_norm"),
        *("evaluation/train_loss", "evaluation/accuracy", "evaluation/test_loss"),
    }
    for tag, points in shown.items():
        kind, name = tag.split("/")
        lines = [line for line in directory.records() if line["kind"] == kind]
        assert points == [(line["step"], pytest.approx(line[name])) for line in lines]


def test_a_finished_run_is_skipped(recipe_file: Path, tmp_path: Path) -> None:
    spec = spec_of(recipe_file, "sgd")
    directory, task = prepared(tmp_path / "run", spec)
    train(directory, spec, task)
    files = {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
    assert len(files) == 6  # run, metrics, result, newest, best, events
    assert train(directory, spec, task) == "finished"
    assert {path: path.read_bytes() for path in files} == files


def test_a_directory_with_another_recipe_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    spec = spec_of(recipe_file, "sgd")
    directory, task = prepared(tmp_path / "run", spec)
    before = directory.manifest.read_bytes()
    recipe_file.write_text(TINY.replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(
        ExperimentError, match=r"other settings \(optimizer.lr: 0.1 there, 0.2 asked for\)"
    ):
        directory.prepare(spec_of(recipe_file, "sgd"), task.fingerprint, None, [])
    with pytest.raises(ExperimentError, match=r"other settings \(the data\)"):
        directory.prepare(spec, "another", None, [])
    assert directory.manifest.read_bytes() == before


def test_a_setting_added_after_the_run_has_its_default(recipe_file: Path, tmp_path: Path) -> None:
    spec = spec_of(recipe_file, "apollo")
    directory, task = prepared(tmp_path / "run", spec)
    manifest = directory.read()
    del manifest["recipe"]["optimizer"]["rebound"], manifest["recipe"]["ranges"]
    directory.manifest.write_text(json.dumps(manifest))
    directory.prepare(spec, task.fingerprint, None, [])
    other = spec.optimizer.model_copy(update={"rebound": "belief"})
    with pytest.raises(ExperimentError, match="rebound: 'constant' there, 'belief' asked for"):
        directory.prepare(spec.model_copy(update={"optimizer": other}), task.fingerprint, None, [])


class InterruptedHereError(Exception):
    pass


def test_an_interrupted_evaluation_costs_no_training(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(recipe_file, "apollo")
    whole, task = prepared(tmp_path / "whole", spec)
    train(whole, spec, task)
    broken, task = prepared(tmp_path / "broken", spec)
    evaluate = type(task).evaluate
    for place in (1, 2):  # in each epoch's evaluation
        left = iter([True] * (place - 1))

        def fail(self: Any, *arguments: Any, left: Any = left) -> Any:
            if next(left, False):
                return evaluate(self, *arguments)
            raise InterruptedHereError

        monkeypatch.setattr(type(task), "evaluate", fail)
        with pytest.raises(InterruptedHereError):
            train(broken, spec, task)
        state = torch.load(broken.checkpoint, weights_only=True)
        assert state["step"] == 12 * min(place, 2)
    monkeypatch.undo()
    assert train(broken, spec, task) == "finished"
    assert_identical(result(whole), result(broken))


def test_an_update_after_the_last_loss_can_diverge_too(recipe_file: Path, tmp_path: Path) -> None:
    text = TINY.replace("lr = 0.1", "lr = 1e30").replace("epochs = 2", "epochs = 1")
    recipe_file.write_text(text.replace("train_examples = 384", "train_examples = 32"))
    spec = spec_of(recipe_file, "sgd")
    directory, task = prepared(tmp_path / "run", spec)
    assert task.steps_per_epoch == 1
    assert train(directory, spec, task) == "diverged"
    [line] = directory.records()
    assert line["kind"] == "step"
    assert line["loss"] < 100
    verdict = directory.verdict()
    assert verdict is not None
    assert "accuracy" not in verdict


@pytest.mark.slow
def test_a_fork_does_not_keep_the_lock(recipe_file: Path, tmp_path: Path) -> None:
    directory, _ = prepared(tmp_path / "run", spec_of(recipe_file, "sgd"))
    hold = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from apollo_bench.runs.run_directory import RunDirectory\n"
        "from apollo_bench.launch.worker import lock_run\n"
        "file = lock_run(RunDirectory(Path(sys.argv[1])))\n"
        "if os.fork() == 0:\n    time.sleep(20)\n    os._exit(0)\n"
        "print('held', flush=True)\ntime.sleep(20)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(directory.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    done = subprocess.run([*WORKER, str(directory.path)], capture_output=True, text=True)
    assert "another process is training this run" in done.stderr
    process.kill()
    process.wait()
    subprocess.run([*WORKER, str(directory.path)], check=True)


def test_divergence_is_a_verdict(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("lr = 0.1", "lr = 1e38"))
    spec = spec_of(recipe_file, "sgd")
    directory, task = prepared(tmp_path / "run", spec)
    assert train(directory, spec, task) == "diverged"
    verdict = directory.verdict()
    assert verdict is not None
    assert verdict["verdict"] == "diverged"
    assert verdict["step"] < verdict["steps"] == 24
    assert "accuracy" not in verdict
    assert train(directory, spec, task) == "diverged"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_in_one_line(recipe_file: Path, tmp_path: Path) -> None:
    spec = spec_of(recipe_file, "sgd")
    directory, _ = prepared(tmp_path / "run", spec)
    directory.checkpoint.write_bytes(b"no checkpoint")
    done = subprocess.run([*WORKER, str(directory.path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{directory.checkpoint}: the checkpoint cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
