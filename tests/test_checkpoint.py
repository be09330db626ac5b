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
from tests.helpers import (
    BACK_ENDS,
    DEVICE,
    WHY_NOT_FUSED,
    as_numpy,
    default_dtype,
    make,
    parameters,
    run_steps,
    same,
    snapshot,
)
from tests.modes import GROUP_MODES
from tests.numpy_reference import Settings

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

    # into an optimizer with other hyperparameters and another state
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
    "no number of steps": (
        lambda s: s["state"][1].update(step=torch.tensor(-1.0)),
        r"step must be a finite number >= 0, got tensor\(-1.\) for a parameter of shape \(4, 2\)",
    ),
    "complex": (
        lambda s: s["state"][1].update(exp_avg=torch.zeros(4, 2, dtype=torch.complex64)),
        r"exp_avg must be real, got torch.complex64",
    ),
    "of other code": (
        lambda s: s["state"].update({1: {"threshold": torch.ones(2)}}),
        r"threshold must have one element, got shape \(2,\)",
    ),
    "settings of another state": (
        lambda s: s["param_groups"][1].update(rebound="belief"),
        r"shape \(5,\) lacks 'threshold', which rebound='belief' of its group needs",
    ),
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


def test_messages_name_the_parameter() -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([("embedding", a), ("weight", b)])
    run_steps(optimizer, range(1))
    for changes, message in (
        ({"exp_avg": torch.zeros(3)}, r"exp_avg must have .* \(4,\), got \(3,\)"),
        ({"step": None}, "step must be a number or a 0-dim tensor, got None"),
        ({"step": torch.zeros(2)}, r"step must have one element, got shape \(2,\)"),
    ):
        saved = optimizer.state_dict()
        saved["state"][1] = {**saved["state"][1], **changes}
        with pytest.raises(ValueError, match=f"{message} for the parameter 'weight' of shape"):
            optimizer.load_state_dict(saved)
    saved["state"][1] = {"step": 1}
    with pytest.raises(ValueError, match=r"the parameter 'weight' of shape .* lacks 'exp_avg'"):
        optimizer.load_state_dict(saved)


def test_entries_of_other_code_beside_the_parameters_are_kept() -> None:
    """``torch.optim.Adam`` keeps them too."""
    optimizer = Apollo(parameters([(3,)]))
    run_steps(optimizer, range(1))
    others = {"plain": 5, "text": "approx_hessian", "none": None}
    optimizer.state.update(others)
    fresh = Apollo(parameters([(3,)]))
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert {name: fresh.state[name] for name in others} == others


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_a_state_that_was_loaded_in_inference_mode_trains_on(
    capturable: bool, back_end: dict[str, Any]
) -> None:
    settings = {"lr": 0.3, "rebound": "belief", "weight_decay": 0.1, "rounding": "kahan", "seed": 0}
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = ApolloW(params, **settings, capturable=capturable, **back_end)
    run_steps(optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = ApolloW(others, **settings, capturable=capturable, **back_end)
    file.seek(0)
    with torch.inference_mode():
        fresh.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, fresh):
        run_steps(each, range(2, 3))
    assert same(snapshot(optimizer), snapshot(fresh))


def test_saved_numbers_keep_their_digits() -> None:
    """The default type does not round them."""
    optimizer = ApolloW(parameters([(3,)]), weight_decay=0.1)
    run_steps(optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0].update(step=301.0, previous_lr=0.1)
    with default_dtype(torch.bfloat16):
        optimizer.load_state_dict(saved)
    (state,) = optimizer.state.values()
    assert (state["step"].item(), state["previous_lr"].item()) == (301.0, 0.1)
    assert (state["step"].dtype, state["previous_lr"].dtype) == (torch.float32, torch.float64)


# state in 16 bits

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
    """Saved settings replace the optimizer's, which stay where none was saved."""
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

    older = through_a_file(wide.state_dict())  # an earlier version lacks these settings
    for group in older["param_groups"]:
        for name in ("rounding", "state_dtype", "seed"):
            del group[name]
    target = Apollo(parameters(SHAPES), **narrow)
    target.load_state_dict(older)
    assert dtypes(target) == {torch.bfloat16}
    for p, q in zip(*(o.param_groups[0]["params"] for o in (target, wide)), strict=True):
        wanted = wide.state[q]["hessian_diag"].bfloat16()
        assert same(target.state[p]["hessian_diag"], wanted)


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


def test_a_state_without_storage_settings_uses_the_groups() -> None:
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
