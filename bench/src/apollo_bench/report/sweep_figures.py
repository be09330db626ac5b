"""The figures of sweeps and of the search for settings."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
from matplotlib.figure import Figure

from apollo_bench.optimizers.plot_style import style_of
from apollo_bench.report.figure_axes import (
    LINES,
    FigureFile,
    Scale,
    logarithmic,
    mark_empty,
    over_time,
    picture,
    short,
    unit,
)
from apollo_bench.report.statistics import SampleStats
from apollo_bench.report.summary import Row, ScheduleSection, Summary, best_of

_TOO_FAR = 10  # times the best value of all trials; points beyond would make the rest look flat


def tuning(summary: Summary) -> list[FigureFile]:
    """Draw the scores of all trials of a search."""
    far = (
        ""
        if summary.metric.higher_is_better
        else f"; nor are values above {_TOO_FAR} times the best"
    )
    return [
        picture(
            "tuning",
            f"{summary.metric.label.capitalize()} of every trial against the first sampled "
            "setting, as a multiple of the best one; diverged trials are not shown"
            + ("" if summary.metric.higher_is_better else far),
            _by_rate(summary),
        )
    ]


def _by_rate(summary: Summary) -> Figure:
    """Return a figure with one column per schedule."""
    sections = summary.sections
    figure = Figure(figsize=(7.5 if len(sections) == 1 else 5.4 * len(sections), 4.8))
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, section in zip(panels, sections, strict=True):
        found: list[float] = []
        for name in dict.fromkeys(row.name for row in section.rows):
            trials = [row for row in section.rows if row.name == name and not row.diverged]
            best = best_of(trials)
            if best is None:
                continue
            setting = first_setting(best)
            points = sorted(
                (first_setting(row) / setting, row.score.mean) for row in trials if row.score
            )
            values = [value for _, value in points]
            axes.plot(
                [rate for rate, _ in points], values, color=style_of(name).color,
                marker=style_of(name).marker, markersize=6, linewidth=1.8, label=best.label,
            )  # fmt: skip
            found += values
        axes.set_xscale("log")
        axes.set_xlabel(f"{settings_drawn(section)}, times the best one")
        axes.set_ylabel(summary.metric.title)
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: short(value)))
        if len(sections) > 1:
            axes.set_title(f"{section.schedule} schedule")
        if found and not summary.metric.higher_is_better and max(found) > _TOO_FAR * min(found) > 0:
            logarithmic(axes, min(found), _TOO_FAR * min(found))
        if axes.lines:
            axes.legend(frameon=False, fontsize=10, ncols=2, loc="best")
        else:
            mark_empty(axes)
    return figure


def first_setting(row: Row) -> float:
    """Return the first sampled setting of a trial; in general it is the learning rate."""
    spec = row.runs[0].spec
    return float(getattr(spec.optimizer, next(iter(spec.ranges or {"lr": []}))))


def settings_drawn(section: ScheduleSection) -> str:
    """Return the names of the first settings that the search drew."""
    keys = dict.fromkeys(next(iter(row.runs[0].spec.ranges or {"lr": []})) for row in section.rows)
    return " or ".join("learning rate" if key == "lr" else key for key in keys)


def sweep(summary: Summary) -> list[FigureFile]:
    """Draw figures 2 and 4 of the paper."""
    if summary.sweep == "lr-robustness":
        what, label = "learning rate", "learning rate, times the base rate"
    else:
        what, label = "weight decay", "weight decay (of the optimizers that state it)"
    name = what.replace(" ", "_")
    pictures = [
        picture(
            name,
            f"{summary.metric.label.capitalize()} and training loss at the end against the "
            f"{what}; bars: ± one standard deviation over seeds",
            _by_value(summary, label),
        )
    ]
    several = len(summary.sections) > 1
    for section in summary.sections:
        pictures.append(
            picture(
                f"{name}_curves_{section.schedule}" if several else f"{name}_curves",
                f"Training loss and {summary.curve.label} at each {what}, means over seeds"
                + (f"; schedule {section.schedule}" if several else ""),
                _curves_by_value(summary, section),
            )
        )
    return pictures


def _curves_by_value(summary: Summary, section: ScheduleSection) -> Figure:
    """Return a figure with one column per optimizer, in shades of its color."""
    names = list(dict.fromkeys(row.name for row in section.rows))
    figure = Figure(figsize=(max(7.0, 3.4 * len(names)), 6.6))
    metric = summary.curve
    panels = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for line, (key, label) in enumerate(
        (("train_loss", "training loss"), (metric.name, metric.title))
    ):
        scale = Scale(panels[line][0], key == metric.name and metric.higher_is_better)
        for axes, name in zip(panels[line], names, strict=True):
            own_rows = [row for row in section.rows if row.name == name]
            for index, row in enumerate(own_rows):
                found = over_time(row, key)
                if found.empty:
                    continue
                axes.plot(
                    found["mean"], linewidth=1.8, linestyle=LINES[index % len(LINES)],
                    color=shade(style_of(name).color, index, len(own_rows)), label=value_label(row),
                )  # fmt: skip
                scale.include(found, band=False)
            if line == 0:
                axes.set_title(style_of(name).label)
            else:
                axes.set_xlabel(unit(section.rows[0]))
                axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if axes.lines and line == 0:
                axes.legend(frameon=False, fontsize=10, ncols=1 + (len(own_rows) > 4))
            if not axes.lines:
                mark_empty(axes)
        panels[line][0].set_ylabel(label)
        scale.set()
    return figure


def _by_value(summary: Summary, label: str) -> Figure:
    """Return a figure of the final metric and loss against the value, one column per schedule."""
    sections = summary.sections
    figure = Figure(figsize=(7.0 if len(sections) == 1 else 5.4 * len(sections), 7.0))
    panels = figure.subplots(2, len(sections), squeeze=False, sharex=True, sharey="row")
    for column, section in enumerate(sections):
        for line, (title, value_of) in enumerate(
            ((summary.metric.title, _score), ("training loss", _train_loss))
        ):
            axes: Any = panels[line][column]
            for name in dict.fromkeys(row.name for row in section.rows):
                points = [
                    (row.point.value, found)
                    for row in section.rows
                    if row.name == name
                    and row.point is not None
                    and (found := value_of(row)) is not None
                ]
                axes.errorbar(
                    [value for value, _ in points],
                    [found.mean for _, found in points],
                    yerr=[found.std or 0.0 for _, found in points],
                    color=style_of(name).color, marker=style_of(name).marker, markersize=6,
                    linewidth=1.8, capsize=3, label=style_of(name).label,
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
            if not any(value_of(row) is not None for row in section.rows):
                mark_empty(axes)
    handles, names_shown = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names_shown, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _score(row: Row) -> SampleStats | None:
    return row.score


def _train_loss(row: Row) -> SampleStats | None:
    return row.stats("train_loss")


def value_label(row: Row) -> str:
    """Return the value of a sweep that the runs were trained at, as a legend shows it."""
    if row.point is None:
        return ""
    factor = row.point.kind == "lr-robustness"
    return f"× {row.point.value:g}" if factor else short(row.point.value)


def shade(color: str, index: int, count: int) -> tuple[float, float, float]:
    """Return a shade of a color: the first is light, the last is dark."""
    rgb = matplotlib.colors.to_rgb(color)
    at = index / max(1, count - 1)  # 0 ... 1
    if at < 0.5:
        return tuple(x + (1 - x) * (0.5 - at) for x in rgb)  # type: ignore[return-value]
    return tuple(x * (1.5 - at) for x in rgb)  # type: ignore[return-value]
