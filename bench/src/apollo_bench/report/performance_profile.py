"""Performance profiles over several tasks, as AlgoPerf scores training algorithms.

On each task an optimizer's ratio is its updates (or seconds) to the task's target, relative to the
best optimizer. The profile is the share of tasks with a ratio up to tau, as a function of tau. The
score is its mean for tau from 1 to MAX_RATIO: 1 for the best on every task (Dahl et al., 2023,
"Benchmarking neural network training algorithms", section 4.5).

AlgoPerf's target is what the best of four tuned optimizers reaches, and others may train longer.
Our runs of a task have one length. Few of them would reach such a target, so that nearly all scores
would be 0 or 1. ``target_of`` takes a value that most optimizers reach.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from apollo_bench.optimizers.plot_style import sort_key, style_of
from apollo_bench.report.summary import Row, ScheduleSection, Summary

MAX_RATIO = 4.0  # as in AlgoPerf
_REACHED_BY = 0.75  # of the optimizers of a task, at least
Unit = Literal["updates", "seconds"]
# the former have their own decay on one task, the latter decay of equal strength on another
_STAND_INS = {"adam": "adam-adj", "radam": "radam-adj"}


@dataclass(frozen=True)
class Entry:
    """One optimizer in the profiles."""

    name: str
    ratios: dict[Unit, list[float]]  # task by task; inf where it does not reach the target

    @property
    def label(self) -> str:
        """Name of the optimizer, as tables show it."""
        return style_of(self.name).label

    def score(self, unit: Unit) -> float:
        """Return the mean of the profile, from 0 to 1."""
        shares = [max(0.0, MAX_RATIO - ratio) / (MAX_RATIO - 1) for ratio in self.ratios[unit]]
        return statistics.fmean(shares)

    def share_within(self, unit: Unit, ratio: float) -> float:
        """Return the profile: the share of tasks with a ratio up to this one."""
        return statistics.fmean(reached <= ratio for reached in self.ratios[unit])


@dataclass(frozen=True)
class Profiles:
    """The optimizers that were trained on every task, and those that were not."""

    sections: list[tuple[Summary, ScheduleSection]]  # the tasks, with each of their schedules
    targets: list[float]  # of the sections
    entries: list[Entry]
    left_out: list[str]  # labels of optimizers without finished runs on every task

    def title(self, index: int) -> str:
        """Return the name of a task, with its schedule if the task has several."""
        summary, section = self.sections[index]
        several = len(summary.sections) > 1
        return f"{summary.task}, {section.schedule}" if several else summary.task


def profiles(summaries: list[Summary]) -> Profiles | None:
    """Return the profiles of the comparisons; None for less than two, or without targets."""
    sections, targets = [], []
    for summary in summaries:
        for section in summary.sections if summary.sweep is None else []:
            target = target_of(section)
            if target is not None:
                sections.append((summary, section))
                targets.append(target)
    if len({summary.task for summary, _ in sections}) < 2:
        return None
    names = {row.name for _, section in sections for row in section.rows}
    names -= {other for name, other in _STAND_INS.items() if name in names}
    times: dict[str, list[tuple[float, float]]] = {}
    left_out = []
    for name in sorted(names, key=sort_key):
        found = [
            _time(section, name, target)
            for (_, section), target in zip(sections, targets, strict=True)
        ]
        known = [time for time in found if time is not None]
        if len(known) == len(found):
            times[name] = known
        else:
            left_out.append(style_of(name).label)
    entries = [
        Entry(
            name,
            {
                "updates": [_ratio(times, name, index, 0) for index in range(len(sections))],
                "seconds": [_ratio(times, name, index, 1) for index in range(len(sections))],
            },
        )
        for name in times
    ]
    return Profiles(sections, targets, entries, left_out) if len(entries) > 1 else None


def target_of(section: ScheduleSection) -> float | None:
    """Return the target of a task's score.

    It is the given target, or the best value that three quarters of the optimizers reach. An
    optimizer reaches a value if the median of its runs does, at any evaluation.
    """
    if section.given_target is not None:
        return section.given_target
    found = [value for row in section.rows if (value := _reached(row)) is not None]
    finite = sorted(filter(math.isfinite, found), reverse=section.curve.higher_is_better)
    last = math.ceil(_REACHED_BY * len(found)) - 1
    return finite[min(last, len(finite) - 1)] if finite else None


def _reached(row: Row) -> float | None:
    """Return the value that the median run reaches; None if a run has not ended.

    A run that diverged reaches nothing, as in ``Row.time_to_target``. The median is the worse of
    the two middle values, so that the median of the times is finite.
    """
    rises = row.curve.higher_is_better
    reached: list[float] = []
    for run in row.runs:
        if run.verdict == "unfinished":
            return None
        values = [line[row.curve.name] for line in run.evaluations] if run.finished else []
        known = [float(value) for value in values if value is not None]
        reached.append(max(known, default=-math.inf) if rises else min(known, default=math.inf))
    return statistics.median_low(reached) if rises else statistics.median_high(reached)


def row_of(section: ScheduleSection, name: str) -> Row | None:
    """Return the row of an optimizer, or of the one that stands in for it; None: there is none."""
    rows = {row.name: row for row in section.rows}
    return rows.get(name) or rows.get(_STAND_INS.get(name, ""))


def _time(section: ScheduleSection, name: str, target: float) -> tuple[float, float] | None:
    """Return the median updates and seconds to the target; None if a run has not ended.

    A run that does not reach the target counts as infinite.
    """
    row = row_of(section, name)
    if row is None:
        return None
    reached = row.time_to_target(target).values()
    if len(reached) < len(row.runs):
        return None
    updates = [one.updates if one.reached else math.inf for one in reached]
    seconds = [one.seconds if one.reached else math.inf for one in reached]
    # the larger of the two middle values, because infinity has no mean
    return statistics.median_high(updates), statistics.median_high(seconds)


def _ratio(times: dict[str, list[tuple[float, float]]], name: str, index: int, unit: int) -> float:
    best = min(found[index][unit] for found in times.values())
    value = times[name][index][unit]
    return value / best if math.isfinite(value) else math.inf
