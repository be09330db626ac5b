"""What a task is to the engine: data, model, loss, metric, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Metric(NamedTuple):
    """What a task is judged by, one of the names of ``Task.metrics``."""

    name: str
    label: str  # as people write it
    unit: str
    higher_is_better: bool

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` is better than ``other``."""
        return one > other if self.higher_is_better else one < other


class Resources(NamedTuple):
    """What a run has to work with; nothing that its result depends on but the data."""

    folder: Path | None = None  # of local data; None: what the task has by itself
    device: torch.device = torch.device("cpu")  # where the batches come out
    workers: int | None = None  # processes that decode images; None: one a core


class Task(Protocol):
    """One problem to train; the optimizer is none of its business."""

    metric: Metric
    fingerprint: str  # of the data
    batch_size: int  # examples in a step, over all processes
    steps_per_epoch: int

    def model(self) -> nn.Module:
        """A new model, drawn from torch's global generator."""

    def batches(
        self, seed: int, epoch: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on, or the part of one of several processes.

        Each batch is a function of (seed, epoch, step) alone: that is what makes a resumed run
        equal to one that was never killed. The parts of ``world`` processes are equal in size, and
        together they are the batch of one process.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a 0-dim tensor."""

    def tally(self, model: nn.Module, rank: int = 0, world: int = 1) -> Tensor:
        """Sums over a process's part of the held-out data, 1-dimensional; add those of all.

        The model is in eval mode, without autograd.
        """

    def metrics(self, tally: Tensor) -> dict[str, float]:
        """Metrics by name, from the sums of all processes."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of one process that sees all held-out data."""
