"""Default seed of an optimizer's random bits."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from apollo_qn.tracing import is_traced

_count = itertools.count()  # number of default seeds in this process


def default_seed() -> int:
    """Return the next number of torch's CPU generator, and leave the generator as it is.

    Model, batches and dropout of a run are then those of the same run with another optimizer.
    """
    index = next(_count)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # all replicas must round in the same way, but the ranks' generators may differ
        return index
    if is_traced():
        return index  # a fake tensor has no value to read
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(1 << 62, (), device="cpu"))
