"""What a report says: each optimizer's runs summarised over their seeds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apollo_bench.config import recipe
from apollo_bench.config.schema import Analysis, Published, SweepPoint
from apollo_bench.optimizers.plot_style import place, style
from apollo_bench.report.statistics import Difference, Spread, difference, spread
from apollo_bench.runs import loading
from apollo_bench.runs.loading import Run
from apollo_bench.workloads.tasks import TASKS
from apollo_bench.workloads.workload import Metric

OURS = "apollo"
_BUDGET = 0.75  # of a run; what the best other optimizer reaches by then is the target


class Reached(NamedTuple):
    """When a run reaches a target; of one that does not, the whole run: it takes at least that."""

    updates: int
    seconds: float
    reached: bool


@dataclass(frozen=True)
class Row:
    """One optimizer with one schedule (and one point of a sweep), over its seeds."""

    name: str
    runs: list[Run]
    curve: Metric  # during training
    metric: Metric  # of the trained model

    @property
    def label(self) -> str:
        """The optimizer's name as people write it."""
        return style(self.name).label

    @property
    def schedule(self) -> str:
        """Of all its runs."""
        return self.runs[0].spec.schedule

    @property
    def point(self) -> SweepPoint | None:
        """Of all its runs."""
        return self.runs[0].spec.sweep

    @functools.cached_property
    def score(self) -> Spread | None:
        """Of the task's metric, over the finished runs."""
        return spread(run.final(self.metric.name) for run in self.runs)

    @functools.cached_property
    def train_loss(self) -> Spread | None:
        """Mean since the last evaluation but one, over the finished runs."""
        return spread(run.final("train_loss") for run in self.runs)

    @functools.cached_property
    def seconds(self) -> Spread | None:
        """Wall time of the finished runs."""
        return spread(run.seconds for run in self.runs if run.finished)

    @functools.cached_property
    def optimizer_ms(self) -> Spread | None:
        """Time of an optimizer step, over the finished runs."""
        return spread(run.optimizer_ms for run in self.runs if run.finished)

    @functools.cached_property
    def optimizer_share(self) -> Spread | None:
        """Percent of a training step, over the finished runs."""
        return spread(run.optimizer_share for run in self.runs if run.finished)

    @property
    def remark(self) -> str:
        """How many runs the numbers stand for, where it is not all of them."""
        parts = []
        for verdict in ("diverged", "unfinished"):
            count = sum(run.verdict == verdict for run in self.runs)
            if count:
                parts.append(f"{count} {verdict}")
        done = sum(run.finished for run in self.runs)
        return ", ".join([f"{done} of {len(self.runs)} finished", *parts] if parts else [str(done)])

    @property
    def diverged(self) -> int:
        """How many of its runs have."""
        return sum(run.verdict == "diverged" for run in self.runs)

    def by_seed(self) -> dict[int, float]:
        """The metric of the finished runs."""
        values = {run.spec.seed: run.final(self.metric.name) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}

    def at(self, share: float) -> float | None:
        """The mean of the curve after a share of a run; None: not all runs are there yet.

        The last evaluation up to there counts; the first, where that is later.
        """
        values = []
        for run in self.runs:
            if run.finished:
                until = share * run.evaluations[-1]["step"]
                lines = [line for line in run.evaluations if line["step"] <= until]
                values.append((lines or run.evaluations)[: len(lines) or 1][-1][self.curve.name])
        found = spread(values)
        return found.mean if found is not None and found.count == len(self.runs) else None

    def reaching(self, target: float) -> dict[int, Reached]:
        """When each ended run first has an evaluation that reaches the target, by seed.

        A run that diverged has not reached it, whatever it had before.
        """
        found = {}
        for run in self.runs:
            if run.verdict == "unfinished":
                continue
            lines = [
                line
                for line in run.evaluations
                if run.finished
                and line[self.curve.name] is not None
                and not self.curve.better(target, line[self.curve.name])
            ]
            if lines:
                found[run.spec.seed] = Reached(lines[0]["step"], lines[0]["time"]["seconds"], True)
            else:
                found[run.spec.seed] = Reached(int(run.result["steps"]), run.seconds, False)
        return found

    @property
    def is_ours(self) -> bool:
        """Whether it is a form of Apollo."""
        return self.runs[0].spec.optimizer.method.startswith("apollo")


def best_of(rows: list[Row]) -> Row | None:
    """The first row of the best mean; one with diverged runs only where all have some."""
    scored = [row for row in rows if row.score is not None]
    sound = [row for row in scored if not row.diverged] or scored

    def merit(row: Row) -> float:
        assert row.score is not None
        return row.score.mean if row.metric.higher_is_better else -row.score.mean

    return max(sound, key=merit, default=None)


@dataclass(frozen=True)
class Section:
    """All rows of one schedule."""

    schedule: str
    rows: list[Row]
    curve: Metric
    metric: Metric
    asked_target: float | None = None

    @property
    def ours(self) -> Row | None:
        """Apollo's row; in a sweep there are several, and this is none of them."""
        mine = [row for row in self.rows if row.name == OURS]
        return mine[0] if len(mine) == 1 else None

    @property
    def length(self) -> str:
        """Of every run, in words."""
        return str(self.rows[0].runs[0].spec.train.schedule)

    @property
    def best(self) -> Row | None:
        """The row of the best mean, as of ``best_of``."""
        return best_of(self.rows)

    @property
    def rival(self) -> Row | None:
        """The best of those that are no form of Apollo."""
        return best_of([row for row in self.rows if not row.is_ours])

    @property
    def forms(self) -> list[Row]:
        """Of Apollo: ApolloW, the belief bound."""
        return [row for row in self.rows if row.is_ours]

    def lead(self, row: Row) -> Difference | None:
        """By how much Apollo's metric is better than that of a row, paired by seed."""
        return self._between(self.ours, row)

    def over_rival(self, row: Row) -> Difference | None:
        """By how much a row is better than the best of the others, paired by seed."""
        return self._between(row, self.rival)

    def updates_saved(self, row: Row) -> Difference | None:
        """By how many updates a row reaches the target before the best of the others, by seed.

        A run that does not reach it counts with its whole length.
        """
        rival = self.rival
        if self.target is None or rival is None or row is rival:
            return None
        one, other = row.reaching(self.target), rival.reaching(self.target)
        return difference(
            {seed: float(when.updates) for seed, when in other.items()},
            {seed: float(when.updates) for seed, when in one.items()},
        )

    def _between(self, one: Row | None, other: Row | None) -> Difference | None:
        if one is None or other is None or one is other:
            return None
        pair = one.by_seed(), other.by_seed()
        return difference(*(pair if self.metric.higher_is_better else pair[::-1]))

    @functools.cached_property
    def target(self) -> float | None:
        """The value of the curve to which times are taken.

        What was asked for, or what the best of those that are no form of Apollo reaches at three
        quarters of a run (of Apollo, where it is alone).
        """
        if self.asked_target is not None:
            return self.asked_target
        others = [row for row in self.rows if not row.is_ours] or self.rows
        values = [value for row in others if (value := row.at(_BUDGET)) is not None]
        if not values:
            return None
        return max(values) if self.curve.higher_is_better else min(values)


@dataclass(frozen=True)
class Summary:
    """All that a report shows."""

    runs: list[Run]
    sections: list[Section]
    curve: Metric
    metric: Metric

    @property
    def task(self) -> str:
        """Its name."""
        return self.runs[0].spec.task

    @property
    def sweep(self) -> Analysis | None:
        """Which analysis it is; None: a comparison."""
        point = self.runs[0].spec.sweep
        return None if point is None else point.kind

    @property
    def rows(self) -> list[Row]:
        """Of all sections."""
        return [row for section in self.sections for row in section.rows]

    @functools.cached_property
    def paper(self) -> recipe.Recipe | None:
        """The recipe of the paper for this task, if it has results of this."""
        if self.sweep is not None or self.task not in recipe.available():
            return None
        found = recipe.load(self.task)
        return found if found.paper else None

    def published(self, row: Row) -> Published | None:
        """What the paper has for a row."""
        return None if self.paper is None else self.paper.paper.get(row.schedule, {}).get(row.name)


def collect(paths: list[Path], target: float | None = None) -> list[Summary]:
    """Read runs and summarise them, task by task.

    Args:
        paths: as of ``reading.find``.
        target: value of the curve to which times are taken; None: chosen for each schedule.

    Raises:
        ExperimentError: there is no run, a run is damaged, or the runs of a task cannot be
            compared.
    """
    by_task: dict[str, list[Run]] = {}
    for run in loading.find(paths):
        by_task.setdefault(run.spec.task, []).append(run)
    known = list(TASKS)
    return [_summarise(by_task[task], target) for task in sorted(by_task, key=known.index)]


def _summarise(runs: list[Run], target: float | None) -> Summary:
    task = runs[0].spec.task
    curve, final = TASKS[task].curve, TASKS[task].final
    if runs[0].spec.is_try:
        final = curve
    if getattr(runs[0].spec.data, "validation", 0):
        curve, final = (
            metric._replace(label=metric.label.replace("test ", "validation "))
            for metric in (curve, final)
        )
    order = list(recipe.load(task).schedules) if task in recipe.available() else []

    def key(run: Run) -> tuple[object, ...]:
        spec = run.spec
        at = order.index(spec.schedule) if spec.schedule in order else len(order)
        value = 0.0 if spec.sweep is None else spec.sweep.value
        return (at, spec.schedule, place(spec.name), value, spec.seed)

    runs.sort(key=key)
    rows: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        rows.setdefault(key(run)[:-1], []).append(run)
    sections: dict[str, list[Row]] = {}
    for mine in rows.values():
        row = Row(mine[0].spec.name, mine, curve, final)
        sections.setdefault(row.schedule, []).append(row)
    made = [Section(name, found, curve, final, target) for name, found in sections.items()]
    return Summary(runs, made, curve, final)
