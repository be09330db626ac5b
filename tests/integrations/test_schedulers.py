"""Every scheduler of torch: a step uses the rate that it sets, times the warmup."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from apollo_qn import Apollo
from apollo_qn.schedules import inverse_square_root
from tests import tolerances
from tests.helpers import of_one_parameter, parameters, rates

LR, STEPS = 0.5, 12

Make = Callable[[Any], Any]
# one of each class at least
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "LambdaLR, the paper's": lambda o: lr_scheduler.LambdaLR(o, inverse_square_root(3)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=2.0, total_steps=20, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=5),
}
IN_TORCH = {
    name
    for module in (lr_scheduler, swa_utils)
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, LRScheduler) and not name.startswith("_") and kind is not LRScheduler
}


def test_all_of_torch() -> None:
    assert {name.split(",")[0] for name in SCHEDULERS} == IN_TORCH


def warmed_up(rates_set: list[float]) -> list[float]:
    """Return the rates after a warmup of 4 steps from a tenth of lr."""
    return [lr * (0.1 + 0.9 * t / 4 if t < 4 else 1.0) for t, lr in enumerate(rates_set)]


class Schedule:
    """A scheduler on Apollo, and the same on SGD, whose rates are the right ones."""

    def __init__(self, name: str, optimizer: Apollo) -> None:
        self.wants_metric = name == "ReduceLROnPlateau"
        self.optimizer = optimizer
        self.peer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], LR)
        self.both = [SCHEDULERS[name](one) for one in (optimizer, self.peer)]
        self.set = [self.rate(self.peer)]

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        return float(optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        self.peer.step()
        for scheduler in self.both:
            scheduler.step(*[1.0] * self.wants_metric)
        self.set.append(self.rate(self.peer))
        assert self.rate(self.optimizer) == pytest.approx(self.set[-1], rel=tolerances.RATE)


def optimizer_of(lr: Any) -> Apollo:
    return of_one_parameter(lr=lr, warmup_steps=4, warmup_init_lr=LR / 10)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_set_is_used(name: str, tensor_lr: bool) -> None:
    optimizer = optimizer_of(torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = Schedule(name, optimizer)
        used = rates(optimizer, STEPS, schedule.step)
    wanted = schedule.set[:STEPS]
    assert len(set(wanted)) > 1
    np.testing.assert_allclose(used, warmed_up(wanted), rtol=tolerances.RATE, atol=1e-15)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == tensor_lr


@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_and_resumed(name: str) -> None:
    """Step 5 lies within the ramp, cycle or decay of most schedulers."""
    optimizer = optimizer_of(LR)
    schedule = Schedule(name, optimizer)
    rates(optimizer, 5, schedule.step)
    saved = copy.deepcopy((optimizer.state_dict(), [s.state_dict() for s in schedule.both]))
    wanted = rates(optimizer, 6, schedule.step)

    fresh = optimizer_of(LR)
    resumed = Schedule(name, fresh)
    fresh.load_state_dict(saved[0])
    for scheduler, state in zip(resumed.both, saved[1], strict=True):
        scheduler.load_state_dict(state)
    resumed.peer.param_groups[0]["lr"] = fresh.param_groups[0]["lr"]
    assert rates(fresh, 6, resumed.step) == pytest.approx(wanted, rel=tolerances.RATE)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_a_momentum_that_cycles(name: str) -> None:
    """Both cycle the momentum by default; torch says that Apollo has none."""
    optimizer = Apollo(parameters([(3,)]), lr=LR)
    make: dict[str, Callable[[], Any]] = {
        "CyclicLR": lambda: lr_scheduler.CyclicLR(optimizer, 0.1, 1.0),
        "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=20),
    }
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
        make[name]()


def test_each_group_has_its_own_rate() -> None:
    a, b = parameters([(), ()], torch.float64)
    optimizer = Apollo(
        [{"params": [a]}, {"params": [b], "lr": 0.1, "warmup_steps": 0}],
        lr=LR,
        warmup_steps=4,
        warmup_init_lr=LR / 10,
        beta=0.0,
    )
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t, lambda t: 0.5**t])
    for t in range(6):
        before = a.item(), b.item()
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
        scheduler.step()
        ramp = 0.1 + 0.9 * t / 4 if t < 4 else 1.0
        assert before[0] - a.item() == pytest.approx(LR * 0.9**t * ramp, rel=tolerances.RATE)
        assert before[1] - b.item() == pytest.approx(0.1 * 0.5**t, rel=tolerances.RATE)
