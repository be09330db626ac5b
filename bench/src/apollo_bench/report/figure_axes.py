"""Parts that the figures of a report share: axes, labels, curves over time, files."""

from __future__ import annotations

import io
import statistics
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
from matplotlib.figure import Figure

from apollo_bench.report.statistics import SampleStats
from apollo_bench.report.summary import Row

BAND = "band: ± one standard deviation over seeds"


_FEW = 5  # points; a shorter curve is shown whole


LINES = ("-", "--", "-.", ":")


class FigureFile(NamedTuple):
    """A drawn figure."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def unit(row: Row) -> str:
    """Return the unit of the row's schedule: "epoch" or "update"."""
    return row.runs[0].spec.train.schedule.unit


def over_time(row: Row, metric: str) -> dict[float, SampleStats]:
    """Return mean and standard deviation over the runs at each evaluation, by epoch or update."""
    time = "epoch" if unit(row) == "epoch" else "step"
    values: dict[float, list[float]] = {}
    for run in row.runs:
        for line in run.evaluations:
            if line.get(metric) is not None:
                values.setdefault(line[time], []).append(line[metric])
    return spreads(values)


def spreads(values: dict[float, list[float]]) -> dict[float, SampleStats]:
    """Return mean and standard deviation of the values at each time, in order of time."""
    return {
        at: SampleStats(
            statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found)
        )
        for at, found in sorted(values.items())
    }


class Scale:
    """Chooses the vertical axis so that the curves can be told apart in late epochs."""

    def __init__(self, axes: Any, rises: bool) -> None:
        self._axes, self._rises = axes, rises
        self._values: list[float] = []
        self._late: list[float] = []  # lower ends of the bands in the second half of the curves
        self._top = 0.0  # of the bands

    def include(self, means: list[float], low: list[float], high: list[float]) -> None:
        """Take a curve and its band into account."""
        self._values += means
        self._top = max(self._top, *high)
        self._late += low[len(low) // 2 :] if len(low) > _FEW else low

    def set(self) -> None:
        """Set the axis, after the last curve."""
        if not self._values:
            return
        lowest, highest = min(self._values), max(self._values)
        if self._rises:
            # with the first epochs in view the rest would look flat
            self._axes.set_ylim(min(self._late) - 1.0, highest + 1.5)
        # over less than a decade a logarithmic axis has hardly a label
        elif 0 < 10 * lowest < max(highest, self._top):
            logarithmic(self._axes, lowest, highest)


def logarithmic(axes: Any, lowest: float, highest: float) -> None:
    """Make the vertical axis logarithmic, from a little below ``lowest``."""
    axes.set_yscale("log")
    axis = axes.yaxis
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.set_ylim(0.92 * lowest, 1.08 * highest)


def short(value: float) -> str:
    """Return the text of a number on an axis: 0.2, 10, 5e-4."""
    if value >= 0.001:
        return f"{value:g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def mark_empty(axes: Any) -> None:
    """Label an empty panel."""
    axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", va="center")


def picture(name: str, caption: str, figure: Figure) -> FigureFile:
    """Render a figure as PNG and SVG."""
    files = {}
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        # no date in the file: the same runs draw the same bytes
        figure.savefig(buffer, format=form, metadata=metadata)
        files[form] = buffer.getvalue()
    return FigureFile(name, caption, files["png"], files["svg"])
