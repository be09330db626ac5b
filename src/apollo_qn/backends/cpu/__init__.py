"""The fused back end for tensors in CPU memory: one call of a torch operator for all tensors.

``operators.cpp`` defines the operators through torch's stable ABI. ``tensor_lists.h`` reads their
arguments. ``schedule.h`` distributes the tensors over threads. ``kernel.h`` does the arithmetic on
the types of ``numbers.h``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from apollo_qn.backends.base import (
    Backend,
    Batch,
    TensorLists,
    increment_version,
    is_plain,
    step_scalars,
)
from apollo_qn.secant import Sums

_HOW = (
    "with torch >= 2.10 and a C++ compiler, `pip install 'setuptools>=77'` and, in a clone of the "
    "repository, `pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .` "
    "add it; docs/backends.md says more"
)


@cache
def why_not() -> str | None:
    """Return the reason why the fused operator is missing, or None if it is there."""
    library = Path(__file__).with_name("_kernel.so")
    if not library.exists():
        return f"the fused CPU kernel was not compiled when apollo-qn was installed ({_HOW})"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:  # compiled for another version of torch
        return (
            f"the fused CPU kernel cannot be loaded by torch {torch.__version__} ({error}; {_HOW})"
        )
    return None


class CPU(Backend):
    """Back end that updates all tensors of all batches, and counts their steps, in one call.

    The call checks all counters before it changes anything. Two more calls, which read and count,
    would each receive and check the same tensors again.
    """

    counts = True

    def takes(self, batches: list[Batch]) -> list[list[bool]]:
        """Return for each tensor whether the operator can update it."""
        arguments = _Arguments(batches)
        if not arguments.plain:
            # check each tensor, because the kernel may still take the plain ones
            plain = [_plain_members(batch) for batch in batches]
            kept = [
                batch.select(_indices(mask)) for batch, mask in zip(batches, plain, strict=True)
            ]
            if not any(len(batch.tensors) for batch in kept):
                return plain
            taken = self.takes([batch for batch in kept if len(batch.tensors)])
            flags = iter([flag for batch in taken for flag in batch])
            return [[on and next(flags) for on in mask] for mask in plain]
        flags = iter(torch.ops.apollo_qn.check(*arguments.tensors).tolist())
        return [[next(flags) >= 0 for _ in batch.tensors.params] for batch in batches]

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        arguments = _Arguments(batches)
        table = torch.ops.apollo_qn.measure(*arguments.tensors, *arguments.numbers())
        tables = table.split_with_sizes([len(batch.tensors) for batch in batches])
        return [
            Sums.from_table(rows, batch.h.belief)
            for rows, batch in zip(tables, batches, strict=True)
        ]

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Update and count all tensors, or return False and change none if one cannot be taken.

        It is also False if the counters or the previous rates of a batch differ.
        """
        arguments = _Arguments(batches)
        if not arguments.plain:
            return False
        table = None if sums is None else torch.cat([one.table() for one in sums])
        if not torch.ops.apollo_qn.step_(*arguments.tensors, *arguments.numbers(), table):
            return False
        increment_version(arguments.tensors[0])
        return True


class _Arguments:
    """Arguments of the operator for all batches: lists of tensors, and a table of scalars."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        lists = [batch.tensors for batch in batches]
        needed = ("params", "grads", "exp_avgs", "hessian_diags", "state_steps")
        optional = ("thresholds", "compensations", "previous_lrs")
        self.tensors = [
            *(_concatenate(lists, name) for name in needed),
            *(_concatenate_and_fill(lists, name) for name in optional),
        ]
        self.plain = all(map(is_plain, self.tensors))

    def numbers(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the row of scalars of each tensor, the RNG keys, and the table of scalars."""
        batches = self._batches
        rows = rng_keys = None
        if len(batches) > 1:
            which = [row for row, batch in enumerate(batches) for _ in batch.tensors.params]
            rows = torch.tensor(which, device="cpu")
        if any(batch.tensors.rng_keys for batch in batches):
            every = (batch.tensors.rng_keys or [0] * len(batch.tensors) for batch in batches)
            rng_keys = torch.tensor([key for keys in every for key in keys], device="cpu")
        table = torch.tensor(
            [step_scalars(batch) for batch in batches], dtype=torch.float64, device="cpu"
        )
        return rows, rng_keys, table


def _concatenate(lists: list[TensorLists], name: str) -> list[Tensor]:
    if len(lists) == 1:
        column: list[Tensor] = getattr(lists[0], name)
        return column
    return [tensor for each in lists for tensor in getattr(each, name)]


def _concatenate_and_fill(lists: list[TensorLists], name: str) -> list[Tensor]:
    """Concatenate a list that only some tensors need, with an empty tensor for the others."""
    if not any(getattr(each, name) for each in lists):
        return []
    nothing = torch.empty(0, device="cpu")
    return [nothing if x is None else x for x in TensorLists.column(lists, name)]


def _plain_members(batch: Batch) -> list[bool]:
    lists = batch.tensors
    columns = [*lists.large, lists.state_steps]
    columns += [lists.thresholds, lists.compensations, lists.previous_lrs]
    return [
        is_plain([column[i] for column in columns if column and column[i] is not None])
        for i in range(len(lists))
    ]


def _indices(mask: list[bool]) -> list[int]:
    return [i for i, on in enumerate(mask) if on]
