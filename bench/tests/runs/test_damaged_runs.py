"""Run directories after a power cut or on a bad disk: recovery and errors."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.errors import ExperimentError
from apollo_bench.launch.run_experiment import Machines, Request, train_runs
from apollo_bench.runs import archive, compatibility, loading
from apollo_bench.runs.baseline import Baseline
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.checkpoint_files import read_checkpoint, write_checkpoint
from apollo_bench.training.loop import train
from bench.tests.conftest import settings_of_a_worker
from bench.tests.helpers import assert_identical, prepared, result, spec_of

STOPPED = "fashion-mnist-apollo-cosine-seed4"
ENDED = "fashion-mnist-sgd-cosine-seed3"


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_last(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the last record of a run, an evaluation."""
    *lines, last = path.read_text().splitlines()
    record = json.loads(last)
    assert record["kind"] == "evaluation"
    change(record)
    path.write_text("\n".join([*lines, json.dumps(record), ""]))


def edit_first(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the first record of a run, of a step."""
    first, *lines = path.read_text().splitlines()
    record = json.loads(first)
    assert record["kind"] == "step"
    change(record)
    path.write_text("\n".join([json.dumps(record), *lines, ""]))


def without_last_line(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def resume(directory: RunDirectory, folder: Path) -> str:
    _, task = prepared(folder / "again", directory.spec())
    return train(directory, directory.spec(), task)


@pytest.fixture(scope="module")
def never_stopped(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of the stopped run, trained without a stop."""
    spec = RunDirectory(finished_once / "runs" / STOPPED).spec()
    directory, task = prepared(tmp_path_factory.mktemp("whole") / "run", spec)
    with settings_of_a_worker():
        train(directory, spec, task)
    return result(directory)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-60],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-200] + bytes(200),
        lambda content: content[:40] + bytes(40) + content[80:],
        lambda content: content + b'{"kind": "step\n\xff\xfe\0\n{"a": 1}\n',
    ],
    ids=["shorter", "half", "zero bytes at the end", "zero bytes within", "lines of another kind"],
)
def test_damaged_records_are_recovered_from_the_checkpoint(
    finished: Path, tmp_path: Path, never_stopped: dict[str, Any], damage: Callable[[bytes], bytes]
) -> None:
    directory = RunDirectory(finished / "runs" / STOPPED)
    rewrite(directory.metrics, damage)
    assert resume(directory, tmp_path) == "finished"
    assert_identical(result(directory), never_stopped)


def test_missing_records_are_recovered_too(
    finished: Path, tmp_path: Path, never_stopped: dict[str, Any]
) -> None:
    directory = RunDirectory(finished / "runs" / STOPPED)
    directory.metrics.unlink()
    assert resume(directory, tmp_path) == "finished"
    assert_identical(result(directory), never_stopped)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: rewrite(run.metrics, lambda content: content[:-300] + bytes(300) + b"\n"),
        lambda run: rewrite(run.result, lambda content: content[:14]),
        lambda run: run.result.write_text("null"),
        lambda run: run.metrics.write_bytes(b""),
        lambda run: run.metrics.unlink(),
        lambda run: rewrite(run.metrics, lambda content: content[:-9]),
        lambda run: rewrite(run.metrics, without_last_line),
        lambda run: rewrite(run.metrics, lambda content: content + b'{"kind": "st'),
        lambda run: edit_last(run.metrics, lambda record: record.pop("accuracy")),
    ],
    ids=[
        "records",
        "result cut short",
        "no result in it",
        "no records",
        "no file of records",
        "last record cut",
        "one record less",
        "a cut record more",
        "no metric",
    ],
)
def test_an_ended_run_is_recovered_from_its_checkpoint(
    finished: Path, tmp_path: Path, damage: Callable[[RunDirectory], None]
) -> None:
    directory = RunDirectory(finished / "runs" / ENDED)
    before = result(directory)
    damage(directory)
    with pytest.raises(ExperimentError, match=f"{ENDED}.*damaged"):
        loading.load_runs([directory.path])
    assert directory.usable_verdict() is None
    assert resume(directory, tmp_path) == "finished"
    assert_identical(result(directory), before)


def test_a_checkpoint_of_an_earlier_version_continues_with_the_file(
    finished: Path, tmp_path: Path, never_stopped: dict[str, Any]
) -> None:
    """Such a checkpoint holds the size of the records instead of their text."""
    directory = RunDirectory(finished / "runs" / STOPPED)
    state = read_checkpoint(directory.checkpoint)
    state["metrics_bytes"] = len(state.pop("metrics"))
    write_checkpoint(directory.checkpoint, state)
    whole = directory.metrics.read_bytes()
    directory.metrics.write_bytes(whole[:-60])
    with pytest.raises(ExperimentError, match=r"metrics.jsonl: damaged since the checkpoint; rem"):
        resume(directory, tmp_path)
    directory.metrics.write_bytes(whole + b'{"kind": "st')
    assert resume(directory, tmp_path) == "finished"
    assert_identical(result(directory), never_stopped)


def test_records_are_on_the_disk_before_the_checkpoint_and_the_result(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    spec = spec_of(recipe_file, "sgd")
    directory, task = prepared(tmp_path / "run", spec)
    synced.clear()
    train(directory, spec, task)
    for name in ("newest.pt.tmp", "result.json.tmp"):
        assert name in synced
        for place, other in enumerate(synced):
            if other == name:
                assert synced[place - 1] == "metrics.jsonl"


def test_no_damaged_byte_of_a_checkpoint_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "newest.pt"
    state = {"step": 3, "weights": torch.arange(24.0), "text": "a record\n"}
    write_checkpoint(path, state)
    whole = path.read_bytes()
    # every third byte: those of the tensors and those of the zip archive around them
    harmless = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(ExperimentError):
            assert_identical(read_checkpoint(path), state)  # the byte was padding
            harmless += 1
    assert harmless < len(whole) / 6  # half of the bytes tried


class Code:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: [1, 2], "it holds a list, not a state"),
        (lambda state: {"step": "3"}, "it holds no number of steps"),
        (without("times"), "'times' is missing"),
        (without("best"), "'best' is missing"),
        (lambda state: {**state, "model": {"w": torch.zeros(1)}}, r"Error\(s\) in loading state"),
        (lambda state: {**state, "processes": []}, "list index out of range"),
        (lambda state: {"step": 1, "x": Code()}, "it holds other objects than tensors and plain"),
    ],
)
def test_a_checkpoint_of_another_content_is_refused(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(finished / "runs" / STOPPED)
    write_checkpoint(directory.checkpoint, change(read_checkpoint(directory.checkpoint)))
    with pytest.raises(ExperimentError, match=rf"newest.pt: the checkpoint cannot .*\({reason}"):
        resume(directory, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: rewrite(run.manifest, lambda content: content[:100]),
        lambda run: run.manifest.write_text("[]"),
        lambda run: run.manifest.write_bytes(b"\xef\xbb\xbf" + run.manifest.read_bytes()),
        lambda run: run.manifest.write_text("[" * 100_000),
        lambda run: edit(run.manifest, lambda x: x.update(data="fingerprint")),
        lambda run: edit(run.manifest, lambda x: x.pop("versions")),
        lambda run: edit(run.manifest, lambda x: x["machine"].pop("cores")),
        lambda run: edit(run.manifest, lambda x: x["recipe"]["train"].update(future=1)),
        lambda run: edit(run.manifest, lambda x: x["execution"].update(threads=0)),
        lambda run: run.result.write_text("{}"),
        lambda run: run.result.write_text("[]"),
        lambda run: edit(run.result, lambda x: x.update(verdict="won")),
        lambda run: edit(run.result, lambda x: x.pop("time")),
        lambda run: run.metrics.write_bytes(b"\xff\xfe\0\n"),
        lambda run: run.metrics.write_text('{"a": 1}\n'),
        lambda run: (run.metrics.unlink(), run.metrics.mkdir()),
        lambda run: run.diagnostics.write_text('{"step": 1, "epoch": 1, "tensors": [{}]}\n'),
        lambda run: run.metrics.write_bytes(b""),
        lambda run: run.metrics.unlink(),
        lambda run: rewrite(run.metrics, without_last_line),
        lambda run: edit_last(run.metrics, lambda x: x.pop("accuracy")),
        lambda run: edit_last(run.metrics, lambda x: x.update(accuracy="80")),
        lambda run: edit_last(run.metrics, lambda x: x.update(train_loss=None)),
        lambda run: edit_last(run.metrics, lambda x: x.pop("train_loss")),
        lambda run: edit_last(run.metrics, lambda x: x.update(step=math.inf)),
        lambda run: edit_last(run.metrics, lambda x: x.update(step=math.nan)),
        lambda run: edit_last(run.metrics, lambda x: x["time"].update(optimizer_ms="2 ms")),
        lambda run: edit_first(run.metrics, lambda x: x.pop("kind")),
        lambda run: edit_first(run.metrics, lambda x: x.update(kind=["step"])),
        lambda run: edit_first(run.metrics, lambda x: x.update(epoch=math.inf)),
        lambda run: edit_first(run.metrics, lambda x: x.update(step=math.nan)),
        lambda run: edit_first(run.metrics, lambda x: x.update(loss="2")),
        lambda run: edit(run.result, lambda x: x.update(train_loss="low")),
        lambda run: edit(run.result, lambda x: x.update(train_loss=math.inf)),
        lambda run: edit(run.result, lambda x: x.update(accuracy=[80])),
        lambda run: edit(run.manifest, lambda x: x["data"].update(remarks=5)),
        lambda run: edit(run.manifest, lambda x: x["data"].update(remarks=[5])),
        lambda run: edit(run.manifest, lambda x: x["machine"].update(cpu=5)),
        lambda run: edit(run.manifest, lambda x: x.update(command="apollo-bench compare")),
        lambda run: edit(run.manifest, lambda x: x.update(search={"trials": "7"})),
    ],
)
def test_a_damaged_run_does_not_lose_the_report_of_the_others(
    finished_once: Path, tmp_path: Path, damage: Callable[[RunDirectory], Any]
) -> None:
    for name in (ENDED, STOPPED):
        shutil.copytree(finished_once / "runs" / name, tmp_path / "runs" / name)
    damage(RunDirectory(tmp_path / "runs" / ENDED))
    said: list[str] = []
    assert [run.path.name for run in loading.load_runs([tmp_path], said.append)] == [STOPPED]
    [reason] = said
    assert ENDED in reason
    assert "\n" not in reason
    with pytest.raises(ExperimentError, match=ENDED):  # a search needs all of its runs
        loading.load_runs([tmp_path])
    with pytest.raises(ExperimentError, match=ENDED):  # nothing to report on
        loading.load_runs([tmp_path / "runs" / ENDED], said.append)


def test_the_report_says_which_run_it_leaves_out(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(finished / "cache"))
    damaged = RunDirectory(finished / "runs" / ENDED)
    damaged.manifest.write_text("")
    done = CliRunner().invoke(app, ["report", str(finished)])
    assert done.exit_code == 0
    line = f"{damaged.manifest}: damaged"
    assert done.stderr.startswith(f"apollo-bench: {line}")
    assert "left out of the report" in done.stderr
    for name in ("report.html", "results.md"):
        assert line in (finished / name).read_text()


def test_a_damaged_run_does_not_block_the_others(
    finished: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run of the folder is skipped as usual, although another run is damaged."""
    RunDirectory(finished / "runs" / STOPPED).manifest.write_text("")
    request = Request(
        [RunDirectory(finished / "runs" / ENDED).spec()],
        finished,
        None,
        Machines("cpu", 1, 1, 1, "ddp"),
        one_report=True,
    )
    assert train_runs(request, pytest.fail) == []
    assert len(compatibility.find_run_directories(finished)) == 4


@pytest.mark.parametrize(
    ("end", "lost", "usable"),
    [
        (24, 0, True),  # the evaluation at its end is not finite
        (24, 1, True),
        (29, 0, True),  # a loss since the last record is not finite
        (30, 0, False),
        (24, 4, False),
    ],
)
def test_the_records_of_a_diverged_run_reach_to_its_last_interval(
    finished: Path, end: int, lost: int, usable: bool
) -> None:
    """Steps 5, 10, 12 and so on to 24 are recorded, and evaluations after 12 and 24."""
    directory = RunDirectory(finished / "runs" / ENDED)
    edit(directory.result, lambda x: x.update(verdict="diverged", step=end))
    lines = directory.metrics.read_bytes().splitlines(keepends=True)
    directory.metrics.write_bytes(b"".join(lines[: len(lines) - lost]))
    assert (directory.usable_verdict() is not None) == usable


def test_a_run_that_diverged_at_once_has_no_records(finished: Path) -> None:
    directory = RunDirectory(finished / "runs" / ENDED)
    edit(directory.result, lambda x: x.update(verdict="diverged", step=5))
    directory.metrics.write_bytes(b"")
    assert directory.usable_verdict() is not None
    directory.metrics.unlink()  # the file is empty until the first record, but exists
    assert directory.usable_verdict() is None


def test_an_archive_refuses_a_truncated_run(finished: Path, tmp_path: Path) -> None:
    directory = RunDirectory(finished / "runs" / ENDED)
    rewrite(directory.metrics, without_last_line)
    with pytest.raises(ExperimentError, match=f"{ENDED}.*its records end at step 12, the run at"):
        archive.write([directory], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_truncated_run_is_left_out_of_a_baseline(finished: Path) -> None:
    RunDirectory(finished / "runs" / ENDED).metrics.write_bytes(b"")
    said: list[str] = []
    baseline = Baseline(finished, "fashion-mnist", said.append)
    assert ENDED not in [run.path.name for run in baseline.runs]
    assert len(baseline.runs) == 3
    [reason] = said
    assert f"{ENDED}/metrics.jsonl: damaged (its records end at step 0" in reason
