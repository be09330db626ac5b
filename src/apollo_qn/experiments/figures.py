"""The figures of a report; one colour and marker for one optimizer everywhere."""

from __future__ import annotations

import io
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from apollo_qn.experiments.report import Row, Spread


class Style(NamedTuple):
    """How an optimizer is drawn."""

    color: str
    marker: str


# Okabe and Ito's palette, which the colour-blind can tell apart; markers for print in grey
_STYLES = {
    "sgd": Style("#0072B2", "s"),
    "adam": Style("#009E73", "^"),
    "radam": Style("#CC79A7", "D"),
    "adam-adj": Style("#56B4E9", "v"),
    "radam-adj": Style("#E69F00", "P"),
    "apollo": Style("#D55E00", "o"),
}
_OTHER = Style("#000000", "x")
SETTINGS: Any = {
    "font.size": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "figure.constrained_layout.use": True,
    "figure.dpi": 144.0,
}


class Picture(NamedTuple):
    """A drawn figure."""

    name: str
    caption: str
    png: bytes


def style(name: str) -> Style:
    """Colour and marker of an optimizer."""
    return _STYLES.get(name, _OTHER)


def draw(rows: list[Row], evaluated_on: str) -> list[Picture]:
    """Draw all figures of a report.

    Args:
        rows: one an optimizer.
        evaluated_on: ``"test"`` or ``"validation"``, for the labels.
    """
    with mpl.rc_context(SETTINGS):
        return [
            Picture(
                "training_loss",
                "Training loss, mean of each epoch; band: ± one standard deviation over seeds",
                _curves(rows, "train_loss", "training loss", logarithmic=True),
            ),
            Picture(
                "test_accuracy",
                f"Accuracy on the {evaluated_on} images; band: ± one standard deviation over seeds",
                _curves(rows, "accuracy", f"{evaluated_on} accuracy (%)", logarithmic=False),
            ),
            Picture(
                "wall_time",
                "Wall time of a run, mean ± one standard deviation over seeds",
                _bars(rows, [row.seconds for row in rows], "wall time of a run (s)", 1),
            ),
            Picture(
                "optimizer_time",
                "Median time of optimizer.step(), mean ± one standard deviation over seeds",
                _bars(rows, [row.optimizer_ms for row in rows], "optimizer time a step (ms)", 2),
            ),
        ]


def _curves(rows: list[Row], metric: str, label: str, logarithmic: bool) -> bytes:
    figure = Figure(figsize=(7.0, 4.4))
    axes: Any = figure.subplots()
    values_shown: list[float] = []
    late: list[float] = []  # lower ends of the bands in the second half
    for row in rows:
        by_epoch: dict[int, list[float]] = {}
        for run in row.runs:
            for line in run.epochs:
                if line.get(metric) is not None:
                    by_epoch.setdefault(line["epoch"], []).append(line[metric])
        if not by_epoch:
            continue
        epochs = sorted(by_epoch)
        means = [statistics.fmean(by_epoch[epoch]) for epoch in epochs]
        deviations = [
            statistics.stdev(by_epoch[epoch]) if len(by_epoch[epoch]) > 1 else 0.0
            for epoch in epochs
        ]
        color, marker = style(row.name)
        every = max(1, len(epochs) // 12)
        axes.plot(
            epochs, means, color=color, marker=marker, markevery=every, markersize=5,
            linewidth=1.8, label=row.label,
        )  # fmt: skip
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        values_shown += means
        late += low[len(low) // 2 :]
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    # a logarithmic axis says nothing, and has hardly a label, over less than a decade
    if logarithmic and values_shown and 0 < 10 * min(values_shown) < max(values_shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.2g"))
        axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axes.set_ylim(0.92 * min(values_shown), 1.08 * max(values_shown))
    elif values_shown and not logarithmic:
        # the wild first epochs would press the rest into a line
        axes.set_ylim(min(late) - 1.0, max(values_shown) + 1.5)
    if values_shown:
        axes.legend(frameon=False, ncols=2, loc="upper right" if logarithmic else "lower right")
    else:
        _nothing_yet(axes)
    return _png(figure)


def _bars(rows: list[Row], values: list[Spread | None], label: str, digits: int) -> bytes:
    figure = Figure(figsize=(7.0, 0.8 + 0.62 * len(rows)))
    axes: Any = figure.subplots()
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        axes.barh(
            place, value.mean, xerr=value.std, color=style(row.name).color, height=0.62,
            error_kw={"elinewidth": 1.4, "capsize": 3.5},
        )  # fmt: skip
        axes.annotate(
            value.text(digits),
            (value.mean + (value.std or 0.0), place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    reach = [value.mean + (value.std or 0.0) for value in values if value is not None]
    if reach:
        axes.set_xlim(0, 1.25 * max(reach))
    else:
        _nothing_yet(axes)
    return _png(figure)


def _nothing_yet(axes: Any) -> None:
    axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", va="center")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # no date in the file: the same runs draw the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
