"""Checks of one parameter's saved state. Each error names the entry and the parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apollo_qn.backends.base import Describe


def check_present(
    names: tuple[str, ...], state: Mapping[str, Any], p: Tensor, describe: Describe
) -> None:
    """Raise ValueError if an entry is missing.

    Args:
        names: entries that the state must have.
        state: saved state of the parameter ``p``.
        p: parameter.
        describe: function that returns the name of a parameter for a message.
    """
    for name in names:
        if name not in state:
            found = sorted(map(str, state))
            raise ValueError(f"the saved state of {describe(p)} lacks {name!r}; it has {found}")


def check_scalar(name: str, value: Any, p: Tensor, describe: Describe) -> None:
    """Raise ValueError if an entry is neither a number nor a tensor of one element."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor, got {value!r} for {describe(p)}"
        )
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} must have one element, got shape {tuple(value.shape)} for {describe(p)}"
        )


def check_step(state: Mapping[str, Any], p: Tensor, describe: Describe) -> None:
    """Raise ValueError if the number of steps is not a finite number >= 0."""
    check_scalar("step", state["step"], p, describe)
    if not 0 <= float(state["step"]) < math.inf:
        raise ValueError(
            f"step must be a finite number >= 0, got {state['step']!r} for {describe(p)}"
        )


def check_tensor(name: str, value: Any, p: Tensor, describe: Describe) -> None:
    """Raise ValueError if an entry is no tensor of its parameter's shape, real where that is."""
    if not isinstance(value, Tensor) or value.shape != p.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} must have its parameter's shape {tuple(p.shape)}, got {got} for {describe(p)}"
        )
    if value.is_complex() and not p.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype} for {describe(p)}")
