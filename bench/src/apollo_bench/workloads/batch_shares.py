"""The rows of a batch that each process of a run has."""

from __future__ import annotations

from apollo_bench.errors import ExperimentError


def share_of_batch(batch_size: int, rank: int, world: int) -> range:
    """Return the rows of one process: neighboring ones, equally many for each process.

    Example:
        >>> share_of_batch(batch_size=64, rank=1, world=2)
        range(32, 64)

    Args:
        batch_size: rows of the whole batch.
        rank: number of this process, below ``world``.
        world: number of processes.

    Raises:
        ExperimentError: the processes cannot share the batch equally.
    """
    if batch_size % world:
        raise ExperimentError(
            f"train.batch_size is {batch_size}, which {world} processes cannot share equally; "
            "choose a multiple of them"
        )
    share = batch_size // world
    return range(rank * share, (rank + 1) * share)
