"""The script behind docs/stability.md trains as Apollo does, and gives the page's numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

from apollo_qn import Apollo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "noisy_quadratic", ROOT / "benchmarks" / "noisy_quadratic.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_it_trains_as_apollo_does(script: ModuleType) -> None:
    curvatures = numpy.linspace(0.01, 1.0, 20)
    path = script.train(5.0, seed=3, steps=200, curvatures=curvatures)
    h = torch.from_numpy(curvatures)
    x = torch.nn.Parameter(torch.ones_like(h))
    optimizer = Apollo([x], lr=5.0, warmup_steps=script.WARMUP, warmup_init_lr=0.0, foreach=True)
    draws = numpy.random.default_rng(3)
    losses = []
    for _ in range(200):
        x.grad = h * x.detach() + torch.from_numpy(draws.standard_normal(20))
        optimizer.step()
        losses.append(float((h * x.detach() ** 2).sum() / 2))
    # the same rule in float64, sums in another order
    assert path.loss == pytest.approx(losses, rel=1e-9)


def test_sgd_is_stable_up_to_38(script: ModuleType) -> None:
    assert not script.train(37.0, 0, "sgd").diverged
    assert script.train(39.0, 0, "sgd").diverged


@pytest.mark.parametrize("elements", [1, 200])
def test_few_elements_lower_the_limit(script: ModuleType, elements: int) -> None:
    curvatures = numpy.linspace(1.0, 0.01, elements)
    assert script.train(5.0, 0, curvatures=curvatures).diverged == (elements == 1)
    assert not script.train(5.0, 0, "sgd", curvatures=curvatures).diverged


def test_small_updates_of_b_are_stable(script: ModuleType) -> None:
    assert script.train(30.0, 0).diverged
    assert not script.train(30.0, 0, average=0.9).diverged


def test_one_d_that_is_held_shrinks_the_error(script: ModuleType) -> None:
    one = numpy.ones(1)
    for scale in (1.0, 2.0, 5.0):
        rate = script.growth(37.0, one, numpy.full((2000, 1), scale))[0]
        assert rate == pytest.approx(math.log(script.BETA) / 2, abs=1e-2)
    assert script.growth(39.0, one, numpy.ones((2000, 1)))[0] > 0


def test_a_small_swing_of_d_suffices_at_the_middle_of_the_stable_rates(script: ModuleType) -> None:
    # at lr (1 - beta) h = 1 + beta a swing of (1 - beta) / (1 + beta) of 1 / D is the limit
    limit = (1 - script.BETA) / (1 + script.BETA)
    signs = numpy.resize([1.0, -1.0], (4000, 1))
    for share, grows in ((0.9 * limit, False), (1.1 * limit, True)):
        rate = (1 + script.BETA) / (1 - script.BETA)
        scales = 1 / (1 + share * signs)
        assert (script.growth(rate, numpy.ones(1), scales)[0] > 0) == grows
