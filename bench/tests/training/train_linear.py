"""Trains a linear model, which has no statistics of a batch, in as many processes as torchrun asks.

torchrun --nproc-per-node=2 -m bench.tests.training.train_linear RUN RECIPE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.fabric_setup import destroy_process_group, launch_fabric
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification.image_workload import ImageClassification


class Linear(ImageClassification):
    """The image workload with a linear model and a dropout that drops nothing."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def run(path: Path, recipe_file: Path) -> None:
    plan = recipe.load(str(recipe_file))
    spec = plan.run("apollo", plan.seeds[0])
    task = tasks.make(spec)
    task.__class__ = Linear
    directory = RunDirectory(path)
    execution = Execution(devices=int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("RANK", "0") == "0":
        directory.prepare(spec, task.fingerprint, None, sys.argv, execution)
    fabric = launch_fabric(execution, spec)
    fabric.barrier()
    train(directory, spec, task, fabric=fabric)


def main() -> None:
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]))
    destroy_process_group()


if __name__ == "__main__":
    main()
