"""The data of the interactive curves: what the page's script draws with Bokeh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas

from apollo_bench.optimizers.plot_style import style_of
from apollo_bench.report.performance_profile import MAX_RATIO, Profiles, Unit
from apollo_bench.report.statistics import SampleStats
from apollo_bench.report.summary import Row, ScheduleSection, Summary
from apollo_bench.report.sweep_figures import first_setting, settings_drawn
from apollo_bench.runs.loading import Run
from apollo_bench.runs.run_directory import Record

Figure = dict[str, Any]  # a figure for the script: title, axes and curves
Curve = dict[str, Any]  # of an optimizer

_DIGITS = 5  # significant digits of a coordinate
_POINTS = 200  # of a performance profile
_RATES_APART = 5.0  # ratio of learning rates from which their axis is logarithmic
_DECAY_SHOWN = 100.0  # of the smallest learning rate, on a logarithmic axis
_FEW = 5  # points; a shorter curve is shown whole
# marker in matplotlib, in Bokeh and as a character of the legend
_MARKERS = {
    "s": ("square", "■"),
    "^": ("triangle", "▲"),
    "D": ("diamond", "◆"),
    "d": ("diamond_cross", "◈"),
    "v": ("inverted_triangle", "▼"),
    "P": ("plus", "✚"),
    "o": ("circle", "●"),
    "X": ("x", "✖"),
    "x": ("circle_x", "⊗"),
    "h": ("hex", "⬢"),
    "*": ("star", "★"),
    "+": ("cross", "+"),
    "<": ("square_pin", "✦"),
    "4": ("y", "Y"),
    # of optimizers that have no style of their own
    ">": ("triangle_dot", "◬"),
    "p": ("circle_cross", "⊕"),
    "8": ("square_x", "⊠"),
    "1": ("square_cross", "⊞"),
    "2": ("asterisk", "✱"),
    "3": ("circle_y", "Ⓨ"),
    "H": ("triangle_pin", "△"),
}


def panels(summary: Summary) -> list[list[Figure]]:
    """Return the figures of every schedule."""
    if summary.sweep is None:
        return [_over_time(section) for section in summary.sections]
    return [_over_settings(summary, section) for section in summary.sections]


def profile_panel(found: Profiles, units: Sequence[Unit]) -> list[Figure]:
    """Return the performance profiles, a figure per unit."""
    ratios = [_short(1.0 + (MAX_RATIO - 1.0) * i / _POINTS) for i in range(_POINTS + 1)]
    figures = []
    for unit in units:
        curves = []
        for entry in found.entries:
            shares = [_short(entry.share_within(unit, ratio)) for ratio in ratios]
            no_spread = {"std": [0.0] * len(ratios), "count": [1] * len(ratios), "seeds": []}
            look = _line_style(entry.name, entry.label)
            curves.append({**look, "value": ratios, "mean": shares, **no_spread})
        figures.append(
            {
                **_scaled(f"share of {len(found.sections)} tasks at the target", curves, False),
                "span": [-0.03, 1.03],
                "log": False,
                "label": f"tau, in {unit} of the best optimizer",
                "log_x": False,
                "ticks": None,
            }
        )
    return figures


def _over_time(section: ScheduleSection) -> list[Figure]:
    """Return metric, training loss, learning rate and gradient norm during training."""
    metric = section.curve
    recorded = all(any(run.steps for run in row.runs) for row in section.rows)
    figures = [
        _figure(section, metric.title, metric.name, _evaluations, metric.higher_is_better),
        _figure(section, "training loss", "loss", _steps)
        if recorded  # archives hold evaluations only
        else _figure(section, "training loss", "train_loss", _evaluations),
        _learning_rates(section),
        _figure(section, "norm of the gradient", "gradient_norm", _steps),
    ]
    return [figure for figure in figures if figure["curves"]]


def _evaluations(run: Run) -> list[Record]:
    return run.evaluations


def _steps(run: Run) -> list[Record]:
    return run.steps


def _figure(
    section: ScheduleSection,
    title: str,
    key: str,
    records: Callable[[Run], list[Record]],
    rises: bool = False,
) -> Figure:
    curves = [_curve(row, key, records) for row in section.rows]
    return _scaled(title, [curve for curve in curves if curve["mean"]], rises)


def _learning_rates(section: ScheduleSection) -> Figure:
    """Return the figure of learning rates; logarithmic where those of optimizers differ much."""
    figure = _figure(section, "learning rate", "lr", _steps)
    peaks = [max(curve["mean"]) for curve in figure["curves"]]
    if peaks and min(peaks) > 0:
        figure["log"] |= max(peaks) > _RATES_APART * min(peaks)
        # a schedule that ends near zero would take most of a logarithmic axis
        figure["log_span"] = [_short(min(peaks) / _DECAY_SHOWN), _short(1.5 * max(peaks))]
    return figure


def _scaled(title: str, curves: list[Curve], rises: bool) -> Figure:
    """Return a figure whose vertical axis tells the curves apart in late epochs."""
    values = [value for curve in curves for value in curve["mean"]]
    low = [
        mean - std
        for curve in curves
        for mean, std in list(zip(curve["mean"], curve["std"], strict=True))[
            len(curve["mean"]) // 2 if len(curve["mean"]) > _FEW else 0 :
        ]
    ]
    span = None
    if rises and values and max(values) > min(low):
        margin = 0.05 * (max(values) - min(low))
        span = [_short(min(low) - margin), _short(max(values) + margin)]
    return {
        "title": title,
        "span": span,  # first visible part of the vertical axis; null: all of it
        "log": not rises and bool(values) and 0 < 10 * min(values) < max(values),
        "curves": curves,
    }


def _curve(row: Row, key: str, records: Callable[[Run], list[Record]]) -> Curve:
    """Return means over seeds and the runs of an optimizer, by updates, epochs and seconds."""
    table = pandas.DataFrame(
        [
            (run.spec.seed, line["step"], line["epoch"], line["time"]["seconds"], line[key])
            for run in row.runs
            for line in records(run)
            if _is_finite(line.get(key))
        ],
        columns=["seed", "step", "epoch", "seconds", "value"],
    )
    by_step = table.groupby("step")
    means = by_step.agg({"epoch": "first", "seconds": "mean"})
    means[["mean", "std", "count"]] = by_step["value"].agg(["mean", "std", "count"])
    # only where all runs that came so far have a record: other runs would make the mean jump
    ends = table.groupby("seed")["step"].max()
    common = means["count"] == [(ends >= step).sum() for step in means.index]
    means = means[common].reset_index()
    seeds = table.groupby("seed", sort=False) if len(row.runs) > 1 else []
    return {
        **_line_style(row.name),
        **_times(means),
        "mean": _shortened(means["mean"]),
        "std": _shortened(means["std"].fillna(0.0)),
        "count": means["count"].tolist(),
        "seeds": [
            {"seed": int(seed), **_times(run), "value": _shortened(run["value"])}
            for seed, run in seeds
        ],
    }


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _times(table: pandas.DataFrame) -> Curve:
    return {
        "updates": table["step"].tolist(),
        "epochs": _shortened(table["epoch"]),
        "seconds": _shortened(table["seconds"]),
    }


def _shortened(values: pandas.Series) -> list[float]:
    return [_short(value) for value in values]


def _over_settings(summary: Summary, section: ScheduleSection) -> list[Figure]:
    """Return final metric and training loss against the value of a sweep, or of a search."""
    search = summary.sweep == "tuning"
    label = settings_drawn(section) if search else _sweep_label(summary)
    figures = []
    for title, stats in (
        (summary.metric.title, lambda row: row.score),
        ("training loss", lambda row: row.stats("train_loss")),
    ):
        curves = [
            _against(
                [row for row in section.rows if row.name == name],
                first_setting if search else _value,
                stats,
            )
            for name in dict.fromkeys(row.name for row in section.rows)
        ]
        curves = [curve for curve in curves if curve["mean"]]
        logarithmic = summary.sweep != "weight-decay"
        if curves:
            found = _scaled(title, curves, rises=False)
            values = sorted({value for curve in curves for value in curve["value"]})
            ticks = None if search else values
            figures.append({**found, "label": label, "log_x": logarithmic, "ticks": ticks})
    return figures


def _value(row: Row) -> float:
    assert row.point is not None
    return row.point.value


def _sweep_label(summary: Summary) -> str:
    if summary.sweep == "lr-robustness":
        return "learning rate, times the base rate"
    return "weight decay (of the optimizers that state it)"


def _against(
    rows: list[Row], value: Callable[[Row], float], stats: Callable[[Row], SampleStats | None]
) -> Curve:
    points = sorted((value(row), found) for row in rows if (found := stats(row)) is not None)
    return {
        **_line_style(rows[0].name),
        "value": [_short(at) for at, _ in points],
        "mean": [_short(found.mean) for _, found in points],
        "std": [_short(found.std or 0.0) for _, found in points],
        "count": [found.count for _, found in points],
        "seeds": [],
    }


def _line_style(name: str, label: str | None = None) -> Curve:
    style = style_of(name)
    marker, symbol = _MARKERS[style.marker]
    return {
        "name": name,
        "label": label or style.label,
        "color": style.color,
        "dark": style.dark,
        "marker": marker,
        "symbol": symbol,
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
