"""The class: steps, groups, state, schedules, autograd and the compiler."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo, ApolloW
from tests import tolerances
from tests.helpers import (
    BACK_ENDS,
    DEVICE,
    ON_GPU,
    Comparison,
    as_numpy,
    give_gradients,
    make,
    normal,
    of_one_parameter,
    parameters,
    rates,
    references,
    run_steps,
    same,
    snapshot,
)
from tests.modes import GROUP_MODES, slow_except
from tests.numpy_reference import Settings

# a step


@BACK_ENDS
@pytest.mark.parametrize("last", [False, True])
def test_a_sparse_gradient_changes_nothing(last: bool, back_end: dict[str, Any]) -> None:
    params = parameters([(3,), (6, 2), (5,)])
    optimizer = Apollo(
        [{"params": params[:2]}, {"params": params[2:], "rebound": "belief"}], **back_end
    )
    run_steps(optimizer, range(2))
    give_gradients(params, 2)
    before = snapshot(optimizer)
    spoilt = params[2] if last else params[1]
    assert spoilt.grad is not None
    spoilt.grad = spoilt.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"dense gradients.*shape \((5,|6, 2)\)"):
        optimizer.step()
    assert same(before, snapshot(optimizer))


def test_closure() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0], device=DEVICE))
    optimizer = Apollo([p], lr=0.5, warmup_steps=0)
    calls = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure) == 13.0
    assert len(calls) == 1
    for _ in range(200):
        optimizer.step(closure)
    assert calls[-1] < 1e-4
    p.grad = None
    assert optimizer.step() is None


def test_hooks_of_a_step() -> None:
    params = parameters([(3,)])
    optimizer = Apollo(params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run_steps(optimizer, range(2))
    assert calls == ["before", "after"] * 2


def test_zero_grad() -> None:
    params = parameters([(3,), (4,)])
    optimizer = Apollo(params)
    run_steps(optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = snapshot(optimizer)
    optimizer.step()  # without a gradient no step is counted
    assert same(before, snapshot(optimizer))


@BACK_ENDS
def test_the_gradient_is_not_changed(back_end: dict[str, Any]) -> None:
    params = parameters()
    optimizer = Apollo(params, **back_end, weight_decay=0.1, maximize=True)
    for t in range(3):
        give_gradients(params, t)
        grads = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        assert same(grads, [p.grad for p in params])


@BACK_ENDS
@pytest.mark.parametrize(
    ("elsewhere", "capturable"), [("meta", False), (str(DEVICE), False), (str(DEVICE), True)]
)
def test_a_default_device_changes_nothing(
    elsewhere: str, capturable: bool, back_end: dict[str, Any]
) -> None:
    """The optimizer makes its tensors beside its parameters, whatever torch's default device."""
    results = []
    for default in (None, elsewhere):
        params = parameters()
        optimizer = ApolloW(
            params, weight_decay=0.1, rebound="belief", seed=0, capturable=capturable, **back_end
        )
        with torch.device(default) if default else contextlib.nullcontext():
            run_steps(optimizer, range(3))
        assert optimizer.state[params[0]]["step"].is_cpu == (not (capturable and ON_GPU))
        results.append(snapshot(optimizer))
    assert same(*results)


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 2, device=DEVICE)
    optimizer = Apollo(model.named_parameters(), warmup_steps=0)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    optimizer.step()
    fresh = Apollo(torch.nn.Linear(3, 2, device=DEVICE).named_parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["param_names"] == ["weight", "bias"]


def test_groups_inherit_and_override() -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([{"params": [a]}, {"params": [b], "lr": 0.1, "beta": 0.5}], sigma=2.0)
    first, second = optimizer.param_groups
    assert (first["lr"], first["beta"], first["sigma"]) == (1.0, 0.9, 2.0)
    assert (second["lr"], second["beta"], second["sigma"]) == (0.1, 0.5, 2.0)


@BACK_ENDS
def test_a_group_added_later_starts_from_its_own_zero(back_end: dict[str, Any]) -> None:
    early, late = parameters([(3,)], torch.float64), parameters([(40,), ()], torch.float64)
    common = Settings(lr=0.3, warmup_steps=4)
    own = Settings(lr=0.1, warmup_steps=3, weight_decay=0.1, decoupled_weight_decay=True)
    wanted = [*references(early, common), *references(late, own)]
    optimizer = make(early, common, **back_end)
    params = [*early, *late]
    compare = Comparison()
    for t in range(10):
        if t == 4:
            optimizer.add_param_group({"params": late, **vars(own)})
        give_gradients(params, t)
        optimizer.step()
        for p, reference in list(zip(params, wanted, strict=True))[: 3 if t >= 4 else 1]:
            assert p.grad is not None
            reference.step(as_numpy(p.grad))
        compare.check_all(optimizer, params, wanted, torch.float64)


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_a_tensor_lr_is_as_a_number(
    mode: dict[str, Any], capturable: bool, back_end: dict[str, Any]
) -> None:
    results = []
    for lr in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        params = parameters(dtype=torch.float64)
        settings = {"warmup_steps": 3, "warmup_init_lr": 0.05, **mode}
        optimizer = Apollo(params, lr=lr, **back_end, capturable=capturable, **settings)
        run_steps(optimizer, range(4))
        if isinstance(lr, Tensor):
            lr.fill_(0.125)
        else:
            optimizer.param_groups[0]["lr"] = 0.125
        run_steps(optimizer, range(4, 6))
        results.append([as_numpy(p) for p in params])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerances.TENSOR_LR)


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("rebound", ["constant", "belief"])
def test_decay_that_forgets_the_parameter(
    rebound: Any, capturable: bool, back_end: dict[str, Any]
) -> None:
    """At lr weight_decay = 1 the previous parameter cannot be rebuilt, but all stays finite."""
    for lr, wd in [(1.0, 1.0), (0.5, 2.0), (0.1, 10.0), (1.0, 1.0 + 1e-9), (1.0, 1.0 - 1e-12)]:
        params = parameters(dtype=torch.float32)
        optimizer = ApolloW(
            params,
            lr=lr,
            weight_decay=wd,
            rebound=rebound,
            warmup_steps=0,
            **back_end,
            capturable=capturable,
        )
        run_steps(optimizer, range(8))
        for p in params:
            assert p.isfinite().all()
            assert all(v.isfinite().all() for v in optimizer.state[p].values())
            assert p.numel() == 0 or p.abs().max() < 100


# state


@BACK_ENDS
@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_state_is_two_tensors_and_scalars(
    dtype: torch.dtype, mode: dict[str, Any], back_end: dict[str, Any]
) -> None:
    params = parameters([(3, 5), (300,), (2, 3, 4, 5)], dtype)
    optimizer = Apollo(params, **back_end, **mode)
    run_steps(optimizer, range(2))
    at_least = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(dtype, dtype)
    for p in params:
        state = optimizer.state[p]
        wanted = {"step", "exp_avg", "hessian_diag"}
        if mode["decoupled_weight_decay"]:
            wanted.add("previous_lr")
        if mode["rebound"] == "belief":
            wanted.add("threshold")
        assert set(state) == wanted
        for name, value in state.items():
            if name in ("exp_avg", "hessian_diag"):
                assert value.shape == p.shape
                assert value.dtype is at_least
                assert value.stride() == p.stride()
            else:
                assert value.numel() == 1
        assert p.dtype is dtype
        storages = {v.untyped_storage().data_ptr() for v in state.values()}
        assert len(storages) == len(state)
    # the optimizer keeps nothing else of a parameter's size
    assert not [k for k, v in vars(optimizer).items() if isinstance(v, Tensor)]


@BACK_ENDS
@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_a_copied_optimizer_goes_on(
    mode: dict[str, Any], copying: str, back_end: dict[str, Any]
) -> None:
    optimizer = Apollo(parameters([(3,), (300,)]), **back_end, warmup_steps=3, **mode)
    run_steps(optimizer, range(2))
    if copying == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif copying == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    run_steps(optimizer, range(2, 5))
    run_steps(twin, range(2, 5))
    assert same(snapshot(optimizer), snapshot(twin))


def test_a_pickle_of_an_older_version_gets_the_defaults() -> None:
    optimizer = Apollo(parameters([(3,)]), lr=0.5)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["rebound"], group["warmup_base_lr"]
    fresh = Apollo.__new__(Apollo)
    fresh.__setstate__(state)
    assert fresh.param_groups[0]["rebound"] == "constant"
    assert fresh.param_groups[0]["warmup_base_lr"] == 0.5


# warmup and schedulers


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@BACK_ENDS
@pytest.mark.parametrize("init", [None, 0.0, 0.01, 2.0])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_warmup(steps: int, init: float | None, back_end: dict[str, Any], capturable: bool) -> None:
    optimizer = of_one_parameter(
        lr=0.5, warmup_steps=steps, warmup_init_lr=init, **back_end, capturable=capturable
    )
    w = 1 / 1000 if init is None else init / 0.5
    wanted = [0.5 * (w + (1 - w) * t / steps) if t < steps else 0.5 for t in range(8)]
    limit = tolerances.CAPTURED_RATE if capturable else tolerances.RATE
    np.testing.assert_allclose(rates(optimizer, 8), wanted, rtol=0, atol=limit)


@BACK_ENDS
def test_a_schedule_and_decoupled_decay_follow_the_reference(back_end: dict[str, Any]) -> None:
    """The displacement is rebuilt with the previous rate, not with the present one."""
    settings = Settings(lr=0.5, weight_decay=0.2, decoupled_weight_decay=True, warmup_steps=4)
    params = parameters(dtype=torch.float64)
    wanted = references(params, settings)
    optimizer = make(params, settings, **back_end)
    compare = Comparison()
    for t in range(15):
        give_gradients(params, t)
        lr = 0.5 * (0.1 if t % 3 == 2 else 1.0) * (t + 1) / 15
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for p, reference in zip(params, wanted, strict=True):
            assert p.grad is not None
            reference.lr = lr
            reference.step(as_numpy(p.grad))
        compare.check_all(optimizer, params, wanted, torch.float64)


# autograd and the compiler


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_autograd_through_the_step(mode: dict[str, Any], warmup_steps: int, steps: int) -> None:
    """gradcheck holds for parameter and state after some steps, by parameter and gradients."""
    start = normal((4,), "start")
    grads = [normal((4,), "g", t) + 2 for t in range(steps)]

    def trained(start: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        p = start.clone()
        optimizer = differentiable(p, 0.3, warmup_steps, mode)
        for g in grads:
            p.grad = g
            optimizer.step()
        return p, optimizer.state[p]["exp_avg"], optimizer.state[p]["hessian_diag"]

    assert torch.autograd.gradcheck(trained, [x.requires_grad_() for x in (start, *grads)])


@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_autograd_to_the_learning_rate(mode: dict[str, Any]) -> None:
    start = normal((4,), "start")
    grads = [normal((4,), "g", t) + 2 for t in range(3)]

    def trained(lr: Tensor) -> tuple[Tensor, Tensor]:
        p = start.clone().requires_grad_()
        p = p * 1  # not a leaf
        # set the rate after construction, because the base of the warmup must be a number
        optimizer = differentiable(p, 0.3, 0, mode)
        optimizer.param_groups[0]["lr"] = lr
        for g in grads:
            p.grad = g
            optimizer.step()
        return p.cpu(), optimizer.state[p]["hessian_diag"].cpu()  # the rate's device

    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(trained, [lr])


def differentiable(p: Tensor, lr: Any, warmup_steps: int, mode: dict[str, Any]) -> Apollo:
    return Apollo(
        [p],
        lr=lr,
        sigma=0.5,
        eps=0.1,
        warmup_steps=warmup_steps,
        warmup_init_lr=0.1,
        differentiable=True,
        **mode,
    )


@slow_except(
    "mode, backend, capturable",
    itertools.product([GROUP_MODES[0], GROUP_MODES[5]], ["eager", "aot_eager"], [False, True]),
    [(GROUP_MODES[5], "eager", False)],
)
def test_a_compiled_step_follows_eager(
    mode: dict[str, Any], backend: str, capturable: bool
) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        # float32, not float64: torch 2.13 loses what a compiled function writes to a 0-dim float64
        # tensor of the CPU, whatever the optimizer
        params = parameters([(3, 5), (), (7,)], torch.float32)
        optimizer = Apollo(params, lr=0.3, warmup_steps=3, eps=0.1, capturable=capturable, **mode)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for t in range(5):
            give_gradients(params, t)
            step()
        results.append([as_numpy(p) for p in params])
        assert {float(s["step"]) for s in optimizer.state.values()} == {5.0}
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerances.COMPILED)


# optimization


@pytest.mark.parametrize(("lr", "rebound"), [(0.5, "constant"), (0.05, "belief")])
def test_a_quadratic_is_minimized(lr: float, rebound: Any) -> None:
    """Minimize a quadratic whose curvatures differ by a factor of 100."""
    curvature = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64, device=DEVICE)
    start_from = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64, device=DEVICE)
    p = torch.nn.Parameter(start_from)
    optimizer = Apollo([p], lr=lr, rebound=rebound, sigma=10.0, eps=1e-2, warmup_steps=50)
    start = (curvature * p.detach() ** 2).sum().item()
    for _ in range(400):
        p.grad = 2 * curvature * p.detach()
        optimizer.step()
    assert (curvature * p.detach() ** 2).sum().item() < 1e-2 * start


def test_maximize_is_the_negated_gradient() -> None:
    one_way, other_way = parameters(), parameters()
    up, down = Apollo(one_way, maximize=True), Apollo(other_way)
    for t in range(4):
        give_gradients(one_way, t)
        give_gradients(other_way, t)
        for p in other_way:
            assert p.grad is not None
            p.grad.neg_()
        up.step()
        down.step()
    assert same([p.data for p in one_way], [p.data for p in other_way])
