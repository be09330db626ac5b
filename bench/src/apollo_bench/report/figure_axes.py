"""Parts that the figures of a report share: axes, labels, curves over time, files."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
import pandas
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from apollo_bench.report.statistics import stats_over_time
from apollo_bench.report.summary import Row

BAND = "band: ± one standard deviation over seeds"
LINES = ("-", "--", "-.", ":")
_FEW = 5  # points; a shorter curve is shown whole


class FigureFile(NamedTuple):
    """A drawn figure."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def unit(row: Row) -> str:
    """Return the unit of the row's schedule: "epoch" or "update"."""
    return row.runs[0].spec.train.schedule.unit


def over_time(row: Row, metric: str) -> pandas.DataFrame:
    """Return mean and standard deviation over the runs at each evaluation, by epoch or update."""
    time = "epoch" if unit(row) == "epoch" else "step"
    lines = [line for run in row.runs for line in run.evaluations if line.get(metric) is not None]
    return stats_over_time([line[time] for line in lines], [line[metric] for line in lines])


def draw_band(axes: Any, found: pandas.DataFrame, color: ColorType) -> None:
    """Fill the area of one standard deviation around a mean over time."""
    low, high = found["mean"] - found["std"], found["mean"] + found["std"]
    axes.fill_between(found.index, low, high, color=color, alpha=0.15, linewidth=0)


class Scale:
    """Chooses the vertical axis so that the curves can be told apart in late epochs."""

    def __init__(self, axes: Any, rises: bool) -> None:
        self._axes, self._rises = axes, rises
        self._values: list[float] = []
        self._late: list[float] = []  # lower ends of the bands in the second half of the curves
        self._top = 0.0  # of the bands

    def include(self, found: pandas.DataFrame, band: bool = True) -> None:
        """Take a mean over time into account, and its band where one is drawn."""
        std = found["std"] if band else 0.0
        self._values += found["mean"].tolist()
        self._top = max(self._top, (found["mean"] + std).max())
        low = (found["mean"] - std).tolist()
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
