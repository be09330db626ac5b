"""The data of the interactive curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import colors

from apollo_bench.config import recipe
from apollo_bench.optimizers.plot_style import STYLES, style_of
from apollo_bench.report import curves
from apollo_bench.report.summary import collect
from apollo_bench.runs import loading
from apollo_bench.search import trials
from bench.tests.report.made_up_runs import made_up


def steps(*losses: float, norm: float | None = 1.0) -> list[dict[str, Any]]:
    return [
        {"loss": loss, "lr": 0.5 / step, "gradient_norm": norm}
        for step, loss in enumerate(losses, 1)
    ]


def panel(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of the only schedule, by title."""
    [summary] = collect([folder])
    [figures] = curves.panels(summary)
    return {figure["title"]: figure for figure in figures}


def test_means_and_seeds_by_updates_epochs_and_seconds(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    made_up(tmp_path, plan.run("sgd", 1), [50.0, 60.0], steps=steps(2.0, 1.0))
    made_up(tmp_path, plan.run("sgd", 2), [52.0, 64.0], steps=steps(4.0, 3.0, norm=None))
    figures = panel(tmp_path)
    assert list(figures) == [
        *("test accuracy (%)", "training loss", "learning rate", "norm of the gradient"),
    ]
    [curve] = figures["test accuracy (%)"]["curves"]
    assert (curve["name"], curve["label"], curve["color"]) == ("sgd", "SGD", STYLES["sgd"].color)
    assert (curve["updates"], curve["epochs"], curve["seconds"]) == ([1, 2], [1, 2], [10, 20])
    assert (curve["mean"], curve["count"]) == ([51.0, 62.0], [2, 2])
    assert curve["std"] == pytest.approx([2**0.5, 8**0.5], rel=1e-4)
    assert [(one["seed"], one["value"]) for one in curve["seeds"]] == [
        (1, [50.0, 60.0]),
        (2, [52.0, 64.0]),
    ]
    [loss] = figures["training loss"]["curves"]
    assert loss["mean"] == [3.0, 2.0]
    [rate] = figures["learning rate"]["curves"]
    assert (rate["mean"], rate["std"]) == ([0.5, 0.25], [0.0, 0.0])
    # a norm that was not finite is left out
    [norm] = figures["norm of the gradient"]["curves"]
    assert (norm["mean"], norm["count"]) == ([1.0, 1.0], [1, 1])


def test_an_archive_has_the_loss_of_its_evaluations(recipe_file: Path, tmp_path: Path) -> None:
    made_up(tmp_path, recipe.load(str(recipe_file)).run("sgd", 1), [50.0, 60.0])
    figures = panel(tmp_path)
    assert list(figures) == ["test accuracy (%)", "training loss"]
    [loss] = figures["training loss"]["curves"]
    assert (loss["mean"], loss["seeds"]) == ([2.0, 1.0], [])


def test_an_unfinished_run_does_not_make_the_mean_jump(recipe_file: Path, tmp_path: Path) -> None:
    """The mean includes an unfinished run up to its last record; diverged values are not drawn."""
    plan = recipe.load(str(recipe_file))
    made_up(tmp_path, plan.run("sgd", 1), [50.0, 60.0, 70.0])
    made_up(tmp_path, plan.run("sgd", 2), [52.0], None)
    made_up(tmp_path, plan.run("sgd", 3), [54.0, None], "diverged")
    [curve] = panel(tmp_path)["test accuracy (%)"]["curves"]
    assert (curve["mean"], curve["count"]) == ([52.0, 60.0, 70.0], [3, 1, 1])


def test_axes_that_tell_the_curves_apart(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    values: list[float | None] = [10.0, 50.0, 80.0, 88.0, 89.0, 90.0]
    made_up(tmp_path / "images", plan.run("sgd", 1), values, steps=steps(90.0, 2.0))
    figures = panel(tmp_path / "images")
    low, high = figures["test accuracy (%)"]["span"]
    assert 86 < low < 88 < 90 < high < 92
    assert not figures["test accuracy (%)"]["log"]
    assert figures["training loss"]["log"]
    assert figures["training loss"]["span"] is None


def test_sweeps_and_searches_are_against_their_settings(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file), ["sweeps.lr-robustness.values=[1, 10]"])
    for spec in plan.sweep("lr-robustness", ["sgd", "apollo"], 1):
        assert spec.sweep is not None
        made_up(tmp_path / "sweep", spec, [50.0, 60.0 + spec.sweep.value])
    figures = panel(tmp_path / "sweep")
    assert list(figures) == ["test accuracy (%)", "training loss"]
    first = figures["test accuracy (%)"]
    assert (first["label"], first["log_x"]) == ("learning rate, times the base rate", True)
    assert [(curve["value"], curve["mean"]) for curve in first["curves"]] == [
        ([1.0, 10.0], [61.0, 70.0]),
    ] * 2
    settings = ["data.validation=64", "search.trials=3", "search.ranges.sgd.lr=[0.01, 1.0]"]
    search = recipe.load(str(recipe_file), settings)
    for spec in trials.make_trials(search):
        made_up(tmp_path / "search", spec, [50.0, 60.0 + 10 * spec.optimizer.lr])
    first = panel(tmp_path / "search")["validation accuracy (%)"]
    assert first["label"] == "learning rate"
    [curve] = first["curves"]
    assert curve["value"] == sorted(curve["value"])
    assert curve["mean"] == pytest.approx([60 + 10 * rate for rate in curve["value"]], rel=1e-4)


def test_long_runs_keep_records_at_common_steps() -> None:
    """Few of 5000 records are kept, at a distance of a power of two, each with a mean loss."""
    records = [{"step": i, "loss": float(i), "lr": float(i)} for i in range(1, 5001)]
    found = loading._thinned(records)
    assert 200 < len(found) <= 400
    assert [record["step"] for record in found[:2]] == [16, 32]
    assert found[0]["loss"] == pytest.approx(8.5)
    assert found[0]["lr"] == 16.0
    shorter = {record["step"] for record in loading._thinned(records[:1000])}
    assert {record["step"] for record in found if record["step"] <= 1000} <= shorter
    assert loading._thinned(records[:7]) == records[:7]


@pytest.mark.parametrize("name", [*STYLES, "mine-0", "mine-1"])
def test_every_color_is_seen_on_a_dark_page(name: str) -> None:
    def luminance(color: str) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb(color)]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def rgb(color: str) -> tuple[float, float, float]:
        return colors.to_rgb(color)

    found = curves.dark_color(name)
    assert (luminance(found) + 0.05) / (luminance("#14171a") + 0.05) >= 4.5
    own = luminance(style_of(name).color)
    assert luminance(found) == pytest.approx(own) or own < 0.3
