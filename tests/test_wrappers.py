"""Entries of wrappers in the state, replaced parameters, saved counters and seeds."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from apollo_qn import Apollo, ApolloW, ApolloWarning
from tests.helpers import BACK_ENDS, give_gradients, normal, parameters, run_steps, same, snapshot


@BACK_ENDS
def test_entries_of_a_wrapper_stay(back_end: dict[str, Any]) -> None:
    """The entries stay before the first step, without a gradient, and through a checkpoint."""
    p, q = parameters([(3,), (4,)])
    optimizer = Apollo([p, q], **back_end)
    for x in (p, q):
        optimizer.state[x]["z"] = x.detach().clone()
    p.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[p]) == {"z", "step", "exp_avg", "hessian_diag"}
    assert set(optimizer.state[q]) == {"z"}
    fresh = Apollo(parameters([(3,), (4,)]), **back_end)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in zip((p, q), fresh.param_groups[0]["params"], strict=True):
        assert same(dict(fresh.state[y]), dict(optimizer.state[x]))


def test_a_wrapper_s_entries_move_with_the_parameter() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    q = torch.nn.Parameter(torch.ones(2, dtype=torch.float64, device="meta"))
    optimizers = []
    for make in (torch.optim.Adam, Apollo):
        optimizer = make([p])
        p.grad = torch.ones(2)
        optimizer.step()
        optimizer.state[p]["z"] = p.detach().clone()
        other = make([q])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizers.append(other)
    adam, ours = (optimizer.state[q]["z"] for optimizer in optimizers)
    assert (ours.device, ours.dtype) == (adam.device, adam.dtype)
    assert optimizers[1].state[q]["exp_avg"].device.type == "meta"


def test_flattened_parameters_are_reported() -> None:
    """DeepSpeed, apex and Megatron replace the tensors of a group by one flat vector."""
    net = torch.nn.Linear(3, 2)
    optimizer = Apollo(net.parameters())
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApolloWarning)
        for _ in range(2):  # as an error it comes at each step, and no step is taken
            with pytest.raises(ApolloWarning, match="fully_shard"):
                optimizer.step()
    assert torch.equal(flat, before)
    assert not optimizer.state
    with pytest.warns(ApolloWarning, match=r"fully_shard"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # the warning comes once


def test_a_model_that_was_sharded_afterwards_is_reported() -> None:
    """fully_shard replaces the parameters, so that those of the optimizer never get a gradient."""
    optimizer = Apollo(parameters([(4, 3)]))
    with pytest.warns(ApolloWarning, match="no parameter of this optimizer has had a gradient"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # the warning comes once


def test_a_parameter_reshaped_before_its_first_step_is_reported() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = Apollo([p])
    p.data = torch.ones(6)  # this rank's part of the flat parameter
    p.grad = torch.ones(6)
    with pytest.warns(ApolloWarning, match=r"of shape \(6,\) takes its first step"):
        optimizer.step()


def test_new_shapes_that_no_wrapper_made_are_not_reported(
    recwarn: pytest.WarningsRecorder,
) -> None:
    net = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    points = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = Apollo([*net.parameters()])
    other = Apollo([points], foreach=True)
    other.param_groups[0]["params"] = [points := torch.nn.Parameter(torch.ones(9, 3))]
    (net(torch.ones(2, 3)).sum() + points.sum()).backward()
    optimizer.step()
    other.step()
    assert not recwarn.list


def test_a_replacement_of_the_same_shape_is_not_reported(recwarn: pytest.WarningsRecorder) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = Apollo([p])
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(4))]
    run_steps(optimizer, range(1))
    assert not [w for w in recwarn if issubclass(w.category, ApolloWarning)]


def test_a_group_added_to_a_copy_is_not_reported(recwarn: pytest.WarningsRecorder) -> None:
    """A copy does not know with which shapes its groups were given."""
    optimizer = copy.deepcopy(Apollo(parameters([(4,)])))
    optimizer.add_param_group({"params": parameters([(3,)])})
    run_steps(optimizer, range(1))
    assert not [w for w in recwarn if issubclass(w.category, ApolloWarning)]


def keep_all_but_step(k: str, v: torch.Tensor) -> torch.Tensor:
    return v if k == "step" else v[[0, 2, 5]]


def keep_rows(k: str, v: torch.Tensor) -> torch.Tensor:
    return v[[0, 2, 5]] if v.dim() else v


def add_rows(k: str, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([v, v.new_zeros(2, *v.shape[1:])]) if v.dim() else v


@pytest.mark.parametrize(
    ("make", "settings", "edit"),
    [
        (Apollo, {}, keep_all_but_step),
        (ApolloW, {}, keep_rows),
        (ApolloW, {}, add_rows),
        (Apollo, {"rebound": "belief", "capturable": True}, keep_rows),
        (ApolloW, {"rebound": "belief", "rounding": "kahan"}, add_rows),
    ],
)
def test_rows_are_edited_as_gaussian_splatting_does(make: Any, settings: Any, edit: Any) -> None:
    """Tools edit all entries except 0-dim ones, of which Apollo by default has only ``step``.

    The next step is that of an optimizer whose state is the edited one.
    """
    dtype = torch.bfloat16 if "rounding" in settings else torch.float32
    p = torch.nn.Parameter(normal((6, 3), "p", dtype=dtype))
    optimizer = make([p], warmup_steps=0, lr=0.1, weight_decay=0.1, **settings)
    run_steps(optimizer, range(2))
    state = optimizer.state.pop(p)
    edited = torch.nn.Parameter(edit("p", p.detach()))
    optimizer.state[edited] = {k: edit(k, v) for k, v in state.items()}
    optimizer.param_groups[0]["params"] = [edited]
    twin = make([torch.nn.Parameter(edited.detach().clone())], **settings)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, twin):
        run_steps(each, range(2, 4))
    assert same(snapshot(optimizer), snapshot(twin))
    assert optimizer.state[edited]["hessian_diag"].shape == edited.shape
    assert float(optimizer.state[edited]["step"]) == 4


def test_an_idiom_that_slices_scalars_is_an_error_with_apollow() -> None:
    optimizer = ApolloW(parameters([(6, 3)]))
    run_steps(optimizer, range(1))
    (state,) = optimizer.state.values()
    with pytest.raises(IndexError):
        {k: keep_all_but_step(k, v) for k, v in state.items()}


@pytest.mark.parametrize(
    "value", [3, 3.0, torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([3])], ids=repr
)
def test_saved_counters_of_any_kind_go_on(value: Any) -> None:
    optimizer = ApolloW(parameters([(3,)]), lr=0.1, rebound="belief", weight_decay=0.1)
    run_steps(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = value
    saved["state"][0]["previous_lr"] = float(saved["state"][0]["previous_lr"])
    saved["state"][0]["threshold"] = float(saved["state"][0]["threshold"])
    params = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    fresh = ApolloW(params, lr=9.0)
    fresh.load_state_dict(saved)
    for each in (optimizer, fresh):
        run_steps(each, range(3, 6))
    assert same(snapshot(optimizer), snapshot(fresh))
    assert fresh.state[params[0]]["step"].dtype is torch.float32


def test_an_invalid_counter_is_refused() -> None:
    optimizer = Apollo(parameters([(3,)]))
    run_steps(optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = "three"
    with pytest.raises(ValueError, match="step must be a number or a 0-dim tensor, got 'three'"):
        optimizer.load_state_dict(saved)


def test_a_bfloat16_state_in_a_full_state_dict() -> None:
    """A group holds no torch.dtype, which distributed checkpoints refuse."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    models = [torch.nn.Linear(4, 2) for _ in range(2)]
    optimizers = [Apollo(model.parameters(), state_dtype=torch.bfloat16) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    saved = get_optimizer_state_dict(models[0], optimizers[0], options=options)
    set_optimizer_state_dict(models[1], optimizers[1], saved, options=options)
    assert optimizers[1].param_groups[0]["state_dtype"] == "bfloat16"
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same(dict(optimizers[0].state[p]), dict(optimizers[1].state[q]))


def test_seeds_of_optimizers() -> None:
    """The seed follows torch's generator; what a run draws from it does not depend on Apollo."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = Apollo(parameters([(3,)])).param_groups[0]["seed"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert Apollo(parameters([(3,)])).param_groups[0]["seed"] != first
    torch.manual_seed(0)
    resumed = Apollo(parameters([(3,)]))
    assert resumed.param_groups[0]["seed"] == first
    resumed.load_state_dict(Apollo(parameters([(3,)]), seed=7).state_dict())
    assert resumed.param_groups[0]["seed"] == 7


@BACK_ENDS
def test_a_reordered_group_resumes_to_the_same_bits(back_end: dict[str, Any]) -> None:
    def train(resume: bool) -> list[torch.Tensor]:
        a, b = parameters([(40,), (40,)], torch.bfloat16)
        optimizer = Apollo([a, b], lr=0.05, warmup_steps=0, seed=3, **back_end)
        for t in range(6):
            if t == 2:
                optimizer.param_groups[0]["params"] = [b, a]
            if t == 4 and resume:
                saved = optimizer.state_dict()
                optimizer = Apollo([b, a], **back_end)
                optimizer.load_state_dict(saved)
            give_gradients([a, b], t)
            optimizer.step()
        return [a.detach(), b.detach()]

    assert same(train(False), train(True))


@pytest.mark.parametrize("back_end", [{"foreach": True}, {"foreach": False}], ids=str)
def test_half_precision_complex_numbers(back_end: dict[str, Any]) -> None:
    """complex32 is two float16; a gradient may be conjugated lazily."""
    results = []
    for dtype in (torch.complex64, torch.complex32):
        p = torch.nn.Parameter(torch.tensor([1 + 2j, -1j, 0.5], dtype=dtype))
        optimizer = Apollo([p], lr=0.5, warmup_steps=0, rounding="nearest", **back_end)
        for t in range(2):
            g = torch.tensor([1 - 1j, 2j, 1.0 + t], dtype=torch.complex64)
            p.grad = g.conj() if dtype is torch.complex64 else g.conj().resolve_conj().to(dtype)
            optimizer.step()
        results.append(torch.view_as_real(p.detach()).float())
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=2e-3)


def test_hyperparameters_with_a_gradient() -> None:
    """beta and weight_decay may be tensors where autograd runs through the step, as in Adam."""

    def trained(beta: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        p = torch.linspace(1.0, 2.0, 4, dtype=torch.float64, requires_grad=True).clone()
        optimizer = Apollo(
            [p], lr=0.1, beta=beta, weight_decay=decay, warmup_steps=0, differentiable=True
        )
        for t in range(3):
            p.grad = p * (t + 1)
            optimizer.step()
        return p

    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.1)]
    assert torch.autograd.gradcheck(trained, numbers)
    with pytest.raises(ValueError, match="weight_decay must be a number unless differentiable"):
        Apollo(parameters([(3,)]), weight_decay=numbers[1])
    with pytest.raises(ValueError, match="differentiable must be the same for all groups"):
        Apollo([{"params": parameters([(3,)]), "differentiable": True}])


@pytest.mark.parametrize("capturable", [False, True])
def test_the_first_gradient_is_taken_whole(capturable: bool) -> None:
    """alpha is exactly 1 at the first step, so that m is g, in float64 too."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = Apollo([p], capturable=capturable, foreach=True)
    p.grad = normal((4,), "g")
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], p.grad)
