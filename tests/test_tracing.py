"""Compilers, tracers and transforms see the plain algorithm, or a clear error."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from apollo_qn import Apollo, ApolloW, apollo
from tests import tolerances
from tests.helpers import give_gradients, normal, parameters

# a row per pair of options; torch.compile takes a second for each
OPTIONS: list[dict[str, Any]] = [
    {"rebound": "belief", "eps": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True, "weight_decay": 0.1, "capturable": True},
    {"rebound": "belief", "eps": 0.1, "warmup_steps": 0, "foreach": False},
]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Return the usual two groups: only matrices decay."""
    matrices = [p for p in params if p.dim() > 1]
    others = [p for p in params if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.05}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_groups_in_one_graph_follow_eager(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        params = parameters([(3, 5), (4,), (2, 2), ()], torch.float32)
        settings = {"lr": 0.1, "warmup_steps": 3, "seed": 0, **options}
        optimizer = Apollo(groups_of(params), **settings)
        step: Any = optimizer.step
        if compiled:
            step = torch.compile(lambda o=optimizer: o.step(), backend="eager", fullgraph=True)
        for t in range(4):
            give_gradients(params, t)
            step()
        assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
        results.append([p.detach() for p in params])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=tolerances.COMPILED)


def test_a_compiled_differentiable_step_runs_untraced() -> None:
    """The compiler would lose the derivatives of m and B."""
    torch._dynamo.reset()
    gradients = []
    for backend in (None, "aot_eager"):
        start = torch.tensor([1.0, 2.0], requires_grad=True)
        p = start.clone()
        optimizer = Apollo([p], lr=0.1, differentiable=True, warmup_steps=0)
        step: Any = optimizer.step
        if backend:
            step = torch.compile(lambda o=optimizer: o.step(), backend=backend)
        for _ in range(2):
            p.grad = 2 * p
            step()
        gradients += torch.autograd.grad(p.square().sum(), start)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    whole = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"differentiable=True cannot be compiled"):
        whole()


def test_kahan_rounding_can_be_turned_off_where_a_step_is_compiled() -> None:
    torch._dynamo.reset()
    params = [p.detach().bfloat16().requires_grad_() for p in parameters([(7, 5), (9,), (3,)])]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = Apollo(groups, lr=torch.tensor(0.1), warmup_steps=0, capturable=True)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for t, rounding in enumerate((None, None, "kahan", None)):
        optimizer.param_groups[1]["rounding"] = rounding
        for i, p in enumerate(params):
            p.grad = normal(p.shape, t, i, dtype=p.dtype)
        step()
    assert not optimizer.state[params[1]]["compensation"].any()


def test_the_functional_form_in_one_graph() -> None:
    torch._dynamo.reset()

    def step(grads: list[Tensor], lists: list[list[Tensor]], rates: list[Tensor]) -> None:
        params, *states = lists
        apollo(
            params, grads, *states, lr=0.1, warmup_steps=2, weight_decay=0.1,
            decoupled_weight_decay=True, previous_lrs=rates,
        )  # fmt: skip

    results = []
    for function in (step, torch.compile(step, backend="eager", fullgraph=True)):
        params = [normal(shape, "theta", dtype=torch.float32) for shape in ((4, 3), (5,))]
        lists = [params, *([torch.zeros_like(p) for p in params] for _ in range(2))]
        lists.append([torch.zeros(()) for _ in params])
        rates = [torch.zeros((), dtype=torch.float64) for _ in params]
        for t in range(3):
            function([normal(p.shape, "g", t, dtype=torch.float32) for p in params], lists, rates)
        results.append([x for column in (*lists, rates) for x in column])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=tolerances.COMPILED)


def test_optimizers_one_after_the_other_are_freed() -> None:
    """A compiled step keeps neither model nor optimizer alive, and the next one compiles too."""
    torch._dynamo.reset()

    def train(seed: int) -> tuple[weakref.ref[Any], weakref.ref[Any], Tensor]:
        p = torch.nn.Parameter(normal((4, 4), seed, dtype=torch.float32))
        optimizer = ApolloW([p], lr=0.1, weight_decay=0.1, warmup_steps=0)
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        for t in range(2):
            p.grad = normal((4, 4), "g", t, dtype=torch.float32)
            step()
        return weakref.ref(p), weakref.ref(optimizer), p.detach().clone()

    for seed in range(2):
        p, optimizer, _ = train(seed)
        gc.collect()
        assert p() is None
        assert optimizer() is None


def a_step_of(optimizer: Apollo, p: torch.nn.Parameter) -> Any:
    def step(g: Tensor) -> Tensor:
        p.grad = g * 1
        optimizer.step()
        return p.detach().clone()

    return step


def test_make_fx_records_the_step() -> None:
    results = []
    for traced in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = Apollo([p], lr=1.0, warmup_steps=0, capturable=True)
        p.grad = torch.full((3,), 0.5)
        optimizer.step()  # the state appears

        function: Any = a_step_of(optimizer, p)
        if traced:
            before = [x.detach().clone() for x in (p, *optimizer.state[p].values())]
            function = make_fx(function)(torch.ones(3))
            with torch.no_grad():  # tracing has taken a step
                for x, value in zip((p, *optimizer.state[p].values()), before, strict=True):
                    x.copy_(value)
        with torch.no_grad():
            results.append(function(torch.ones(3)))
    assert torch.equal(*results)


def test_a_trace_needs_capturable() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Apollo([p], lr=1.0, warmup_steps=0)

    with pytest.raises(RuntimeError, match="capturable must be True where a step is traced"):
        make_fx(a_step_of(optimizer, p))(torch.ones(3))
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("capturable", [False, True])
def test_fake_tensors(capturable: bool) -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = Apollo([p], capturable=capturable)
        p.grad = torch.ones(3)
        if not capturable:
            with pytest.raises(RuntimeError, match="capturable must be True"):
                optimizer.step()
            return
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_functionalize() -> None:
    def step(p: Tensor, g: Tensor, m: Tensor, B: Tensor, t: Tensor) -> Tensor:
        apollo([p], [g], [m], [B], [t], lr=0.1, warmup_steps=0, capturable=True)
        return p

    tensors = [torch.ones(3), torch.full((3,), 0.5), *torch.zeros(2, 3).unbind(), torch.zeros(())]
    wanted = step(*(x.clone() for x in tensors))
    assert torch.equal(torch.func.functionalize(step)(*(x.clone() for x in tensors)), wanted)

    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Apollo([p])

    def outside(g: Tensor) -> Tensor:
        p.grad = g * 1
        optimizer.step()
        return p.detach()

    with pytest.raises(RuntimeError, match="functionalize traces the gradient"):
        torch.func.functionalize(outside)(torch.ones(3))
    assert torch.equal(p, torch.ones(3))


def test_inference_mode_and_back() -> None:
    """Working memory that was made in inference mode can be used outside of it."""
    results = []
    for inference in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = Apollo([p], lr=0.1, warmup_steps=0, foreach=True)
        for t in range(3):
            p.grad = torch.full((3,), t + 1.0)
            with torch.inference_mode(inference and t < 2):
                optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
