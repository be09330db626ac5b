"""The contract of a workload: data, model, loss and metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]  # with one row for each example
HiddenState = tuple[Tensor, ...]  # likewise: what a step leaves to the next; () at an epoch's start


class Metric(NamedTuple):
    """What a task is judged by, one of the names of ``Task.metrics``."""

    name: str
    label: str  # as people write it, with the split that it is measured on
    unit: str  # "" for a number without one
    higher_is_better: bool

    @property
    def title(self) -> str:
        """With its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` is better than ``other``."""
        return one > other if self.higher_is_better else one < other


class Resources(NamedTuple):
    """What a run has to work with; nothing that its result depends on but the data."""

    folder: Path | None = None  # of local data; None: what the task has by itself
    device: torch.device = torch.device("cpu")  # where the batches come out
    workers: int | None = None  # processes that decode images; None: one a core


class Workload(Protocol):
    """One problem to train; the optimizer is none of its business."""

    curve: Metric  # during training; the best weights are those of its best value
    final: Metric  # of the trained model
    has_final_test: (
        bool  # whether the trained model is measured in another way than during training
    )
    unit: str  # what throughput counts: "images", "words"
    units_per_step: float  # over all processes
    fingerprint: str  # of the data
    remarks: list[str]  # what a reader must know of data and metric
    steps_per_epoch: int

    def model(self) -> nn.Module:
        """A new model, drawn from torch's global generator."""

    def batches(
        self, seed: int, epoch: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on, or the part of one of several processes.

        Each batch is a function of (seed, epoch, step) alone: that is what makes a resumed run
        equal to one that was never killed. The parts of ``world`` processes together are the batch
        of one process.
        """

    def loss(
        self, model: nn.Module, part: Batch, batch: Batch, hidden_state: HiddenState
    ) -> tuple[Tensor, HiddenState]:
        """What a part of a process's batch adds to the loss, a 0-dim tensor, and what it leaves.

        The sum over the parts of ``batch``, averaged over the processes, is the mean loss of the
        batch of all processes.
        """

    def tally(self, model: nn.Module, rank: int = 0, world: int = 1, final: bool = False) -> Tensor:
        """Sums over a process's part of the held-out data, 1-dimensional; add those of all.

        The model is in eval mode, without autograd. ``final``: it is trained to the end.
        """

    def metrics(self, tally: Tensor, final: bool = False) -> dict[str, float]:
        """Metrics by name, from the sums of all processes."""
