"""The processes of one run where torchrun, on one machine or on many, has started this command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from apollo_bench.errors import ExperimentError

if TYPE_CHECKING:
    from apollo_bench.config.execution import Placement

T = TypeVar("T")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def started() -> bool:
    """Whether torchrun has started this process."""
    return all(name in os.environ for name in _NAMES)


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return int(os.environ["RANK"]) if started() else 0


def speaks() -> bool:
    """Whether it is the one that prints and writes."""
    return rank() == 0


def speaks_of(error: ExperimentError) -> bool:
    """Whether this process is to tell an error that all have."""
    return speaks() or (isinstance(error, LostError) and rank() == 1)  # the first may be lost


def placement(asked: Placement) -> Placement:
    """Where the run is trained: on the processes that torchrun has started.

    Raises:
        ExperimentError: it has started another number on a machine than is asked for.
    """
    devices, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if asked.devices not in (1, devices):
        raise ExperimentError(
            f"--devices is {asked.devices}, torchrun has started {devices} processes on this "
            "machine; leave --devices out"
        )
    return asked.model_copy(update={"devices": devices, "nodes": world // devices})


def join(accelerator: str) -> None:
    """Meet the other processes."""
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
    # torchrun's store still holds the addresses of the processes before a restart
    # (pytorch/pytorch#135712); on several machines their agents count restarts differently
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = PrefixStore(attempt, TCPStore(*address, is_master=False))
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world)


def _store_survives() -> bool:
    """Whether torchrun keeps one store over all restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def advice() -> str | None:
    """What is to be told of the way in which torchrun was called."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    several = os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]
    if restarts and several and _store_survives():
        return (
            "for --max-restarts on several machines set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where "
            "torchrun is called; otherwise a restart may meet addresses of processes that are gone "
            "(pytorch/pytorch#135712)"
        )
    return None


def joined() -> bool:
    """Whether this process and others have met."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def agreed(work: Callable[[], T]) -> T:
    """Do it in every process; what one of them complains of ends all.

    Raises:
        ExperimentError: in every process, where ``work`` has raised one in any.
    """
    import torch.distributed as dist

    done: T | None = None
    complaint = None
    try:
        done = work()
    except (ExperimentError, OSError) as error:
        complaint = str(error)
    if joined():
        complaints: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(complaints, complaint)
    else:
        complaints = [complaint]
    found = [(i, text) for i, text in enumerate(complaints) if text is not None]
    if found:
        which, text = found[0]
        raise ExperimentError(text if which == 0 else f"on rank {which}: {text}")
    return done  # type: ignore[return-value]


def from_first(value: T) -> T:
    """What the first process has."""
    import torch.distributed as dist

    if not joined():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


_LOST = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "Timed out")


@contextmanager
def losing_none() -> Iterator[None]:
    """Turn the many ways in which another process's end shows into one that can be read.

    Raises:
        ExperimentError: the connection to another process is lost.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not joined() or not (
            isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)
        ):
            raise
        raise LostError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} has lost the connection to another "
            "process of this run, which has ended or cannot be reached; nothing is lost since the "
            "last checkpoint: the same command goes on from there (torchrun --max-restarts N does "
            "so by itself)"
        ) from None


class LostError(ExperimentError):
    """Another process of the run is gone."""
