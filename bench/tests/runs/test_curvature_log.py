"""--diagnostics: the files that it adds to a run, and that training is unchanged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.errors import ExperimentError
from apollo_bench.report import page
from apollo_bench.runs import archive, curvature_log
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.loop import train
from apollo_qn.diagnostics import TensorDiagnostics, overall
from bench.tests.conftest import TINY
from bench.tests.helpers import (
    WORKER,
    assert_identical,
    kill_worker_when,
    prepared,
    result,
    spec_of,
    stop_after,
)
from bench.tests.training.test_loop import shown_by_tensorboard
from bench.tests.training.test_process_group import run as torchrun
from bench.tests.workloads.language_modeling.test_language_workload import SETTINGS, texts  # noqa: F401  (a fixture)

LINES = [5, 10, 15, 20]  # of 24 steps


def lines_of(directory: RunDirectory) -> dict[int, list[TensorDiagnostics]]:
    found = {line["step"]: curvature_log.read(line) for line in directory.diagnostics_records()}
    assert len(found) == len(directory.diagnostics.read_bytes().splitlines()), "a step twice"
    return found


def test_a_run_is_the_same_with_it_and_without(recipe_file: Path, tmp_path: Path) -> None:
    """Runs that are resumed, sometimes without --diagnostics, have no duplicate or wrong line."""
    spec = spec_of(recipe_file, "apollo")
    plain, task = prepared(tmp_path / "plain", spec)
    assert train(plain, spec, task) == "finished"
    measured, task = prepared(tmp_path / "measured", spec)
    assert train(measured, spec, task, diagnose_every=5) == "finished"
    assert not plain.diagnostics.exists()
    assert_identical(result(measured), result(plain))
    assert measured.metrics.read_bytes() != b""

    lines = lines_of(measured)
    assert list(lines) == LINES
    state = torch.load(measured.checkpoint, weights_only=True)
    names = [name for name, _ in task.model().named_parameters()]
    for step, tensors in lines.items():
        assert [one.name for one in tensors] == names
        assert {one.step for one in tensors} == {step}
        assert all(one.secant_correction is not None for one in tensors)
    assert [one.numel for one in lines[5]] == [
        entry["exp_avg"].numel() for entry in state["optimizer"]["state"].values()
    ]
    assert [line["epoch"] for line in measured.diagnostics_records()] == [
        step / 12 for step in LINES
    ]
    shown = shown_by_tensorboard(measured)
    assert shown["curvature.negative/all"] == [
        (step, pytest.approx(overall(tensors).negative)) for step, tensors in lines.items()
    ]
    assert [step for step, _ in shown[f"curvature.step_ratio/{names[0]}"]] == LINES

    pieces, task = prepared(tmp_path / "pieces", spec)
    outcomes: list[str] = []
    while not outcomes or outcomes[-1] == "stopped":
        every = None if len(outcomes) == 2 else 5  # steps 9 to 12 are not measured
        outcomes.append(train(pieces, spec, task, stop_after(3), diagnose_every=every))
    assert len(outcomes) == 6
    assert_identical(result(pieces), result(plain))
    assert lines_of(pieces) == {step: lines[step] for step in LINES if step != 10}


def test_lines_after_the_checkpoint_are_written_again_once(
    recipe_file: Path, tmp_path: Path
) -> None:
    """The log holds lines that a killed run wrote after its checkpoint."""
    spec = spec_of(recipe_file, "apollo")
    directory, task = prepared(tmp_path / "run", spec)

    def go_on(steps: int) -> str:
        return train(directory, spec, task, stop_after(steps), diagnose_every=1)

    assert go_on(7) == "stopped"
    kept = directory.checkpoint.read_bytes()
    assert go_on(7) == "stopped"
    directory.checkpoint.write_bytes(kept)
    assert go_on(99) == "finished"
    assert list(lines_of(directory)) == list(range(1, 25))


@pytest.mark.slow
def test_killed_and_resumed(recipe_file: Path, tmp_path: Path) -> None:
    """Lines that were written after the checkpoint are written again, once."""
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 3"))
    spec = spec_of(recipe_file, "apollo")
    whole, task = prepared(tmp_path / "whole", spec)
    assert train(whole, spec, task, diagnose_every=1) == "finished"
    killed, task = prepared(tmp_path / "killed", spec)
    killed.prepare(spec, task.fingerprint, None, ["test"], diagnose_every=1)
    assert killed.diagnose_every() == 1
    kill_worker_when(killed, lambda: len(list(killed.diagnostics_records())) >= 8)
    with killed.diagnostics.open("ab") as file:
        file.write(b'{"step": 1, "tensors": [')  # a line that the kill cut short
    subprocess.run([*WORKER, str(killed.path)], check=True)
    assert_identical(result(killed), result(whole))
    assert killed.diagnostics.read_bytes() == whole.diagnostics.read_bytes()
    assert len(lines_of(killed)) == 36
    times = [line["time"] for line in killed.records() if line["kind"] == "evaluation"]
    assert [one["optimizer_ms"] for one in times] == [None] * 3, "a measured step was timed"


def test_lines_are_kept_by_the_step(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    whole = [json.dumps({"step": step}).encode() + b"\n" for step in (2, 4, 6)]
    for content, step, kept in (
        (whole, 6, 3),
        (whole, 5, 2),
        (whole, 0, 0),
        ([whole[0], b"{}\n", whole[2]], 9, 1),
        ([whole[0], whole[1][:-1]], 9, 1),
        ([], 9, 0),
    ):
        path.write_bytes(b"".join(content))
        assert curvature_log._bytes_until(path, step) == len(b"".join(content[:kept]))


def test_numbers_that_json_lacks() -> None:
    [tensor] = curvature_log.read(
        {"tensors": [curvature_log._jsonable({"name": "a", "step_ratio": float("inf"), **OTHERS})]}
    )
    assert tensor.step_ratio != tensor.step_ratio
    assert tensor.negative == 0.5


OTHERS: dict[str, Any] = {
    **dict.fromkeys(("numel", "step"), 2),
    **dict.fromkeys(("lr", "threshold", "negative", "rectified", "secant_correction"), 0.5),
    **{f"curvature_{name}": 1.0 for name in ("mean", "rms", "min", "max")},
    **dict.fromkeys(("parameter_norm", "step_norm", "rate_min", "rate_max"), 1.0),
}


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*arguments])
    return done.exit_code, done.output


@pytest.mark.slow
def test_the_command_line(recipe_file: Path, tmp_path: Path) -> None:
    """--diagnostics takes a number or none; the run continues, and the report shows the curves."""
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 3"))
    out = tmp_path / "out"
    command = ["train", str(recipe_file), "--optimizer", "apollo", "--out", str(out)]
    command += ["--threads", "1"]
    directory = RunDirectory(out / "runs" / "fashion-mnist-apollo-cosine-seed3")
    spec = spec_of(recipe_file, "apollo")
    for arguments, message in (
        (["--diagnose-every", "0"], "Invalid value"),
        (["--diagnose-every", "-5"], "Invalid value"),
        (["--optimizer", "sgd", "--diagnostics"], "the optimizer 'sgd' (sgd) has none"),
    ):
        code, said = invoke(*command, *arguments)
        assert code == 2
        assert message in said
    values = "sweeps.lr-robustness.values=[0.5, 1]"
    sweep = ["sweep", str(recipe_file), "lr-robustness", "--set", values, "--out", str(out)]
    code, said = invoke(*sweep, "--optimizers", "apollo,sgd", "--diagnostics")
    assert code == 2
    assert "the optimizer 'sgd' (sgd) has none" in said
    assert not out.exists(), "something was written"

    directory, task = prepared(directory.path, spec)
    assert train(directory, spec, task, stop_after(7)) == "stopped"
    assert directory.diagnose_every() is None
    code, said = invoke(*command[:2], "--diagnostics", *command[2:])
    assert code == 0, said
    assert directory.diagnose_every() == 25
    assert list(lines_of(directory)) == [25]

    page.write([out], out)
    assert (out / "curvature.png").read_bytes().startswith(b"\x89PNG")
    assert "of the runs with --diagnostics" in (out / "report.html").read_text()
    page.show(page.write([out], out), Console(quiet=True))


@pytest.mark.slow
def test_every_step_measured_is_reported(recipe_file: Path, tmp_path: Path) -> None:
    """With every step measured no step is timed; all schedules and seeds are drawn."""
    text = TINY + '\n[schedules.constant]\nkind = "constant"\nepochs = 2\n'
    recipe_file.write_text(text.replace("train_examples = 384", "train_examples = 64"))
    plan = recipe.load(str(recipe_file))
    for schedule in ("cosine", "constant"):
        for seed in (3, 4):
            spec = plan.run("apollo", seed, schedule)
            directory, task = prepared(tmp_path / "runs" / spec.label, spec)
            assert train(directory, spec, task, diagnose_every=1) == "finished"
    [summary] = page.write([tmp_path], tmp_path)
    assert [len(run.curvature) for run in summary.runs] == [4] * 4
    assert all(run.optimizer_ms is None for run in summary.runs)
    page.show([summary], Console(quiet=True))

    kept = tmp_path / "kept"
    assert archive.write([RunDirectory(run.path) for run in summary.runs], kept) == 4
    [again] = page.write([kept], kept)
    # compared by repr, because NaN differs from NaN
    assert {run.path.name: repr(run.curvature) for run in again.runs} == {
        run.path.name: repr(run.curvature) for run in summary.runs
    }
    drawn = (tmp_path / "curvature.svg").read_bytes()
    assert (kept / "curvature.svg").read_bytes() == drawn
    table = kept / archive.CURVATURE
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(ExperimentError, match=r"curvature.csv: does not match runs.json; write"):
        archive.read(kept)
    plain = RunDirectory(summary.runs[0].path)
    plain.diagnostics.unlink()
    archive.write([plain], kept)
    assert not table.exists(), "of runs that are no longer there"
    [one] = archive.read(kept)
    assert one.curvature == []


def test_another_optimizer_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    spec = spec_of(recipe_file, "radam")
    directory, task = prepared(tmp_path / "run", spec)
    with pytest.raises(ExperimentError, match=r"measures Apollo's curvature.*'radam'"):
        train(directory, spec, task, diagnose_every=5)
    assert not directory.metrics.exists()


@pytest.mark.slow
def test_sharded_weights(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two processes under FSDP2 write the same log as one process."""
    settings = [*SETTINGS["phrases"], "model.dropout=0.0", "schedule.updates=4"]
    settings += ["train.evaluate_every=4", "train.average_checkpoints=1"]
    spec = recipe.load("phrases", settings).run("apollo", 3)
    found = []
    for name, execution in (
        ("one", Execution()),
        ("two", Execution(devices=2, strategy="fsdp2")),
    ):
        directory, task = prepared(tmp_path / name, spec, execution, texts)
        directory.prepare(spec, task.fingerprint, texts, ["test"], execution, diagnose_every=2)
        if name == "one":
            assert train(directory, spec, task, diagnose_every=2) == "finished"
        else:
            done = torchrun("bench.tests.training.train_prepared", str(directory.path))
            assert done.returncode == 0, done.stderr
        found.append(lines_of(directory))
    one, two = found
    assert list(two) == list(one) == [2, 4]
    assert sum(tensor.step_norm < 1e-7 for tensor in one[4]) < len(one[4]) / 4
    for step in one:
        assert [x.name for x in two[step]] == [x.name for x in one[step]]
        for left, right in zip(two[step], one[step], strict=True):
            assert (left.numel, left.step, left.lr) == (right.numel, right.step, right.lr)
            if right.step_norm < 1e-7:
                continue  # the bias of the attention keys: its gradient is rounding error alone
            # gradients are averaged in another order, and B magnifies the rounding by differences
            for field in ("parameter_norm", "step_norm", "step_ratio"):
                assert getattr(left, field) == pytest.approx(getattr(right, field), rel=1e-3)
            assert left.curvature_rms == pytest.approx(right.curvature_rms, rel=0.05, abs=1e-9)
