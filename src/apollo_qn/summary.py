"""How an optimizer and its parameters are shown: ``repr(optimizer)``, and names in messages.

``repr`` gives the settings that differ from the defaults first.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from apollo_qn.backends.base import unnamed


def describe(optimizer: Optimizer) -> str:
    """Return one block of lines per group: lr, what differs from the defaults, and the rest."""
    defaults = _defaults(type(optimizer))
    lines = [f"{type(optimizer).__name__} ("]
    for i, group in enumerate(optimizer.param_groups):
        shown = {name: value for name, value in group.items() if name not in _NOT_SHOWN}
        # a group's first rate differs from lr only if it was changed
        expected = {**defaults, "warmup_base_lr": group["lr"]}
        first = ["lr", *(n for n in sorted(shown) if n != "lr" and _differs(n, shown, expected))]
        rest = [name for name in sorted(shown) if name not in first]
        lines.append(f"Parameter Group {i}")
        lines += [f"    {name}: {shown[name]}" for name in first]
        lines.append("    defaults: " + ", ".join(f"{name}={shown[name]!r}" for name in rest))
    return "\n".join([*lines, ")"])


_NOT_SHOWN = ("params", "param_names")


def _defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a constructor; a subclass that hands settings on inherits them."""
    result: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Optimizer) and "__init__" in vars(base):
            for name, p in inspect.signature(vars(base)["__init__"]).parameters.items():
                if p.default is not inspect.Parameter.empty:
                    result[name] = p.default
    return result


def _differs(name: str, group: dict[str, Any], expected: dict[str, Any]) -> bool:
    return name not in expected or bool(group[name] != expected[name])


def parameter_name(groups: list[dict[str, Any]], p: Tensor) -> str:
    """Return how a message names a parameter of the groups."""
    for group in groups:
        for name, q in zip(group.get("param_names", ()), group["params"], strict=False):
            if q is p:
                return f"the parameter {name!r} of shape {tuple(p.shape)}"
    return unnamed(p)
