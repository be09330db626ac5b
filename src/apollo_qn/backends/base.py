"""The one form of tensor lists, and the one protocol of a back end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from apollo_qn.hyperparameters import Hyperparameters, StepScalars
from apollo_qn.secant import Sums


@dataclass(slots=True)
class TensorLists:
    """The tensors of one step: entry i of each list belongs to parameter i.

    A list that the settings do not need is empty: ``previous_lrs`` without decoupled decay,
    ``thresholds`` without belief, ``compensations`` without Kahan rounding (which holds None for a
    parameter that is not of 16 bits), ``rng_streams`` where no random bits are drawn, ``rows``
    where no parameter is a shard. ``rows`` holds a shard's row in the table of sums, or -1.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    hessian_diags: list[Tensor] = field(default_factory=list)
    state_steps: list[Tensor] = field(default_factory=list)
    previous_lrs: list[Tensor] = field(default_factory=list)
    thresholds: list[Tensor] = field(default_factory=list)
    compensations: list[Any] = field(default_factory=list)
    rng_streams: list[int] = field(default_factory=list)
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

    @property
    def large(self) -> list[list[Tensor]]:
        """The four lists of tensors of the parameters' shapes."""
        return [self.params, self.grads, self.exp_avgs, self.hessian_diags]


def joined(lists: Sequence[TensorLists]) -> TensorLists:
    """Return the lists of several groups, which need the same lists, as one."""
    names = [each.name for each in fields(TensorLists)]
    return TensorLists(*([x for each in lists for x in getattr(each, name)] for name in names))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one group that share hyperparameters and step scalars.

    The scalars are floats, or tensors of shape (n,) where counters are not read on the host. All
    tensors are real, of one device, and of one type per list. Either all are shards or none is.
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
    """A way to carry out :func:`apollo_qn.algorithm.update` on many tensors.

    A back end sees plain local tensors and changes them in place. It knows nothing of groups,
    state dicts or meshes, and does not count steps. An optimizer owns its instance, and with it the
    instance's working memory.
    """

    def takes(self, batches: list[Batch]) -> list[list[bool]]:
        """Return for each tensor of each batch whether this back end can update it."""
        return [[True] * len(batch.tensors) for batch in batches]

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        raise NotImplementedError

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Update all tensors.

        Args:
            batches: what is updated.
            sums: the sums over the whole tensors, where the batches consist of shards.

        Returns:
            False: nothing has been changed, because :meth:`takes` says no of some tensor.
        """
        raise NotImplementedError


def step_scalars(batch: Batch) -> tuple[Any, ...]:
    """Return the row of scalars that the fused kernels read: ``step_scalars`` in ``kernel.h``."""
    h, s = batch.h, batch.scalars
    return (
        *(s.alpha, s.rate, s.offset, h.sigma, s.previous_offset, s.kappa, s.omega),
        *(h.sigma, h.secant_eps, -1.0 if h.maximize else 1.0),
        *(h.weight_decay if h.l2 else 0.0, h.weight_decay if h.decoupled else 0.0),
        *(float(h.decays), float(h.belief), float(h.rounding == "stochastic"), s.t),
    )


def is_plain(tensors: Sequence[Any]) -> bool:
    """Return whether all are of torch's own classes; a subclass may lack an operation."""
    return set(map(type, tensors)) <= _PLAIN


_PLAIN = {Tensor, torch.nn.Parameter}
