"""The rule, one tensor after the other: slow, differentiable, and what the others must equal."""

from __future__ import annotations

import torch

from apollo_qn.backends import Batch
from apollo_qn.rule import Hyperparameters, StepScalars, update


def step(batch: Batch, h: Hyperparameters) -> None:
    """Apply :func:`apollo_qn.rule.update` to each tensor of ``batch``."""
    for i, (p, g, m, B) in enumerate(
        zip(batch.params, batch.grads, batch.exp_avgs, batch.hessian_diags, strict=True)
    ):
        scalars = StepScalars.at(
            batch.t[i] if isinstance(batch.t, list) else batch.t,
            h,
            batch.previous_lr[i] if isinstance(batch.previous_lr, list) else batch.previous_lr,
            # clone: it is overwritten below, and autograd may still need it
            None if batch.thresholds is None else batch.thresholds[i].clone(),
        )
        old = (p, m, B)
        if torch.is_grad_enabled():  # they are overwritten below, and autograd still needs them
            old = (p.clone(), m.clone(), B.clone())
        new_p, new_m, new_B, threshold = update(old[0], g, old[1], old[2], h, scalars)
        p.copy_(new_p)
        m.copy_(new_m)
        B.copy_(new_B)
        if batch.thresholds is not None:
            assert isinstance(threshold, torch.Tensor)
            batch.thresholds[i].copy_(threshold)
