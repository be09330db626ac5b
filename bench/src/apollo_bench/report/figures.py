"""The figures of a report; one colour and marker for one optimizer everywhere."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
from matplotlib.figure import Figure

from apollo_bench.optimizers.plot_style import SETTINGS, style
from apollo_bench.report.statistics import Spread
from apollo_bench.report.summary import Row, Section, Summary, best_of
from apollo_qn.diagnostics import TensorDiagnostics

_BAND = "band: ± one standard deviation over seeds"
_TOO_FAR = 10  # times the best value of all tries: what is beyond would press the rest into a line
_FEW = 5  # points of a curve, of which all are shown
_LINES = ("-", "--", "-.", ":")


class Picture(NamedTuple):
    """A drawn figure."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def draw(summary: Summary) -> list[Picture]:
    """Draw all figures of a report."""
    with mpl.rc_context(SETTINGS):
        make = {None: _comparison, "tuning": _tuning}.get(summary.sweep, _sweep)
        return make(summary)


def _comparison(summary: Summary) -> list[Picture]:
    """Figure 1 of the paper, and what a step costs."""
    curve = summary.curve
    return [
        _picture(
            "training_loss",
            f"Training loss, mean since the evaluation before; {_BAND}",
            _curves_by_schedule(summary, "train_loss", "training loss"),
        ),
        _picture(
            curve.label.replace(" ", "_"),
            f"{curve.label.capitalize()}; {_BAND}",
            _curves_by_schedule(summary, curve.name, curve.title),
        ),
        _picture(
            "wall_time",
            "Wall time of a run, mean ± one standard deviation over seeds",
            _bars(summary, "wall time of a run (s)", 1, [row.seconds for row in summary.rows]),
        ),
        _picture(
            "optimizer_time",
            "Median time of optimizer.step(), mean ± one standard deviation over seeds",
            _bars(
                summary, "optimizer time a step (ms)", 2, [row.optimizer_ms for row in summary.rows]
            ),
        ),
        *_curvature(summary),
    ]


def _curvature(summary: Summary) -> list[Picture]:
    """Of those runs that were trained with --diagnostics."""
    rows = [row for row in summary.rows if any(run.curvature for run in row.runs)]
    if not rows:
        return []
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    figure = Figure(figsize=(10.0, 6.6))
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for axes, (title, measured) in zip(panels, _CURVATURES.items(), strict=True):
        for row in rows:
            found = _measured_over_time(row, measured)
            if not found:
                continue
            times, means = list(found), [value.mean for value in found.values()]
            line = _LINES[schedules.index(row.schedule) % len(_LINES)]
            label = f"{row.label}, {row.schedule}" if len(schedules) > 1 else row.label
            color = style(row.name).color
            axes.plot(times, means, color=color, linestyle=line, linewidth=1.8, label=label)
            spreads = [(value.mean, value.std or 0.0) for value in found.values()]
            low, high = [x - std for x, std in spreads], [x + std for x, std in spreads]
            axes.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if measured is _step_ratio and axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: short(value)))
            axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        if not axes.lines:
            _nothing_yet(axes)
    for axes in panels[2:]:
        axes.set_xlabel(_unit(rows[0]))
    if len(rows) > 1:
        panels[0].legend(frameon=False)
    caption = (
        "Apollo's curvature B, all tensors together, where --diagnostics measured it: share of "
        "negative elements; share below sigma, which sigma rectifies; last secant correction and "
        f"last step; {_BAND}"
    )
    return [_picture("curvature", caption, figure)]


def _correction_share(tensors: TensorDiagnostics) -> float:
    change, size = tensors.secant_correction, tensors.curvature_rms
    return change / size if change is not None and size else math.nan


def _step_ratio(tensors: TensorDiagnostics) -> float:
    return tensors.step_ratio or math.nan  # its axis is logarithmic


_CURVATURES: dict[str, Callable[[TensorDiagnostics], float]] = {
    "negative curvature (%)": lambda tensors: 100 * tensors.negative,
    "rectified by sigma (%)": lambda tensors: 100 * tensors.rectified,
    "secant correction / B (RMS)": _correction_share,
    "step / parameter (norms)": _step_ratio,
}


def _measured_over_time(
    row: Row, measured: Callable[[TensorDiagnostics], float]
) -> dict[float, Spread]:
    values: dict[float, list[float]] = {}
    for run in row.runs:
        for one in run.curvature:
            value = measured(one.tensors)
            if math.isfinite(value):
                at = one.epoch if _unit(row) == "epoch" else one.step
                values.setdefault(at, []).append(value)
    return _spreads(values)


def _tuning(summary: Summary) -> list[Picture]:
    far = "" if summary.metric.higher_is_better else f", nor what is over {_TOO_FAR} times the best"
    return [
        _picture(
            "tuning",
            f"{summary.metric.label.capitalize()} of every try over the first setting that was "
            f"drawn, as a multiple of the best one; what diverged is not shown{far}",
            _by_rate(summary),
        )
    ]


def _by_rate(summary: Summary) -> Figure:
    """A column for each schedule."""
    sections = summary.sections
    figure = Figure(figsize=(7.5 if len(sections) == 1 else 5.4 * len(sections), 4.8))
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, section in zip(panels, sections, strict=True):
        found: list[float] = []
        for name in dict.fromkeys(row.name for row in section.rows):
            tries = [row for row in section.rows if row.name == name and not row.diverged]
            best = best_of(tries)
            if best is None:
                continue
            own = _first_setting(best)
            points = sorted(
                (_first_setting(row) / own, row.score.mean) for row in tries if row.score
            )
            values = [value for _, value in points]
            axes.plot(
                [rate for rate, _ in points], values, color=style(name).color,
                marker=style(name).marker, markersize=6, linewidth=1.8, label=best.label,
            )  # fmt: skip
            found += values
        axes.set_xscale("log")
        axes.set_xlabel(f"{_settings_drawn(section)}, times the best one")
        axes.set_ylabel(summary.metric.title)
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: short(value)))
        if len(sections) > 1:
            axes.set_title(f"{section.schedule} schedule")
        if found and not summary.metric.higher_is_better and max(found) > _TOO_FAR * min(found) > 0:
            _logarithmic(axes, min(found), _TOO_FAR * min(found))
        if axes.lines:
            axes.legend(frameon=False, fontsize=10, ncols=2, loc="best")
        else:
            _nothing_yet(axes)
    return figure


def _first_setting(row: Row) -> float:
    """Of those that were drawn, the learning rate in most cases."""
    spec = row.runs[0].spec
    return float(getattr(spec.optimizer, next(iter(spec.ranges or {"lr": []}))))


def _settings_drawn(section: Section) -> str:
    keys = dict.fromkeys(next(iter(row.runs[0].spec.ranges or {"lr": []})) for row in section.rows)
    return " or ".join("learning rate" if key == "lr" else key for key in keys)


def _sweep(summary: Summary) -> list[Picture]:
    """Figures 2 and 4 of the paper."""
    if summary.sweep == "lr-robustness":
        what, label = "learning rate", "learning rate, times the base rate"
    else:
        what, label = "weight decay", "weight decay (of those that state it)"
    name = what.replace(" ", "_")
    pictures = [
        _picture(
            name,
            f"{summary.metric.label.capitalize()} and training loss at the end over the "
            f"{what}; bars: ± one standard deviation over seeds",
            _by_value(summary, label),
        )
    ]
    several = len(summary.sections) > 1
    for section in summary.sections:
        pictures.append(
            _picture(
                f"{name}_curves_{section.schedule}" if several else f"{name}_curves",
                f"Training loss and {summary.curve.label} at each {what}, means over seeds"
                + (f"; schedule {section.schedule}" if several else ""),
                _curves_by_value(summary, section),
            )
        )
    return pictures


def _curves_by_schedule(summary: Summary, metric: str, label: str) -> Figure:
    sections = summary.sections
    figure = Figure(figsize=(7.0 if len(sections) == 1 else 5.4 * len(sections), 4.4))
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, section in zip(panels, sections, strict=True):
        scale = _Scale(axes, metric == summary.curve.name and summary.curve.higher_is_better)
        for row in section.rows:
            found = _over_time(row, metric)
            if not found:
                continue
            color, marker = style(row.name).color, style(row.name).marker
            every = max(1, len(found) // 12)
            times, means = list(found), [value.mean for value in found.values()]
            axes.plot(
                times, means, color=color, marker=marker, markevery=every, markersize=5,
                linewidth=1.8, label=row.label,
            )  # fmt: skip
            low = [value.mean - (value.std or 0.0) for value in found.values()]
            high = [value.mean + (value.std or 0.0) for value in found.values()]
            axes.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
            scale.saw(means, low, high)
        if len(sections) > 1:
            axes.set_title(f"{section.schedule} schedule")
        axes.set_xlabel(_unit(section.rows[0]))
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        scale.set()
        if axes.lines:
            axes.legend(frameon=False, ncols=2, loc="best")
        else:
            _nothing_yet(axes)
    return figure


def _curves_by_value(summary: Summary, section: Section) -> Figure:
    """A column for each optimizer, in shades of its colour."""
    names = list(dict.fromkeys(row.name for row in section.rows))
    figure = Figure(figsize=(max(7.0, 3.4 * len(names)), 6.6))
    metric = summary.curve
    panels = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for line, (key, label) in enumerate(
        (("train_loss", "training loss"), (metric.name, metric.title))
    ):
        scale = _Scale(panels[line][0], key == metric.name and metric.higher_is_better)
        for axes, name in zip(panels[line], names, strict=True):
            mine = [row for row in section.rows if row.name == name]
            for place, row in enumerate(mine):
                found = _over_time(row, key)
                if not found:
                    continue
                means = [value.mean for value in found.values()]
                axes.plot(
                    list(found), means, linewidth=1.8, linestyle=_LINES[place % len(_LINES)],
                    color=_shade(style(name).color, place, len(mine)), label=_value(row),
                )  # fmt: skip
                scale.saw(means, means, means)
            if line == 0:
                axes.set_title(style(name).label)
            else:
                axes.set_xlabel(_unit(section.rows[0]))
                axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if axes.lines and line == 0:
                axes.legend(frameon=False, fontsize=10, ncols=1 + (len(mine) > 4))
            if not axes.lines:
                _nothing_yet(axes)
        panels[line][0].set_ylabel(label)
        scale.set()
    return figure


def _by_value(summary: Summary, label: str) -> Figure:
    """A column for each schedule: the metric and the loss at the end, over the sweep's values."""
    sections = summary.sections
    figure = Figure(figsize=(7.0 if len(sections) == 1 else 5.4 * len(sections), 7.0))
    panels = figure.subplots(2, len(sections), squeeze=False, sharex=True, sharey="row")
    for column, section in enumerate(sections):
        for line, (title, own) in enumerate(
            ((summary.metric.title, _score), ("training loss", _train_loss))
        ):
            axes: Any = panels[line][column]
            for name in dict.fromkeys(row.name for row in section.rows):
                points = [
                    (row.point.value, found)
                    for row in section.rows
                    if row.name == name
                    and row.point is not None
                    and (found := own(row)) is not None
                ]
                axes.errorbar(
                    [value for value, _ in points],
                    [found.mean for _, found in points],
                    yerr=[found.std or 0.0 for _, found in points],
                    color=style(name).color, marker=style(name).marker, markersize=6,
                    linewidth=1.8, capsize=3, label=style(name).label,
                )  # fmt: skip
            values = sorted({row.point.value for row in section.rows if row.point is not None})
            if summary.sweep == "lr-robustness":
                axes.set_xscale("log")
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(
                values, [short(value) for value in values], **(turned if len(values) > 5 else {})
            )
            axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            if column == 0:
                axes.set_ylabel(title)
            if line == 0 and len(sections) > 1:
                axes.set_title(f"{section.schedule} schedule")
            if line == 1:
                axes.set_xlabel(label)
            if not any(own(row) is not None for row in section.rows):
                _nothing_yet(axes)
    handles, names_shown = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names_shown, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _score(row: Row) -> Spread | None:
    return row.score


def _train_loss(row: Row) -> Spread | None:
    return row.train_loss


def _unit(row: Row) -> str:
    """What its schedule counts."""
    return row.runs[0].spec.train.schedule.unit


def _over_time(row: Row, metric: str) -> dict[float, Spread]:
    """Mean and deviation over the runs at each evaluation, by epochs or updates."""
    time = "epoch" if _unit(row) == "epoch" else "step"
    values: dict[float, list[float]] = {}
    for run in row.runs:
        for line in run.evaluations:
            if line.get(metric) is not None:
                values.setdefault(line[time], []).append(line[metric])
    return _spreads(values)


def _spreads(values: dict[float, list[float]]) -> dict[float, Spread]:
    return {
        at: Spread(
            statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found)
        )
        for at, found in sorted(values.items())
    }


class _Scale:
    """Chooses the vertical axis by what is drawn, so that the late epochs can be told apart."""

    def __init__(self, axes: Any, rises: bool) -> None:
        self._axes, self._rises = axes, rises
        self._values: list[float] = []
        self._late: list[float] = []  # lower ends of the bands in the second half
        self._top = 0.0  # of the bands

    def saw(self, means: list[float], low: list[float], high: list[float]) -> None:
        """A curve, and the ends of its band."""
        self._values += means
        self._top = max(self._top, *high)
        self._late += low[len(low) // 2 :] if len(low) > _FEW else low

    def set(self) -> None:
        """After the last curve."""
        if not self._values:
            return
        least, most = min(self._values), max(self._values)
        if self._rises:
            # the wild first epochs would press the rest into a line
            self._axes.set_ylim(min(self._late) - 1.0, most + 1.5)
        # a logarithmic axis says nothing, and has hardly a label, over less than a decade
        elif 0 < 10 * least < max(most, self._top):
            _logarithmic(self._axes, least, most)


def _logarithmic(axes: Any, least: float, most: float) -> None:
    axes.set_yscale("log")
    axis = axes.yaxis
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.set_ylim(0.92 * least, 1.08 * most)


def _value(row: Row) -> str:
    if row.point is None:
        return ""
    factor = row.point.kind == "lr-robustness"
    return f"× {row.point.value:g}" if factor else short(row.point.value)


def short(value: float) -> str:
    """As people write it on an axis: 0.2, 10, 5e-4."""
    if value >= 0.001:
        return f"{value:g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _shade(color: str, place: int, count: int) -> tuple[float, float, float]:
    """From the colour's half-light to its dusk."""
    rgb = matplotlib.colors.to_rgb(color)
    at = place / max(1, count - 1)  # 0 ... 1
    if at < 0.5:
        return tuple(x + (1 - x) * (0.5 - at) for x in rgb)  # type: ignore[return-value]
    return tuple(x * (1.5 - at) for x in rgb)  # type: ignore[return-value]


def _bars(summary: Summary, label: str, digits: int, values: Iterable[Spread | None]) -> Figure:
    several = len(summary.sections) > 1
    rows = summary.rows
    figure = Figure(figsize=(7.0, 0.8 + 0.62 * len(rows)))
    axes: Any = figure.subplots()
    reach = []
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        end = value.mean + (value.std or 0.0)
        reach.append(end)
        axes.barh(
            place, value.mean, xerr=value.std, color=style(row.name).color, height=0.62,
            error_kw={"elinewidth": 1.4, "capsize": 3.5},
        )  # fmt: skip
        axes.annotate(
            value.text(digits), (end, place), xytext=(7, 0), textcoords="offset points", va="center"
        )
    names = [f"{row.label}, {row.schedule}" if several else row.label for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    if reach:
        axes.set_xlim(0, 1.25 * max(reach))
    else:
        _nothing_yet(axes)
    return figure


def _nothing_yet(axes: Any) -> None:
    axes.text(0.5, 0.5, "nothing to show yet", transform=axes.transAxes, ha="center", va="center")


def _picture(name: str, caption: str, figure: Figure) -> Picture:
    files = {}
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        # no date in the file: the same runs draw the same bytes
        figure.savefig(buffer, format=form, metadata=metadata)
        files[form] = buffer.getvalue()
    return Picture(name, caption, files["png"], files["svg"])
