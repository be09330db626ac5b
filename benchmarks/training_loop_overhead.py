"""Overhead of apollo-bench's training loop over a minimal loop on the same model and data.

    python benchmarks/training_loop_overhead.py [--recipe fashion-mnist] [--epochs 2] [--repeats 5]

Both train the recipe's Apollo run from the same weights and evaluate after each epoch. The training
loop also logs, writes checkpoints and can be resumed. The two alternate; the table has medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from apollo_bench.config import recipe
from apollo_bench.config.recipe import RunSpec
from apollo_bench.optimizers.registry import build_optimizer, lr_factor
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.workload import Workload


def train_minimal(spec: RunSpec, task: Workload) -> None:
    """Train and evaluate with the shortest loop that gives the same weights."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(spec.seed)
    model = task.model()
    optimizer = build_optimizer(spec.optimizer, model)
    steps = spec.train.schedule.steps(task.steps_per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lr_factor(spec.train.schedule, spec.name, steps)
    )
    for epoch in range(spec.train.schedule.length):
        model.train()
        for batch in task.batches(spec.seed, epoch, 0):
            loss, _ = task.loss(model, batch, batch, ())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            task.metrics(task.evaluate(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", default="fashion-mnist")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    plan = recipe.load(arguments.recipe)
    spec = plan.run("apollo", plan.seeds[0])
    schedule = spec.train.schedule.model_copy(update={"epochs": arguments.epochs})
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"schedule": schedule})})
    task = tasks.make(spec)
    times: dict[str, list[float]] = {"minimal": [], "training loop": []}
    for repeat in range(arguments.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            directory = RunDirectory(Path(folder) / "run")
            directory.prepare(spec, task.fingerprint, None, sys.argv)
            for name in sorted(times, reverse=bool(repeat % 2)):
                start = time.perf_counter()
                if name == "minimal":
                    train_minimal(spec, task)
                else:
                    train(directory, spec, task)
                if repeat:  # the first is a warmup
                    times[name].append(time.perf_counter() - start)
            shutil.rmtree(directory.path)
        print(f"\r{repeat}/{arguments.repeats}", end="", file=sys.stderr)
    print("\r        \r", end="", file=sys.stderr)
    steps = arguments.epochs * task.steps_per_epoch
    print("milliseconds per step, evaluations included")
    for name, taken in times.items():
        print(f"{name:14} {1e3 * statistics.median(taken) / steps:8.3f}")
    ratios = [a / b for a, b in zip(times["training loop"], times["minimal"], strict=True)]
    low, high = min(ratios), max(ratios)
    print(f"training loop / minimal: {statistics.median(ratios):.3f} ({low:.3f} - {high:.3f})")


if __name__ == "__main__":
    main()
