"""The rule, one tensor after the other: slow, differentiable, and what the others must equal."""

from __future__ import annotations

import torch

from apollo_qn import rounding, rule
from apollo_qn.backends import Batch
from apollo_qn.rule import Hyperparameters, StepScalars, Sums


def step(batch: Batch, h: Hyperparameters, sums: Sums | None = None) -> None:
    """Apply :func:`apollo_qn.rule.update` to each tensor; ``sums`` as of :func:`measure`."""
    for i, (p, g, m, B) in enumerate(
        zip(batch.params, batch.grads, batch.exp_avgs, batch.hessian_diags, strict=True)
    ):
        scalars = _scalars(batch, h, i)
        given = None
        if sums is not None:
            largest = None if sums.largest is None else sums.largest[i]
            given = Sums(sums.scale[i], sums.q4[i], sums.k[i], largest)
        low = None if batch.compensations is None else batch.compensations[i]
        old = (p, m, B)
        if torch.is_grad_enabled():  # they are overwritten below, and autograd still needs them
            old = (p.clone(), m.clone(), B.clone())
        theta = old[0] if low is None else rounding.joined(old[0], low, batch.dtype)
        theta, new_m, new_B, threshold = rule.update(theta, g, old[1], old[2], h, scalars, given)
        random = _random(batch, i)
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
        if batch.thresholds is not None:
            assert isinstance(threshold, torch.Tensor)
            batch.thresholds[i].copy_(threshold)


def measure(batch: Batch, h: Hyperparameters) -> Sums:
    """The sums over each tensor, which here are parts of others; nothing is changed."""
    found = [
        rule.measure(p, g, m, B, h, _scalars(batch, h, i))
        for i, (p, g, m, B) in enumerate(
            zip(batch.params, batch.grads, batch.exp_avgs, batch.hessian_diags, strict=True)
        )
    ]
    return Sums.joined(found, torch.stack)


def _random(batch: Batch, i: int) -> torch.Tensor | None:
    if batch.streams is None:
        return None
    t = batch.t[i].to(batch.params[i].device) if isinstance(batch.t, list) else batch.t
    step = t.detach().long() if isinstance(t, torch.Tensor) else int(t)
    keys = rounding.keys(batch.streams[i], step)
    return rounding.words(rounding.places(batch.params[i]), *keys)


def _scalars(batch: Batch, h: Hyperparameters, i: int) -> StepScalars:
    return StepScalars.at(
        batch.t[i] if isinstance(batch.t, list) else batch.t,
        h,
        batch.previous_lr[i] if isinstance(batch.previous_lr, list) else batch.previous_lr,
        # clone: it is overwritten in the step, and autograd may still need it
        None if batch.thresholds is None else batch.thresholds[i].clone(),
    )
