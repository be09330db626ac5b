"""The reference back end: Algorithm 1 on one tensor after the other, slow and differentiable.

All other back ends are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_qn import algorithm, rounding
from apollo_qn.backends.base import Backend, Batch
from apollo_qn.hyperparameters import StepScalars
from apollo_qn.secant import Sums, arithmetic


class Reference(Backend):
    """Back end that calls :mod:`apollo_qn.algorithm` for one tensor after the other."""

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        return [_measure(batch) for batch in batches]

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Apply :func:`apollo_qn.algorithm.update` to each tensor."""
        for i, batch in enumerate(batches):
            _step(batch, None if sums is None else sums[i])
        return True


def _step(batch: Batch, sums: Sums | None) -> None:
    tensors, h = batch.tensors, batch.h
    for i, (p, g, m, B) in enumerate(zip(*tensors.large, strict=True)):
        dtype = arithmetic(p.dtype, m.dtype)
        s = _scalars(batch, i, dtype)
        low = tensors.compensations[i] if tensors.compensations else None
        old = (p, m, B)
        if (
            torch.is_grad_enabled()
        ):  # autograd still needs the old values, which are overwritten below
            old = (p.clone(), m.clone(), B.clone())
        theta = old[0] if low is None else rounding.join(old[0], low, dtype)
        given = None if sums is None else sums.of(i)
        theta, new_m, new_B, threshold = algorithm.update(theta, g, old[1], old[2], h, s, given)
        random = _random_bits(batch, i)
        if low is not None:
            theta, rest = rounding.split(theta, p.dtype)
            low.copy_(rest)
        elif random is not None and rounding.is_drawn(p.dtype, h.rounding):
            theta = rounding.stochastic(theta, p.dtype, random)
        if random is not None and m.dtype in rounding.DROPPED:
            new_B = rounding.stochastic(new_B, B.dtype, rounding.low_half(random))
        p.copy_(theta)
        m.copy_(new_m)
        B.copy_(new_B)
        if tensors.thresholds:
            assert isinstance(threshold, Tensor)
            tensors.thresholds[i].copy_(threshold)


def _measure(batch: Batch) -> Sums:
    found = []
    for i, (p, g, m, B) in enumerate(zip(*batch.tensors.large, strict=True)):
        s = _scalars(batch, i, arithmetic(p.dtype, m.dtype))
        found.append(algorithm.measure(p, g, m, B, batch.h, s))
    return Sums.concatenate(found, torch.stack)


def _scalars(batch: Batch, i: int, dtype: torch.dtype) -> StepScalars:
    """Return the scalars of tensor ``i``."""
    s = batch.scalars.select(i)
    if batch.tensors.thresholds:
        # clone, because the step overwrites it and autograd may still need it
        s = s.with_threshold(batch.tensors.thresholds[i].clone())
    return s.to(dtype)


def _random_bits(batch: Batch, i: int) -> Tensor | None:
    if not batch.tensors.rng_keys:
        return None
    p, t = batch.tensors.params[i], batch.scalars.select(i).t
    step = t.detach().to(p.device).long() if isinstance(t, Tensor) else int(t)
    keys = rounding.keys(batch.tensors.rng_keys[i], step)
    return rounding.random_bits(rounding.memory_offsets(p), *keys)
