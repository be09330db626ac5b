"""The compiled kernel when tensors, states and settings change between its steps."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from apollo_qn import Apollo, ApolloW, apollo
from tests.helpers import (
    NEEDS_CPU,
    NEEDS_KERNEL,
    give_gradients,
    normal,
    parameters,
    run_steps,
    same,
    snapshot,
)

pytestmark = [NEEDS_KERNEL, NEEDS_CPU]


def test_shared_gradients_and_steps() -> None:
    """Two parameters may share a gradient; a shared step counts twice, as with foreach."""
    params = [normal((300,), i, dtype=torch.float32) for i in range(2)]
    g = normal((300,), "g", dtype=torch.float32)

    def train(**back_end: Any) -> list[Any]:
        ps = [p.clone() for p in params]
        m, B = ([torch.zeros(300) for _ in ps] for _ in range(2))
        step = torch.zeros(())
        for _ in range(3):
            apollo(ps, [g, g], m, B, [step, step], lr=0.3, **back_end)
        return [*ps, *m, step]

    for got, wanted in zip(train(fused=True), train(foreach=True), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_tensors_may_change_between_steps() -> None:
    """The next step notices new memory, new state and other gradients."""

    def train(**back_end: Any) -> list[Any]:
        params = parameters([(3, 4), (300,), (2, 3, 4, 5), (70,)], torch.float64)
        optimizer = ApolloW(params, lr=0.2, warmup_steps=0, weight_decay=0.05, **back_end)
        run_steps(optimizer, range(2))
        with torch.no_grad():
            params[0].data = params[0].detach().clone().t().contiguous().t()
            params[2].data = params[2].detach().contiguous()
        run_steps(optimizer, range(2, 4))
        state = optimizer.state[params[1]]
        state["exp_avg"] = state["exp_avg"].clone().mul_(0.5)
        state["hessian_diag"].set_(torch.full((300,), 0.25, dtype=torch.float64))
        run_steps(optimizer, range(4, 6))
        give_gradients(params, 6)
        params[3].grad = None
        optimizer.step()
        optimizer.add_param_group({"params": parameters([(9,)], torch.float64), "lr": 0.1})
        run_steps(optimizer, range(7, 9))
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    for got, wanted in zip(train(fused=True), train(foreach=False), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_shrank_in_place_is_not_read_beyond_its_end() -> None:
    params = parameters([(1000,)], torch.float32)
    optimizer = Apollo(params)
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    assert params[0].grad is not None
    params[0].grad.resize_(3)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert same(before, snapshot(optimizer))


def _new_memory(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    p.data = p.detach().clone()


def _share(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    for x in (p, *optimizer.state[p].values()):
        x.share_memory_()


def _other_layout(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    if p.dim() == 2:
        p.data = p.detach().t().contiguous().t()


def _new_state(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    for name, x in optimizer.state[p].items():
        optimizer.state[p][name] = x.clone()


def _state_set(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    for x in optimizer.state[p].values():
        x.set_(x.clone())


def _swap(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))


def _no_gradient(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    p.grad = None


def _strided_gradient(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    if p.grad is not None and p.dim() == 2:
        p.grad = p.grad.t().contiguous().t()


def _reload(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _other_rate(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] *= 0.9


CHANGES = [
    _new_memory,
    _share,
    _other_layout,
    _new_state,
    _state_set,
    _swap,
    _no_gradient,
    _strided_gradient,
    _reload,
    _other_rate,
]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_changes_between_steps(seed: int) -> None:
    """Memory, layout, state and gradients change at random; results follow the reference."""
    results = []
    for back_end in ({"fused": True}, {"foreach": False}):
        chance = random.Random(seed)
        params = parameters([(3, 4), (300,), (7, 9), (), (70,)], torch.float64)
        groups = [{"params": params[:3]}, {"params": params[3:], "rebound": "belief"}]
        optimizer = ApolloW(groups, lr=0.2, warmup_steps=4, weight_decay=0.05, **back_end)
        run_steps(optimizer, range(1))
        for t in range(1, 15):
            give_gradients(params, t)
            for _ in range(chance.randrange(3)):
                chance.choice(CHANGES)(optimizer, chance.choice(params))
            optimizer.step()
        results.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
