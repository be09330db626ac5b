"""The process group of one run, when torchrun started this command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from apollo_bench.errors import ExperimentError

if TYPE_CHECKING:
    from apollo_bench.config.execution import Execution

T = TypeVar("T")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def launched_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return all(name in os.environ for name in _NAMES)


def rank() -> int:
    """Return the rank of this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


def is_main_process() -> bool:
    """Return whether this process has rank 0, which prints and writes."""
    return rank() == 0


def reports_error(error: ExperimentError) -> bool:
    """Return whether this process prints an error that all processes have."""
    # rank 0 may be the process that was lost
    return is_main_process() or (isinstance(error, ConnectionLostError) and rank() == 1)


def torchrun_execution(requested: Execution) -> Execution:
    """Return how the run is executed: on the processes that torchrun started.

    Raises:
        ExperimentError: torchrun started another number of processes per machine.
    """
    devices, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if requested.devices not in (1, devices):
        raise ExperimentError(
            f"--devices is {requested.devices}, torchrun has started {devices} processes on this "
            "machine; leave --devices out"
        )
    return requested.model_copy(update={"devices": devices, "nodes": world // devices})


def init_process_group(accelerator: str) -> None:
    """Initialize the default process group, unless it exists.

    Args:
        accelerator: ``"cpu"`` (gloo) or ``"gpu"`` (also NCCL).
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    if dist.is_initialized():
        return
    if accelerator == "gpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if accelerator == "gpu" else "gloo"
    if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"] or not _store_survives():
        dist.init_process_group(backend)
        return
    # After a restart torchrun's store still holds the addresses of the processes before it
    # (pytorch/pytorch#135712). On several machines the agents count restarts differently, so that
    # this prefix works on one machine only.
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = PrefixStore(attempt, TCPStore(*address, is_master=False))
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world)


def _store_survives() -> bool:
    """Return whether torchrun keeps one store over all restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restart_advice() -> str | None:
    """Return advice on the call of torchrun; None if it is fine."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    several = os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]
    if restarts and several and _store_survives():
        return (
            "for --max-restarts on several machines set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where "
            "torchrun is called; otherwise a restart may meet addresses of processes that are gone "
            "(pytorch/pytorch#135712)"
        )
    return None


def is_distributed() -> bool:
    """Return whether the process group is initialized and has several processes."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def run_on_all(work: Callable[[], T]) -> T:
    """Call ``work`` in every process, and raise in all of them if it fails in one.

    Example:
        >>> run_on_all(lambda: 3)  # every process must call it
        3

    Raises:
        ExperimentError: in every process, if ``work`` raised one in any process.
    """
    import torch.distributed as dist

    done: T | None = None
    message = None
    try:
        done = work()
    except (ExperimentError, OSError) as error:
        message = str(error)
    if is_distributed():
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
    else:
        messages = [message]
    found = [(i, text) for i, text in enumerate(messages) if text is not None]
    if found:
        which, text = found[0]
        raise ExperimentError(text if which == 0 else f"on rank {which}: {text}")
    return done  # type: ignore[return-value]


def broadcast_from_main(value: T) -> T:
    """Return the value of the main process; every process must call this.

    Args:
        value: a picklable value; those of other processes are ignored.
    """
    import torch.distributed as dist

    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


_LOST = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "Timed out")


@contextmanager
def translate_lost_connection() -> Iterator[None]:
    """Turn the errors that PyTorch raises for a lost process into a readable one.

    Raises:
        ConnectionLostError: the connection to another process is lost.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not is_distributed() or not (
            isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)
        ):
            raise
        raise ConnectionLostError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} has lost the connection to another "
            "process of this run, which has ended or cannot be reached; the same command continues "
            "from the last checkpoint (torchrun --max-restarts N does so by itself)"
        ) from None


class ConnectionLostError(ExperimentError):
    """Another process of the run ended or cannot be reached."""
