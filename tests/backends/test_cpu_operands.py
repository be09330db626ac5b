"""The tensors that the compiled kernel takes, and those that it leaves to another back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo, ApolloW, apollo
from tests.backends.test_cpu import STATE, done_by_the_operator
from tests.helpers import (
    NEEDS_CPU,
    NEEDS_KERNEL,
    generator,
    give_gradients,
    normal,
    parameters,
    run_steps,
)

pytestmark = [NEEDS_KERNEL, NEEDS_CPU]


def test_only_what_the_kernel_cannot_take_falls_back() -> None:
    """Unsupported types, layouts and aliases fall back; tensors beside them do not."""
    shapes = [(4, 6)] * 9
    settings: dict[str, Any] = {"lr": 0.3, "warmup_steps": 0}

    def build() -> list[torch.nn.Parameter]:
        params = parameters(shapes, torch.float32)
        dtypes = [torch.float32, torch.float16, torch.complex64]
        for i, dtype in enumerate(dtypes):
            params[i] = torch.nn.Parameter(params[i].detach().to(dtype))
        whole = params[3].detach().repeat(2, 2)
        params[3] = torch.nn.Parameter(whole[::2, ::2])  # not dense
        line = torch.arange(40.0) / 40
        params[4], params[5] = (torch.nn.Parameter(line[i : i + 24].view(4, 6)) for i in (0, 16))
        return params

    def gradients(params: list[torch.nn.Parameter], t: int) -> None:
        give_gradients(params, t)
        assert params[6].grad is not None
        params[6].grad = params[6].grad.t().contiguous().t()
        params[7].grad = normal((4, 1), t, dtype=torch.float32).expand(4, 6)
        params[8].grad = (
            torch.view_as_complex(normal((24, 2), t, dtype=torch.float32)).conj().imag.view(4, 6)
        )

    results = []
    for back_end in ({"fused": True}, {"foreach": True}):
        params = build()
        optimizer = Apollo(params, **settings, **back_end)
        for t in range(4):
            gradients(params, t)
            optimizer.step()
        results.append([p.detach() for p in params])
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        ulp = torch.finfo(got.dtype).eps
        assert (got - wanted).abs().max() <= 20 * ulp * wanted.abs().max(), i


def test_views_of_one_storage_that_do_not_overlap_are_taken() -> None:
    line = torch.randn(40, generator=generator("line"))
    params = [torch.nn.Parameter(line[i : i + 10]) for i in (0, 10, 20, 30)]
    optimizer = Apollo(params)
    run_steps(optimizer, range(2))
    give_gradients(params, 2)
    assert done_by_the_operator(optimizer)


@pytest.mark.parametrize("shift", [0, 3])
def test_a_gradient_that_lies_in_a_parameter(shift: int) -> None:
    """g of the first tensor is part of theta of the second: any order is right, torn reads are
    not."""
    whole = torch.randn(200_000, generator=generator("whole"))

    def train(**back_end: Any) -> Tensor:
        line = whole.clone()
        p = torch.nn.Parameter(line[: 100_000 - shift])
        optimizer = Apollo([p], warmup_steps=0, lr=0.1, **back_end)
        p.grad = line[shift:100_000]  # its own memory, shifted
        for _ in range(3):
            optimizer.step()
        return line

    assert torch.allclose(train(fused=True), train(foreach=False), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_another_parameter() -> None:
    """The first update reads what the second writes, so the order must be the reference's."""

    def train(**back_end: Any) -> list[Tensor]:
        a, b, c = (torch.nn.Parameter(torch.full((40,), float(i))) for i in range(3))
        a.grad, b.grad, c.grad = b.data, torch.full((40,), 0.5), torch.full((40,), -2.0)
        optimizer = Apollo([a, b, c], lr=1.0, warmup_steps=0, **back_end)
        for _ in range(3):
            optimizer.step()
        return [a.detach(), b.detach(), c.detach()]

    fused, rule = train(fused=True), train(foreach=False, fused=False)
    torch.testing.assert_close(fused, rule)


@pytest.mark.parametrize("state", [2, 3], ids=["exp_avg", "hessian_diag"])
def test_state_that_is_the_parameter(state: int) -> None:
    found = []
    for back_end in ({"fused": True}, {"foreach": False, "fused": False}):
        columns = [[normal((100,), i, dtype=torch.float32)] for i in range(4)]
        columns[state] = columns[0]
        apollo(*columns, [torch.tensor(3.0)], lr=0.1, **back_end)  # type: ignore[arg-type]
        found.append(columns[0][0])
    torch.testing.assert_close(*found)


def test_tuples_for_lists() -> None:
    found = []
    for kind in (list, tuple):
        p, g = torch.linspace(-1, 1, 9), torch.linspace(2, -1, 9)
        columns = [kind([x]) for x in (p, g, torch.zeros(9), torch.zeros(9), torch.zeros(()))]
        apollo(*columns, lr=0.1, fused=True)  # type: ignore[arg-type]
        found.append(p)
    assert torch.equal(*found)


def test_gradients_that_come_and_go() -> None:
    """A different gradient is missing in each step, so that counters differ between tensors."""
    optimizers = []
    for back_end in ({"fused": True}, {"foreach": False, "fused": False}):
        params = [torch.nn.Parameter(normal((n,), n, dtype=torch.float32)) for n in (5, 70, 9)]
        optimizers.append(ApolloW(params, warmup_steps=5, weight_decay=0.1, lr=0.1, **back_end))
    for t in range(12):
        for optimizer in optimizers:
            params = optimizer.param_groups[0]["params"]
            for i, p in enumerate(params):
                g = normal(tuple(p.shape), ("g", t, i), dtype=torch.float32)
                p.grad = None if i == t % 3 else g
            optimizer.step()
    for one, other in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        torch.testing.assert_close(one, other)


UNLIKE = {
    "steps": ("step", torch.tensor(1.0)),
    "type": ("step", torch.tensor(3.0, dtype=torch.float64)),
    "rate": ("previous_lr", torch.tensor(0.05, dtype=torch.float64)),
    "type of the rate": ("previous_lr", torch.tensor(0.08)),
}


@pytest.mark.parametrize("case", UNLIKE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_counter_unlike_the_others(case: str, place: int) -> None:
    name, value = UNLIKE[case]

    def train(**back_end: Any) -> list[Any]:
        params = parameters([(5,), (70,), (9,)], torch.float64)
        optimizer = ApolloW(params, lr=0.1, warmup_steps=9, weight_decay=0.1, **back_end)
        run_steps(optimizer, range(3))
        optimizer.state[params[place]][name] = value.clone()
        run_steps(optimizer, range(3, 6))
        states = [optimizer.state[p] for p in params]
        steps = [float(state["step"]) for state in states]
        return [*(p.detach() for p in params), steps, [float(s["previous_lr"]) for s in states]]

    *fused, steps, rates = train(fused=True)
    *rule, wanted, wanted_rates = train(foreach=False, fused=False)
    torch.testing.assert_close(fused, rule)
    assert steps == wanted == [4.0 if case == "steps" and i == place else 6.0 for i in range(3)]
    assert rates == pytest.approx(wanted_rates)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "wrong",
    [torch.tensor(float("nan")), torch.tensor(3.0, device="meta"), torch.full((2,), 3.0)],
    ids=["no number", "elsewhere", "two"],
)
def test_a_counter_that_no_back_end_takes(wrong: Tensor, place: int) -> None:
    params = parameters([(5,), (70,), (9,)], torch.float32)
    optimizer = Apollo(params, fused=True)
    run_steps(optimizer, range(3))
    optimizer.state[params[place]]["step"] = wrong.clone()
    give_gradients(params, 3)
    columns = [params, *([optimizer.state[p][name] for p in params] for name in STATE)]
    before = [x.detach().clone() for column in columns for x in column]
    with pytest.raises(RuntimeError):
        optimizer.step()
    for x, y in zip((x for column in columns for x in column), before, strict=True):
        assert x.is_meta or torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))
