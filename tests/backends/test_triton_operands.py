"""Which tensors the Triton kernel takes: types, layouts, and memory that overlaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo
from apollo_qn.backends import triton
from apollo_qn.backends.base import Batch, TensorLists
from apollo_qn.hyperparameters import StepScalars
from apollo_qn.state import hyperparameters
from tests.backends.interpreter import SetSizes
from tests.helpers import DEVICE, parameters

Row = dict[str, Tensor]
COLUMNS = ("params", "grads", "exp_avgs", "hessian_diags")


def row(shape: tuple[int, ...] = (6, 4)) -> Row:
    return {name: torch.zeros(shape, device=DEVICE) for name in COLUMNS}


def taken(*rows: Row, **settings: Any) -> list[bool]:
    """Whether the kernel takes each row, alone and split over two batches alike."""
    h = hyperparameters(Apollo(parameters([(1,)]), **settings).param_groups[0])

    def batch(some: tuple[Row, ...]) -> Batch:
        names = COLUMNS + (("thresholds",) if h.belief else ())
        lists = TensorLists(**{name: [one[name] for one in some] for name in names})
        return Batch(lists, h, StepScalars.at(1.0, h))

    (together,) = triton.Triton().takes([batch(rows)])
    first, rest = triton.Triton().takes([batch(rows[:1]), batch(rows[1:])])
    assert first + rest == together
    return together


def test_views_of_one_storage_that_do_not_overlap(interpreted: SetSizes) -> None:
    line = torch.zeros(16 * 4, device=DEVICE)
    views = line.split(4)
    rows = [dict(zip(COLUMNS, views[4 * i : 4 * i + 4], strict=True)) for i in range(4)]
    assert taken(*rows) == [True] * 4


@pytest.mark.parametrize("column", ["params", "exp_avgs", "hessian_diags"])
def test_written_memory_that_overlaps(column: str, interpreted: SetSizes) -> None:
    """In one element; both tensors are left to a back end that updates them in order."""
    rows = [row((4,)) for _ in range(4)]
    line = torch.zeros(7, device=DEVICE)
    rows[1][column], rows[3]["params"] = line[:4], line[3:]
    assert taken(*rows) == [True, False, True, False]


def test_one_span_that_covers_several(interpreted: SetSizes) -> None:
    rows = [row((4,)), row((2,)), row((4,)), row((2,)), row((2,))]
    line = torch.zeros(8, device=DEVICE)
    rows[0]["params"], rows[1]["exp_avgs"], rows[3]["params"] = line[:4], line[:2], line[2:4]
    assert taken(*rows) == [False, False, True, False, True]


def test_state_that_is_the_parameter(interpreted: SetSizes) -> None:
    rows = [row(), row()]
    rows[1]["exp_avgs"] = rows[1]["params"]
    assert taken(*rows) == [True, False]


def test_thresholds_that_are_one_tensor(interpreted: SetSizes) -> None:
    rows = [row() | {"thresholds": torch.zeros((), device=DEVICE)} for _ in range(3)]
    assert taken(*rows, rebound="belief") == [True] * 3
    rows[2]["thresholds"] = rows[0]["thresholds"]
    assert taken(*rows, rebound="belief") == [False, True, False]


@pytest.mark.parametrize("shift", [0, 3])
def test_a_gradient_in_memory_that_another_row_writes(shift: int, interpreted: SetSizes) -> None:
    """The order of all updates matters, so none is taken."""
    line = torch.zeros(14, device=DEVICE)
    rows = [row((4,)), row((4,)), row((4,))]
    rows[0]["params"], rows[2]["grads"] = line[4:8], line[4 + shift : 8 + shift]
    assert taken(*rows) == [False] * 3
    rows[2]["grads"] = line[8:12]  # behind it
    assert taken(*rows) == [True] * 3


def test_gradients_may_share_memory(interpreted: SetSizes) -> None:
    rows = [row(), row()]
    rows[1]["grads"] = rows[0]["grads"]
    assert taken(*rows) == [True, True]


class Subclass(Tensor):
    pass


CHANGES: dict[str, Callable[[Row], None]] = {
    "a class of its own": lambda r: r.update(params=r["params"].as_subclass(Subclass)),
    "sparse": lambda r: r.update(grads=r["grads"].to_sparse()),
    "empty": lambda r: r.update({name: x[:0] for name, x in r.items()}),
    "strides of the gradient": lambda r: r.update(grads=torch.zeros(4, 6, device=DEVICE).t()),
    "strides of m": lambda r: r.update(exp_avgs=torch.zeros(4, 6, device=DEVICE).t()),
    "expanded": lambda r: r.update(grads=torch.zeros(1, 4, device=DEVICE).expand(6, 4)),
    "every other column": lambda r: r.update({name: x[:, ::2] for name, x in r.items()}),
    "negated lazily": lambda r: r.update(grads=torch._neg_view(r["grads"])),
    "another shape": lambda r: r.update(hessian_diags=torch.zeros(4, 6, device=DEVICE)),
    "type of B": lambda r: r.update(hessian_diags=r["hessian_diags"].double()),
    "integers": lambda r: r.update(grads=r["grads"].long()),
    "float64 with a float32 state": lambda r: r.update(params=r["params"].double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_the_kernel_cannot_take(change: Callable[[Row], None], interpreted: SetSizes) -> None:
    """The other rows are taken."""
    rows = [row(), row(), row()]
    change(rows[1])
    assert taken(*rows) == [True, False, True]


def test_a_transposed_row(interpreted: SetSizes) -> None:
    rows = [row(), {name: x.t() for name, x in row().items()}, row()]
    assert taken(*rows) == [True] * 3


def test_the_type_of_a_threshold(interpreted: SetSizes) -> None:
    rows = [row() | {"thresholds": torch.zeros((), device=DEVICE)} for _ in range(2)]
    rows[1]["thresholds"] = rows[1]["thresholds"].double()
    assert taken(*rows, rebound="belief") == [True, False]
    rows[1]["thresholds"] = torch.zeros(0, device=DEVICE)  # at address 0
    assert taken(*rows, rebound="belief") == [True, False]
