"""Tensor lists, batches, and the interface that every back end implements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from apollo_qn.hyperparameters import Hyperparameters, StepScalars
from apollo_qn.secant import Sums

Describe: TypeAlias = Callable[[Tensor], str]  # returns the name of a parameter for a message


@dataclass(slots=True)
class TensorLists:
    """Tensors of one step; entry i of each list belongs to parameter i.

    Some lists are empty if the settings do not need them: ``previous_lrs`` without decoupled decay,
    ``thresholds`` without belief, ``compensations`` without Kahan rounding, ``rng_keys`` if no
    random bits are drawn, ``rows`` if no parameter is a shard. ``compensations`` holds None for
    parameters that are not 16 bits wide. ``rows`` holds a shard's row in the table of sums, or -1.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    hessian_diags: list[Tensor] = field(default_factory=list)
    state_steps: list[Tensor] = field(default_factory=list)
    previous_lrs: list[Tensor] = field(default_factory=list)
    thresholds: list[Tensor] = field(default_factory=list)
    compensations: list[Any] = field(default_factory=list)
    rng_keys: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.params)

    def select(self, indices: Sequence[int]) -> TensorLists:
        """Return the lists of some parameters."""
        if len(indices) == len(self.params):
            return self
        return self.map(lambda column: [column[i] for i in indices])

    def slice(self, which: slice) -> TensorLists:
        """Return the lists of a run of parameters."""
        return self.map(lambda column: column[which])

    def map(self, change: Callable[[list[Any]], list[Any]]) -> TensorLists:
        """Return the lists with ``change`` applied to each that is not empty."""
        columns = (getattr(self, each.name) for each in fields(self))
        return TensorLists(*(change(column) if column else [] for column in columns))

    @classmethod
    def concatenate(cls, lists: Sequence[TensorLists]) -> TensorLists:
        """Concatenate the lists of several groups, which must all need the same lists."""
        names = [each.name for each in fields(cls)]
        return cls(*([x for each in lists for x in getattr(each, name)] for name in names))

    @staticmethod
    def column(lists: Sequence[TensorLists], name: str) -> list[Any]:
        """Concatenate one list of several groups, with None for groups that do not need it."""
        return [x for each in lists for x in getattr(each, name) or [None] * len(each)]

    @property
    def large(self) -> list[list[Tensor]]:
        """Return the four lists of tensors that have the parameters' shapes."""
        return [self.params, self.grads, self.exp_avgs, self.hessian_diags]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one group that share hyperparameters and step scalars.

    The scalars are floats, or tensors of shape (n,) if counters are not read on the host. All
    tensors are real and lie on one device. Each list has one type. All tensors are shards, or none.
    """

    tensors: TensorLists
    h: Hyperparameters
    scalars: StepScalars

    def select(self, indices: Sequence[int]) -> Batch:
        """Return the batch of some of the tensors."""
        if len(indices) == len(self.tensors):
            return self
        return Batch(self.tensors.select(indices), self.h, self.scalars.select(list(indices)))

    def slice(self, which: slice) -> Batch:
        """Return the batch of a run of the tensors."""
        return Batch(self.tensors.slice(which), self.h, self.scalars.select(which))


class Backend:
    """Interface of a back end, which applies :func:`apollo_qn.algorithm.update` to many tensors.

    A back end gets plain local tensors and changes them in place. It knows nothing of groups, state
    dicts or meshes. Each optimizer has its own instance, because an instance keeps working memory.

    ``counts`` says who counts steps and records rates. If it is True, :meth:`step` does, and checks
    first that the counters and previous rates of a batch are equal. Otherwise the plan does.
    """

    counts = False

    def takes(self, batches: list[Batch]) -> list[list[bool]]:
        """Return for each tensor of each batch whether this back end can update it."""
        return [[True] * len(batch.tensors) for batch in batches]

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        raise NotImplementedError

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Update all tensors.

        Args:
            batches: tensors to update.
            sums: sums over the full tensors, needed if the batches consist of shards.

        Returns:
            True, or False if :meth:`takes` refuses a tensor, or if ``counts`` is True and the
            counters or previous rates of a batch differ; then nothing has been changed.
        """
        raise NotImplementedError


def unnamed(p: Tensor) -> str:
    """Return how a message describes a parameter whose name is not known."""
    return f"a parameter of shape {tuple(p.shape)}"


def step_scalars(batch: Batch) -> tuple[Any, ...]:
    """Return the row of scalars that the fused kernels read, as ``Scalars`` in ``kernel.h``."""
    h, s = batch.h, batch.scalars
    decay = (0.0, h.weight_decay) if h.decoupled_weight_decay else (h.weight_decay, 0.0)
    return (
        *(s.alpha, s.rate, s.offset, h.sigma, s.previous_offset, s.kappa, s.omega),
        *(h.sigma, h.secant_eps(), -1.0 if h.maximize else 1.0, *decay),
        *(float(h.decays), float(h.belief), float(h.rounding == "stochastic"), s.t),
    )


def copy_to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor in host memory to a device; a CUDA device is not waited for."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def increment_version(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel has changed the tensors in place."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def is_plain(tensors: Sequence[Any]) -> bool:
    """Return whether all are of torch's own classes, because a subclass may lack an operation."""
    return set(map(type, tensors)) <= _PLAIN


_PLAIN = {Tensor, torch.nn.Parameter}
