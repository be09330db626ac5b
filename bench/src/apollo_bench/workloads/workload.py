"""The contract of a workload: data, model, loss and metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from apollo_bench.workloads.base_settings import DataSettings, ModelSettings

Batch = tuple[Tensor, ...]  # one row per example
HiddenState = tuple[Tensor, ...]  # one row per example; () at the start of an epoch


class Metric(NamedTuple):
    """A metric of a workload, one of the names that ``Workload.metrics`` returns.

    Example:
        >>> accuracy = Metric("accuracy", "test accuracy", "%", higher_is_better=True)
        >>> accuracy.title, accuracy.better(90.0, 89.0)
        ('test accuracy (%)', True)
    """

    name: str
    label: str  # as reports show it, with the split
    unit: str  # "" if there is none
    higher_is_better: bool

    @property
    def title(self) -> str:
        """Label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def better(self, one: float, other: float) -> bool:
        """Return whether ``one`` is better than ``other``."""
        return one > other if self.higher_is_better else one < other


class _Batches(Protocol):
    @property
    def batch_size(self) -> int:
        """Examples (sentence pairs: tokens) per step, over all processes."""


class WorkloadSpec(Protocol):
    """The part of a resolved recipe that a workload is made from."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def model(self) -> ModelSettings:
        """The table [model]."""

    @property
    def data(self) -> DataSettings:
        """The table [data]."""

    @property
    def train(self) -> _Batches:
        """The table [train]."""


class Resources(NamedTuple):
    """The resources of a run; except for the data, its result does not depend on them."""

    folder: Path | None = None  # of local data; None: the task's own data
    device: torch.device = torch.device("cpu")  # of the batches
    workers: int | None = None  # processes that decode images; None: one per core


class Workload(Protocol):
    """A problem to train: data, model, loss and metric. A workload does not know the optimizer.

    Example:
        >>> from apollo_bench.config import recipe
        >>> from apollo_bench.workloads import tasks
        >>> workload = tasks.make(recipe.load("fashion-mnist").run("apollo", seed=1))
        >>> batch = next(workload.batches(seed=1, epoch=0, start=0))
        >>> [tuple(column.shape) for column in batch]
        [(64, 1, 28, 28), (64,)]
        >>> loss, hidden_state = workload.loss(workload.model(), batch, batch, ())
        >>> loss.shape, hidden_state
        (torch.Size([]), ())
    """

    monitored: Metric  # evaluated during training; the best weights are those of its best value
    final: Metric  # of the trained model
    has_final_test: bool  # whether the trained model is also evaluated on test data
    unit: str  # of throughput: "images", "words"
    units_per_step: float  # over all processes
    fingerprint: str  # of the data
    published: bool  # whether the data are known to be those that the paper used
    remarks: list[str]  # notes on data and metric, for the report
    steps_per_epoch: int

    def model(self) -> nn.Module:
        """Return a new model, drawn from torch's global generator."""

    def batches(
        self, seed: int, epoch: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``start`` on, or this process's part of them.

        A batch is a function of (seed, epoch, step) alone, so that a resumed run equals an
        uninterrupted one. The parts of ``world`` processes together are the batch of one process.

        Args:
            seed: seed of the run.
            epoch: from 0 on.
            start: first step of the epoch that is wanted, from 0 on.
            rank: number of this process, below ``world``.
            world: number of processes.

        Raises:
            ExperimentError: the processes cannot share a batch.
        """

    def loss(
        self, model: nn.Module, part: Batch, batch: Batch, hidden_state: HiddenState
    ) -> tuple[Tensor, HiddenState]:
        """Return the loss of a part of a process's batch, 0-dim, and the next hidden state.

        The sum over the parts of ``batch``, averaged over the processes, is the mean loss of the
        whole batch.

        Args:
            model: what ``model`` returned, or Fabric's wrapper of it.
            part: rows of ``batch``.
            batch: the batch of this process.
            hidden_state: what the previous step returned for the same rows; () at the start of an
                epoch.
        """

    def evaluate(
        self, model: nn.Module, rank: int = 0, world: int = 1, final: bool = False
    ) -> Tensor:
        """Return 1-dim float64 sums over this process's part of the held-out data, to be added up.

        It is called without autograd.

        Args:
            model: in eval mode.
            rank: number of this process.
            world: number of processes.
            final: whether the model is fully trained.
        """

    def metrics(self, sums: Tensor, final: bool = False) -> dict[str, float]:
        """Return metrics by name, from the sums of all processes.

        Args:
            sums: sum over the processes of what ``evaluate`` returned.
            final: as it was for ``evaluate``; then ``self.final`` is among the metrics.
        """
