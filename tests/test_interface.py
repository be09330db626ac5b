"""The interface of the class: signature, defaults, and errors for bad values."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import apollo_qn
from apollo_qn import Apollo, ApolloW
from tests.helpers import parameters, run_steps, same, snapshot

DEFAULTS: dict[str, Any] = {
    "params": inspect.Parameter.empty,
    "lr": 1.0,
    "beta": 0.9,
    "eps": 1e-4,
    "sigma": 1.0,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "rebound": "constant",
    "warmup_steps": 500,
    "warmup_init_lr": None,
    "foreach": None,
    "fused": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "rounding": None,
    "state_dtype": None,
    "seed": None,
}
POSITIONAL = ["params", "lr", "beta", "eps", "sigma", "weight_decay"]


def test_signature() -> None:
    found = inspect.signature(Apollo).parameters
    assert {name: p.default for name, p in found.items()} == DEFAULTS
    assert list(found)[: len(POSITIONAL)] == POSITIONAL
    for name, p in found.items():
        wanted = p.POSITIONAL_OR_KEYWORD if name in POSITIONAL else p.KEYWORD_ONLY
        assert p.kind is wanted, name


def test_apollow_is_apollo_with_decoupled_decay() -> None:
    p = parameters([(3,)])
    one, other = ApolloW(p, weight_decay=0.1, seed=0), Apollo(p, weight_decay=0.1, seed=0)
    assert isinstance(one, Apollo)
    assert one.defaults == {**other.defaults, "decoupled_weight_decay": True}
    assert not ApolloW(p, decoupled_weight_decay=False).defaults["decoupled_weight_decay"]
    positional = list(inspect.signature(ApolloW).parameters)[: len(POSITIONAL)]
    assert positional == POSITIONAL
    assert ApolloW(p, 0.1, 0.2, 0.3, 0.4, 0.5).defaults["weight_decay"] == 0.5


def test_public_names() -> None:
    optimizers = {"Apollo", "ApolloW", "GradientRelease", "apollo"}
    assert set(apollo_qn.__all__) == optimizers | {
        "ApolloWarning", "LearningRateWarning", "lr_range_test",
    }  # fmt: skip
    assert apollo_qn.__version__


nan, inf = math.nan, math.inf
BAD: list[tuple[str, Any, str]] = [
    *[("lr", x, "a finite number >= 0") for x in (-0.1, nan, inf, "1", None, True)],
    ("lr", torch.tensor(-1.0), "a finite number >= 0"),
    ("lr", torch.ones(2), r"a tensor of one real element, got shape \(2,\)"),
    ("lr", torch.ones((), dtype=torch.complex64), "a tensor of one real element"),
    *[("beta", x, r"in \[0, 1\)") for x in (-0.1, 1.0, 1, 2.0, nan, (0.9, 0.99), None)],
    *[("eps", x, "a finite number >= 0") for x in (-1e-9, nan, inf, None)],
    *[("sigma", x, "a finite number > 0") for x in (0, 0.0, -1.0, nan, inf, None)],
    *[("weight_decay", x, "a finite number >= 0") for x in (-1e-9, nan, inf, None)],
    *[("warmup_steps", x, "a whole number >= 0") for x in (-1, 1.5, nan, None, "5")],
    *[("warmup_init_lr", x, "None or a finite number >= 0") for x in (-1.0, nan, inf, "a")],
    *[("rebound", x, "'constant' or 'belief'") for x in ("Constant", None, 1)],
    *[("rounding", x, "None, 'nearest', 'stochastic' or 'kahan'") for x in ("Kahan", 1, True)],
    *[
        ("state_dtype", x, r"None \(float32 at least\) or torch.bfloat16")
        for x in (torch.float16, torch.float32, "float16")
    ],
    *[("seed", x, r"a whole number in \[0, 2\*\*64\)") for x in (-1, 1 << 64, 1.0, "0", True)],
]
BAD_IDS = [f"{name}={value!r}" for name, value, _ in BAD]


@pytest.mark.parametrize(("name", "value", "what"), BAD, ids=BAD_IDS)
def test_bad_values_name_argument_value_and_range(name: str, value: Any, what: str) -> None:
    a, b, c = parameters([(3,), (4,), (5,)])
    message = f"{name} must be .*{what}"
    with pytest.raises(ValueError, match=message) as raised:
        Apollo([a], **{name: value})
    if not isinstance(value, Tensor):
        assert repr(value) in str(raised.value)
    with pytest.raises(ValueError, match=message):
        ApolloW([a], **{name: value})
    with pytest.raises(ValueError, match=message):
        Apollo([{"params": [a]}, {"params": [b], name: value}])
    optimizer = Apollo([a, b])
    run_steps(optimizer, range(2))
    before, group = snapshot(optimizer), {"params": [c], name: value}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert same(before, snapshot(optimizer))
    assert len(optimizer.param_groups) == 1
    assert set(group) == {"params", name}


def test_contradicting_values_are_refused() -> None:
    p = parameters([(3,)])
    with pytest.raises(ValueError, match="eps must be > 0 with rebound='belief'"):
        Apollo(p, eps=0.0, rebound="belief")
    with pytest.raises(ValueError, match="warmup_init_lr must be None or 0 where lr is 0"):
        Apollo(p, lr=0.0, warmup_init_lr=0.1)


@pytest.mark.parametrize(
    "good",
    [
        {"lr": 0},
        {"lr": 0.0, "warmup_init_lr": 0.0},
        {"beta": 0},
        {"eps": 0},
        {"warmup_steps": 10.0},
        {"warmup_init_lr": 3.0},
        {"weight_decay": 1},
        {"lr": torch.tensor([0.5])},
    ],
    ids=str,
)
def test_values_at_the_border(good: dict[str, Any]) -> None:
    params = parameters()
    run_steps(Apollo(params, **good), range(3))
    assert all(p.isfinite().all() for p in params)


def test_contradictory_back_end_choices_are_refused() -> None:
    p = parameters([(3,)])
    with pytest.raises(RuntimeError, match="cannot both be True"):
        Apollo(p, fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="foreach=True does not support differentiable=True"):
        Apollo(p, foreach=True, differentiable=True)
    with pytest.raises(RuntimeError, match="fused=True does not support differentiable=True"):
        Apollo(p, fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="cannot both be True"):
        Apollo(p, foreach=True).add_param_group({"params": parameters([(4,)]), "fused": True})
    run_steps(Apollo(p, fused=False), range(1))


def test_what_torch_refuses_too() -> None:
    p = parameters([(3,)])
    with pytest.raises(ValueError, match="empty parameter list"):
        Apollo([])
    with pytest.raises(TypeError):
        Apollo(p[0])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Apollo(p).add_param_group({"params": p})
    with pytest.raises(TypeError, match="must be a dict"):
        Apollo(p).add_param_group(parameters([(3,)]))  # type: ignore[arg-type]
