"""What a hyperparameter may be: for the class, and for its twin in JAX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

_NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "a finite number >= 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _NOT_NEGATIVE,
    "beta": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "eps": _NOT_NEGATIVE,
    "sigma": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": (lambda x: 0 <= x < math.inf and x == int(x), "a whole number >= 0"),
    "warmup_init_lr": (lambda x: 0 <= x < math.inf, "None or a finite number >= 0"),
}


def check(given: Mapping[str, Any], lr: str = "lr") -> None:
    """Raise ValueError for the first of these hyperparameters that is out of its range.

    Args:
        given: hyperparameters by name; those that are left out, or None where that is allowed, are
            not looked at.
        lr: the name that the learning rate has.
    """
    for known, (holds, what) in _RANGES.items():
        name = lr if known == "lr" else known
        if name not in given or (known == "warmup_init_lr" and given[name] is None):
            continue
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
            raise ValueError(f"{name} must be {what}, got {value!r}")
    if given.get(lr) == 0 and (given.get("warmup_init_lr") or 0) > 0:
        raise ValueError(
            f"warmup_init_lr must be None or 0 where {lr} is 0, got {given['warmup_init_lr']!r}"
        )
    if given["rebound"] not in ("constant", "belief"):
        raise ValueError(f"rebound must be 'constant' or 'belief', got {given['rebound']!r}")
    if given["rebound"] == "belief" and given.get("eps") == 0:
        raise ValueError("eps must be > 0 with rebound='belief', got 0")
