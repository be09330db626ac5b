"""The modes that the tests of all back ends share, and tables of pairs of options."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

DECAY: dict[str, dict[str, Any]] = {
    "none": {},
    "zero-decoupled": {"decoupled_weight_decay": True},
    "L2": {"weight_decay": 0.05},
    "decoupled": {"weight_decay": 0.05, "decoupled_weight_decay": True},
}
REBOUND: dict[str, dict[str, Any]] = {
    "constant": {"rebound": "constant"},
    # belief's threshold may be near 0 in tensors of one element; a larger eps conditions them well
    "belief": {"rebound": "belief", "eps": 0.1},
}
MODE_OPTIONS: dict[str, dict[str, Any]] = {
    f"{rebound}-{decay}": {**REBOUND[rebound], **DECAY[decay]}
    for rebound, decay in itertools.product(REBOUND, DECAY)
}
MODES = list(MODE_OPTIONS.values())
MODE_IDS = list(MODE_OPTIONS)
# modes with the default eps, for tests that do not compare back ends
GROUP_MODES: list[dict[str, Any]] = [
    {"rebound": rebound, "weight_decay": wd, "decoupled_weight_decay": decoupled}
    for rebound, (wd, decoupled) in itertools.product(
        ("constant", "belief"), [(0.0, False), (0.05, False), (0.05, True)]
    )
]

# dtype of the parameter, its rounding, dtype of the state
Storing = tuple[torch.dtype, Any, torch.dtype | None]
STORING: list[Storing] = [
    (torch.bfloat16, "nearest", torch.bfloat16),
    (torch.bfloat16, "stochastic", None),
    (torch.bfloat16, "stochastic", torch.bfloat16),
    (torch.bfloat16, "kahan", None),
    (torch.bfloat16, "kahan", torch.bfloat16),
    (torch.float16, "stochastic", torch.bfloat16),
    (torch.float16, "kahan", None),
    (torch.float32, "kahan", torch.bfloat16),
]
STORING_OPTIONS = {
    " ".join(str(part).removeprefix("torch.") for part in storing): storing for storing in STORING
}


def pairs(**options: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test so that every two values of different options meet in some row.

    Most faults need at most two options to show. The full product of six options has hundreds of
    rows, the pairs have a few dozen.

    Args:
        options: for each argument of the test its values by id. A value may be a ``pytest.param``
            with marks.
    """
    rows = []
    for row in covering_rows([list(values) for values in options.values()]):
        values: list[Any] = []
        marks: list[Any] = []
        for name, id_ in zip(options, row, strict=True):
            value = options[name][id_]
            if isinstance(value, _WITH_MARKS):
                marks.extend(value.marks)
                (value,) = value.values
            values.append(value)
        rows.append(pytest.param(*values, id="-".join(row), marks=marks))
    return pytest.mark.parametrize(list(options), rows)


def slow_except(names: str, rows: Iterable[Any], fast: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize over ``rows``; those that are not in ``fast`` are marked slow."""
    chosen = list(fast)
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*row, marks=() if row in chosen else pytest.mark.slow, id=str(row))
            for row in rows
        ],
    )


_WITH_MARKS = type(pytest.param())


def covering_rows(columns: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return rows, one value from each column, in which every pair of values occurs."""
    if len(columns) == 1:
        return [(value,) for value in columns[0]]
    # a GPU's own tests have one column, and run where this package is missing
    from allpairspy import AllPairs

    return [tuple(row) for row in AllPairs(columns)]
