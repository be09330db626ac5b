"""What a task is to the engine: data, model, loss, metric, and no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """One problem to train; the optimizer is none of its business."""

    fingerprint: str  # of the data
    batch_size: int  # examples in a step
    steps_per_epoch: int

    def model(self) -> nn.Module:
        """A new model, drawn from torch's global generator."""

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on.

        Each is a function of (seed, epoch, step) alone: that is what makes a resumed run equal to
        one that was never killed.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a 0-dim tensor."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the held-out data, by name; the model is in eval mode, without autograd."""


def derived_seed(*parts: int) -> int:
    """A seed for each (seed, epoch, step), unrelated to its neighbours'."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
