"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TaskName = Annotated[str, typer.Argument(help="A task (see `tasks`), or a recipe's .toml file.")]
RunFolders = Annotated[
    list[Path], typer.Argument(help="Run directories, or folders that contain some.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Apply the recipe's table [quick]: about a minute.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds.")]
OptimizerNames = Annotated[
    str | None, typer.Option("--optimizers", help="Optimizers of the recipe: a,b,c or all.")
]
ScheduleNames = Annotated[
    str | None, typer.Option("--schedules", help="Schedules of the recipe: a,b or all.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: train.batch_size=64, optimizer.lr=0.25, ..."),
]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Folder of local data, used instead of the default.")
]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Runs at the same time.  [default: as many as fit]")
]
AcceleratorName = Annotated[str, typer.Option("--accelerator", help="cpu or gpu.")]
Devices = Annotated[int, typer.Option(min=1, help="Processes that share the batches of each run.")]
StrategyName = Annotated[
    str,
    typer.Option("--strategy", help="For several processes: ddp, or fsdp2 (transformers only)."),
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="ray: each run is a Ray task, on the cluster of RAY_ADDRESS or a local one.",
    ),
]
Tuned = Annotated[
    Path | None,
    typer.Option(help="Folder of a finished `sweep TASK tuning`; its best settings are used."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads per process.  [default: an equal part of the cores]"),
]
