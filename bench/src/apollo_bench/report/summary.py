"""Summaries: the runs of each optimizer over their seeds.

Numbers come from the pandas table of the runs (``run_table``). A row also keeps its runs, whose
evaluations give targets and curves.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas

from apollo_bench.config import recipe
from apollo_bench.config.optimizer_settings import ApolloSettings, AveragedSettings
from apollo_bench.config.schema import Analysis, PaperResult, SweepPoint
from apollo_bench.optimizers.plot_style import sort_key, style_of
from apollo_bench.report.run_table import run_table
from apollo_bench.report.statistics import Difference, SampleStats, difference, sample_stats
from apollo_bench.runs import loading
from apollo_bench.runs.loading import Run
from apollo_bench.workloads.custom_model import CustomModel
from apollo_bench.workloads.tasks import TASKS, entry_of
from apollo_bench.workloads.workload import Metric

APOLLO = "apollo"
_TARGET_FRACTION = 0.75  # of a run; the target is what the best other optimizer has reached by then


class TargetReached(NamedTuple):
    """When a run reaches a target; for a run that does not, its whole length, a lower bound."""

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
        """Name of the optimizer, as tables show it."""
        return style_of(self.name).label

    @property
    def schedule(self) -> str:
        """Schedule of the runs."""
        return self.runs[0].spec.schedule

    @property
    def point(self) -> SweepPoint | None:
        """Point in the sweep of the runs; None without a sweep."""
        return self.runs[0].spec.sweep

    @functools.cached_property
    def _finished(self) -> pandas.DataFrame:
        table = run_table(self.runs, [self.metric.name])
        return table[table["verdict"] == "finished"]

    def stats(self, quantity: str) -> SampleStats | None:
        """Return the statistics of a column of ``run_table`` over the finished runs."""
        return sample_stats(self._finished[quantity])

    @functools.cached_property
    def score(self) -> SampleStats | None:
        """Statistics of the task's metric over the finished runs."""
        return self.stats(self.metric.name)

    @property
    def search_cost(self) -> str:
        """The cost of the search for the settings, as "12 trials, 4.1 min"; "" without one."""
        search = self.runs[0].manifest.get("search")
        if not search:
            return ""
        return f"{search['trials']} trials, {search['seconds'] / 60:.1f} min"

    @property
    def remark(self) -> str:
        """The number of finished runs, and of the others if there are any."""
        counts = Counter(run.verdict for run in self.runs)
        done, others = counts["finished"], ("diverged", "unfinished")
        if done == len(self.runs):
            return str(done)
        parts = [f"{counts[verdict]} {verdict}" for verdict in others if counts[verdict]]
        return ", ".join([f"{done} of {len(self.runs)} finished", *parts])

    @property
    def diverged(self) -> int:
        """The number of diverged runs."""
        return sum(run.verdict == "diverged" for run in self.runs)

    def by_seed(self) -> dict[int, float]:
        """Return the metric of the finished runs, by seed."""
        finished = self._finished.set_index("seed")[self.metric.name].dropna()
        values: dict[int, float] = finished.to_dict()
        return values

    def at(self, share: float) -> float | None:
        """Return the mean of the curve after a fraction of a run; None if a run is unfinished.

        It takes the last evaluation up to there, or the first if that is later.

        Args:
            share: fraction of the updates of a run, between 0 and 1.
        """
        values = []
        for run in self.runs:
            if run.finished:
                until = share * run.evaluations[-1]["step"]
                lines = [line for line in run.evaluations if line["step"] <= until]
                values.append((lines or run.evaluations)[: len(lines) or 1][-1][self.curve.name])
        found = sample_stats(values)
        return found.mean if found is not None and found.count == len(self.runs) else None

    def time_to_target(self, target: float) -> dict[int, TargetReached]:
        """Return when each ended run first has an evaluation that reaches the target, by seed.

        A run that diverged has not reached it, whatever its evaluations before.

        Args:
            target: value of the curve.
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
                found[run.spec.seed] = TargetReached(
                    lines[0]["step"], lines[0]["time"]["seconds"], True
                )
            else:
                found[run.spec.seed] = TargetReached(int(run.result["steps"]), run.seconds, False)
        return found

    @property
    def is_apollo(self) -> bool:
        """Whether the optimizer is a variant of Apollo."""
        return isinstance(self.runs[0].spec.optimizer, ApolloSettings | AveragedSettings)


def best_of(rows: list[Row]) -> Row | None:
    """Return the first row with the best mean; diverged rows count only if all diverged.

    Args:
        rows: rows of one metric.

    Returns:
        The first of the best rows; None if no row has a finished run.
    """
    scored = [row for row in rows if row.score is not None]
    sound = [row for row in scored if not row.diverged] or scored

    def merit(row: Row) -> float:
        assert row.score is not None
        return row.score.mean if row.metric.higher_is_better else -row.score.mean

    return max(sound, key=merit, default=None)


def winner_of(rows: list[Row]) -> Row | None:
    """Return the row with the best mean if it is ahead of each other row beyond chance.

    It is if Student's 95 % interval of the difference, paired by seed, does not contain 0. A row
    of which a run diverged is behind. With one seed there is no interval, so nobody wins.
    """
    best = best_of(rows)
    if best is None or len(rows) < 2:
        return None
    leads = [
        lead_of(best, row)
        for row in rows
        if row is not best and row.score is not None and (best.diverged or not row.diverged)
    ]
    return best if all(lead is not None and lead.is_lead for lead in leads) else None


def lead_of(one: Row, other: Row) -> Difference | None:
    """Return by how much the metric of one row is better than that of another, paired by seed."""
    pair = one.by_seed(), other.by_seed()
    return difference(*(pair if one.metric.higher_is_better else pair[::-1]))


@dataclass(frozen=True)
class ScheduleSection:
    """All rows of one schedule."""

    schedule: str
    rows: list[Row]
    curve: Metric
    metric: Metric
    given_target: float | None = None

    @property
    def apollo_row(self) -> Row | None:
        """The row of Apollo; None in a sweep, which has several."""
        apollos = [row for row in self.rows if row.name == APOLLO]
        return apollos[0] if len(apollos) == 1 else None

    @property
    def length(self) -> str:
        """Length of every run, for example "8 epochs"."""
        return str(self.rows[0].runs[0].spec.train.schedule)

    @property
    def best(self) -> Row | None:
        """The row with the best mean, as in ``best_of``."""
        return best_of(self.rows)

    @property
    def winner(self) -> Row | None:
        """The row that is ahead of all others beyond chance, as in ``winner_of``."""
        return winner_of(self.rows)

    @property
    def best_other(self) -> Row | None:
        """The best row that is not a variant of Apollo."""
        return best_of([row for row in self.rows if not row.is_apollo])

    @property
    def apollo_variants(self) -> list[Row]:
        """The rows of Apollo's variants: ApolloW, the belief bound and others."""
        return [row for row in self.rows if row.is_apollo]

    def lead(self, row: Row) -> Difference | None:
        """Return by how much Apollo's metric is better than that of a row, paired by seed."""
        return self._between(self.apollo_row, row)

    def lead_over_best_other(self, row: Row) -> Difference | None:
        """Return by how much a row is better than the best other optimizer, paired by seed."""
        return self._between(row, self.best_other)

    def updates_saved(self, row: Row) -> Difference | None:
        """Return how many updates a row saves until the target, against the best other optimizer.

        A run that does not reach the target counts with its whole length.
        """
        rival = self.best_other
        if self.target is None or rival is None or row is rival:
            return None
        one, other = row.time_to_target(self.target), rival.time_to_target(self.target)
        return difference(
            {seed: float(when.updates) for seed, when in other.items()},
            {seed: float(when.updates) for seed, when in one.items()},
        )

    def is_ahead(self, one: Row, other: Row) -> bool:
        """Return whether the mean of one row is better than that of another."""
        if one.score is None or other.score is None:
            return False
        return self.metric.better(one.score.mean, other.score.mean)

    def _between(self, one: Row | None, other: Row | None) -> Difference | None:
        if one is None or other is None or one is other:
            return None
        return lead_of(one, other)

    @functools.cached_property
    def target(self) -> float | None:
        """The value of the curve that times are measured to.

        The given target, or what the best optimizer other than Apollo reaches at three quarters of
        a run (Apollo itself, if it is alone).
        """
        if self.given_target is not None:
            return self.given_target
        others = [row for row in self.rows if not row.is_apollo] or self.rows
        values = [value for row in others if (value := row.at(_TARGET_FRACTION)) is not None]
        if not values:
            return None
        return max(values) if self.curve.higher_is_better else min(values)


@dataclass(frozen=True)
class Summary:
    """Everything that a report shows."""

    runs: list[Run]
    sections: list[ScheduleSection]
    curve: Metric
    metric: Metric

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.runs[0].spec.task

    @property
    def sweep(self) -> Analysis | None:
        """The analysis; None for a comparison."""
        point = self.runs[0].spec.sweep
        return None if point is None else point.kind

    @property
    def rows(self) -> list[Row]:
        """The rows of all sections."""
        return [row for section in self.sections for row in section.rows]

    @functools.cached_property
    def paper(self) -> recipe.Recipe | None:
        """The recipe of this task, if the paper has results for it and its model is ours."""
        if isinstance(self.runs[0].spec.model, CustomModel):
            return None
        if self.sweep is not None or self.task not in recipe.recipe_names():
            return None
        found = recipe.load(self.task)
        return found if found.paper else None

    def published(self, row: Row) -> PaperResult | None:
        """Return the paper's result for a row; None if there is none."""
        return None if self.paper is None else self.paper.paper.get(row.schedule, {}).get(row.name)


def collect(
    paths: list[Path],
    target: float | None = None,
    skip: Callable[[str], None] | None = None,
    only: str | None = None,
) -> list[Summary]:
    """Load runs and summarize them, task by task.

    Example:
        >>> [summary] = collect([Path("runs/compare")])
        >>> summary.task, summary.metric.title, [section.length for section in summary.sections]
        ('wordnet', 'test perplexity', ['400 updates'])

    Args:
        paths: as in ``load_runs``.
        target: value of the curve that times are measured to; None: chosen for each schedule.
        skip: as in ``load_runs``.
        only: the task whose runs are summarized; None: all tasks.

    Raises:
        ExperimentError: there is no run, a run is damaged, or the runs of a task are incompatible.
    """
    by_task: dict[str, list[Run]] = {}
    for run in loading.load_runs(paths, skip):
        if only in (None, run.spec.task):
            by_task.setdefault(run.spec.task, []).append(run)
    known = [*TASKS, *sorted(by_task.keys() - TASKS.keys())]
    return [_summarize(by_task[task], target) for task in sorted(by_task, key=known.index)]


def _summarize(runs: list[Run], target: float | None) -> Summary:
    task = runs[0].spec.task
    curve, final = entry_of(runs[0].spec).monitored, entry_of(runs[0].spec).final
    if runs[0].spec.is_trial:
        final = curve
    if runs[0].spec.data.held_out:
        curve, final = (
            metric._replace(label=metric.label.replace("test ", "validation "))
            for metric in (curve, final)
        )
    order = list(recipe.load(task).schedules) if task in recipe.recipe_names() else []

    def key(run: Run) -> tuple[object, ...]:
        spec = run.spec
        at = order.index(spec.schedule) if spec.schedule in order else len(order)
        value = 0.0 if spec.sweep is None else spec.sweep.value
        return (at, spec.schedule, sort_key(spec.name), value, spec.seed)

    runs.sort(key=key)
    rows: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        rows.setdefault(key(run)[:-1], []).append(run)
    sections: dict[str, list[Row]] = {}
    for runs_of_row in rows.values():
        row = Row(runs_of_row[0].spec.name, runs_of_row, curve, final)
        sections.setdefault(row.schedule, []).append(row)
    made = [ScheduleSection(name, found, curve, final, target) for name, found in sections.items()]
    return Summary(runs, made, curve, final)
