"""The functional form."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo, advice, apollo
from tests.helpers import BACK_ENDS, DEVICE, gradient, parameters, same

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def lists(n: int = 3) -> Lists:
    params = [p.detach() for p in parameters([(3, 5), (), (300,)][:n])]
    return (
        params,
        [gradient(p.shape, p.dtype, i, 0).clone() for i, p in enumerate(params)],
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros(()) for _ in params],
    )


def test_signature() -> None:
    names = list(inspect.signature(apollo).parameters)
    assert names[:5] == ["params", "grads", "exp_avgs", "hessian_diags", "state_steps"]
    functional = inspect.signature(apollo).parameters
    for name, parameter in inspect.signature(Apollo).parameters.items():
        if name not in ("params", "state_dtype"):  # the state is the caller's
            assert functional[name].default == parameter.default, name


ADVICE = [
    ("betas", (0.9, 0.999), "use beta for the first of the two"),
    ("beta1", 0.9, "use beta"),
    ("momentum", 0.9, "use beta, and start at ten times the lr of SGD"),
    ("amsgrad", False, "leave it out"),
    ("nesterov", True, "leave it out"),
    ("warmup", 100, "use warmup_steps"),
    ("init_lr", 0.01, "use warmup_init_lr"),
    ("weight_decay_type", "L2", "'L2' is the default, and decoupled_weight_decay=True"),
    ("state_dtype", torch.bfloat16, "make exp_avgs and hessian_diags of that type"),
]


@pytest.mark.parametrize(("name", "value", "message"), ADVICE, ids=[x[0] for x in ADVICE])
def test_keywords_of_other_optimizers_get_advice(name: str, value: Any, message: str) -> None:
    given = lists()
    with pytest.raises(TypeError, match=f"apollo has no argument {name}, got {name}=.*{message}"):
        apollo(*given, **{name: value})  # type: ignore[arg-type]
    assert not any(step.any() for step in given[-1])


def test_other_keywords_are_left_to_python() -> None:
    assert not set(inspect.signature(apollo).parameters) & advice.FUNCTIONAL.keys()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigmaa'"):
        apollo(*lists(), sigmaa=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("rebound", ["constant", "belief"])
@pytest.mark.parametrize("decoupled", [False, True])
@BACK_ENDS
def test_it_does_what_the_class_does(
    back_end: dict[str, Any], decoupled: bool, rebound: Any
) -> None:
    params, _, m, B, steps = lists()
    settings: dict[str, Any] = {
        "lr": 0.4,
        "weight_decay": 0.1,
        "decoupled_weight_decay": decoupled,
        "rebound": rebound,
        "warmup_steps": 4,
        **back_end,
    }
    others = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Apollo(others, **settings)
    rates = [torch.zeros((), dtype=torch.float64) for _ in params]
    thresholds = [torch.ones((), device=DEVICE) for _ in params]
    for t in range(6):
        grads = [gradient(p.shape, p.dtype, i, t).clone() for i, p in enumerate(params)]
        for p, g in zip(others, grads, strict=True):
            p.grad = g
        optimizer.step()
        apollo(
            params,
            grads,
            m,
            B,
            steps,
            previous_lrs=rates if decoupled else None,
            thresholds=thresholds if rebound == "belief" else None,
            **settings,
        )
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert same(p, q.data)
        assert same(m[i], optimizer.state[q]["exp_avg"])
        assert steps[i] == 6


@pytest.mark.parametrize("which", range(1, 5))
def test_lists_of_other_lengths(which: int) -> None:
    given = lists()
    copies = [[x.clone() for x in tensors] for tensors in given]
    given[which].pop()
    name = ("params", "grads", "exp_avgs", "hessian_diags", "state_steps")[which]
    with pytest.raises(ValueError, match=rf"{name} must have one tensor for each of the 3 .*got 2"):
        apollo(*given)
    assert same(copies[0], given[0])


def test_lists_that_the_mode_needs() -> None:
    with pytest.raises(ValueError, match="previous_lrs must be a list"):
        apollo(*lists(), decoupled_weight_decay=True)
    with pytest.raises(ValueError, match="thresholds must be a list"):
        apollo(*lists(), rebound="belief")
    with pytest.raises(ValueError, match="thresholds must have one tensor"):
        apollo(*lists(), rebound="belief", thresholds=[])


def test_compensations() -> None:
    """Each 16-bit parameter needs one; entries of other parameters are not touched."""
    narrow, wide = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    low, other = torch.zeros_like(narrow), torch.ones(5)

    def step(compensations: Any, **settings: Any) -> None:
        zeros = [[torch.zeros(3), torch.zeros(3)] for _ in range(2)]
        apollo(
            [narrow, wide],
            [torch.ones_like(narrow), torch.ones(3)],
            *zeros,
            [torch.zeros(()), torch.zeros(())],
            lr=2.0**-12,
            warmup_steps=0,
            compensations=compensations,
            **{"rounding": "kahan", **settings},
        )

    for bad in (None, [low], [None, None], [torch.zeros(4, dtype=torch.bfloat16), None], [other]):
        with pytest.raises(ValueError, match="compensations must"):
            step(bad)
    step([low, other])
    assert narrow.eq(1).all()
    assert low.eq(-(2.0**-12)).all()
    assert wide.eq(1 - 2.0**-12).all()
    assert other.eq(1).all()
    step(None, rounding="nearest")
    with pytest.raises(ValueError, match="rounding must be None, 'nearest'"):
        step(None, rounding="up")
    with pytest.raises(ValueError, match=r"seed must be a whole number in \[0, 2\*\*64\), got -1"):
        step(None, seed=-1)


@BACK_ENDS
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("params", torch.ones(3, dtype=torch.int64), "params must be floating or complex"),
        ("grads", None, "grads must hold tensors, got None"),
        ("grads", torch.ones(3, dtype=torch.complex64), "gradient is of type torch.complex64"),
        ("grads", torch.ones(3, device="meta"), "gradient is of type torch.float32 on meta"),
        ("exp_avgs", torch.ones(3, dtype=torch.float16), "exp_avgs must be bfloat16, float32"),
        ("state_steps", torch.tensor(0), "state_steps must be floating 0-dim .*int64"),
        ("state_steps", 0, "state_steps must be floating 0-dim tensors, got 0"),
        ("thresholds", torch.zeros(0), r"thresholds must be floating 0-dim .*\(0,\)"),
        ("thresholds", torch.zeros((), device="meta"), "thresholds must lie on .*got meta"),
    ],
    ids=str,
)
def test_wrong_tensors_change_nothing(
    name: str, value: Any, message: str, back_end: dict[str, Any]
) -> None:
    names = ("params", "grads", "exp_avgs", "hessian_diags")
    given: dict[str, Any] = {key: [torch.ones(3), torch.ones(3)] for key in names}
    given |= {key: [torch.ones(()), torch.ones(())] for key in ("state_steps", "thresholds")}
    given[name][1] = value
    with pytest.raises((ValueError, RuntimeError), match=message):
        apollo(**given, rebound="belief", warmup_steps=0, **back_end)
    assert all(column[0].eq(1).all() for column in given.values())


def test_positions_tell_the_bits_apart() -> None:
    def trained(positions: list[int] | None) -> list[Tensor]:
        params = [torch.ones(200, dtype=torch.bfloat16) for _ in range(2)]
        others = [[torch.zeros(200), torch.zeros(200)] for _ in range(2)]
        grads = [torch.ones_like(p) for p in params]
        steps = [torch.zeros(()), torch.zeros(())]
        settings: dict[str, Any] = {"lr": 2.0**-9, "warmup_steps": 0, "positions": positions}
        apollo(params, grads, *others, steps, rounding="stochastic", **settings)
        return params

    a, b = trained(None)
    assert not torch.equal(a, b)
    assert same(trained([1, 0]), [b, a])
    with pytest.raises(
        ValueError, match=r"positions must have one number for each of the 2 .*got 1"
    ):
        trained([1])


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot both"):
        apollo(*lists(), fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        apollo(*lists(), foreach=True, differentiable=True)


def test_tensor_lr_elsewhere_needs_capturable() -> None:
    with pytest.raises(ValueError, match="lr as a tensor on meta needs capturable=True"):
        apollo(*lists(), lr=torch.tensor(1.0, device="meta"), warmup_steps=0)


def test_warmup_of_a_share_of_the_base() -> None:
    """A scheduler's lr does not change the share that warmup starts with."""
    params, grads, m, B, steps = lists(1)
    before = params[0].clone()
    apollo(
        params, grads, m, B, steps, lr=0.1, warmup_steps=10, warmup_init_lr=0.5, warmup_base_lr=1.0
    )
    torch.testing.assert_close(before - params[0], 0.1 * 0.5 * grads[0])


def test_no_tensors_at_all() -> None:
    apollo([], [], [], [], [])
