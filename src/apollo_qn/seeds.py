"""Default seed of an optimizer's random bits; the draw is undone if a saved seed replaces it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_qn.tracing import is_traced

_count = itertools.count()  # number of seeds drawn in this process


class DefaultSeed(NamedTuple):
    """A seed, with the state of torch's generator before and after the seed was drawn from it."""

    value: int
    before: Tensor | None = None
    after: Tensor | None = None

    @classmethod
    def draw(cls) -> DefaultSeed:
        """Return a new seed."""
        index = next(_count)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # all replicas must round in the same way, but the ranks' generators may differ
            return cls(index)
        if is_traced():
            return cls(index)  # a fake tensor has no value to read
        before = torch.get_rng_state()
        value = int(torch.randint(1 << 62, (), device="cpu"))
        return cls(value, before, torch.get_rng_state())

    def undo_draw(self) -> None:
        """Undo the draw if it was the last one from torch's generator.

        A resumed run then draws the same random numbers as the run that it continues.
        """
        if self.before is None or self.after is None:
            return
        if torch.equal(self.after, torch.get_rng_state()):
            torch.set_rng_state(self.before)
