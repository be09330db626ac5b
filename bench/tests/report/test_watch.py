"""A report that is rewritten while its runs are training."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from apollo_bench.config import recipe
from apollo_bench.interrupts import Interrupted
from apollo_bench.report import page, watch
from apollo_bench.report.summary import Summary
from bench.tests.helpers import PATIENCE
from bench.tests.report.made_up_runs import made_up


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_it_is_written_when_runs_change_and_ends_with_them(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe.load(str(recipe_file)).run("sgd", 1)
    directory = made_up(tmp_path, spec, [50.0], None)
    refreshed: list[tuple[float | None, bool]] = []
    looks: list[int] = []
    state = watch._state

    def look(paths: list[Path]) -> list[tuple[str, int, int]]:
        """Change nothing before the third check, when the run ends."""
        looks.append(len(refreshed))
        if len(looks) == 3:
            made_up(tmp_path, spec, [50.0, 60.0])
        return state(paths)

    def write(
        *arguments: object, refresh: float | None = None, with_figures: bool = True
    ) -> list[Summary]:
        refreshed.append((refresh, with_figures))
        return real(*arguments, refresh=refresh, with_figures=False)  # type: ignore[arg-type]

    real = page.write
    monkeypatch.setattr(watch, "_state", look)
    monkeypatch.setattr(page, "write", write)
    said: list[str] = []
    watch.watch([tmp_path], tmp_path / "out", None, no_warning, said.append, every=0.01)
    assert looks == [0, 1, 1]
    assert refreshed == [(0.01, False), (0.01, False), (None, True)]
    assert [line.split("  ")[1] for line in said] == [
        "0 of 1 runs have ended",
        "1 of 1 runs have ended",
    ]
    assert directory.result.exists()
    assert "data-refresh" not in (tmp_path / "out" / "report.html").read_text()[:9000]


def test_ctrl_c_leaves_a_whole_report(recipe_file: Path, tmp_path: Path) -> None:
    made_up(tmp_path, recipe.load(str(recipe_file)).run("sgd", 1), [50.0], None)
    out = tmp_path / "out"

    def interrupt() -> None:
        deadline = time.monotonic() + PATIENCE
        while not (out / "report.html").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        watch.watch([tmp_path], out, None, no_warning, lambda _: None, every=PATIENCE)
    thread.join()
    assert caught.value.number == signal.SIGINT
    html = (out / "report.html").read_text()
    assert html.rstrip().endswith("</html>")
    assert "data-refresh=" not in html[: html.index("<script")]
    assert not list(out.glob("*.png")), "drawing would keep the user waiting"


def test_a_damaged_run_is_reported_once(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe.load(str(recipe_file))
    made_up(tmp_path, plan.run("sgd", 1), [50.0, 60.0])
    damaged = made_up(tmp_path, plan.run("sgd", 2), [50.0, 60.0])
    damaged.metrics.write_text("{\n" + json.dumps({}))
    told: list[str] = []
    watch.watch([tmp_path], tmp_path / "out", None, told.append, lambda _: None, every=0.01)
    assert len(told) == 1
    assert str(damaged.metrics) in told[0]
