"""Back ends: fast forms of :func:`apollo_qn.rule.update`.

A back end changes the tensors that it is given in place. It sees plain local tensors and knows
nothing of state or meshes. ``reference`` and ``foreach`` take a :class:`Batch` of tensors that are
alike; the fused ones take what they can of all :class:`Group` s in one call. Of tensors that are
parts of others each back end gives the sums, and does the step with those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from apollo_qn.rule import Hyperparameters, arithmetic


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group in one step; see :func:`apollo_qn.apollo` for the lists and options.

    ``previous_lrs`` are given with decoupled weight decay, ``thresholds`` with belief,
    ``compensations`` with ``rounding="kahan"`` (None for a parameter that needs none), ``shared``
    where some of the tensors are parts of others: a number for each of these, -1 for a whole one.
    ``streams`` are the words of :mod:`apollo_qn.rounding` that stand for the tensors.
    """

    h: Hyperparameters
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    hessian_diags: list[Tensor]
    state_steps: list[Tensor]
    previous_lrs: list[Tensor] | None = None
    thresholds: list[Tensor] | None = None
    compensations: list[Tensor | None] | None = None
    streams: list[int] | None = None
    shared: list[int] | None = None
    foreach: bool | None = None
    fused: bool | None = None
    capturable: bool = False
    differentiable: bool = False

    def part(self, which: list[int]) -> Group:
        """The group with some of its tensors."""
        if len(which) == len(self.params):
            return self
        lists: dict[str, Any] = {
            field.name: [column[i] for i in which]
            for field in fields(self)
            if isinstance(column := getattr(self, field.name), list)
        }
        return replace(self, **lists)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors that one call updates: non-empty, real, of one device and one type for each list.

    ``params[i]``, ``grads[i]``, ``exp_avgs[i]`` and ``hessian_diags[i]`` have one shape. ``t`` is
    the number of steps done: one float for all, or a 0-dim tensor for each. ``previous_lr`` (of the
    same form) is needed with decoupled weight decay, ``thresholds`` (a 0-dim tensor for each, read
    and written) with belief, ``compensations`` (of the parameters' shapes and type, read and
    written) where 16-bit parameters are rounded so, ``streams`` where random bits are drawn; they
    are None otherwise.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    hessian_diags: list[Tensor]
    t: float | list[Tensor]
    previous_lr: float | list[Tensor] | None = None
    thresholds: list[Tensor] | None = None
    compensations: list[Tensor] | None = None
    streams: list[int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arithmetic."""
        return arithmetic(self.params[0].dtype, self.exp_avgs[0].dtype)

    def part(self, which: slice) -> Batch:
        """The batch of some of the tensors."""
        t, lr = self.t, self.previous_lr
        return Batch(
            self.params[which],
            self.grads[which],
            self.exp_avgs[which],
            self.hessian_diags[which],
            t[which] if isinstance(t, list) else t,
            lr[which] if isinstance(lr, list) else lr,
            None if self.thresholds is None else self.thresholds[which],
            None if self.compensations is None else self.compensations[which],
            None if self.streams is None else self.streams[which],
        )
