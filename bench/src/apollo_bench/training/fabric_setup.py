"""Lightning Fabric for a run: devices, precision, DDP and FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch_fabric(execution: Execution, spec: RunSpec) -> Fabric:
    """Return a launched Fabric: the process has joined the other processes of the run.

    Args:
        execution: devices, processes and strategy.
        spec: the run, which gives the precision.

    Raises:
        ExperimentError: a device is missing, or the model cannot be sharded.
    """
    from lightning_fabric import Fabric  # the import takes seconds

    if execution.accelerator == "gpu" and torch.cuda.device_count() < execution.devices:
        raise ExperimentError(
            f"{execution.devices} GPUs are asked for, this machine has {torch.cuda.device_count()}"
        )
    execution.check(spec)
    strategy: dict[str, Any] = {}
    if execution.processes > 1:
        sharded = execution.strategy == "fsdp2"
        strategy["strategy"] = _fsdp2_strategy(execution.processes) if sharded else "ddp"
    fabric = Fabric(
        accelerator=execution.accelerator,
        devices=execution.devices,
        num_nodes=execution.nodes,
        precision=spec.train.precision,
        **strategy,
    )
    fabric.launch()
    return fabric


def _fsdp2_strategy(processes: int) -> Any:
    """Return FSDP2 with one unit per module of ``fsdp_units``, and one for everything else."""
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    def parallelize(network: Any, mesh: DeviceMesh) -> Any:
        mesh = mesh["data_parallel"]
        for module in list(network.modules()):
            for unit in module.fsdp_units() if hasattr(module, "fsdp_units") else ():
                fully_shard(unit, mesh=mesh)
        return fully_shard(network, mesh=mesh)

    return ModelParallelStrategy(parallelize, data_parallel_size=processes, tensor_parallel_size=1)


def destroy_process_group() -> None:
    """Leave the process group; without this the last process may crash when it exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
