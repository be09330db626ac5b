"""The report of a sweep and of a search."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from apollo_bench.config import recipe
from apollo_bench.errors import ExperimentError
from apollo_bench.report import narrative, page, tables
from apollo_bench.report.summary import collect
from apollo_bench.search import trials
from bench.tests.conftest import TINY
from bench.tests.report.made_up_runs import made_up
from bench.tests.report.test_report import PNG


def test_sweeps(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(
        f"{TINY}\n[sweeps.lr-robustness]\nvalues = [0.2, 1.0]\n"
        "[sweeps.weight-decay]\nvalues = [1e-4, 2e-4]\n"
    )
    plan = recipe.load(str(recipe_file))
    for kind, name in (("lr-robustness", "learning_rate"), ("weight-decay", "weight_decay")):
        folder = tmp_path / kind
        for spec in plan.sweep(kind, ["sgd", "apollo"]):  # type: ignore[arg-type]
            assert spec.sweep is not None
            better = 3.0 * (spec.name == "apollo") + 5.0 * (spec.sweep.value in (1.0, 2e-4))
            made_up(folder, spec, [40.0, 60.0 + better + spec.seed])
        [summary] = page.write([folder], folder)
        table = tables.tables(summary)[0]
        titles = [column.title for column in table.columns]
        if kind == "lr-robustness":
            assert titles[1:3] == ["lr × 0.2", "lr × 1"]
        else:
            assert titles[1:3] == ["decay 0.0001", "decay 0.0002"]
        assert [cell.text for cell in table.rows[1]] == [
            *("Apollo", "66.50 ± 0.71", "71.50 ± 0.71", "5.00", "4"),
        ]
        assert [[cell.best for cell in row[1:3]] for row in table.rows] == [[False] * 2, [True] * 2]
        assert narrative.headline(summary) == (
            "Between its best and worst value the mean test accuracy differs by: Apollo 5.00, "
            "SGD 5.00."
        )
        for picture in (name, f"{name}_curves"):
            assert (folder / f"{picture}.png").read_bytes().startswith(PNG)
        console = Console(width=80, record=True, quiet=True)
        page.show([summary], console)
    both = [tmp_path / "lr-robustness", tmp_path / "weight-decay"]
    with pytest.raises(ExperimentError, match="differ in analysis: they cannot stand in one table"):
        collect(both)


def test_trials_of_a_search(recipe_file: Path, tmp_path: Path) -> None:
    """Trials are sorted by the rate, and a best rate at an end of the range is marked."""
    settings = ["data.validation=64", "search.trials=3", "search.ranges.sgd.lr=[0.01, 1.0]"]
    plan = recipe.load(str(recipe_file), [*settings, "search.ranges.apollo.lr=[0.1, 10.0]"])
    for spec in trials.make_trials(plan):
        rate = spec.optimizer.lr
        score = 60.0 + 10 * rate if spec.name == "sgd" else 60.0 - rate
        made_up(tmp_path, spec, [50.0, score])
    [summary] = collect([tmp_path])
    chosen, all_trials = tables.tables(summary)
    ends = [column.title for column in chosen.columns].index("at an end")
    assert [row[ends].text for row in chosen.rows] == ["lr, the largest", "lr, the smallest"]
    for row in all_trials.rows:
        rates = [float(cell.text.partition(":")[0]) for cell in row[1:]]
        assert rates == sorted(rates)
        assert len(rates) == 3
        assert [cell.best for cell in row[1:]].count(True) == 1
