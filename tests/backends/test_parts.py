"""A tensor in parts, each measured and stepped by itself, is the tensor as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn.backends import Batch, Group, cpu, foreach, reference, triton
from apollo_qn.backends.plan import Plan, planned
from apollo_qn.rule import Hyperparameters, Sums
from tests import tolerances
from tests.helpers import DEVICE, NEEDS_FUSED, ON_GPU, as_numpy, normal
from tests.numpy_reference import ReferenceApollo, Settings

SetBlock = Callable[[int], None]

# 200,000: above what the kernel gives to all threads and a block of the foreach back end here
SIZES = [1, 300, 200_000]
CUTS = [0.0, 0.3, 0.3, 0.9, 1.0]  # the second part is empty
MODES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.05, "decoupled_weight_decay": True},
    {"rebound": "belief", "weight_decay": 0.05},
]


def hyperparameters(settings: Settings) -> Hyperparameters:
    names = Hyperparameters.__slots__
    known = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    return Hyperparameters(**{**known, "warmup_start": 1e-3, "maximize": False})


class Parts:
    """The state of a tensor's parts, and the step of each back end."""

    def __init__(self, theta: Tensor, settings: Settings) -> None:
        cuts = [round(cut * theta.numel()) for cut in CUTS]
        self.slices = [slice(*pair) for pair in itertools.pairwise(cuts)]
        self.slices = [one for one in self.slices if one.stop > one.start]
        self.theta = [theta[one].clone() for one in self.slices]
        self.m, self.B = ([torch.zeros_like(x) for x in self.theta] for _ in range(2))
        count = len(self.slices)
        self.steps = [torch.zeros(()) for _ in range(count)]
        self.h = hyperparameters(settings)
        lrs = [torch.zeros((), dtype=torch.float64) for _ in range(count)]
        self.previous_lrs = lrs if self.h.decoupled_weight_decay else None
        thresholds = [torch.zeros((), dtype=theta.dtype, device=DEVICE) for _ in range(count)]
        self.thresholds = thresholds if self.h.belief else None

    def step_one_by_one(self, back_end: ModuleType, gradients: list[Tensor]) -> None:
        before = None if self.previous_lrs is None else float(self.previous_lrs[0])
        t = float(self.steps[0])
        batch = Batch(self.theta, gradients, self.m, self.B, t, before, self.thresholds)
        each = [batch.part(slice(i, i + 1)) for i in range(len(gradients))]
        parts = [back_end.measure(one, self.h) for one in each]
        whole = Sums.joined(parts, torch.stack).merged()
        for one in each:
            back_end.step(one, self.h, whole)
        for i, step in enumerate(self.steps):
            step += 1
            if self.previous_lrs is not None:
                self.previous_lrs[i].fill_(self.h.rate(t))

    def step_fused(self, gradients: list[Tensor], kind: type[Plan]) -> None:
        count = len(gradients)
        columns = (self.theta, gradients, self.m, self.B, self.steps)
        group = Group(
            self.h, *columns, self.previous_lrs, self.thresholds, shared=list(range(count))
        )
        plan = planned([group], None, kind)
        assert plan.left == [[]]
        table = torch.zeros(count, 4, dtype=torch.float64, device=DEVICE)
        plan.measure([self.h], table)
        scale, q4, k, largest = table.unbind(1)
        whole = Sums(scale, q4, k, largest).merged()
        assert whole.largest is not None
        table.copy_(torch.stack([whole.scale, whole.q4, whole.k, whole.largest]))
        plan.step([self.h], table)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES, ids=["plain", "decoupled", "belief"])
@pytest.mark.parametrize(
    "back_end",
    [reference, foreach, pytest.param(triton.Plan if ON_GPU else cpu.Plan, marks=NEEDS_FUSED)],
    ids=["rule", "foreach", "fused"],
)
def test_parts_are_the_whole(
    back_end: ModuleType | type[Plan], mode: dict[str, Any], size: int, set_block: SetBlock
) -> None:
    set_block(1 << 14)
    check_parts(back_end, mode, size, steps=6)


def check_parts(
    back_end: ModuleType | type[Plan], mode: dict[str, Any], size: int, steps: int
) -> None:
    """A trajectory in parts against that of the whole; a fused back end is given by its plan."""
    settings = Settings(lr=0.1, warmup_steps=3, **mode)
    theta = normal((size,), "theta")
    wanted, parts = ReferenceApollo(as_numpy(theta), settings), Parts(theta, settings)
    for t in range(steps):
        g = normal((size,), "g", t) * 10.0 ** (torch.arange(size, device=DEVICE) % 5)
        wanted.step(as_numpy(g))
        gradients = [g[one].clone() for one in parts.slices]
        if isinstance(back_end, type):
            parts.step_fused(gradients, back_end)
        else:
            parts.step_one_by_one(back_end, gradients)
        for mine, theirs, tolerance in (
            (parts.theta, wanted.theta, tolerances.LARGE[torch.float64] * 10),
            (parts.m, wanted.m, tolerances.LARGE[torch.float64] * 10),
            (parts.B, wanted.B, tolerances.TRAJECTORY_B[torch.float64]),
        ):
            difference = abs(as_numpy(torch.cat(mine)) - theirs).max()
            assert difference <= tolerance * abs(theirs).max(), (t, difference)
