"""The main job as a user runs it: interruption, crashes, report, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.launch import run_experiment, run_scheduler
from apollo_bench.report import narrative, page
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification.image_workload import ACCURACY
from bench.tests.conftest import TINY
from bench.tests.helpers import PATIENCE, assert_identical, prepared, result

CLI = [sys.executable, "-m", "apollo_bench"]
CACHES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")


def use_caches_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo at the test's end what the command sets in this process."""
    for variable in CACHES:
        monkeypatch.setenv(variable, str(folder / "cache"))


class Quiet:
    """Display that shows nothing."""

    def update(self, runs: list[run_scheduler.RunState], jobs: int) -> None:
        pass


def state_of(directory: RunDirectory, spec: RunSpec, steps: int) -> run_scheduler.RunState:
    return run_scheduler.RunState(directory, spec, steps, ACCURACY, "images", 32.0)


def states(recipe_file: Path, out: Path, names: list[str]) -> list[run_scheduler.RunState]:
    runs = []
    for spec in recipe.load(str(recipe_file)).runs(names, 1):
        directory, task = prepared(out / "runs" / spec.label, spec)
        runs.append(state_of(directory, spec, spec.train.schedule.steps(task.steps_per_epoch)))
    return runs


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 4"))
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work, home):
        folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in CACHES}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    out = tmp_path / "out"
    command = [
        *(*CLI, "compare", str(recipe_file), "--out", str(out)),
        *("--optimizers", "sgd,apollo", "--seeds", "1", "--jobs", "2"),
    ]
    process = subprocess.Popen(
        command, cwd=work, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    runs = [
        RunDirectory(out / "runs" / f"fashion-mnist-{name}-cosine-seed3")
        for name in ("sgd", "apollo")
    ]
    deadline = time.monotonic() + PATIENCE
    while not all(any(run.records()) for run in runs):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert f"Continue with:  apollo-bench compare {recipe_file}" in output
    assert "Traceback" not in output
    assert all(run.checkpoint.exists() for run in runs)
    assert any(run.verdict() is None for run in runs)

    again = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert again.returncode == 0, again.stderr
    assert "Best mean test accuracy" in again.stdout
    assert "sgd-cosine-seed3" in again.stderr
    assert (out / "report.html").exists()
    assert not list(work.iterdir()), "wrote outside its output folder"
    assert not list(home.iterdir()), "wrote outside its output folder"
    for run in runs:
        spec = run.spec()
        whole, task = prepared(tmp_path / "whole" / spec.name, spec)
        train(whole, spec, task)
        assert_identical(result(whole), result(run))


class Killer:
    """Kills the run of one optimizer as soon as it has begun."""

    def __init__(self, name: str) -> None:
        self.name, self.killed = name, 0

    def update(self, runs: list[run_scheduler.RunState], jobs: int) -> None:
        for run in runs:
            if run.spec.name == self.name and run.pid is not None and not self.killed:
                os.kill(run.pid, signal.SIGKILL)
                self.killed += 1


@pytest.mark.slow
def test_crash_and_divergence_leave_the_other_runs_alone(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("lr = 0.1", "lr = 1e38"))
    runs = states(recipe_file, tmp_path, ["adam", "sgd", "apollo"])
    killer = Killer("adam")
    run_scheduler.run_all(runs, 2, killer)
    assert killer.killed == 1
    assert [run.status for run in runs] == ["failed", "diverged", "finished"]
    assert runs[0].reason == "killed by signal 9"
    [summary] = page.write([tmp_path], tmp_path / "report")
    rows = {row.name: row for row in summary.rows}
    assert rows["adam"].remark == "0 of 1 finished, 1 unfinished"
    assert rows["sgd"].remark == "0 of 1 finished, 1 diverged"
    assert rows["sgd"].score is None
    assert rows["apollo"].remark == "1"
    assert "Some runs have not finished" in narrative.headline(summary)
    # the next call retries the crashed run only
    before = runs[2].directory.result.stat().st_mtime_ns
    second = states(recipe_file, tmp_path, ["adam", "sgd", "apollo"])
    run_scheduler.run_all(second, 2, Quiet())
    assert [run.status for run in second] == ["finished", "diverged", "finished"]
    assert runs[2].directory.result.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compare", "mnist"], "no task 'mnist'; there are cifar10, fashion-mnist"),
        (["compare", "--optimizers", "adagard"], "no optimizer 'adagard'"),
        (["compare", "--optimizers", ","], "--optimizers names none"),
        (["compare", "--schedules", "linear"], "no schedule 'linear'"),
        (["compare", "--set", "train.batch_size"], "--set is 'train.batch_size', allowed is key="),
        (["compare", "--set", "optimizer.lrr=1"], "optimizers.sgd.lrr: unknown key, allowed are"),
        (["compare", "--data", "/nowhere"], "--data is '/nowhere'; it needs a TASK: apollo-bench"),
        (
            ["compare", "fashion-mnist", "--data", "/nowhere"],
            "/nowhere/train-images-idx3-ubyte.gz: no such file",
        ),
        (["compare", "--out", "/dev/null/x"], "/dev/null/x"),
        (["train", "fashion-mnist", "--optimizer", "x"], "no optimizer 'x'"),
        (["report", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use_caches_below(tmp_path, monkeypatch)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("apollo-bench: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_with_other_settings_is_refused(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_caches_below(tmp_path, monkeypatch)
    out = tmp_path / "out"
    states(recipe_file, out, ["sgd"])
    recipe_file.write_text(TINY.replace("lr = 0.1", "lr = 0.3"))
    arguments = ["compare", str(recipe_file), "--out", str(out), "--optimizers", "sgd"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "optimizer.lr: 0.1 there, 0.3 asked for" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_is_written_where_not_all_can_be_trained(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_caches_below(tmp_path, monkeypatch)
    out = tmp_path / "out"
    states(recipe_file, out, ["sgd"])
    there = sorted(out.rglob("*"))

    def refused(text: str, optimizers: str) -> str:
        recipe_file.write_text(text)
        arguments = ["compare", str(recipe_file), "--out", str(out), "--optimizers", optimizers]
        done = CliRunner().invoke(app, [*arguments, "--seeds", "1"])
        assert done.exit_code == 2
        assert sorted(out.rglob("*")) == there
        return done.stderr

    assert "optimizer.lr: 0.1 there" in refused(TINY.replace("lr = 0.1", "lr = 0.3"), "apollo,sgd")
    # errors of the report are found before hours of training
    assert "differ in train: they cannot" in refused(
        TINY.replace("epochs = 2", "epochs = 3"), "adam"
    )


def test_two_runs_of_one_name_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    more = '[schedules.long-cosine]\nkind = "cosine"\nepochs = 4\n\n[optimizers.sgd-long]\n'
    more += 'method = "sgd"\nlr = 0.1\n\n[optimizers.sgd]'
    recipe_file.write_text(TINY.replace("[optimizers.sgd]", more))
    plan = recipe.load(str(recipe_file))
    specs = [plan.run("sgd", 1, "long-cosine"), plan.run("sgd-long", 1, "cosine")]
    machines = run_experiment.Machines("cpu", 1, 1, 1, "ddp")
    with pytest.raises(
        ExperimentError,
        match="sgd with schedule long-cosine, and sgd-long with schedule cosine; rename an opt",
    ):
        run_experiment.train_runs(
            run_experiment.Request(specs, tmp_path / "out", None, machines), print
        )
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_task_is_not_continued(recipe_file: Path, tmp_path: Path) -> None:
    spec = recipe.load(str(recipe_file)).run("sgd", 3)
    directory, task = prepared(tmp_path / "run", spec)
    other = recipe.load("wordnet").run("sgd", 3)
    with pytest.raises(ExperimentError, match="holds a run of the task 'fashion-mnist'; choose"):
        directory.check(other, task.fingerprint, Execution())


def test_an_unfinished_run_may_move(recipe_file: Path, tmp_path: Path) -> None:
    spec = recipe.load(str(recipe_file)).run("sgd", 3)
    directory, task = prepared(tmp_path / "run", spec, Execution(threads=2))

    def prepare(execution: Execution, data: Path | None = None, keep: bool = True) -> None:
        directory.prepare(spec, task.fingerprint, data, ["test"], execution, (), keep)

    prepare(Execution(), tmp_path)
    assert directory.execution() == Execution(threads=2)
    assert directory.read()["data"]["folder"] == str(tmp_path)
    prepare(Execution(threads=3), keep=False)
    assert directory.execution() == Execution(threads=3)
    assert directory.read()["data"]["folder"] is None
    prepare(Execution(accelerator="gpu"))
    assert directory.execution() == Execution(accelerator="gpu", threads=3)
    prepare(Execution(devices=2))  # allowed, because nothing has been trained
    directory.checkpoint.write_bytes(b"")
    message = r"holds an unfinished run of 2 processes \(--devices 2\), 1 asked for"
    with pytest.raises(ExperimentError, match=message):
        prepare(Execution())
    directory.result.write_text(
        '{"verdict": "finished", "step": 24, "steps": 24, "time": {"seconds": 1.0}}'
    )
    directory.metrics.write_text(
        '{"kind": "evaluation", "epoch": 2, "step": 24, "train_loss": 1.0, "accuracy": 50.0, '
        '"time": {"seconds": 1.0}}\n'
    )
    before = directory.manifest.read_text()
    prepare(Execution(accelerator="gpu", threads=7), keep=False)
    assert directory.manifest.read_text() == before


def test_train_and_report_commands(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_caches_below(tmp_path, monkeypatch)
    out = tmp_path / "out"
    command = ["train", str(recipe_file), "--optimizer", "adam", "--seed", "8", "--out", str(out)]
    command += ["--threads", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    run = out / "runs" / "fashion-mnist-adam-cosine-seed8"
    assert str(run) in done.stdout
    assert RunDirectory(run).execution().threads == 1
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page" / "report.html").exists()
    assert (run / "metrics.jsonl").exists()


def test_tasks_command() -> None:
    done = CliRunner().invoke(app, ["tasks"])
    assert done.exit_code == 0
    assert all(name in done.stdout for name in tasks.TASKS)
