"""Where a run is trained: which devices, how many processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.recipe import RunSpec
from apollo_qn.experiments.schema import Count, Section

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Accelerator = Literal["cpu", "gpu"]


class Placement(Section):
    """What a run is trained on; of its result only the rounding depends on it.

    Processes on several machines are started there by torchrun, ``devices`` on each of ``nodes``.
    """

    accelerator: Accelerator = "cpu"
    devices: Count = 1  # processes on a machine: GPUs, or on a CPU whatever is asked for
    nodes: Count = 1
    threads: Count = 1  # of each process

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.nodes

    def fabric(self, spec: RunSpec) -> Fabric:
        """Lightning Fabric for this run, its processes joined.

        Raises:
            ExperimentError: there is no such device.
        """
        from lightning.fabric import Fabric  # takes seconds

        if self.accelerator == "gpu" and torch.cuda.device_count() < self.devices:
            raise ExperimentError(
                f"{self.devices} GPUs are asked for, this machine has {torch.cuda.device_count()}"
            )
        several: dict[str, Any] = {"strategy": "ddp"} if self.processes > 1 else {}
        fabric = Fabric(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.nodes,
            precision=spec.train.precision,
            **several,
        )
        fabric.launch()
        return fabric


def leave() -> None:
    """Take leave of a run's other processes; without it the last of them may crash at its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share(
    accelerator: str, devices: int, jobs: int | None, threads: int | None = None
) -> tuple[int, Placement]:
    """Divide this machine: how many runs at a time, and where each is trained.

    Args:
        accelerator: ``"cpu"`` or ``"gpu"``.
        devices: processes of a run.
        jobs: runs at a time; None: as many as the cores or GPUs are enough for.
        threads: of each process; None: its part of the cores.

    Raises:
        ExperimentError: another accelerator, or fewer GPUs than a run needs.
    """
    if accelerator not in get_args(Accelerator):
        allowed = ", ".join(get_args(Accelerator))
        raise ExperimentError(f"--accelerator is {accelerator!r}, allowed are {allowed}")
    if accelerator == "gpu":
        there = torch.cuda.device_count()
        if there < devices * (jobs or 1):
            raise ExperimentError(f"{devices * (jobs or 1)} GPUs are needed, there are {there}")
    else:
        there = cores() // (threads or 1)
    jobs = jobs or max(1, there // devices)
    threads = threads or max(1, cores() // (jobs * devices))
    placement = {"accelerator": accelerator, "devices": devices, "threads": threads}
    return jobs, Placement.model_validate(placement)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux
