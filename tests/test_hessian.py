"""Diagonals of known Hessians, and Apollo's B beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apollo_qn import Apollo, diagnostics
from tests import tolerances
from tests.helpers import generator, normal


def quadratic(H: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(params: dict[str, Tensor]) -> Tensor:
        theta = torch.cat([p.flatten() for p in params.values()])
        return theta @ (H @ theta) / 2

    return loss


def two_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"a": normal((3, 2), "a", dtype=dtype), "b": normal((4,), "b", dtype=dtype)}


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_diagonal_hessian_is_found_exactly(at_once: int) -> None:
    diagonal = normal((10,), "diagonal")
    params = two_tensors()
    found = diagnostics.hessian_diagonal(
        quadratic(diagonal.diag()), params, 4, generator=generator(1), at_once=at_once
    )
    exact = diagnostics.exact_hessian_diagonal(quadratic(diagonal.diag()), params, at_once=at_once)
    assert (found.probes, exact.probes) == (4, 10)
    for one in (found, exact):
        assert torch.equal(one.mean["a"], diagonal[:6].view(3, 2))
        assert torch.equal(one.mean["b"], diagonal[6:])
        assert all(not error.any() for error in one.standard_error.values())


class Net(nn.Module):
    """Convolution, normalization, attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.normal = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.normal(self.convolution(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(x.mean(1))
        return out


def network() -> tuple[Net, Callable[[dict[str, Tensor]], Tensor]]:
    torch.manual_seed(2)
    net = Net().double().eval()
    x, y = normal((12, 1, 4, 4), "x"), torch.arange(12) % 3

    def loss(params: dict[str, Tensor]) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch.func.functional_call(net, params, (x,))
        return nn.functional.cross_entropy(out, y)

    return net, loss


def test_probes_are_as_near_as_they_say() -> None:
    """For a network the errors agree with the standard errors."""
    net, loss = network()
    params = dict(net.named_parameters())
    exact = diagnostics.exact_hessian_diagonal(loss, params, at_once=50)
    found = diagnostics.hessian_diagonal(loss, params, 400, generator=generator(2), at_once=50)
    again = diagnostics.hessian_diagonal(loss, params, 400, generator=generator(2), at_once=7)
    deviations = []
    for name, mean in exact.mean.items():
        assert mean.shape == params[name].shape
        torch.testing.assert_close(again.mean[name], found.mean[name])
        error = found.standard_error[name]
        known = error > 1e-12
        off = (found.mean[name] - mean)[~known].abs()
        assert bool((off < 1e-12).all()), name
        deviations.append(((found.mean[name] - mean) / error)[known])
    score = torch.cat(deviations)
    assert len(score) > 100
    # of 400 signs' mean: nearly normal. 5 is passed once in 10^6; one minus the shares to be
    # expected beyond 1 and 2 are 0.32 and 0.05
    assert score.abs().max() < 5
    assert 0.6 < float((score.abs() < 1).double().mean()) < 0.8
    assert float((score.abs() < 2).double().mean()) > 0.9


def test_standard_errors_of_a_full_matrix() -> None:
    """The variance of an element is the sum of squares of the other elements of its row."""
    A = normal((10, 10), "A")
    H = A + A.t()
    found = diagnostics.hessian_diagonal(
        quadratic(H), two_tensors(), 1000, generator=generator(3), at_once=100
    )
    error = torch.cat([x.flatten() for x in found.standard_error.values()])
    right = ((H**2).sum(1) - H.diag() ** 2).div(1000).sqrt()
    # the standard deviation of 1000 numbers is known to some 2 %
    assert bool(((error / right - 1).abs() < 0.1).all())


def scalar_quadratic(
    curvatures: Tensor, steps: int, **settings: Any
) -> tuple[Apollo, diagnostics.HessianDiagonal]:
    """Train sum h theta^2 / 2 with Apollo, each element as a tensor of its own."""
    params = {f"p{i}": nn.Parameter(torch.ones((), dtype=torch.float64)) for i in range(5)}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return sum(h * x**2 / 2 for h, x in zip(curvatures, values.values(), strict=True))  # type: ignore[return-value]

    optimizer = Apollo(list(params.items()), warmup_steps=0, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(dict(params)).backward()
        optimizer.step()
    return optimizer, diagnostics.exact_hessian_diagonal(loss, params)


CURVATURES = torch.tensor([-0.5, 0.1, 0.7, 1.3, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.2}, {"maximize": True}, {"maximize": True, "weight_decay": 0.2}],
    ids=str,
)
def test_b_is_the_rate_times_the_hessian(settings: dict[str, Any]) -> None:
    """For one element, with beta = 0 and eps = 0, the secant condition determines B."""
    optimizer, exact = scalar_quadratic(CURVATURES, 2, lr=0.2, beta=0.0, eps=0.0, **settings)
    sign = -1 if settings.get("maximize") else 1
    decay = settings.get("weight_decay", 0.0)
    for one, h in zip(diagnostics.compare(optimizer, exact), CURVATURES, strict=True):
        assert float(one.hessian) == pytest.approx(sign * float(h) + decay)
        assert one.relative_error < tolerances.QUADRATIC
        assert one.trace_ratio == pytest.approx(1, rel=tolerances.QUADRATIC)
        assert one.signs == 1
        assert math.isnan(one.pearson)
        assert math.isnan(one.spearman)


def test_comparison_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = nn.Parameter(torch.ones(7, 30))
    optimizer = Apollo([("w", p)], lr=0.5, warmup_steps=0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    B = torch.round(3 * normal(p.shape, "B"))  # with ties, and zeros
    optimizer.state[p]["hessian_diag"] = B
    h, error = normal(p.shape, "h"), normal(p.shape, "e").abs() / 5
    [one] = diagnostics.compare(optimizer, diagnostics.HessianDiagonal({"w": h}, {"w": error}, 10))
    x, y = (B / 0.5).flatten().numpy(), h.flatten().numpy()
    assert one.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert one.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    known = np.abs(y) > 2 * error.flatten().numpy()
    assert 0 < known.sum() < known.size
    assert one.signs == pytest.approx(np.mean((np.sign(x) == np.sign(y))[known]))
    assert one.relative_error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y))
    assert one.noise == pytest.approx(float(error.norm() / h.norm()))
    assert one.trace_ratio == pytest.approx(x.sum() / y.sum())


def trained() -> tuple[Apollo, list[diagnostics.Comparison]]:
    net, loss = network()
    params = dict(net.named_parameters())
    optimizer = Apollo(net.parameters(), lr=0.5, warmup_steps=0)
    for _ in range(30):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()
    exact = diagnostics.exact_hessian_diagonal(loss, params, at_once=50)
    with pytest.raises(ValueError, match=r"got 'convolution.weight', which is none of 0\.0"):
        diagnostics.compare(optimizer, exact)
    return optimizer, diagnostics.compare(optimizer, exact, net.named_parameters())


def test_a_trained_network_beside_its_hessian(tmp_path: Path) -> None:
    optimizer, found = trained()
    assert [one.name for one in found][:2] == ["convolution.weight", "convolution.bias"]
    assert all(one.noise == 0 or math.isnan(one.noise) for one in found)
    # B need not agree with the Hessian; check that each is its parameter's, divided by its rate
    states = [entry["hessian_diag"] for entry in optimizer.state.values()]
    for one, B in zip(found, states, strict=True):
        assert torch.equal(one.B, B.flatten() / 0.5)
        assert one.hessian.abs().max() > 0
    pytest.importorskip("matplotlib")
    figure = diagnostics.plot(found)
    assert len([axes for axes in figure.axes if axes.get_visible()]) == len(found)
    for axes, one in zip(figure.axes, found, strict=False):
        points = axes.containers[0].lines[0]
        finite = one.hessian.isfinite()
        assert points.get_xdata().tolist() == one.hessian[finite].tolist()
        assert points.get_ydata().tolist() == one.B[finite].tolist()
    figure.savefig(tmp_path / "hessian.png")
    assert (tmp_path / "hessian.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="comparisons must be at least one"):
        diagnostics.plot([])
    with pytest.raises(ValueError, match="columns must be a whole number >= 1, got 0"):
        diagnostics.plot(found, columns=0)


def test_a_panel_has_few_points() -> None:
    pytest.importorskip("matplotlib")
    values = torch.arange(1.0, 10_001)
    one = diagnostics.Comparison("large", values, 2 * values, torch.zeros(10_000))
    points = diagnostics.plot([one]).axes[0].containers[0].lines[0]
    assert points.get_ydata().tolist() == values[::3].tolist()  # B is the second argument


def test_what_the_hessian_refuses() -> None:
    loss = quadratic(torch.eye(10, dtype=torch.float64))
    params = two_tensors()
    with pytest.raises(ValueError, match="probes must be a whole number >= 2, got 1"):
        diagnostics.hessian_diagonal(loss, params, 1)
    with pytest.raises(ValueError, match="at_once must be a whole number >= 1, got 0"):
        diagnostics.exact_hessian_diagonal(loss, params, at_once=0)
    for bad in (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=f"got {bad.dtype} for 'c'"):
            diagnostics.hessian_diagonal(loss, {"c": bad})
    exact = diagnostics.exact_hessian_diagonal(loss, params)
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(5))
    optimizer = Apollo([("a", p), ("b", q)])
    with pytest.raises(ValueError, match="'a' has not been stepped"):
        diagnostics.compare(optimizer, exact)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    with pytest.raises(ValueError, match=r"diagonal of 'b' must have .* \(5,\), got \(4,\)"):
        diagnostics.compare(optimizer, exact)
