"""The data of the interactive curves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from apollo_bench.config import recipe
from apollo_bench.optimizers import plot_style
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


@pytest.mark.parametrize(("rate", "logarithmic"), [(0.12, False), (0.05, True)])
def test_learning_rates_that_are_far_apart_have_a_logarithmic_axis(
    recipe_file: Path, tmp_path: Path, rate: float, logarithmic: bool
) -> None:
    plan = recipe.load(str(recipe_file))
    for name, peak in (("sgd", 0.5), ("adam", rate)):
        decay = [{"loss": 1.0, "lr": peak * share} for share in (0.5, 1.0, 0.5, 0.0)]
        made_up(tmp_path, plan.run(name, 1), [50.0] * 4, steps=decay)
    figure = panel(tmp_path)["learning rate"]
    assert figure["log"] is logarithmic
    assert figure["log_span"] == [rate / 100, 0.75]


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


# every optimizer with a style of its own, and as many others as have one color each
NAMES = [*STYLES, *(f"mine-{i}" for i in range(7))]


def linear(color: str) -> list[float]:
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color)]


def luminance(color: str) -> float:
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear(color), strict=True))


def cielab(color: str) -> NDArray[numpy.float64]:
    """Coordinates in which equal distances look about equally different."""
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = numpy.cbrt(numpy.array(to_xyz) @ linear(color) / (0.9505, 1.0, 1.089))
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture
def first_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test has taken a color."""
    monkeypatch.setattr(plot_style, "_given", {})


@pytest.mark.usefixtures("first_names")
def test_every_color_is_seen_on_a_dark_page() -> None:
    for style in map(style_of, NAMES):
        assert (luminance(style.dark) + 0.05) / (luminance("#14171a") + 0.05) >= 4.5
        own = luminance(style.color)
        assert luminance(style.dark) == pytest.approx(own) or own < 0.3


@pytest.mark.usefixtures("first_names")
@pytest.mark.parametrize(("page", "apart"), [("color", 18), ("dark", 30)])
def test_colors_are_told_apart(page: str, apart: float) -> None:
    found = {name: cielab(getattr(style_of(name), page)) for name in NAMES}
    for one, other in itertools.combinations(NAMES, 2):
        assert numpy.linalg.norm(found[one] - found[other]) > apart, (one, other)


@pytest.mark.usefixtures("first_names")
def test_markers_and_their_symbols_are_told_apart() -> None:
    looks = [curves._line_style(name) for name in NAMES]
    for key in ("marker", "symbol"):
        assert len({look[key] for look in looks}) == len(NAMES) == 21
