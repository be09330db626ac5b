"""The registry: make an optimizer and its learning rate schedule from a recipe's settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.config.optimizer_settings import (
    AdamSettings,
    ApolloSettings,
    AveragedSettings,
    MuonSettings,
    NAdamSettings,
    OptimizerSettings,
    SGDSettings,
)
from apollo_bench.config.schema import LRShape, Schedule
from apollo_bench.optimizers.averaged_apollo import AveragedApollo
from apollo_bench.optimizers.custom import build_custom
from apollo_bench.optimizers.muon import MuonAndAdamW
from apollo_qn import Apollo
from apollo_qn.schedules import inverse_square_root


def build_optimizer(settings: OptimizerSettings, network: nn.Module) -> torch.optim.Optimizer:
    """Make an optimizer on its fastest back end, as a user would.

    Example:
        >>> from apollo_bench.config import recipe
        >>> spec = recipe.load("wordnet").run("apollo", seed=1)
        >>> build_optimizer(spec.optimizer, nn.Linear(4, 2)).defaults["lr"]
        100.0

    Args:
        settings: settings of one run; weight decay is a number.
        network: network, on its device.

    Raises:
        TypeError: the weight decay is a reference; resolve the run first.
        ExperimentError: the class of the optimizer cannot be imported, or does not take its
            settings.
    """
    decay, parameters = settings.weight_decay, network.parameters()
    if isinstance(settings, CustomSettings):
        return build_custom(settings, parameters)
    if not isinstance(decay, float):
        raise TypeError(f"weight decay is not resolved: {decay!r}")
    if isinstance(settings, SGDSettings):
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
    if isinstance(settings, AdamSettings):
        return torch.optim.AdamW(parameters, lr, betas, eps, decay, fused=True)
    if isinstance(settings, MuonSettings):
        return MuonAndAdamW(network, lr, decay, settings.momentum, betas, eps)
    kind = torch.optim.NAdam if isinstance(settings, NAdamSettings) else torch.optim.RAdam
    # PyTorch has no fused form of these two
    return kind(parameters, lr, betas, eps, decay, decoupled_weight_decay=True, foreach=True)


def lr_factor(schedule: Schedule, name: str, steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step, for LambdaLR.

    Example:
        >>> factor = lr_factor(Schedule(kind="cosine", updates=400), "sgd", steps=400)
        >>> factor(0), round(factor(200), 3), factor(400)
        (1.0, 0.5, 0.0)
        >>> optimizer = torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    Args:
        schedule: schedule of the run.
        name: name of the optimizer, for which the schedule may have overrides.
        steps: steps of the whole run.
    """
    shape: LRShape = schedule.overrides.get(name, schedule)
    warmup = shape.warmup_steps
    if shape.kind == "inverse-sqrt" and warmup is not None:
        return inverse_square_root(warmup)
    fall = _decay(shape, schedule, steps)
    return fall if warmup is None else lambda step: min(1.0, (step + 1) / warmup) * fall(step)


def _decay(shape: LRShape, schedule: Schedule, steps: int) -> Callable[[int], float]:
    if shape.kind == "constant":
        return lambda step: 1.0
    if shape.kind == "cosine":
        return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
    edges = [round(milestone * steps / schedule.length) for milestone in shape.milestones]
    return lambda step: shape.factor ** sum(step >= edge for edge in edges)
