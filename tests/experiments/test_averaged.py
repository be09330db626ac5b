"""Apollo with a moving average of B, the experiment."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_qn import Apollo
from apollo_qn.experiments.averaged import AveragedApollo


def trained(make: type[torch.optim.Optimizer], steps: int = 30, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = make(network.parameters(), **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), (x[:, 0] > 0).long())
        loss.backward()
        optimizer.step()
    return network


SETTINGS = {
    "lr": 2.0, "beta": 0.9, "eps": 1e-4, "sigma": 0.05, "weight_decay": 1e-3, "warmup_steps": 7,
    "warmup_init_lr": 0.02,
}  # fmt: skip


def test_without_an_average_it_is_apollo() -> None:
    one = trained(AveragedApollo, hessian_beta=0.0, **SETTINGS)
    other = trained(Apollo, **SETTINGS)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_average_is_the_average_of_b() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    settings = {**SETTINGS, "sigma": 0.01, "eps": 1e-6}
    optimizer = AveragedApollo([p], hessian_beta=0.8, **settings)  # type: ignore[arg-type]
    average, history = torch.zeros_like(p), []
    for step in range(6):
        p.grad = 5.0**step * torch.randn(5, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        state = optimizer.state[p]
        history.append(state["hessian_diag"].clone())
        average = 0.8 * average + 0.2 * history[-1]
        torch.testing.assert_close(state["hessian_avg"], average)
        corrected = average / (1 - 0.8 ** len(history))
        m = state["exp_avg"]
        t = len(history) - 1
        rate = 0.02 + (2.0 - 0.02) * min(1.0, t / 7)
        torch.testing.assert_close(p.detach(), before - rate * m / corrected.abs().clamp(min=0.01))
    assert any(b.abs().max() > 0.01 for b in history), "sigma rectifies everything"


def test_a_wrong_average_is_named() -> None:
    with pytest.raises(ValueError, match="hessian_beta is 1"):
        trained(AveragedApollo, hessian_beta=1, **SETTINGS)
