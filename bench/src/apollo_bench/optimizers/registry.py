"""From the settings of a recipe to an optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from apollo_bench.config.schema import (
    SGD,
    Adam,
    ApolloSettings,
    AveragedSettings,
    Muon,
    NAdam,
    Optimizer,
    Schedule,
    Shape,
)
from apollo_bench.optimizers.averaged_apollo import AveragedApollo
from apollo_bench.optimizers.muon import MuonAndAdamW
from apollo_qn import Apollo
from apollo_qn.schedules import inverse_square_root


def build(settings: Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer on the fastest back end that it has: what a user would take.

    Raises:
        TypeError: the weight decay is still a reference; resolve the run first.
    """
    decay, parameters = settings.weight_decay, network.parameters()
    if not isinstance(decay, float):
        raise TypeError(f"weight decay is not resolved: {decay!r}")
    if isinstance(settings, SGD):
        return torch.optim.SGD(
            parameters, settings.lr, settings.momentum, weight_decay=decay, fused=True
        )
    if isinstance(settings, ApolloSettings):
        return Apollo(
            parameters,
            settings.lr,
            settings.beta,
            settings.eps,
            settings.sigma,
            decay,
            decoupled_weight_decay=settings.method == "apollow",
            rebound=settings.rebound,
            warmup_steps=settings.warmup_steps,
            warmup_init_lr=settings.warmup_init_lr,
        )
    if isinstance(settings, AveragedSettings):
        return AveragedApollo(parameters, **settings.model_dump(exclude={"method"}))
    lr, betas, eps = settings.lr, (settings.betas[0], settings.betas[1]), settings.eps
    if isinstance(settings, Adam):
        return torch.optim.AdamW(parameters, lr, betas, eps, decay, fused=True)
    if isinstance(settings, Muon):
        return MuonAndAdamW(network, lr, decay, settings.momentum, betas, eps)
    kind = torch.optim.NAdam if isinstance(settings, NAdam) else torch.optim.RAdam
    # torch has no fused one of either
    return kind(parameters, lr, betas, eps, decay, decoupled_weight_decay=True, foreach=True)


def rate_factor(schedule: Schedule, name: str, steps: int) -> Callable[[int], float]:
    """The factor on an optimizer's learning rate at step 0, 1, ..., of ``steps``, for LambdaLR.

    Args:
        schedule: of the run.
        name: of the optimizer, which may have a shape of its own in the schedule.
        steps: of the whole training.
    """
    shape: Shape = schedule.instead.get(name, schedule)
    warmup = shape.warmup_steps
    if shape.kind == "inverse-sqrt" and warmup is not None:
        return inverse_square_root(warmup)
    fall = _fall(shape, schedule, steps)
    return fall if warmup is None else lambda step: min(1.0, (step + 1) / warmup) * fall(step)


def _fall(shape: Shape, schedule: Schedule, steps: int) -> Callable[[int], float]:
    if shape.kind == "constant":
        return lambda step: 1.0
    if shape.kind == "cosine":
        return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
    edges = [round(milestone * steps / schedule.length) for milestone in shape.milestones]
    return lambda step: shape.factor ** sum(step >= edge for edge in edges)
