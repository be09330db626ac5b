"""Runs that were not trained: their records are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.runs.run_directory import RunDirectory


def made_up(
    folder: Path,
    spec: RunSpec,
    values: list[float | None],
    verdict: str | None = "finished",
    metric: str = "accuracy",
    steps: list[dict[str, Any]] | None = None,
) -> RunDirectory:
    """Return a run whose metric after each epoch is this; each epoch takes ten seconds.

    Args:
        folder: folder of the runs.
        spec: the run.
        values: metric after each epoch of one step.
        verdict: how the run ended; None: it has not.
        metric: name of the metric.
        steps: keys of the step records, beside step and time; None: no such records.
    """
    directory = RunDirectory(folder / "runs" / spec.label)
    directory.prepare(spec, "made up", None, ["test"], Execution())
    with directory.metrics.open("w") as file:
        for step, keys in enumerate(steps or [], 1):
            place = {"kind": "step", "epoch": step, "step": step, "time": {"seconds": 10.0 * step}}
            file.write(json.dumps(place | keys) + "\n")
        for epoch, value in enumerate(values, 1):
            line: dict[str, Any] = {
                "kind": "evaluation",
                "epoch": epoch,
                "step": epoch,
                "train_loss": 2.0 / epoch,
                metric: value,
                "time": {"seconds": 10.0 * epoch, "optimizer_ms": 2.0, "step_ms": 50.0},
            }
            file.write(json.dumps(line) + "\n")
    if verdict is not None:
        count = len(values)
        record: dict[str, Any] = {
            "verdict": verdict,
            "step": count,
            "steps": count,
            "time": {"seconds": 10.0 * count},
        }
        if verdict == "finished":
            record |= {"train_loss": 2.0 / count, metric.replace("valid_", "test_"): values[-1]}
        directory.result.write_text(json.dumps(record))
    return directory
