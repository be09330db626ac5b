"""Errors of a step, which change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apollo_qn import Apollo
from tests.helpers import BACK_ENDS, give_gradients, parameters, run_steps, same, snapshot


@BACK_ENDS
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
def test_an_error_changes_nothing(first: bool, back_end: dict[str, Any]) -> None:
    """No tensor or state of any group changes; the message names the parameter."""
    a, b, c = parameters([(3,), (4,), (2, 2)])
    optimizer = Apollo(
        [{"params": [("a", a), ("b", b)]}, {"params": [("c", c)]}], lr=0.1, warmup_steps=0,
        **back_end,
    )  # fmt: skip
    if not first:
        run_steps(optimizer, range(1))
    give_gradients([a, b, c], 1)
    if first:
        c.grad = torch.ones(2, 2).to_sparse()
        message = "dense gradients, got a sparse one for the parameter 'c'"
    else:
        c.grad = None
        c.data = torch.ones(5)
        c.grad = torch.ones(5)
        message = r"exp_avg has the shape \(2, 2\).*parameter 'c' of shape \(5,\)"
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert same(before, snapshot(optimizer))
    assert set(optimizer.state) == (set() if first else {a, b, c})


@BACK_ENDS
@pytest.mark.parametrize("how", ["stored otherwise", "another type"])
def test_an_error_undoes_the_conversion_of_a_state(how: str, back_end: dict[str, Any]) -> None:
    """Also the state of a group that was converted before the error was found in the next."""
    a, b = parameters([(3,), (4,)], torch.bfloat16)
    optimizer = Apollo([{"params": [a]}, {"params": [b]}], seed=0, rounding="kahan", **back_end)
    run_steps(optimizer, range(2))
    give_gradients([a, b], 2)
    if how == "another type":
        a.grad = None
        a.data = a.data.half()  # needs a new compensation
        a.grad = torch.ones_like(a)
    else:
        optimizer.param_groups[0].update(state_dtype="bfloat16", rounding="nearest")
    optimizer.state[b]["exp_avg"] = torch.zeros(5)
    before = {name: value.clone() for name, value in optimizer.state[a].items()}
    with pytest.raises(RuntimeError, match="exp_avg has the shape"):
        optimizer.step()
    assert same(before, dict(optimizer.state[a]))
    assert {"compensation"} < before.keys()


@BACK_ENDS
def test_an_error_undoes_the_restart_of_an_incomplete_state(back_end: dict[str, Any]) -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([a, b], **back_end)
    run_steps(optimizer, range(1))
    del optimizer.state[a]["hessian_diag"]
    optimizer.state[b]["exp_avg"] = torch.zeros(5)
    before = {name: value.clone() for name, value in optimizer.state[a].items()}
    with pytest.raises(RuntimeError, match="exp_avg has the shape"):
        optimizer.step()
    assert same(before, dict(optimizer.state[a]))


@BACK_ENDS
def test_a_state_that_was_left_on_another_device_changes_nothing(back_end: dict[str, Any]) -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([a, b], warmup_steps=0, **back_end)
    run_steps(optimizer, range(1))
    optimizer.state[b]["hessian_diag"] = torch.zeros(4, device="meta")  # meta stands for a GPU
    before = a.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"hessian_diag lies on meta, but belongs to a parameter"
    ):
        optimizer.step()
    assert torch.equal(a, before)


@BACK_ENDS
def test_an_expanded_parameter_changes_nothing(back_end: dict[str, Any]) -> None:
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1).expand(4))
    optimizer = Apollo([a, b], warmup_steps=0, **back_end)
    give_gradients([a, b], 0)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(4,\), whose elements share"):
        optimizer.step()
    assert torch.equal(a, torch.ones(3))
    assert not optimizer.state


@BACK_ENDS
@pytest.mark.parametrize(
    ("name", "value"),
    [("sigma", 0.0), ("beta", 1.0), ("eps", None), ("rebound", "belif"), ("warmup_steps", -1)],
)
def test_a_bad_setting_of_a_group_changes_nothing(
    name: str, value: Any, back_end: dict[str, Any]
) -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([{"params": [a]}, {"params": [b]}], **back_end)
    give_gradients([a, b], 0)
    before = [a.detach().clone(), b.detach().clone()]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        optimizer.step()
    assert same(before, [a.detach(), b.detach()])
    assert not optimizer.state


@BACK_ENDS
def test_a_counter_that_is_not_a_number_changes_nothing(back_end: dict[str, Any]) -> None:
    params = parameters([(3,), (4,)])
    optimizer = Apollo(params, warmup_steps=0, **back_end)
    run_steps(optimizer, range(1))
    optimizer.state[params[1]]["step"].fill_(float("nan"))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="step counter or a previous_lr is not a number"):
        optimizer.step()
    assert same(before, [p.detach() for p in params])


@BACK_ENDS
def test_an_integer_counter_that_was_not_loaded_is_refused(back_end: dict[str, Any]) -> None:
    params = parameters([(3,), (4,)])
    optimizer = Apollo([("first", params[0]), ("second", params[1])], warmup_steps=0, **back_end)
    run_steps(optimizer, range(1))
    optimizer.state[params[1]]["step"] = torch.tensor(1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"counter of the parameter 'second'.*int64"):
        optimizer.step()
    assert same(before, [p.detach() for p in params])


@BACK_ENDS
def test_a_scheduled_weight_decay_may_be_a_tensor(back_end: dict[str, Any]) -> None:
    """As torch.linspace(...)[i] is; the constructor takes a number."""
    results = []
    for decay in (0.5, torch.tensor(0.5)):
        params = parameters([(3,), (40,)])
        optimizer = Apollo(params, warmup_steps=0, weight_decay=0.1, **back_end)
        optimizer.param_groups[0]["weight_decay"] = decay
        run_steps(optimizer, range(3))
        results.append([p.detach() for p in params])
    assert same(*results)


@BACK_ENDS
def test_a_parameter_that_is_conjugated_lazily_is_refused(back_end: dict[str, Any]) -> None:
    """As in torch.optim.Adam; the update of a resolved copy would be lost."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).conj())
    assert p.is_conj()
    p.grad = torch.ones(3, dtype=torch.complex64)
    optimizer = Apollo([p], **back_end)
    with pytest.raises(RuntimeError, match="conjugated"):
        optimizer.step()
    assert not optimizer.state
