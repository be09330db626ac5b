"""The mathematics: the update against the reference, and the paper's theorems."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apollo_qn import algorithm, secant
from apollo_qn.hyperparameters import Hyperparameters, StepScalars
from tests import tolerances
from tests.helpers import BACK_ENDS, DEVICE, Comparison, as_numpy, make, normal
from tests.numpy_reference import ReferenceApollo, Settings


def hyperparameters(**changed: Any) -> Hyperparameters:
    values: dict[str, Any] = {
        "lr": 0.5,
        "beta": 0.9,
        "eps": 1e-4,
        "sigma": 1.0,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "rebound": "constant",
        "warmup_steps": 0,
        "warmup_start": 1.0,
        "maximize": False,
    }
    return Hyperparameters(**{**values, **changed})


def test_alpha_is_the_weight_of_eq_9() -> None:
    h = hyperparameters(beta=0.9)
    assert h.alpha(0) == pytest.approx(1.0)
    assert h.alpha(1) == pytest.approx(0.1 / (1 - 0.81))
    assert h.alpha(10_000) == pytest.approx(0.1)
    # m is then the mean of the gradients, weighted by beta^age and normalized
    g = np.random.default_rng(0).normal(size=12)
    m = 0.0
    for t, value in enumerate(g):
        m += float(h.alpha(t)) * (value - m)
    weights = 0.9 ** np.arange(11, -1, -1)
    assert m == pytest.approx(float(weights @ g / weights.sum()))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rate_is_designs_formula(as_tensor: bool) -> None:
    h = hyperparameters(lr=0.5, warmup_steps=100, warmup_start=0.02)
    for t in (0, 1, 50, 99, 100, 101, 1000):
        got = h.rate(torch.tensor(float(t)) if as_tensor else float(t))
        wanted = 0.5 * (0.02 + 0.98 * t / 100) if t < 100 else 0.5
        assert float(got) == pytest.approx(wanted, rel=1e-6)


def test_eps_is_divided_by_sigma_with_constant_alone() -> None:
    assert hyperparameters(eps=1e-4, sigma=0.01).secant_eps() == pytest.approx(1e-2)
    assert hyperparameters(eps=1e-4, sigma=0.01, rebound="belief").secant_eps() == 1e-4


@pytest.mark.parametrize("lr", [0.1, 1.0, torch.tensor(0.1, dtype=torch.float64)])
def test_displacement_is_rebuilt(lr: float | Tensor) -> None:
    """d + wd theta_before from theta, which holds theta_before - lr (d + wd theta_before)."""
    wd = 0.3
    h = hyperparameters(lr=lr, weight_decay=wd, decoupled_weight_decay=True)
    d, before = normal((7,), "d"), normal((7,), "before")
    theta = before - lr * (d + wd * before)
    s = StepScalars.at(3.0, h, previous_lr=lr)
    torch.testing.assert_close(s.kappa * d + s.omega * theta, d + wd * before)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_undetermined_displacement_is_d(as_tensor: bool) -> None:
    h = hyperparameters(weight_decay=0.5, decoupled_weight_decay=True)
    lr: Any = torch.tensor(2.0) if as_tensor else 2.0
    t: Any = torch.tensor(3.0) if as_tensor else 3.0
    s = StepScalars.at(t, h, previous_lr=lr)
    assert (float(s.kappa), float(s.omega)) == (1.0, 0.0)


def test_update_changes_nothing_in_place() -> None:
    tensors = [normal((5,), i) for i in range(4)]
    copies = [x.clone() for x in tensors]
    h = hyperparameters()
    algorithm.update(*tensors, h, StepScalars.at(2.0, h))
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


def test_hand_computed_two_steps() -> None:
    """Two elements, computed by hand, with beta = 0, eps = 0, sigma = 1, lr = 1."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64, device=DEVICE))
    optimizer = make([p], Settings(lr=1.0, beta=0.0, eps=0.0, warmup_steps=0))
    p.grad = torch.tensor([1.0, 2.0], dtype=torch.float64, device=DEVICE)
    optimizer.step()  # d = 0: B = 0, D = 1, d' = g
    assert p.tolist() == [0.0, 0.0]
    p.grad = torch.tensor([-1.0, -2.0], dtype=torch.float64, device=DEVICE)
    optimizer.step()
    # y = (-2, -4), <d, y> = -10, ||d||_4^4 = 17, a = -10/17, B' = (10/17, 40/17)
    B = optimizer.state[p]["hessian_diag"]
    torch.testing.assert_close(B.cpu(), torch.tensor([10 / 17, 40 / 17], dtype=torch.float64))
    # d' = (-1 / 1, -2 / (40/17))
    torch.testing.assert_close(p.data.cpu(), torch.tensor([1.0, 0.85], dtype=torch.float64))


@BACK_ENDS
@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (300,), (2, 3, 4, 5)]),
    c=st.floats(-3, 3).map(lambda x: 10.0**x),
    scale=st.floats(-4, 4).map(lambda x: 10.0**x),
    weight_decay=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-4, 1e-2, 0.1]),
    warmup_steps=st.integers(0, 6),
    seed=st.integers(0, 10**6),
)
def test_theorem_1(
    back_end: dict[str, Any],
    shape: tuple[int, ...],
    c: float,
    scale: float,
    weight_decay: float,
    eps: float,
    warmup_steps: int,
    seed: int,
) -> None:
    """(lr, sigma) and (c lr, c sigma) give the same trajectory."""
    trajectories = []
    for factor in (1.0, c):
        p = torch.nn.Parameter(normal(shape, seed) * scale)
        settings = Settings(
            lr=0.3 * factor,
            sigma=0.7 * factor,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
        )
        optimizer = make([p], settings, **back_end)
        mean = normal(shape, seed, "mean")
        path = []
        for t in range(8):
            p.grad = scale * (mean + mean.sign() + normal(shape, seed, t) / 2)
            optimizer.step()
            path.append(p.detach().clone())
        trajectories.append(torch.stack(path))
    one, other = trajectories
    assert (one - other).abs().max() <= tolerances.THEOREM_1 * one.abs().max()


@BACK_ENDS
@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (300,), (2, 3, 4, 5)]),
    scale=st.floats(-10, 10).map(lambda x: 10.0**x),
    sigma=st.sampled_from([0.01, 1.0, 30.0]),
    decay=st.sampled_from([(0.0, False), (0.1, False), (0.1, True)]),
    seed=st.integers(0, 10**6),
)
def test_secant_property(
    back_end: dict[str, Any],
    shape: tuple[int, ...],
    scale: float,
    sigma: float,
    decay: tuple[float, bool],
    seed: int,
) -> None:
    """With eps = 0: <d, B' d> = -<d, m' - m>, with the displacement that was really made."""
    p = torch.nn.Parameter(normal(shape, seed) * scale)
    weight_decay, decoupled = decay
    settings = Settings(
        lr=0.3,
        sigma=sigma,
        eps=0.0,
        warmup_steps=0,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled,
    )
    optimizer = make([p], settings, **back_end)
    d = m = B = torch.zeros(())
    for t in range(6):
        before = p.detach().clone()
        p.grad = scale * normal(shape, seed, t)
        optimizer.step()
        state = optimizer.state[p]
        new_m, new_B = state["exp_avg"].clone(), state["hessian_diag"].clone()
        if t:
            y = new_m - m
            terms = (d * B * d).abs().sum() + (d * new_B * d).abs().sum() + (d * y).abs().sum()
            gap = (d * new_B * d).sum() + (d * y).sum()
            assert abs(float(gap)) <= tolerances.SECANT * float(terms)
        m, B = new_m, new_B
        d = m / B.abs().clamp(min=sigma)
        if decoupled:
            d = d + weight_decay * before


def of_scale(scales: list[float], shape: tuple[int, ...]) -> list[Tensor]:
    mean = normal(shape, "mean")
    mean = mean + mean.sign()
    return [
        (scale * (mean + normal(shape, "extreme", t) / 2)).float() for t, scale in enumerate(scales)
    ]


EXTREMES = {
    "huge": [1e20] * 6,
    "tiny": [1e-30] * 6,
    "up and down": [1.0, 1e20, 1.0, 1e20, 1e-30, 1e-30, 1e20, 1.0],
    "tiny then huge": [1e-30, 1e-30, 1e20, 1e20, 1e-30, 1e-30],
    "zero between": [1.0, 0.0, 0.0, 1e20, 0.0, 1e-30],
    "all zero": [0.0] * 4,
}


@BACK_ENDS
@pytest.mark.parametrize("shape", [(1,), (40,), (300,), (3000,)], ids=str)
@pytest.mark.parametrize("rebound", ["constant", "belief"])
@pytest.mark.parametrize("scales", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_gradients(
    scales: list[float],
    rebound: str,
    shape: tuple[int, ...],
    back_end: dict[str, Any],
    set_block: Any,
) -> None:
    """Float32 follows float64 where squares and fourth powers exceed float32's range by far."""
    set_block(1024)
    follow(scales, Settings(lr=0.1, warmup_steps=0, rebound=rebound), shape, back_end)


@BACK_ENDS
@pytest.mark.parametrize("shape", [(1,), (40,), (300,), (3000,)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e20])
def test_extreme_gradients_without_eps(
    scale: float, shape: tuple[int, ...], back_end: dict[str, Any], set_block: Any
) -> None:
    set_block(1024)
    follow([scale] * 6, Settings(lr=0.1, eps=0.0, warmup_steps=0), shape, back_end)


@BACK_ENDS
@pytest.mark.parametrize("sigma", [1e-30, 1e20])
def test_extreme_sigma(sigma: float, back_end: dict[str, Any]) -> None:
    follow([sigma] * 6, Settings(lr=0.1 * sigma, sigma=sigma, warmup_steps=0), (40,), back_end)


@BACK_ENDS
def test_what_does_not_fit_saturates(back_end: dict[str, Any]) -> None:
    """B = 1e49 exceeds float32: it saturates, and later steps stay finite."""
    p = torch.nn.Parameter(torch.ones(40, device=DEVICE))
    optimizer = make([p], Settings(lr=0.1, eps=0.0, warmup_steps=0), **back_end)
    for g in of_scale([1e-30, 1e20, 1e20, 1.0, 1e-30, 1e20, 1.0], (40,)):
        p.grad = g
        optimizer.step()
        state = optimizer.state[p]
        for x in (p, state["exp_avg"], state["hessian_diag"]):
            assert x.isfinite().all()


def follow(
    scales: list[float], settings: Settings, shape: tuple[int, ...], back_end: dict[str, Any]
) -> None:
    p = torch.nn.Parameter(normal(shape, "theta").float())
    reference = ReferenceApollo(as_numpy(p), settings)
    optimizer = make([p], settings, **back_end)
    compare = Comparison()
    for t, g in enumerate(of_scale(scales, shape)):
        before = as_numpy(p)
        reference.theta = before
        p.grad = g
        optimizer.step()
        reference.step(as_numpy(g))
        state = optimizer.state[p]
        compare.check("m", state["exp_avg"], reference.m, tolerances.EXTREME)
        compare.check("B", state["hessian_diag"], reference.B, tolerances.EXTREME)
        # the step, to the rounding of the parameter
        made, wanted = as_numpy(p) - before, reference.theta - before
        room = np.abs(before).max() + np.abs(reference.theta).max()
        # where B cancelled, its error and that of d = m / D is relative to the largest B
        D = np.abs(reference.m) / np.where(reference.d == 0, 1, np.abs(reference.d))
        known = 1 + np.abs(reference.B).max() / np.where(D == 0, 1, D)
        limit = tolerances.EXTREME * known * np.abs(wanted)
        assert np.isfinite(made).all(), t
        assert (np.abs(made - wanted) <= limit + room * torch.finfo(torch.float32).eps).all(), t


@given(
    numbers=st.tuples(*[st.floats(-300, 300)] * 3),
    eps=st.sampled_from([0.0, 1e-4]),
)
def test_secant_coefficient_is_finite_where_the_result_is(
    numbers: tuple[float, float, float], eps: float
) -> None:
    """c = scale^3 k / (scale q4^(1/4) + eps)^4 in logarithms, where a plain form would overflow."""
    log_scale, log_k, _ = (x / 10 for x in numbers)
    q4 = 3.0
    got = secant.secant_coefficient(
        torch.tensor(10.0**log_scale, dtype=torch.float64),
        torch.tensor(q4, dtype=torch.float64),
        torch.tensor(10.0**log_k, dtype=torch.float64),
        eps,
    )
    n = 10.0**log_scale * q4**0.25 + eps
    wanted = 3 * log_scale + log_k - 4 * math.log10(n)
    assert math.log10(float(got)) == pytest.approx(wanted, abs=1e-9)


def test_no_displacement_leaves_b_unchanged() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert secant.secant_coefficient(zero, zero, zero, 0.0) == 0
    assert secant.secant_coefficient(zero, zero, zero, 1e-4) == 0


def test_finite_keeps_nan_and_saturates() -> None:
    c = secant.saturate(
        torch.tensor([1e300, -1e300, 2.0, math.nan], dtype=torch.float64), torch.float32
    )
    assert c.dtype is torch.float32
    assert c[:3].isfinite().all()
    assert c[2] == 2
    assert c[3].isnan()


@pytest.mark.parametrize(
    ("rebound", "t"), list(itertools.product(["constant", "belief"], [0.0, 4.0]))
)
def test_offset(rebound: Any, t: float) -> None:
    h = hyperparameters(rebound=rebound, eps=1e-3)
    wanted = 1e-3 / float(h.alpha(t)) if rebound == "belief" else 0.0
    assert h.offset(t) == pytest.approx(wanted)
