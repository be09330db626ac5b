"""Shards that are measured and updated one by one step like the unsharded tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn.backends.base import Backend, Batch, TensorLists
from apollo_qn.backends.cpu import CPU
from apollo_qn.backends.foreach import Foreach
from apollo_qn.backends.reference import Reference
from apollo_qn.backends.triton import Triton
from apollo_qn.hyperparameters import Hyperparameters, StepScalars
from apollo_qn.secant import Sums
from tests import tolerances
from tests.helpers import DEVICE, NEEDS_FUSED, ON_GPU, as_numpy, normal
from tests.numpy_reference import ReferenceApollo, Settings

SetBlock = Callable[[int], None]

# 200,000 elements: divided over threads by the kernel, and into blocks by foreach
SIZES = [1, 300, 200_000]
CUTS = [0.0, 0.3, 0.3, 0.9, 1.0]  # the second part is empty
MODES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.05, "decoupled_weight_decay": True},
    {"rebound": "belief", "weight_decay": 0.05},
]


def hyperparameters(settings: Settings) -> Hyperparameters:
    names = Hyperparameters._fields
    known = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    return Hyperparameters(**{**known, "warmup_start": 1e-3, "maximize": False})


class Shards:
    """The shards of a tensor with their state, and their steps by a back end."""

    def __init__(self, theta: Tensor, settings: Settings) -> None:
        cuts = [round(cut * theta.numel()) for cut in CUTS]
        slices = [slice(*pair) for pair in itertools.pairwise(cuts)]
        self.slices = [one for one in slices if one.stop > one.start]
        self.theta = [theta[one].clone() for one in self.slices]
        self.m, self.B = ([torch.zeros_like(x) for x in self.theta] for _ in range(2))
        self.h = hyperparameters(settings)
        self.thresholds = [
            torch.zeros((), dtype=theta.dtype, device=DEVICE) for _ in self.slices if self.h.belief
        ]
        self.t, self.previous_lr = 0, 0.0

    def step(self, back_end: Backend, gradients: list[Tensor]) -> None:
        s = StepScalars.at(float(self.t), self.h, self.previous_lr)
        lists = TensorLists(self.theta, gradients, self.m, self.B, thresholds=self.thresholds)
        lists.state_steps = [torch.tensor(float(self.t)) for _ in self.theta]
        # one batch per shard must equal one batch of all shards
        batches = [Batch(lists.select([i]), self.h, s) for i in range(len(lists))]
        if self.t % 2:
            batches = [Batch(lists, self.h, s)]
        sums = Sums.concatenate(back_end.measure(batches), torch.cat).merged()
        assert sums.largest is None or self.h.belief
        added = [
            Sums.from_table(self.power_of_2(sums).expand(len(batch.tensors), 4), self.h.belief)
            for batch in batches
        ]
        assert back_end.step(batches, added)
        self.t += 1
        self.previous_lr = float(s.rate)

    def power_of_2(self, sums: Sums) -> Tensor:
        """Return the sums with a scale that is a power of 2, as the reduction does."""
        scale = torch.exp2(torch.log2(sums.scale).floor()).where(sums.scale > 0, 1)
        share = (sums.scale / scale).double()
        largest = sums.k * 0 if sums.largest is None else sums.largest
        columns = (scale, sums.q4 * share**4, sums.k * share, largest)
        return torch.stack([x.double() for x in columns])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES, ids=["plain", "decoupled", "belief"])
@pytest.mark.parametrize(
    "back_end",
    [Reference, Foreach, pytest.param(Triton if ON_GPU else CPU, marks=NEEDS_FUSED)],
    ids=["reference", "foreach", "fused"],
)
def test_shards_step_as_the_unsharded_tensor(
    back_end: type[Backend], mode: dict[str, Any], size: int, set_block: SetBlock
) -> None:
    set_block(1 << 14)
    check_shards(back_end(), mode, size, steps=6)


def check_shards(back_end: Backend, mode: dict[str, Any], size: int, steps: int) -> None:
    """Compare the trajectory of shards with that of the unsharded tensor."""
    settings = Settings(lr=0.1, warmup_steps=3, **mode)
    theta = normal((size,), "theta")
    wanted, shards = ReferenceApollo(as_numpy(theta), settings), Shards(theta, settings)
    for t in range(steps):
        g = normal((size,), "g", t) * 10.0 ** (torch.arange(size, device=DEVICE) % 5)
        wanted.step(as_numpy(g))
        shards.step(back_end, [g[one].clone() for one in shards.slices])
        for mine, theirs, tolerance in (
            (shards.theta, wanted.theta, tolerances.LARGE[torch.float64] * 10),
            (shards.m, wanted.m, tolerances.LARGE[torch.float64] * 10),
            (shards.B, wanted.B, tolerances.TRAJECTORY_B[torch.float64]),
        ):
            difference = abs(as_numpy(torch.cat(mine)) - theirs).max()
            assert difference <= tolerance * abs(theirs).max(), (t, difference)
