"""The overview of several tasks: AlgoPerf's score, and what the page begins with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from apollo_bench.config import recipe
from apollo_bench.report import overview, page
from apollo_bench.report.performance_profile import Entry, profiles
from apollo_bench.report.summary import Summary, collect
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.workloads.tasks import TASKS

# by task and optimizer: the updates at which each seed reaches the target; None: never
REACHED = {
    "fashion-mnist": {
        "sgd": [200, 200, 400],
        "apollo": [100, 100, 100],
        "adam-adj": [100, 400, 400],
    },
    "wordnet": {"sgd": [100, 200, 200], "apollo": [300, 300, 300], "adam": [None, 400, None]},
}


def write_runs(folder: Path, task: str, reached: dict[str, list[int | None]]) -> None:
    """Finished runs with an evaluation every 100 updates; a run is good from ``reached`` on."""
    plan, metric = recipe.load(task), TASKS[task].curve
    good, bad = (90.0, 50.0) if metric.higher_is_better else (5.0, 9.0)
    for name, numbers in reached.items():
        for seed, number in enumerate(numbers, 1):
            spec = plan.run(name, seed)
            directory = RunDirectory(folder / "runs" / spec.label)
            directory.prepare(spec, "0", None, ["test"])
            lines = [
                {
                    "kind": "evaluation", "step": step, "epoch": step / 50, "train_loss": 1.0,
                    metric.name: good if number is not None and step >= number else bad,
                    "time": {"seconds": step / 10, "step_ms": 1.0, "optimizer_ms": 1.0},
                }
                for step in range(100, 401, 100)
            ]  # fmt: skip
            directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            final = {metric.name: lines[-1][metric.name], TASKS[task].final.name: good}
            verdict = {"verdict": "finished", "step": 400, "steps": 400, "train_loss": 1.0, **final}
            directory.result.write_text(json.dumps({**verdict, "time": {"seconds": 40.0}}))


@pytest.fixture
def no_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of each task take seconds."""
    monkeypatch.setattr(page.figures, "draw", lambda summary: [])


@pytest.fixture
def summaries(tmp_path: Path) -> list[Summary]:
    for task, reached in REACHED.items():
        write_runs(tmp_path / "out", task, reached)  # type: ignore[arg-type]
    return collect([tmp_path / "out"])


def test_a_score_is_the_mean_of_the_profile() -> None:
    entry = Entry("sgd", {"updates": [1.0, 2.5, 4.0, math.inf], "seconds": [1.0]})
    assert entry.score("updates") == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert entry.score("seconds") == 1
    shares = [entry.share_within("updates", ratio) for ratio in (1.0, 2.4, 2.5, 3.9, 4.0)]
    assert shares == [0.25, 0.25, 0.5, 0.5, 0.75]
    steps = 30000
    area = (
        sum(entry.share_within("updates", 1 + 3 * (i + 0.5) / steps) for i in range(steps)) / steps
    )
    assert entry.score("updates") == pytest.approx(area, abs=1e-3)


def test_ratios_are_those_of_medians_to_the_best(summaries: list[Summary]) -> None:
    found = profiles(summaries)
    assert found is not None
    ratios = {entry.name: entry.ratios["updates"] for entry in found.entries}
    # Adam is Adam-adj on images; of its runs on WordNet most do not reach the target
    assert ratios == {"sgd": [2.0, 1.0], "adam": [4.0, math.inf], "apollo": [1.0, 1.5]}
    assert found.left_out == []


def test_what_is_not_on_every_task_has_no_score(tmp_path: Path) -> None:
    write_runs(tmp_path, "fashion-mnist", {**REACHED["fashion-mnist"], "radam": [100, 100, 100]})  # type: ignore[arg-type]
    write_runs(tmp_path, "wordnet", REACHED["wordnet"])  # type: ignore[arg-type]
    found = profiles(collect([tmp_path]))
    assert found is not None
    assert found.left_out == ["RAdam"]
    first = overview.overview(collect([tmp_path]))
    assert first is not None
    [row] = [row for row in first.table.rows if row[0].text == "RAdam"]
    assert [cell.text for cell in row[1:]] == ["-", "-", "90.00 ± 0.00", "-"]


@pytest.mark.usefixtures("no_other_figures")
def test_the_page_begins_with_contents_and_overview(
    tmp_path: Path, summaries: list[Summary]
) -> None:
    page.write([tmp_path / "out"], tmp_path / "page")
    html = (tmp_path / "page" / "report.html").read_text()
    places = [
        html.index(text)
        for text in ('href="#overview"', 'id="overview"', "AlgoPerf", 'id="task-wordnet"')
    ]
    assert places == sorted(places)
    assert 'href="#task-wordnet"' in html
    assert (tmp_path / "page" / "performance_profile.svg").exists()
    lines = (tmp_path / "page" / "results.md").read_text().splitlines()
    assert lines[0] == "**Overview**"
    assert lines[4].startswith("| Apollo | **0.92** | **0.92** |")
    assert lines[5].startswith("| SGD | 0.83 | 0.83 |")
    assert "Adam-adj for Adam (fashion-mnist)" in "\n".join(lines)


@pytest.mark.usefixtures("no_other_figures")
def test_a_report_on_one_task_has_no_overview(tmp_path: Path) -> None:
    write_runs(tmp_path, "wordnet", REACHED["wordnet"])  # type: ignore[arg-type]
    found = collect([tmp_path])
    assert overview.overview(found) is None
    assert overview.draw(found) == []
    page.write([tmp_path], tmp_path)
    assert "Overview" not in (tmp_path / "report.html").read_text()


def test_seconds_of_unlike_executions_are_not_compared(
    tmp_path: Path, summaries: list[Summary]
) -> None:
    path = RunDirectory(tmp_path / "out" / "runs" / summaries[0].runs[0].spec.label).manifest
    manifest = json.loads(path.read_text())
    manifest["execution"]["threads"] = 7
    path.write_text(json.dumps(manifest))
    first = overview.overview(collect([tmp_path / "out"]))
    assert first is not None
    assert [column.title for column in first.table.columns[:3]] == [
        "optimizer", "score by updates", "fashion-mnist: test accuracy (%)",
    ]  # fmt: skip
    assert "There is no score by seconds" in " ".join(first.notes)
    shutil.rmtree(tmp_path / "out")
