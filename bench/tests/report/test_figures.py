"""What the figures of a report draw, read from the axes before they become a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apollo_bench.config import recipe
from apollo_bench.report import curvature_figures, figures, overview, sweep_figures
from apollo_bench.report.summary import collect
from apollo_bench.runs.curvature_log import Curvature
from apollo_bench.search import trials
from apollo_qn.diagnostics import TensorDiagnostics
from bench.tests.conftest import TINY
from bench.tests.report.made_up_runs import made_up


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a dictionary that gets each figure by its name, instead of its files."""
    found: dict[str, Any] = {}
    for module in (curvature_figures, figures, overview, sweep_figures):
        monkeypatch.setattr(
            module, "picture", lambda name, caption, figure: found.setdefault(name, figure)
        )
    return found


def test_bars_and_curves_are_means(
    recipe_file: Path, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    plan = recipe.load(str(recipe_file))
    made_up(tmp_path, plan.run("sgd", 1), [40.0, 60.0])
    made_up(tmp_path, plan.run("sgd", 2), [50.0, 80.0])
    made_up(tmp_path, plan.run("apollo", 1), [70.0, 75.0])
    figures.draw(collect([tmp_path])[0])
    # ten seconds per epoch, two milliseconds per step
    for name, expected in (("wall_time", 20.0), ("optimizer_time", 2.0)):
        [axes] = drawn[name].axes
        assert [bar.get_width() for bar in axes.patches] == [expected] * 2
    [axes] = drawn["test_accuracy"].axes
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert curves == {"SGD": [45.0, 70.0], "Apollo": [70.0, 75.0]}


def test_points_of_a_sweep_are_means_at_its_values(
    recipe_file: Path, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    recipe_file.write_text(f"{TINY}\n[sweeps.lr-robustness]\nvalues = [0.2, 1.0]\n")
    for spec in recipe.load(str(recipe_file)).sweep("lr-robustness", ["sgd"]):
        assert spec.sweep is not None
        made_up(tmp_path, spec, [10.0, 50.0 + 10 * spec.sweep.value + 2 * spec.seed])
    figures.draw(collect([tmp_path])[0])
    metric, loss = drawn["learning_rate"].axes
    assert metric.lines[0].get_xdata().tolist() == [0.2, 1.0]
    assert metric.lines[0].get_ydata().tolist() == [59.0, 67.0]  # of the seeds 3 and 4
    assert loss.lines[0].get_ydata().tolist() == [1.0, 1.0]


def test_rates_of_trials_are_multiples_of_the_best(
    recipe_file: Path, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    settings = ["data.validation=64", "search.trials=3", "search.ranges.sgd.lr=[0.01, 1.0]"]
    plan = recipe.load(str(recipe_file), [*settings, "optimizers.sgd.lr=0.1"])
    made = trials.make_trials(plan, ["sgd"])
    for spec in made:
        made_up(tmp_path, spec, [50.0, 60.0 + 10 * spec.optimizer.lr])
    figures.draw(collect([tmp_path])[0])
    [axes] = drawn["tuning"].axes
    rates = sorted(spec.optimizer.lr for spec in made)
    [line] = axes.lines
    assert line.get_xdata().tolist() == pytest.approx([rate / rates[-1] for rate in rates])
    assert line.get_ydata().tolist() == pytest.approx([60 + 10 * rate for rate in rates])


def test_shares_of_the_curvature_are_percentages() -> None:
    measured = [value_of(_tensors()) for value_of in curvature_figures._CURVATURES.values()]
    assert measured == [25.0, 75.0, 0.75, 0.125]


def test_the_curvature_of_a_sweep_has_a_line_per_value(
    recipe_file: Path, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    recipe_file.write_text(f"{TINY}\n[sweeps.lr-robustness]\nvalues = [0.2, 1.0]\n")
    for spec in recipe.load(str(recipe_file)).sweep("lr-robustness", ["apollo"]):
        made_up(tmp_path, spec, [50.0])
    [summary] = collect([tmp_path])
    for row in summary.rows:
        assert row.point is not None
        for run in row.runs:
            share = 0.1 * row.point.value
            run.curvature.append(Curvature(1, 1.0, _tensors(negative=share)))
    figures.draw(summary)
    negative = drawn["curvature"].axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in negative.lines}
    assert lines == {"Apollo × 0.2": [pytest.approx(2.0)], "Apollo × 1": [pytest.approx(10.0)]}
    assert len({str(line.get_color()) for line in negative.lines}) == 2


def _tensors(negative: float = 0.25) -> TensorDiagnostics:
    counts = {"numel": 4, "step": 2, "lr": 0.5, "threshold": 1.0}
    rest = dict.fromkeys(("parameter_norm", "step_norm", "rate_min", "rate_max"), 1.0)
    rest |= dict.fromkeys(("curvature_mean", "curvature_min", "curvature_max"), 1.0)
    return TensorDiagnostics(
        **{"name": "a", **counts, **rest},
        **{"negative": negative, "rectified": 0.75, "step_ratio": 0.125},
        **{"secant_correction": 3.0, "curvature_rms": 4.0},
    )
