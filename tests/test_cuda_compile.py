"""Compiled steps and models on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apollo_qn import Apollo
from tests import tolerances
from tests.helpers import (
    BACK_ENDS,
    DEVICE,
    NEEDS_GPU,
    as_numpy,
    give_gradients,
    parameters,
)
from tests.test_cuda import MODES

pytestmark = NEEDS_GPU


@pytest.fixture(autouse=True)
def current_device() -> Iterator[None]:
    with torch.cuda.device(DEVICE):
        yield
        torch.cuda.synchronize()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("mode", [MODES[0], MODES[5]], ids=str)
def test_a_step_that_inductor_compiles(mode: dict[str, Any], capturable: bool) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        params = parameters([(3, 5), (), (7,), (700,)])
        optimizer = Apollo(params, lr=0.3, warmup_steps=3, eps=0.1, capturable=capturable, **mode)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for t in range(5):
            give_gradients(params, t)
            step()
        results.append(params)
    for got, wanted in zip(*results, strict=True):
        off = abs(as_numpy(got) - as_numpy(wanted))
        assert not off.size or off.max() <= tolerances.COMPILED


@BACK_ENDS
def test_a_compiled_model_is_trained(back_end: dict[str, Any]) -> None:
    """The step reads gradients that the compiler has allocated."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
    ).to(DEVICE)
    x = torch.randn(256, 16, device=DEVICE)
    y = x[:, :1] * x[:, 1:2]
    optimizer = Apollo(model.parameters(), lr=0.1, warmup_steps=10, **back_end)

    @torch.compile(fullgraph=True)
    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(x), y)

    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert float(losses[-1]) < 0.5 * float(losses[0])
