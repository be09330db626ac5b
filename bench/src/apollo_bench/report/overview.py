"""The overview of a report on several tasks: all scores in one table, and the profiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from apollo_bench.console_table import Cell, Column, Table
from apollo_bench.optimizers.plot_style import SETTINGS, sort_key, style_of
from apollo_bench.report import curves, narrative
from apollo_bench.report.figure_axes import FigureFile, picture
from apollo_bench.report.performance_profile import (
    MAX_RATIO,
    Profiles,
    Unit,
    profiles,
    row_of,
)
from apollo_bench.report.summary import Summary
from apollo_bench.report.tables import NOTHING

_POINTS = 400  # of a profile's curve


class Overview(NamedTuple):
    """The first section of a report on several tasks."""

    table: Table
    notes: list[str]


def overview(summaries: list[Summary]) -> Overview | None:
    """Return the overview of the comparisons; None if they are of one task."""
    compared = [summary for summary in summaries if summary.sweep is None]
    if len(compared) < 2:
        return None
    found, units = profiles(compared), _units(compared)
    return Overview(_table(compared, found, units), _notes(found, units))


def draw(summaries: list[Summary]) -> list[FigureFile]:
    """Draw the profiles of the comparisons, if they are of several tasks."""
    compared = [summary for summary in summaries if summary.sweep is None]
    found = profiles(compared)
    return [] if found is None else [_picture(found, _units(compared))]


def panel(summaries: list[Summary]) -> list[curves.Figure]:
    """Return the profiles of the comparisons for the page; none if there are no profiles."""
    compared = [summary for summary in summaries if summary.sweep is None]
    found = profiles(compared)
    return [] if found is None else curves.profile_panel(found, _units(compared))


def _units(summaries: list[Summary]) -> list[Unit]:
    """Return the units of the profiles; seconds only if runs of a task were executed equally."""
    same_execution = all(
        len({narrative.describe_execution(run) for run in summary.runs}) == 1
        for summary in summaries
    )
    return ["updates", "seconds"] if same_execution else ["updates"]


def _table(summaries: list[Summary], found: Profiles | None, units: list[Unit]) -> Table:
    sections = [(summary, section) for summary in summaries for section in summary.sections]
    scores = {} if found is None else {entry.name: entry for entry in found.entries}
    names = {row.name for _, section in sections for row in section.rows}
    # first the optimizers with a score, then all others, such as stand-ins
    shown = [*scores, *(name for name in names if name not in scores)]
    order = {name: -entry.score("updates") for name, entry in scores.items()}
    columns = [Column("optimizer")]
    columns += [Column(f"score by {unit}") for unit in units if found is not None]
    for summary, section in sections:
        several = len(summary.sections) > 1
        schedule = f", {section.schedule}" if several else ""
        columns.append(Column(f"{summary.task}{schedule}: {summary.metric.title}", False))
    best = {unit: max((e.score(unit) for e in scores.values()), default=0.0) for unit in units}
    rows = []
    for name in sorted(shown, key=lambda name: (order.get(name, 1.0), sort_key(name))):
        cells = [Cell(style_of(name).label, color=name)]
        for unit in units if found is not None else []:
            score = scores[name].score(unit) if name in scores else None
            text = NOTHING if score is None else f"{score:.2f}"
            cells.append(Cell(text, score is not None and score == best[unit]))
        for _, section in sections:
            row = row_of(section, name) if name in scores else None
            row = row or next((other for other in section.rows if other.name == name), None)
            text = NOTHING if row is None or row.score is None else row.score.text(2)
            cells.append(Cell(text, row is not None and row is section.winner))
        rows.append(cells)
    return Table("Overview", columns, rows)


def _picture(found: Profiles, units: list[Unit]) -> FigureFile:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(1.0 + 5.2 * len(units), 4.4))
        panels = figure.subplots(1, len(units), squeeze=False, sharey=True)[0]
        ratios = [1.0 + (MAX_RATIO - 1.0) * i / _POINTS for i in range(_POINTS + 1)]
        for axes, unit in zip(panels, units, strict=True):
            _draw(axes, found, unit, ratios)
        panels[0].set_ylabel(f"share of {len(found.sections)} tasks")
        panels[0].legend(frameon=False, loc="lower right")
        caption = (
            f"Performance profiles: share of the tasks on which an optimizer reaches the target "
            f"within tau times the {' or '.join(units)} of the best"
        )
        return picture("performance_profile", caption, figure)


def _draw(axes: Any, found: Profiles, unit: Unit, ratios: list[float]) -> None:
    for entry in found.entries:
        style = style_of(entry.name)
        shares = [entry.share_within(unit, ratio) for ratio in ratios]
        axes.plot(
            ratios, shares, color=style.color, marker=style.marker, markevery=_POINTS // 6,
            markersize=5, linewidth=1.8, label=entry.label, drawstyle="steps-post",
        )  # fmt: skip
    axes.set_xlim(1.0, MAX_RATIO)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"tau, in {unit} of the best optimizer")


def _notes(found: Profiles | None, units: list[Unit]) -> list[str]:
    if found is None:
        return [
            "There is no score over the tasks: fewer than two optimizers have finished all runs."
        ]
    targets = ", ".join(
        f"{target:.2f} ({found.title(index)})" for index, target in enumerate(found.targets)
    )
    texts = [
        f"The score is AlgoPerf's (Dahl et al., 2023). On each task an optimizer's ratio is its "
        f"median {' or '.join(units)} to the target, divided by the best optimizer's. A run that "
        f"does not reach the target takes forever. The score is the mean, for tau from 1 to "
        f"{MAX_RATIO:g}, of the share of tasks with a ratio up to tau: 1 is the best on all tasks.",
        f"Targets of the score: {targets}."
        + (
            " Each is the best value that three quarters of the task's optimizers reach, at any "
            "evaluation of their median run. AlgoPerf takes what the best of four tuned "
            "optimizers reaches. Runs of equal length would nearly all miss such a target."
            if all(section.given_target is None for _, section in found.sections)
            else ""
        ),
    ]
    if "seconds" not in units:
        texts.append(
            "There is no score by seconds: runs of one task were executed in different ways."
        )
    if found.left_out:
        texts.append(
            f"Without a score, because they have no ended runs on some task: "
            f"{', '.join(found.left_out)}."
        )
    stand_ins = [
        f"{row.label} for {entry.label} ({found.title(index)})"
        for entry in found.entries
        for index, (_, section) in enumerate(found.sections)
        for row in [row_of(section, entry.name)]
        if row is not None and row.name != entry.name
    ]
    if stand_ins:
        texts.append(f"One optimizer stands in for another: {', '.join(stand_ins)}.")
    return texts
