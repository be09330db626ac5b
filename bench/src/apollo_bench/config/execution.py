"""Where a run is trained: which devices, how many processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from apollo_bench.config.recipe import RunSpec
from apollo_bench.config.schema import Count, Section
from apollo_bench.errors import ExperimentError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Accelerator = Literal["cpu", "gpu"]
Strategy = Literal["ddp", "fsdp2"]


class Placement(Section):
    """What a run is trained on; of its result only the rounding depends on it.

    Processes on several machines are started there by torchrun, ``devices`` on each of ``nodes``.
    """

    accelerator: Accelerator = "cpu"
    devices: Count = 1  # processes on a machine: GPUs, or on a CPU whatever is asked for
    nodes: Count = 1
    threads: Count = 1  # of each process
    strategy: Strategy = "ddp"  # of several processes: all weights in each, or a part (transformer)

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.nodes

    def fabric(self, spec: RunSpec) -> Fabric:
        """Lightning Fabric for this run, its processes joined.

        Raises:
            ExperimentError: there is no such device, or the model cannot be sharded.
        """
        from lightning_fabric import Fabric  # takes seconds

        if self.accelerator == "gpu" and torch.cuda.device_count() < self.devices:
            raise ExperimentError(
                f"{self.devices} GPUs are asked for, this machine has {torch.cuda.device_count()}"
            )
        self.check(spec)
        several: dict[str, Any] = {}
        if self.processes > 1:
            several["strategy"] = _sharded(self.processes) if self.strategy == "fsdp2" else "ddp"
        fabric = Fabric(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.nodes,
            precision=spec.train.precision,
            **several,
        )
        fabric.launch()
        return fabric

    def check(self, spec: RunSpec) -> None:
        """Raise ExperimentError where this run cannot be trained so."""
        if spec.optimizer.method == "muon" and not hasattr(torch.optim, "Muon"):
            raise ExperimentError(
                f"the optimizer {spec.name!r} (muon) needs torch 2.9 or newer, this is "
                f"{torch.__version__}; leave it out with --optimizers"
            )
        if self.strategy == "fsdp2" and spec.optimizer.method == "muon":
            raise ExperimentError(
                f"--strategy is 'fsdp2', the optimizer {spec.name!r} (muon) needs whole matrices: "
                "'ddp'"
            )
        if self.strategy == "fsdp2" and spec.model.family != "transformer":
            raise ExperimentError(
                f"--strategy is 'fsdp2', the model of the task {spec.task} ({spec.model}) is "
                "trained with 'ddp' only; transformers with both"
            )


def _sharded(processes: int) -> Any:
    """FSDP2: every layer is a unit, all the rest (the embedding) another."""
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    from apollo_bench.workloads.translation.transformer import Transformer

    def parallelize(network: Any, mesh: DeviceMesh) -> Any:
        mesh = mesh["data_parallel"]
        for module in network.modules():
            if isinstance(module, Transformer):
                for layer in (*module.encoder, *module.decoder):
                    fully_shard(layer, mesh=mesh)
        return fully_shard(network, mesh=mesh)

    return ModelParallelStrategy(parallelize, data_parallel_size=processes, tensor_parallel_size=1)


def leave() -> None:
    """Take leave of a run's other processes; without it the last of them may crash at its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share(
    accelerator: str,
    devices: int,
    jobs: int | None,
    threads: int | None = None,
    strategy: str = "ddp",
    cluster: bool = False,
) -> tuple[int, Placement]:
    """Divide this machine: how many runs at a time, and where each is trained.

    Args:
        accelerator: ``"cpu"`` or ``"gpu"``.
        devices: processes of a run.
        jobs: runs at a time; None: as many as the cores or GPUs are enough for.
        threads: of each process; None: its part of the cores.
        strategy: of several processes, ``"ddp"`` or ``"fsdp2"``.
        cluster: the runs are trained on other machines, with a thread in each process by default.

    Raises:
        ExperimentError: another accelerator or strategy, or fewer GPUs than a run needs.
    """
    if cluster:  # the machines of the tasks are others
        return jobs or 1, _checked(accelerator, devices, threads or 1, strategy)
    _check_choices(accelerator, strategy)
    if accelerator == "gpu":
        there = torch.cuda.device_count()
        if there < devices * (jobs or 1):
            raise ExperimentError(f"{devices * (jobs or 1)} GPUs are needed, there are {there}")
    else:
        there = cores() // (threads or 1)
    jobs = jobs or max(1, there // devices)
    threads = threads or max(1, cores() // (jobs * devices))
    return jobs, _checked(accelerator, devices, threads, strategy)


def _checked(accelerator: str, devices: int, threads: int, strategy: str) -> Placement:
    _check_choices(accelerator, strategy)
    placement = {
        "accelerator": accelerator,
        "devices": devices,
        "threads": threads,
        "strategy": strategy,
    }
    return Placement.model_validate(placement)


def _check_choices(accelerator: str, strategy: str) -> None:
    for option, value, kind in (
        ("--accelerator", accelerator, Accelerator),
        ("--strategy", strategy, Strategy),
    ):
        if value not in get_args(kind):
            raise ExperimentError(f"{option} is {value!r}, allowed are {', '.join(get_args(kind))}")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux
