"""What a report says: each optimizer's runs summarised over their seeds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from apollo_qn.experiments import recipe
from apollo_qn.experiments.report import reading
from apollo_qn.experiments.report.reading import Run
from apollo_qn.experiments.report.statistics import Difference, Spread, difference, spread
from apollo_qn.experiments.schema import Published, SweepKind, SweepPoint
from apollo_qn.experiments.styles import place, style
from apollo_qn.experiments.tasks import TASKS
from apollo_qn.experiments.tasks.base import Metric

OURS = "apollo"
_BUDGET = 0.75  # of the epochs; what the best other optimizer reaches by then is the target


@dataclass(frozen=True)
class Row:
    """One optimizer with one schedule (and one point of a sweep), over its seeds."""

    name: str
    runs: list[Run]
    metric: Metric

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
        """Of the task's metric after the last epoch, over the finished runs."""
        return spread(run.final(self.metric.name) for run in self.runs)

    @functools.cached_property
    def train_loss(self) -> Spread | None:
        """Mean of the last epoch, over the finished runs."""
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

    def by_seed(self) -> dict[int, float]:
        """The metric of the finished runs."""
        values = {run.spec.seed: run.final(self.metric.name) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}

    def at(self, share: float) -> float | None:
        """The mean of the metric after a share of the epochs; None: not all runs are there yet."""
        epoch = max(1, int(share * self.runs[0].spec.train.epochs))
        values = [
            line[self.metric.name]
            for run in self.runs
            for line in run.epochs
            if line["epoch"] == epoch and line[self.metric.name] is not None
        ]
        found = spread(values)
        return found.mean if found is not None and found.count == len(self.runs) else None

    def time_to(self, target: float) -> Spread | None:
        """Seconds until the end of the first epoch that reaches the target, over those that do."""
        times = []
        for run in self.runs:
            reached = [
                line["time"]["seconds"]
                for line in run.epochs
                if line[self.metric.name] is not None
                and not self.metric.better(target, line[self.metric.name])
            ]
            times += reached[:1]
        return spread(times)


@dataclass(frozen=True)
class Section:
    """All rows of one schedule."""

    schedule: str
    rows: list[Row]
    metric: Metric
    asked_target: float | None = None

    @property
    def ours(self) -> Row | None:
        """Apollo's row; in a sweep there are several, and this is none of them."""
        mine = [row for row in self.rows if row.name == OURS]
        return mine[0] if len(mine) == 1 else None

    @property
    def epochs(self) -> int:
        """Of every run."""
        return self.rows[0].runs[0].spec.train.epochs

    @property
    def length(self) -> str:
        """In words."""
        return f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"

    @property
    def best(self) -> Row | None:
        """The row of the best mean."""
        return self._best(self.rows)

    @property
    def rival(self) -> Row | None:
        """The best of the others."""
        return self._best([row for row in self.rows if row.name != OURS])

    def _best(self, rows: list[Row]) -> Row | None:
        best: Row | None = None
        for row in rows:
            if row.score is not None and (
                best is None
                or best.score is None
                or self.metric.better(row.score.mean, best.score.mean)
            ):
                best = row
        return best

    def lead(self, row: Row) -> Difference | None:
        """Apollo's metric minus that of a row, paired by seed; positive: Apollo's is higher."""
        if self.ours is None or row is self.ours:
            return None
        return difference(self.ours.by_seed(), row.by_seed())

    @functools.cached_property
    def target(self) -> float | None:
        """The value of the metric to which times are taken.

        What was asked for, or what the best of the others reaches at three quarters of the epochs
        (of Apollo, where it is alone).
        """
        if self.asked_target is not None:
            return self.asked_target
        others = [row for row in self.rows if row.name != OURS] or self.rows
        values = [value for row in others if (value := row.at(_BUDGET)) is not None]
        if not values:
            return None
        return max(values) if self.metric.higher_is_better else min(values)


@dataclass(frozen=True)
class Summary:
    """All that a report shows."""

    runs: list[Run]
    sections: list[Section]
    metric: Metric

    @property
    def sweep(self) -> SweepKind | None:
        """Which analysis it is; None: a comparison."""
        point = self.runs[0].spec.sweep
        return None if point is None else point.kind

    @property
    def rows(self) -> list[Row]:
        """Of all sections."""
        return [row for section in self.sections for row in section.rows]

    @property
    def evaluated_on(self) -> str:
        """Which images the metric was measured on."""
        return "validation" if self.runs[0].spec.data.validation else "test"

    @property
    def title(self) -> str:
        """Of the metric."""
        return f"{self.evaluated_on} {self.metric.label} ({self.metric.unit})"

    @functools.cached_property
    def paper(self) -> recipe.Recipe | None:
        """The recipe of the paper for this task, if it has results of this."""
        task = self.runs[0].spec.task
        if self.sweep is not None or task not in recipe.available():
            return None
        found = recipe.load(task)
        return found if found.paper else None

    def published(self, row: Row) -> Published | None:
        """What the paper has for a row."""
        return None if self.paper is None else self.paper.paper.get(row.schedule, {}).get(row.name)


def collect(paths: list[Path], target: float | None = None) -> Summary:
    """Read runs and summarise them.

    Args:
        paths: as of ``reading.find``.
        target: value of the metric to which times are taken; None: chosen for each schedule.

    Raises:
        ExperimentError: there is no run, a run is damaged, or the runs cannot be compared.
    """
    runs = reading.find(paths)
    task = runs[0].spec.task
    metric = TASKS[task].metric
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
        row = Row(mine[0].spec.name, mine, metric)
        sections.setdefault(row.schedule, []).append(row)
    return Summary(
        runs,
        [Section(schedule, rows, metric, target) for schedule, rows in sections.items()],
        metric,
    )
