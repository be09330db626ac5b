"""The figure of Apollo's curvature, for runs with diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
import pandas
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from apollo_bench.optimizers.plot_style import style_of
from apollo_bench.report.figure_axes import (
    BAND,
    LINES,
    FigureFile,
    draw_band,
    mark_empty,
    picture,
    short,
    unit,
)
from apollo_bench.report.statistics import stats_over_time
from apollo_bench.report.summary import Row, Summary
from apollo_bench.report.sweep_figures import shade, value_label
from apollo_qn.diagnostics import TensorDiagnostics


def curvature(summary: Summary) -> list[FigureFile]:
    """Draw the curvature of the runs that were trained with diagnostics."""
    rows = [row for row in summary.rows if any(run.curvature for run in row.runs)]
    if not rows:
        return []
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    figure = Figure(figsize=(10.0, 6.6))
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for axes, (title, measured) in zip(panels, _CURVATURES.items(), strict=True):
        for row in rows:
            found = _measured_over_time(row, measured)
            if found.empty:
                continue
            line = LINES[schedules.index(row.schedule) % len(LINES)]
            label = f"{row.label}, {row.schedule}" if len(schedules) > 1 else row.label
            color: ColorType = style_of(row.name).color
            if row.point is not None:
                same = [x for x in rows if (x.name, x.schedule) == (row.name, row.schedule)]
                label = f"{label} {value_label(row)}"
                color = shade(style_of(row.name).color, same.index(row), len(same))
            axes.plot(found["mean"], color=color, linestyle=line, linewidth=1.8, label=label)
            draw_band(axes, found, color)
        axes.set_title(title)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if measured is _step_ratio and axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: short(value)))
            axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        if not axes.lines:
            mark_empty(axes)
    for axes in panels[2:]:
        axes.set_xlabel(unit(rows[0]))
    if len(rows) > 1:
        panels[0].legend(frameon=False)
    caption = (
        "Apollo's curvature B, all tensors together, of the runs with --diagnostics: share of "
        "negative elements; share below sigma, which sigma rectifies; last secant correction and "
        f"last step; {BAND}"
    )
    return [picture("curvature", caption, figure)]


def _correction_share(tensors: TensorDiagnostics) -> float:
    change, size = tensors.secant_correction, tensors.curvature_rms
    return change / size if change is not None and size else math.nan


def _step_ratio(tensors: TensorDiagnostics) -> float:
    return tensors.step_ratio or math.nan  # the axis is logarithmic


_CURVATURES: dict[str, Callable[[TensorDiagnostics], float]] = {
    "negative curvature (%)": lambda tensors: 100 * tensors.negative,
    "rectified by sigma (%)": lambda tensors: 100 * tensors.rectified,
    "secant correction / B (RMS)": _correction_share,
    "step / parameter (norms)": _step_ratio,
}


def _measured_over_time(
    row: Row, measured: Callable[[TensorDiagnostics], float]
) -> pandas.DataFrame:
    """Return mean and standard deviation over the runs of what is measured and finite."""
    by_epoch = unit(row) == "epoch"
    points = [
        (one.epoch if by_epoch else one.step, value)
        for run in row.runs
        for one in run.curvature
        if math.isfinite(value := measured(one.tensors))
    ]
    return stats_over_time([time for time, _ in points], [value for _, value in points])
