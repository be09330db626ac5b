"""Saving, loading, and the authors' released state."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from apollo_qn import Apollo, ApolloW
from tests import tolerances
from tests.helpers import (
    BACK_ENDS,
    DEVICE,
    WHY_NOT_FUSED,
    Comparison,
    as_numpy,
    gradient,
    make,
    normal,
    parameters,
    run_steps,
    same,
    snapshot,
)
from tests.modes import GROUP_MODES
from tests.numpy_reference import ReleasedApollo, Settings

SHAPES = [(), (3, 5), (0,), (300,), (2, 3, 4, 5), (11, 30)]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@BACK_ENDS
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_continuation_is_bit_identical(
    mode: dict[str, Any], dtype: torch.dtype, back_end: dict[str, Any], capturable: bool
) -> None:
    settings = Settings(lr=0.3, warmup_steps=8, **mode)
    params = parameters(SHAPES, dtype)
    optimizer = make(params, settings, **back_end, capturable=capturable)
    run_steps(optimizer, range(4))
    saved = through_a_file(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    run_steps(optimizer, range(4, 8))

    # into an optimizer of other hyperparameters, whose state is of other steps
    others = parameters(SHAPES, dtype)
    fresh = Apollo(others, lr=7.0, beta=0.5, sigma=2.0, warmup_steps=0)
    run_steps(fresh, range(1))
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    fresh.load_state_dict(saved)
    run_steps(fresh, range(4, 8))
    assert same(snapshot(optimizer), snapshot(fresh))


@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_a_state_goes_from_one_back_end_to_the_other(mode: dict[str, Any]) -> None:
    settings = Settings(lr=0.3, warmup_steps=8, **mode)
    results = []
    ends = [{"foreach": False, "fused": None}, {"foreach": True, "fused": None}]
    if WHY_NOT_FUSED is None:
        ends.append({"foreach": None, "fused": True})
    for first, second in itertools.product(ends, ends):
        params = parameters(SHAPES, torch.float64)
        optimizer = make(params, settings, **first)
        run_steps(optimizer, range(3))
        fresh = make(params, settings)
        saved = through_a_file(optimizer.state_dict())
        saved["param_groups"][0].update(second)
        fresh.load_state_dict(saved)
        run_steps(fresh, range(3, 6))
        results.append([as_numpy(p) for p in params])
    for path in results[1:]:
        for got, wanted in zip(path, results[0], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


def test_state_dict_holds_tensors_and_plain_values_only() -> None:
    optimizer = ApolloW(parameters(), rebound="belief", weight_decay=0.1)
    run_steps(optimizer, range(2))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(isinstance(v, torch.Tensor) for v in state.values())
    for group in saved["param_groups"]:
        assert all(
            v is None or isinstance(v, bool | int | float | str | list) for v in group.values()
        )


def test_the_loaded_state_is_a_copy() -> None:
    params = parameters([(4,), (300,)])
    optimizer = ApolloW(params, rebound="belief", weight_decay=0.1)
    run_steps(optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    fresh = ApolloW(parameters([(4,), (300,)]))
    fresh.load_state_dict(saved)
    places = {v.data_ptr() for s in saved["state"].values() for v in s.values()}
    for state in fresh.state.values():
        assert not places & {v.data_ptr() for v in state.values()}
    run_steps(fresh, range(2, 4))
    assert same(saved["state"], kept["state"])


def test_an_unused_optimizer_saves_and_loads() -> None:
    optimizer = Apollo(parameters())
    fresh = Apollo(parameters(), lr=3.0)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["lr"] == 1.0
    assert not fresh.state


def test_parameters_without_state_stay_without() -> None:
    params = parameters([(3,), (4,)])
    optimizer = Apollo(params)
    params[0].grad = torch.ones(3, device=DEVICE)
    optimizer.step()
    others = parameters([(3,), (4,)])
    fresh = Apollo(others)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert "step" in fresh.state[others[0]]
    assert not fresh.state.get(others[1])
    run_steps(fresh, range(2))


def test_layout_of_the_loaded_state_is_the_parameters() -> None:
    params = parameters([(2, 3, 4, 5)])
    optimizer = Apollo(params)
    run_steps(optimizer, range(2))
    saved = optimizer.state_dict()
    plain = torch.nn.Parameter(params[0].detach().contiguous())
    fresh = Apollo([plain])
    fresh.load_state_dict(saved)
    state = fresh.state[plain]
    assert state["exp_avg"].stride() == plain.stride()
    assert torch.equal(state["exp_avg"], optimizer.state[params[0]]["exp_avg"])


BROKEN = {
    "wrong shape": (
        lambda s: s["state"][1].update(exp_avg=torch.zeros(7)),
        r"exp_avg must have its parameter's shape \(4, 2\), got \(7,\)",
    ),
    "wrong shape of B": (
        lambda s: s["state"][0].update(hessian_diag=torch.zeros(())),
        r"hessian_diag must have its parameter's shape \(3,\), got \(\)",
    ),
    "no m": (lambda s: s["state"][1].pop("exp_avg"), r"lacks 'exp_avg'"),
    "no B": (lambda s: s["state"][1].pop("hessian_diag"), r"lacks 'hessian_diag'"),
    "no step": (lambda s: s["state"][1].pop("step"), r"lacks 'step'"),
    "a group too few": (lambda s: s["param_groups"].pop(), r"groups of \[2\] parameters"),
    "a parameter too few": (
        lambda s: s["param_groups"][0]["params"].pop(),
        r"groups of \[1, 1\] parameters, this optimizer of \[2, 1\]",
    ),
    "of Adam": (
        lambda s: [v.update(exp_avg_sq=v.pop("hessian_diag")) for v in s["state"].values()],
        r"lacks 'hessian_diag'.*exp_avg_sq",
    ),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_state_that_does_not_fit_changes_nothing(breaks: Any, message: str) -> None:
    def built() -> Apollo:
        a, b, c = parameters([(3,), (4, 2), (5,)])
        optimizer = Apollo([{"params": [a, b]}, {"params": [c], "lr": 0.1}])
        run_steps(optimizer, range(2))
        return optimizer

    optimizer = built()
    saved = copy.deepcopy(built().state_dict())
    saved["param_groups"][0]["lr"] = 9.0
    breaks(saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(before, snapshot(optimizer))
    # and no hook is left behind
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    run_steps(optimizer, range(2, 3))


def test_the_users_hooks_are_called() -> None:
    source = Apollo(parameters([(3,)]), lr=0.25)
    run_steps(source, range(2))
    optimizer = Apollo(parameters([(3,)]))
    calls: list[str] = []

    def before(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        groups = [{**g, "lr": g["lr"] * 2} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    def after(opt: Any) -> None:
        calls.append("after")
        (state,) = opt.state.values()
        assert state["step"] == 2  # the state is complete when the user's hook sees it
        state["exp_avg"].zero_()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(source.state_dict())
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    (state,) = optimizer.state.values()
    assert not state["exp_avg"].any()
    assert state["hessian_diag"].any()


# the authors' released optimizer


def released_state_dict(released: ReleasedApollo, dtype: torch.dtype) -> dict[str, Any]:
    """As ``torch.save`` of the release's state dict has it: ``step`` is a Python int."""
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
            # no third tensor has come with it
            shaped = {k for k, v in optimizer.state[p].items() if v.numel() == p.numel() != 1}
            assert shaped <= {"exp_avg", "hessian_diag"}


def test_released_state_of_float32_in_a_scheduled_run() -> None:
    """lr differs from base_lr when a scheduler has been at work; initial_lr comes along."""
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
    """The second and the third release have the same keys; m / update tells them apart."""
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
    """A group of frozen parameters does not tell it; the other one does."""
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


# what is stored in 16 bits

STORING: list[dict[str, Any]] = [
    {"rounding": "stochastic", "seed": 3},
    {"rounding": "kahan"},
    {"rounding": "kahan", "state_dtype": torch.bfloat16},
    {"rounding": "stochastic", "state_dtype": torch.bfloat16, "seed": 1 << 33},
]


@BACK_ENDS
@pytest.mark.parametrize("storing", STORING, ids=str)
def test_a_resumed_run_rounds_as_it_would_have(
    storing: dict[str, Any], back_end: dict[str, Any]
) -> None:
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = ApolloW(params, lr=0.01, weight_decay=0.1, **storing, **back_end)
    run_steps(optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run_steps(optimizer, range(3, 6))
    fresh = ApolloW(others, rounding="nearest")
    fresh.load_state_dict(saved)
    run_steps(fresh, range(3, 6))
    assert same(snapshot(optimizer), snapshot(fresh))


def dtypes(optimizer: Apollo) -> set[torch.dtype]:
    states = optimizer.state.values()
    return {state[name].dtype for state in states for name in ("exp_avg", "hessian_diag")}


def test_states_of_other_types() -> None:
    """The settings are those that were saved; where they were saved without, the optimizer's."""
    narrow = {"state_dtype": torch.bfloat16}
    wide, small = Apollo(parameters(SHAPES)), Apollo(parameters(SHAPES), **narrow)
    for optimizer in (wide, small):
        run_steps(optimizer, range(2))
    assert (dtypes(wide), dtypes(small)) == ({torch.float32}, {torch.bfloat16})
    for saved in (wide, small):
        for target in (Apollo(parameters(SHAPES)), Apollo(parameters(SHAPES), **narrow)):
            target.load_state_dict(through_a_file(saved.state_dict()))
            assert same(snapshot(target)[2::2], snapshot(saved)[2::2])
            run_steps(target, range(2, 3))
            assert dtypes(target) == dtypes(saved)

    older = through_a_file(wide.state_dict())  # of a version without these settings
    for group in older["param_groups"]:
        for name in ("rounding", "state_dtype", "seed"):
            del group[name]
    target = Apollo(parameters(SHAPES), **narrow)
    target.load_state_dict(older)
    assert dtypes(target) == {torch.bfloat16}
    for p, q in zip(*(o.param_groups[0]["params"] for o in (target, wide)), strict=True):
        wanted = wide.state[q]["hessian_diag"].bfloat16()
        assert same(target.state[p]["hessian_diag"], wanted)


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


@pytest.mark.parametrize("shape", [(3, 4), (3, 5)])
def test_a_compensation_must_fit(shape: tuple[int, ...]) -> None:
    optimizer = Apollo(parameters([(3, 5)], torch.bfloat16), rounding="kahan")
    run_steps(optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    saved["state"][0]["compensation"] = torch.zeros(shape, dtype=torch.bfloat16)
    if shape == (3, 5):
        optimizer.load_state_dict(saved)
        return
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"compensation must have its parameter's shape \(3, 5\)"):
        optimizer.load_state_dict(saved)
    assert same(before, snapshot(optimizer))


def test_a_state_that_says_nothing_of_storing_is_stored_as_the_group_says() -> None:
    storing = {"rounding": "kahan", "state_dtype": "bfloat16", "seed": 5}
    older, newer = (Apollo(parameters([(30,)], torch.bfloat16), warmup_steps=0) for _ in range(2))
    newer.param_groups[0].update(storing)
    run_steps(older, range(2))
    saved = older.state_dict()
    for name in storing:
        del saved["param_groups"][0][name]
    newer.load_state_dict(saved)
    assert {name: newer.param_groups[0][name] for name in storing} == storing
    run_steps(newer, range(2, 3))
    (state,) = newer.state.values()
    assert state["exp_avg"].dtype is torch.bfloat16
    assert "compensation" in state
