"""The table of all runs, one line each: results.csv, and the source of the means over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pandas

from apollo_bench.config.recipe import RunSpec
from apollo_bench.runs.loading import Run


def run_table(runs: Sequence[Run], metrics: Sequence[str]) -> pandas.DataFrame:
    """Return one line per run, with all digits.

    Example:
        >>> from pathlib import Path
        >>> from apollo_bench.runs.loading import load_runs
        >>> table = run_table(load_runs([Path("runs/compare")]), ["test_perplexity"])
        >>> means = table.groupby("optimizer")["test_perplexity"].mean()
        >>> sorted(means.index)[:2]
        ['adamw', 'apollo']

    Args:
        runs: the runs, in the order of the lines.
        metrics: names of the metrics of trained models, a column each.

    Returns:
        A table of dtype object: integers and missing values stay what they are. Metrics and
        ``train_loss`` are None for a run that has not finished; ``seconds`` is the wall time so
        far, ``optimizer_ms`` the median time of an optimizer step in milliseconds, and
        ``optimizer_share`` its share of a training step in percent.
    """
    return pandas.DataFrame([_line(run, metrics) for run in runs], dtype=object)


def _line(run: Run, metrics: Sequence[str]) -> dict[str, object]:
    spec, point = run.spec, run.spec.sweep
    return {
        "task": spec.task,
        "optimizer": spec.name,
        "schedule": spec.schedule,
        "sweep": None if point is None else point.kind,
        "value": None if point is None else point.value,
        "lr": spec.optimizer.lr,
        "weight_decay": spec.optimizer.weight_decay,
        "settings": sampled_settings(spec),
        "seed": spec.seed,
        "verdict": run.verdict,
        "done": run.progress,
        **{name: run.final(name) for name in metrics},
        "train_loss": run.final("train_loss"),
        "seconds": run.seconds,
        "optimizer_ms": run.optimizer_ms,
        "optimizer_share": run.optimizer_share,
    }


def sampled_settings(spec: RunSpec, short: bool = False) -> str:
    """Return the settings that a search drew for a run, for example "lr 0.5"; "" without a search.

    Args:
        spec: the run.
        short: whether the values stand without their names.
    """
    values = [(key, f"{getattr(spec.optimizer, key):g}") for key in spec.ranges or {}]
    return ", ".join(value if short else f"{key} {value}" for key, value in values)
