"""How a run is executed: devices, processes and threads."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import torch
from pydantic import Field

from apollo_bench.available_cores import MAX_PROCESSES, available_cores
from apollo_bench.config.optimizer_settings import MuonSettings
from apollo_bench.config.recipe import RunSpec
from apollo_bench.config_section import ConfigSection, PositiveInt
from apollo_bench.errors import ExperimentError

Accelerator = Literal["cpu", "gpu"]
Strategy = Literal["ddp", "fsdp2"]


class Execution(ConfigSection):
    """Devices, processes and threads of a run; only rounding depends on them.

    torchrun starts the processes of several machines, ``devices`` on each of ``nodes``.

    Example:
        >>> Execution(devices=4, nodes=2).processes
        8
    """

    accelerator: Accelerator = "cpu"
    devices: PositiveInt = 1  # processes per machine, one per GPU
    nodes: PositiveInt = 1
    threads: Annotated[int, Field(ge=1, le=MAX_PROCESSES)] = 1  # per process
    strategy: Strategy = "ddp"  # for several processes; fsdp2 shards transformers

    @property
    def processes(self) -> int:
        """The number of processes on all machines."""
        return self.devices * self.nodes

    def check(self, spec: RunSpec) -> None:
        """Raise ExperimentError if this run cannot be executed with these settings."""
        if isinstance(spec.optimizer, MuonSettings) and not hasattr(torch.optim, "Muon"):
            raise ExperimentError(
                f"the optimizer {spec.name!r} (muon) needs torch 2.9 or newer, this is "
                f"{torch.__version__}; leave it out with --optimizers"
            )
        if self.strategy == "fsdp2" and isinstance(spec.optimizer, MuonSettings):
            raise ExperimentError(
                f"--strategy is 'fsdp2', the optimizer {spec.name!r} (muon) needs unsharded "
                "matrices; use --strategy ddp"
            )
        if self.strategy == "fsdp2" and not spec.model.can_be_sharded:
            raise ExperimentError(
                f"--strategy is 'fsdp2', the model of the task {spec.task} ({spec.model}) is "
                "trained with 'ddp' only; transformers with both"
            )


def plan_execution(
    accelerator: str,
    devices: int,
    jobs: int | None,
    threads: int | None = None,
    strategy: str = "ddp",
    cluster: bool = False,
) -> tuple[int, Execution]:
    """Divide this machine between runs.

    Example:
        >>> jobs, execution = plan_execution("cpu", devices=2, jobs=1, threads=4)
        >>> jobs, execution.devices, execution.threads
        (1, 2, 4)

    Args:
        accelerator: ``"cpu"`` or ``"gpu"``.
        devices: processes per run.
        jobs: runs at the same time; None: as many as the cores or GPUs allow.
        threads: threads per process; None: an equal part of the cores.
        strategy: for several processes, ``"ddp"`` or ``"fsdp2"``.
        cluster: the runs are trained on other machines, by default with one thread per process.

    Returns:
        The number of runs at the same time, and how each is executed.

    Raises:
        ExperimentError: unknown accelerator or strategy, or too few GPUs.
    """
    if cluster:  # the tasks run on other machines
        return jobs or 1, _make_execution(accelerator, devices, threads or 1, strategy)
    _check_choices(accelerator, strategy)
    if accelerator == "gpu":
        there = torch.cuda.device_count()
        if there < devices * (jobs or 1):
            raise ExperimentError(f"{devices * (jobs or 1)} GPUs are needed, there are {there}")
    else:
        there = available_cores() // (threads or 1)
    jobs = jobs or max(1, there // devices)
    threads = threads or max(1, available_cores() // (jobs * devices))
    return jobs, _make_execution(accelerator, devices, threads, strategy)


def _make_execution(accelerator: str, devices: int, threads: int, strategy: str) -> Execution:
    _check_choices(accelerator, strategy)
    execution = {
        "accelerator": accelerator,
        "devices": devices,
        "threads": threads,
        "strategy": strategy,
    }
    return Execution.model_validate(execution)


def _check_choices(accelerator: str, strategy: str) -> None:
    for option, value, kind in (
        ("--accelerator", accelerator, Accelerator),
        ("--strategy", strategy, Strategy),
    ):
        if value not in get_args(kind):
            raise ExperimentError(f"{option} is {value!r}, allowed are {', '.join(get_args(kind))}")
