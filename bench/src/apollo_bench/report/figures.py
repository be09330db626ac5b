"""The figures of a comparison; ``draw`` makes all figures of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
from matplotlib.figure import Figure

from apollo_bench.optimizers.plot_style import SETTINGS, style_of
from apollo_bench.report.curvature_figures import curvature
from apollo_bench.report.figure_axes import (
    BAND,
    FigureFile,
    Scale,
    draw_band,
    mark_empty,
    over_time,
    picture,
    unit,
)
from apollo_bench.report.statistics import SampleStats
from apollo_bench.report.summary import Summary
from apollo_bench.report.sweep_figures import sweep, tuning


def draw(summary: Summary) -> list[FigureFile]:
    """Draw all figures of a report."""
    with mpl.rc_context(SETTINGS):
        if summary.sweep == "tuning":
            return tuning(summary)
        made = sweep(summary) if summary.sweep else _comparison(summary)
        return [*made, *curvature(summary)]


def _comparison(summary: Summary) -> list[FigureFile]:
    """Draw figure 1 of the paper, wall time and optimizer time."""
    curve = summary.curve
    return [
        picture(
            "training_loss",
            f"Training loss, mean since the previous evaluation; {BAND}",
            _curves_by_schedule(summary, "train_loss", "training loss"),
        ),
        picture(
            curve.label.replace(" ", "_"),
            f"{curve.label.capitalize()}; {BAND}",
            _curves_by_schedule(summary, curve.name, curve.title),
        ),
        picture(
            "wall_time",
            "Wall time of a run, mean ± one standard deviation over seeds",
            _bars(
                summary, "wall time of a run (s)", 1, [row.stats("seconds") for row in summary.rows]
            ),
        ),
        picture(
            "optimizer_time",
            "Median time of optimizer.step(), mean ± one standard deviation over seeds",
            _bars(
                summary,
                "optimizer time per step (ms)",
                2,
                [row.stats("optimizer_ms") for row in summary.rows],
            ),
        ),
    ]


def _curves_by_schedule(summary: Summary, metric: str, label: str) -> Figure:
    sections = summary.sections
    figure = Figure(figsize=(7.0 if len(sections) == 1 else 5.4 * len(sections), 4.4))
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, section in zip(panels, sections, strict=True):
        scale = Scale(axes, metric == summary.curve.name and summary.curve.higher_is_better)
        for row in section.rows:
            found = over_time(row, metric)
            if found.empty:
                continue
            color, marker = style_of(row.name).color, style_of(row.name).marker
            axes.plot(
                found["mean"], color=color, marker=marker, markevery=max(1, len(found) // 12),
                markersize=5, linewidth=1.8, label=row.label,
            )  # fmt: skip
            draw_band(axes, found, color)
            scale.include(found)
        if len(sections) > 1:
            axes.set_title(f"{section.schedule} schedule")
        axes.set_xlabel(unit(section.rows[0]))
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        scale.set()
        if axes.lines:
            axes.legend(frameon=False, ncols=2, loc="best")
        else:
            mark_empty(axes)
    return figure


def _bars(
    summary: Summary, label: str, digits: int, values: Iterable[SampleStats | None]
) -> Figure:
    several = len(summary.sections) > 1
    rows = summary.rows
    figure = Figure(figsize=(7.0, 0.8 + 0.62 * len(rows)))
    axes: Any = figure.subplots()
    reach = []
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        end = value.mean + (value.std or 0.0)
        reach.append(end)
        axes.barh(
            index, value.mean, xerr=value.std, color=style_of(row.name).color, height=0.62,
            error_kw={"elinewidth": 1.4, "capsize": 3.5},
        )  # fmt: skip
        axes.annotate(
            value.text(digits), (end, index), xytext=(7, 0), textcoords="offset points", va="center"
        )
    names = [f"{row.label}, {row.schedule}" if several else row.label for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    if reach:
        axes.set_xlim(0, 1.25 * max(reach))
    else:
        mark_empty(axes)
    return figure
