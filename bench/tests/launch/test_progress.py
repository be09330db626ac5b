"""The live table: what is shown, at which width and height."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from apollo_bench.config import recipe
from apollo_bench.launch.progress import LiveTable, PlainLines, duration, seconds_left
from apollo_bench.launch.run_scheduler import RunState, Status
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification.image_workload import ACCURACY

LARGE = 123456.7891


def state(
    name: str, task: str = "fashion-mnist", status: Status = "waiting", steps: int = 1000
) -> RunState:
    spec = recipe.load(task).run("sgd", 1)
    run = RunState(
        RunDirectory(Path(name)), spec, steps, tasks.TASKS[task].monitored, "words", 32.0
    )
    run.status = status
    return run


def drawn(runs: list[RunState], width: int = 80, height: int = 40) -> list[str]:
    console = Console(
        width=width,
        height=height,
        force_terminal=True,
        record=True,
        file=io.StringIO(),
        color_system=None,
    )
    with LiveTable(console) as table:
        table.update(runs, 2)
    text = console.export_text()  # the display draws everything again when it ends
    last = re.search(r"\d %, .* left", text)
    assert last is not None
    return text[: last.end()].splitlines()


def test_runs_of_a_folder(finished: Path) -> None:
    runs = []
    for path in sorted((finished / "runs").iterdir()):
        directory = RunDirectory(path)
        runs.append(RunState(directory, directory.spec(), 24, ACCURACY, "images", 32.0))
        runs[-1].read_progress()
        runs[-1].update_status()
    assert [run.progress for run in runs] == [f"{n} of 2 epochs" for n in (2, 1, 2, 2)]
    runs[1].status = "running"
    title, head, *rows = drawn(runs)[:6]
    assert title == ("fashion-mnist: done in epochs, score is test accuracy (%), speed in images/s")
    assert head.split() == ["run", "done", "loss", "score", "speed", "time", "left"]
    for run, row in zip(runs, rows, strict=True):
        name, done, loss, score, speed, time, left, status = row.split()
        assert name == f"{run.spec.name}-seed{run.spec.seed}"
        assert done == f"{run.done:g}/2"
        assert run.loss is not None
        assert run.score is not None
        assert run.speed is not None
        assert (loss, score) == (f"{run.loss:.4f}", f"{run.score:.2f}")
        assert (time, status) == (duration(run.seconds), run.status)
        running = run.status == "running"
        assert speed == (f"{run.speed:.0f}" if running else "-")
        assert left == (duration(run.seconds_left) if running else "-")


@pytest.mark.parametrize("width", [200, 80, 60, 52])
def test_no_number_is_cut(width: int) -> None:
    runs = []
    for task, steps in (("fashion-mnist", 1000), ("one-billion-word", 2_000_000)):
        for i in range(3):
            run = state("", task, "running")
            name = f"{task}-my-own-optimizer-{i}-{run.spec.schedule}-seed12"
            run.directory = RunDirectory(Path(name))
            runs.append(run)
            run.steps, run.step, run.evaluated = steps, steps // 2, steps // 2
            run.loss, run.score, run.speed, run.seconds = LARGE, LARGE, LARGE, 36000.0
    runs[-1].loss = 3e38
    lines = drawn(runs, width)
    assert max(map(len, lines)) <= width
    for run, line in zip(runs, (line for line in lines if "ed12" in line), strict=True):
        words = line.split()
        assert words[1] == f"{run.done:g}/{run.spec.train.schedule.length}"
        assert words[2] == ("3e+38" if run is runs[-1] else "123456.7891")
        assert words[3] == "123456.79"
        assert words[-1] == "running"
        assert ("123457" in words) == (width >= 60)  # the speed
        assert (words.count("10:00:00") == 2) == (width >= 80)
    whole = sum("my-own-optimizer-1-seed12" in line for line in lines)
    assert whole == (2 if width == 200 else 0)


def test_waiting_runs_are_one_line() -> None:
    runs = [state(f"fashion-mnist-sgd-seed{i}") for i in range(30)]
    runs[0].status, runs[1].status = "finished", "running"
    lines = drawn(runs, 80, 24)
    assert [line.split()[0] for line in lines[2:4]] == ["sgd-seed0", "sgd-seed1"]
    assert lines[4].strip() == "and 28 waiting"
    assert "%" in lines[5]
    assert len(lines) == 6


def test_a_table_higher_than_the_terminal_shows_what_goes_on() -> None:
    runs = [state(f"run{i:02}") for i in range(40)]
    for run in runs[:20]:
        run.status = "finished"
    runs[5].status = "failed"
    runs[20].status = runs[21].status = "running"
    lines = drawn(runs, height=10)
    assert [line.split()[0] for line in lines[2:7]] == [f"run{i:02}" for i in (5, 18, 19, 20, 21)]
    assert lines[7].strip() == "and 17 finished, 18 waiting"
    assert len(lines) < 10


def test_time_left() -> None:
    assert [duration(None), duration(65), duration(3661)] == ["-", "1:05", "1:01:01"]
    runs = [state(str(i), steps=100) for i in range(4)]
    assert seconds_left(runs, 2) is None
    runs[0].status, runs[0].step, runs[0].seconds = "finished", 100, 50.0
    runs[1].status, runs[1].step, runs[1].seconds = "running", 20, 10.0
    assert seconds_left(runs, 2) == pytest.approx(0.5 * (80 + 100 + 100) / 2)
    assert seconds_left(runs, 8) == pytest.approx(0.5 * 100)


def test_stopped_runs_have_no_time_left() -> None:
    runs = [state("one", status="running"), state("two")]
    for status, step, said in (
        ("running", 0, False),
        ("running", 20, True),
        ("stopped", 20, False),
    ):
        for run in runs:
            run.status = status  # type: ignore[assignment]
            run.step, run.seconds = step, 0.5 * step
        console = Console(file=io.StringIO(), width=200)
        PlainLines(console).update(runs, 1)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("left in all" in text) is said
        assert status in text
