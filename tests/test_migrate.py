"""States of the authors' released optimizer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from apollo_qn import Apollo
from tests import tolerances
from tests.helpers import (
    BACK_ENDS,
    DEVICE,
    Comparison,
    as_numpy,
    default_dtype,
    gradient,
    normal,
    parameters,
    run_steps,
    same,
    snapshot,
)
from tests.numpy_reference import ReleasedApollo
from tests.test_checkpoint import dtypes, through_a_file


def released_state_dict(released: ReleasedApollo, dtype: torch.dtype) -> dict[str, Any]:
    """Return a state dict as the release saves it, with ``step`` as a Python int."""
    return {
        "state": {
            i: {k: v if k == "step" else torch.tensor(v, dtype=dtype) for k, v in state.items()}
            for i, state in enumerate(released.state)
        },
        "param_groups": [{**released.group, "params": list(range(len(released.thetas)))}],
    }


RELEASED_SHAPES = [(), (7,), (3, 5), (300,)]


@BACK_ENDS
@pytest.mark.parametrize("saved_at", [0, 1, 3, 9])
@pytest.mark.parametrize(
    ("decay", "wd"), [("L2", 0.0), ("L2", 0.05), ("decoupled", 0.05), ("decoupled", 0.0)]
)
@pytest.mark.parametrize("rebound", ["constant", "belief"])
def test_the_released_state_continues_as_there(
    rebound: str, decay: str, wd: float, saved_at: int, back_end: dict[str, Any]
) -> None:
    start = parameters(RELEASED_SHAPES, torch.float64)
    lr, eps = (0.01, 1e-4) if rebound == "constant" else (0.3, 0.1)
    released = ReleasedApollo(
        [as_numpy(p) for p in start],
        lr=lr,
        eps=eps,
        rebound=rebound,
        warmup=5,
        init_lr=lr / 50,
        weight_decay=wd,
        weight_decay_type=decay,
    )

    def gradients(t: int) -> list[Any]:
        return [as_numpy(gradient(p.shape, p.dtype, i, t)) for i, p in enumerate(start)]

    for t in range(saved_at):
        released.step(gradients(t))
    params = [torch.nn.Parameter(torch.tensor(theta, device=DEVICE)) for theta in released.thetas]
    optimizer = Apollo(params, lr=123.0, **back_end)
    saved = through_a_file(released_state_dict(released, torch.float64))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["sigma"] == 0.01
    assert back_end.items() <= optimizer.param_groups[0].items()
    compare = Comparison()
    for t in range(saved_at, saved_at + 10):
        for p, g in zip(params, gradients(t), strict=True):
            p.grad = torch.tensor(g, device=DEVICE)
        optimizer.step()
        released.step(gradients(t))
        for i, p in enumerate(params):
            compare.check((i, "theta"), p, released.thetas[i], tolerances.RELEASED)
            wanted = released.state[i]["approx_hessian"]
            compare.check((i, "B"), optimizer.state[p]["hessian_diag"], wanted, tolerances.RELEASED)
            # the release's third tensor is gone
            shaped = {k for k, v in optimizer.state[p].items() if v.numel() == p.numel() != 1}
            assert shaped <= {"exp_avg", "hessian_diag"}


def test_released_state_of_float32_in_a_scheduled_run() -> None:
    """After a scheduler lr differs from base_lr, and groups have initial_lr."""
    released = ReleasedApollo([np.ones(5)], lr=0.01, warmup=2)
    for t in range(4):
        released.step([np.arange(1.0, 6.0) + t])
    saved = released_state_dict(released, torch.float32)
    saved["param_groups"][0].update(lr=0.001, initial_lr=0.01)
    p = torch.nn.Parameter(torch.tensor(released.thetas[0], dtype=torch.float32))
    optimizer = Apollo([p])
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["warmup_base_lr"]) == (0.001, 0.01, 0.01)
    assert optimizer.state[p]["exp_avg"].dtype is torch.float32
    torch.optim.lr_scheduler.StepLR(optimizer, 2, last_epoch=3)


def test_the_first_release_had_a_sigma_of_1() -> None:
    released = ReleasedApollo([np.ones(5)], lr=0.5)
    released.step([np.arange(1.0, 6.0)])
    saved = released_state_dict(released, torch.float64)
    del saved["param_groups"][0]["rebound"]
    optimizer = Apollo([torch.nn.Parameter(torch.ones(5, dtype=torch.float64, device=DEVICE))])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["sigma"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", ["L2", "decoupled"])
@pytest.mark.parametrize("sigma", [1.0, 0.01])
def test_sigma_is_recovered_from_the_stored_update(
    sigma: float, decay: str, dtype: torch.dtype
) -> None:
    """The second and third release have the same keys; m / update distinguishes them."""
    start = [normal((40,), "theta", i) for i in range(2)]
    released = ReleasedApollo(
        [as_numpy(p) for p in start], lr=0.1 * sigma, warmup=2, weight_decay=0.05,
        weight_decay_type=decay, sigma=sigma,
    )  # fmt: skip
    for t in range(4):
        released.step([as_numpy(normal((40,), "g", i, t)) for i in range(2)])
    params = [
        torch.nn.Parameter(torch.tensor(theta, dtype=dtype, device=DEVICE))
        for theta in released.thetas
    ]
    optimizer = Apollo(params)
    optimizer.load_state_dict(released_state_dict(released, dtype))
    assert optimizer.param_groups[0]["sigma"] == sigma


def released_with_a_tiny_direction(
    dtype: torch.dtype, **settings: Any
) -> tuple[dict[str, Any], torch.nn.Parameter, float]:
    """Return a release's state after 4 steps, its parameter and the last threshold of belief.

    The direction of the first element is lost in the rounding of its decayed parameter.
    """
    defaults = {"lr": 1.0, "warmup": 0, "weight_decay": 0.05, "weight_decay_type": "decoupled"}
    start = as_numpy(normal((40,), "theta"))
    released = ReleasedApollo([start], **{**defaults, **settings})
    threshold = 0.0
    for t in range(4):
        g = as_numpy(gradient(torch.Size((40,)), torch.float64, 0, t)) / 4
        g[0] *= 1e-10
        threshold = float(np.max(np.abs(g - released.state[0]["exp_avg_grad"])))
        released.step([g])
    p = torch.nn.Parameter(torch.tensor(released.thetas[0], dtype=dtype, device=DEVICE))
    return released_state_dict(released, dtype), p, threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("changed_lr", [None, 0.1, 0.0])
@pytest.mark.parametrize("sigma", [1.0, 0.01])
def test_decoupled_decay_hides_neither_sigma_nor_the_last_rate(
    sigma: float, changed_lr: float | None, dtype: torch.dtype
) -> None:
    """A scheduler may have changed lr between the last step and the save."""
    saved, p, _ = released_with_a_tiny_direction(dtype, sigma=sigma)
    if changed_lr is not None:
        saved["param_groups"][0]["lr"] = changed_lr
    optimizer = Apollo([p])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["sigma"] == sigma
    found = optimizer.state[p]["previous_lr"].item()
    if changed_lr is None:
        assert found == 1.0
    else:
        tolerance = (
            tolerances.RECOVERED_FROM_FLOAT32 if dtype is torch.float32 else tolerances.RELEASED
        )
        assert found == pytest.approx(1.0, rel=tolerance)


def test_the_last_rate_of_a_warmup_is_that_of_the_release() -> None:
    """Its warmup ignores the rate that a scheduler has set."""
    saved, p, _ = released_with_a_tiny_direction(torch.float64, warmup=8, init_lr=0.2)
    saved["param_groups"][0]["lr"] = 0.1
    optimizer = Apollo([p])
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["previous_lr"].item() == pytest.approx(0.5, rel=tolerances.RATE)


def test_the_last_rate_is_the_groups_where_the_parameter_is_another() -> None:
    saved, _, _ = released_with_a_tiny_direction(torch.float32)
    other = torch.nn.Parameter(normal((40,), "other", dtype=torch.float32))
    optimizer = Apollo([other])
    optimizer.load_state_dict(saved)
    assert optimizer.state[other]["previous_lr"].item() == 1.0


@pytest.mark.parametrize("changed_lr", [1.0, 0.1])
def test_the_threshold_is_not_that_of_a_lost_direction(changed_lr: float) -> None:
    saved, p, threshold = released_with_a_tiny_direction(torch.float32, rebound="belief", eps=0.1)
    saved["param_groups"][0]["lr"] = changed_lr
    optimizer = Apollo([p])
    optimizer.load_state_dict(saved)
    found = optimizer.state[p]["threshold"].item()
    # a wrong rate changes the direction by that times wd = 0.05 of the update, which is at most
    # twice the directions that count
    tolerance = 2 * 0.05 * (1.0 - changed_lr) + tolerances.RECOVERED_FROM_FLOAT32
    assert found == pytest.approx(threshold, rel=tolerance)


def of_a_port(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return a state of the release with changed entries; those that are ``...`` are left out."""
    released = ReleasedApollo([np.ones(5)], lr=0.5, warmup=4)
    for t in range(3):
        released.step([np.arange(1.0, 6.0) + t])
    saved = released_state_dict(released, torch.float32)
    for entries, changes in ((saved["state"][0], state), (saved["param_groups"][0], group)):
        entries.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del entries[name]
    return saved


@pytest.mark.parametrize(
    ("state", "group", "message"),
    [
        *[
            ({name: ...}, {}, f"state of the parameter 'weight' of shape .* lacks '{name}'")
            for name in ("step", "exp_avg_grad", "approx_hessian", "update")
        ],
        *[
            (
                {name: value},
                {},
                rf"{name} must have its parameter's shape \(5,\), got {got} for .*'weight'",
            )
            for name in ("exp_avg_grad", "approx_hessian", "update")
            for value, got in ((None, "None"), (torch.ones(1), r"\(1,\)"))
        ],
        ({"step": None}, {}, "step must be a number or a 0-dim tensor, got None for .*'weight'"),
        ({"step": -1}, {}, "step must be a finite number >= 0, got -1 for .*'weight'"),
        ({"step": float("nan")}, {}, "step must be a finite number >= 0, got nan"),
        ({"update": torch.ones(5, dtype=torch.int64)}, {}, "update must be of a floating-point"),
        ({}, {"lr": "1"}, "lr must be a finite number >= 0, got '1', in a saved parameter group"),
        ({}, {"base_lr": None}, "warmup_base_lr must be a finite number >= 0, got None"),
        ({}, {"base_lr": 0.0}, "warmup_init_lr must be None or 0 where warmup_base_lr is 0"),
        ({}, {"warmup": -1}, "warmup_steps must be a whole number >= 0, got -1"),
        ({}, {"rebound": "none"}, "rebound must be 'constant' or 'belief', got 'none'"),
    ],
)
def test_a_wrong_entry_of_a_port_is_named(
    state: dict[str, Any], group: dict[str, Any], message: str
) -> None:
    (p,) = parameters([(5,)])
    optimizer = Apollo([("weight", p)])
    run_steps(optimizer, range(1))
    before, lr = snapshot(optimizer), optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(of_a_port(state, group))
    assert same(before, snapshot(optimizer))
    assert optimizer.param_groups[0]["lr"] == lr


@pytest.mark.parametrize(
    ("group", "next_lr"),
    [
        ({"lr": 0.0, "base_lr": 0.0, "init_lr": 0.0}, 0.0),
        ({"init_lr": None}, 0.5 * (1e-3 + (1 - 1e-3) * 3 / 4)),
        ({"init_lr": None, "warmup": 0}, 0.5),
        ({"lr": torch.tensor(0.5), "warmup": 0}, 0.5),
    ],
    ids=["lr 0", "no init_lr", "no warmup", "tensor"],
)
def test_settings_of_a_port_that_have_a_meaning(group: dict[str, Any], next_lr: float) -> None:
    optimizer = Apollo(parameters([(5,)]))
    optimizer.load_state_dict(of_a_port({}, group))
    assert optimizer.effective_lrs() == [pytest.approx(next_lr, rel=tolerances.RATE)]
    run_steps(optimizer, range(1))


def test_the_counter_of_a_release_has_all_its_digits() -> None:
    saved = of_a_port({"step": 301}, {"weight_decay_type": "decoupled", "lr": 0.1})
    optimizer = Apollo(parameters([(5,)]))
    with default_dtype(torch.bfloat16):
        optimizer.load_state_dict(saved)
    (state,) = optimizer.state.values()
    assert (state["step"].item(), state["previous_lr"].item()) == (301.0, 0.1)


def unstarted(**group: Any) -> dict[str, Any]:
    """Return the state of a released optimizer that has taken no step."""
    saved = released_state_dict(ReleasedApollo([np.ones(5)], lr=0.5, warmup=7), torch.float32)
    saved["param_groups"][0].update(group)
    return {**saved, "state": {}}


def test_a_released_state_before_its_first_step_is_recognized() -> None:
    saved = unstarted(init_lr=0.125, weight_decay=0.25, weight_decay_type="decoupled")
    del saved["param_groups"][0]["rebound"]  # the first release
    optimizer = Apollo(parameters([(5,)]), lr=123.0, beta=0.5, sigma=3.0)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    wanted = {
        "lr": 0.5,
        "beta": 0.9,
        "sigma": 1.0,
        "rebound": "constant",
        "weight_decay": 0.25,
        "decoupled_weight_decay": True,
        "warmup_steps": 7,
        "warmup_init_lr": 0.125,
        "warmup_base_lr": 0.5,
    }
    assert {name: group[name] for name in wanted} == wanted
    assert not {"warmup", "init_lr", "base_lr", "weight_decay_type"} & group.keys()
    run_steps(optimizer, range(1))

    optimizer = Apollo(parameters([(5,)]))
    optimizer.load_state_dict(unstarted(rebound="belief"))  # belief has no sigma
    assert optimizer.param_groups[0]["rebound"] == "belief"


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, r"before its first step.*whether sigma was 1 .* or 0\.01.*lr=0\.5, warmup_steps=7"),
        ({"weight_decay_type": "stable"}, "weight_decay_type must be .*got 'stable'"),
    ],
    ids=["sigma", "stable"],
)
def test_a_released_state_before_its_first_step_that_cannot_be_loaded(
    group: dict[str, Any], message: str
) -> None:
    optimizer = Apollo(parameters([(5,)]))
    run_steps(optimizer, range(1))
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(unstarted(**group))
    assert same(before, snapshot(optimizer))
    assert all(a.keys() == b.keys() for a, b in zip(groups, optimizer.param_groups, strict=True))


def test_groups_of_a_released_state_have_the_same_sigma() -> None:
    """A group of frozen parameters does not determine sigma; the other group does."""
    released = ReleasedApollo([np.ones(5)], lr=0.5, sigma=1.0)
    released.step([np.arange(1.0, 6.0)])
    saved = released_state_dict(released, torch.float32)
    saved["param_groups"].insert(0, {**saved["param_groups"][0], "params": [1]})
    frozen, trained = parameters([(3,), (5,)])
    optimizer = Apollo([{"params": [frozen]}, {"params": [trained]}])
    optimizer.load_state_dict(saved)
    assert [group["sigma"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_groups_and_keys_of_a_released_state_are_named() -> None:
    released = ReleasedApollo([np.ones(5)], lr=0.01)
    released.step([np.arange(1.0, 6.0)])
    saved = released_state_dict(released, torch.float64)
    optimizer = Apollo([torch.nn.Parameter(torch.ones(5, dtype=torch.float64, device=DEVICE))])
    two = {**saved, "param_groups": saved["param_groups"] * 2}
    with pytest.raises(ValueError, match=r"groups of \[1, 1\] parameters, this optimizer of \[1\]"):
        optimizer.load_state_dict(two)
    del saved["param_groups"][0]["warmup"]
    with pytest.raises(ValueError, match="a parameter group lacks 'warmup'"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_released_stable_decay_is_refused() -> None:
    released = ReleasedApollo([np.ones(5)], lr=0.01, weight_decay=0.1, weight_decay_type="stable")
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64, device=DEVICE))
    optimizer = Apollo([p])
    run_steps(optimizer, range(1))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"weight_decay_type must be .*got 'stable'"):
        optimizer.load_state_dict(released_state_dict(released, torch.float64))
    assert same(before, snapshot(optimizer))


@pytest.mark.parametrize("rebound", ["constant", "belief"])
def test_released_state_of_a_wrong_shape_or_size(rebound: str) -> None:
    released = ReleasedApollo([np.ones(5)], lr=0.01, rebound=rebound)
    released.step([np.ones(5)])
    for params in ([torch.ones(4)], [torch.ones(5), torch.ones(5)]):
        optimizer = Apollo([torch.nn.Parameter(p) for p in params])
        before = snapshot(optimizer)
        with pytest.raises(ValueError):  # noqa: PT011  # which of two messages is not the point
            optimizer.load_state_dict(released_state_dict(released, torch.float64))
        assert same(before, snapshot(optimizer))


def test_the_released_state_in_16_bits() -> None:
    released = ReleasedApollo([np.ones((3, 5)), np.ones(7)], lr=0.01, warmup=0)
    for t in range(3):
        released.step([np.full((3, 5), 1.0 + t), np.full(7, 2.0 - t)])
    state = {
        i: {k: v if k == "step" else torch.tensor(v) for k, v in one.items()}
        for i, one in enumerate(released.state)
    }
    saved = {"state": state, "param_groups": [{**released.group, "params": [0, 1]}]}
    params = [torch.nn.Parameter(torch.tensor(x).bfloat16()) for x in released.thetas]
    optimizer = Apollo(params, rounding="kahan", state_dtype=torch.bfloat16)
    optimizer.load_state_dict(saved)
    assert dtypes(optimizer) == {torch.bfloat16}
    for p, one in zip(params, released.state, strict=True):
        wanted = torch.tensor(one["approx_hessian"]).bfloat16()
        assert same(optimizer.state[p]["hessian_diag"], wanted)
    run_steps(optimizer, range(3, 5))
    assert all("compensation" in optimizer.state[p] for p in params)
