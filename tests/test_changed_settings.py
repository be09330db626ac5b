"""Settings, parameters and storage that change during training, and how numbers are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apollo_qn import Apollo, ApolloW
from tests.helpers import BACK_ENDS, DEVICE, parameters, run_steps, same, snapshot


def test_a_mode_chosen_in_mid_run() -> None:
    """The scalars of the new mode are created; m and B are kept."""
    params = parameters()
    optimizer = Apollo(params, warmup_steps=0, lr=0.1)
    run_steps(optimizer, range(3))
    group = optimizer.param_groups[0]
    group.update(rebound="belief", decoupled_weight_decay=True, weight_decay=0.1)
    run_steps(optimizer, range(3, 6))
    for p in params:
        assert p.isfinite().all()
        assert {"previous_lr", "threshold"} <= set(optimizer.state[p])


@BACK_ENDS
def test_another_way_of_storing_in_mid_run(back_end: dict[str, Any]) -> None:
    """A new compensation begins at 0, and the state changes its type."""
    params = parameters([(3, 5), (300,)], torch.bfloat16)
    optimizer = Apollo(params, warmup_steps=0, lr=0.1, rounding="kahan", **back_end)
    group = optimizer.param_groups[0]
    run_steps(optimizer, range(2))
    first = [optimizer.state[p]["compensation"] for p in params]
    assert all(low.any() and low.dtype is p.dtype for low, p in zip(first, params, strict=True))
    group.update(rounding="nearest", state_dtype=torch.bfloat16)
    run_steps(optimizer, range(2, 4))
    for p in params:
        assert set(optimizer.state[p]) == {"step", "exp_avg", "hessian_diag"}
        assert optimizer.state[p]["hessian_diag"].dtype is torch.bfloat16
    values = [p.detach().float() for p in params]
    group.update(rounding="kahan", lr=0.0, state_dtype=None)
    run_steps(optimizer, range(4, 5))
    for p, value in zip(params, values, strict=True):
        assert same(p.detach().float(), value)
        assert optimizer.state[p]["compensation"].eq(0).all()
        assert optimizer.state[p]["hessian_diag"].dtype is torch.float32


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_autograd_through_a_rounded_step(rounding: Any) -> None:
    """The rounding is straight-through: the derivative is that of the float32 step."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.linspace(-1, 1, 8).bfloat16().to(dtype).requires_grad_()
        p = start * 1
        optimizer = Apollo([p], lr=0.25, warmup_steps=0, differentiable=True, rounding=rounding)
        p.grad = p * 0.5
        optimizer.step()
        low = optimizer.state[p].get("compensation", torch.zeros_like(p))
        (p.float() + low.float()).sum().backward()
        assert start.grad is not None
        results.append(start.grad.float())
    torch.testing.assert_close(*results, rtol=2.0**-7, atol=0)


def test_a_complex_state_cannot_be_bfloat16() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="state_dtype must be None for complex parameters"):
        Apollo([p], state_dtype=torch.bfloat16)


def test_a_replaced_parameter_continues() -> None:
    """For example an embedding that grows: the group gets another tensor with the same state."""
    old = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = Apollo([old], warmup_steps=0)
    run_steps(optimizer, range(2))
    new = torch.nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(old)
    run_steps(optimizer, range(2, 3))
    assert optimizer.state[new]["step"] == 3


@pytest.mark.parametrize(
    ("name", "value"), [("rounding", "bad"), ("state_dtype", torch.float16), ("seed", -1)]
)
def test_a_bad_way_of_storing_in_mid_run(name: str, value: Any) -> None:
    optimizer = Apollo(parameters(dtype=torch.bfloat16))
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    good = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.step()
    optimizer.param_groups[0][name] = good
    assert same(before, snapshot(optimizer))


def test_complex_state_is_not_cut() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=DEVICE))
    optimizer = Apollo([p])
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    with pytest.raises(ValueError, match="state_dtype must be None for complex"):
        optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = None
    assert same(before, snapshot(optimizer))


def test_a_compensation_is_of_the_parameters_type() -> None:
    p = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16, device=DEVICE))
    optimizer = Apollo([p], rounding="kahan", warmup_steps=0)
    run_steps(optimizer, range(3))
    assert optimizer.state[p]["compensation"].dtype is torch.bfloat16
    p.data = p.data.float()
    run_steps(optimizer, range(3, 4))
    assert "compensation" not in optimizer.state[p]
    p.data = p.data.half()
    run_steps(optimizer, range(4, 5))
    assert optimizer.state[p]["compensation"].dtype is torch.float16


@pytest.mark.parametrize("mode", [{"capturable": True}, {"differentiable": True}], ids=str)
def test_another_default_device_does_not_matter(mode: dict[str, Any]) -> None:
    results = []
    for default in ("cpu", "meta"):
        p = torch.ones(3, device="cpu", requires_grad=not mode.get("differentiable"))
        optimizer = ApolloW([p], lr=0.1, weight_decay=0.1, warmup_steps=3, **mode)
        for t in range(3):
            p.grad = torch.full((3,), 1.0 + t, device="cpu")
            with torch.device(default):
                optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_a_rate_of_one_element_may_have_a_dimension() -> None:
    params = parameters([(3,)], torch.float64)
    lr = torch.full((1,), 0.5, dtype=torch.float64)
    optimizer = ApolloW(params, lr=lr, weight_decay=0.1, warmup_steps=0)
    run_steps(optimizer, range(2))
    assert optimizer.state[params[0]]["previous_lr"] == 0.5
