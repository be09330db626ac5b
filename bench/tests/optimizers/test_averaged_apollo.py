"""Apollo with a moving average of B, the experiment."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_bench.optimizers.averaged_apollo import AveragedApollo
from apollo_qn import Apollo


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
    """Compare the steps with the formulas, written down again here."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    own, sigma, eps = 0.8, 0.01, 1e-6
    settings = {**SETTINGS, "sigma": sigma, "eps": eps, "weight_decay": 0.0}
    optimizer = AveragedApollo([p], hessian_beta=own, **settings)  # type: ignore[arg-type]
    theta, m, b, average = p.detach().clone(), *(torch.zeros(5, dtype=torch.float64),) * 3
    corrected = average
    largest = 0.0
    for t in range(6):
        g = 5.0**t * torch.randn(5, dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step()
        d = m / corrected.abs().clamp(min=sigma)
        new = m + (1 - 0.9) / (1 - 0.9 ** (t + 1)) * (g - m)
        a = (d @ (new - m) + d @ (b * d)) / (d.pow(4).sum() ** 0.25 + eps / sigma) ** 4
        m, b = new, b - a * d**2
        average = own * average + (1 - own) * b
        corrected = average / (1 - own ** (t + 1))
        theta = theta - (0.02 + 1.98 * t / 7) * m / corrected.abs().clamp(min=sigma)
        torch.testing.assert_close(p.detach(), theta)
        torch.testing.assert_close(optimizer.state[p]["hessian_avg"], average)
        largest = max(largest, float(corrected.abs().max()))
    assert largest > sigma, "sigma rectifies everything"


def test_a_wrong_average_is_named() -> None:
    with pytest.raises(ValueError, match="hessian_beta is 1"):
        trained(AveragedApollo, hessian_beta=1, **SETTINGS)
