"""The fused back end for tensors in CPU memory: all tensors of all groups in one call.

This module hands the kernel the addresses of what it can take; ``kernel.c`` does the arithmetic.
"""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from apollo_qn.backends import kernel, memory, plan
from apollo_qn.backends.kernel import address
from apollo_qn.backends.plan import Tensors
from apollo_qn.rule import Hyperparameters, arithmetic


def why_not() -> str | None:
    """Why there is no kernel; None: there is one."""
    found = kernel.load()
    return found if isinstance(found, str) else None


class Plan(plan.Plan):
    """What the kernel does for tensors in CPU memory."""

    KINDS = plan.KINDS

    def fits(self, large: list[Tensor], numbers: list[Tensor | None]) -> bool:
        """Whether all lie in CPU memory, the numbers in their types."""
        types = (torch.float32, torch.float64, arithmetic(large[0].dtype, large[2].dtype))
        return all(x.is_cpu for x in large) and all(
            x is None or (x.is_cpu and x.dtype is dtype)
            for x, dtype in zip(numbers, types, strict=True)
        )

    def check_writable(self, ranges: set[memory.Range], tensors: Tensors) -> None:
        """Raise ValueError for what lies in memory that cannot be written."""
        found = memory.read_only(ranges) if ranges else None
        if found is not None:
            owner, region = found[0].owner, found[1]
            shape = tuple(tensors.params[owner].shape)
            raise ValueError(
                f"parameter {owner} of shape {shape} or its state lies in read-only memory "
                f"({region.path or 'of no file'}); it must be writable: clone it"
            )

    def measure(self, hyperparameters: list[Hyperparameters], table: Tensor) -> None:
        """Write the sums of parts into their rows of ``table``."""
        self._run(hyperparameters, table, measuring=True)

    def step(self, hyperparameters: list[Hyperparameters], table: Tensor | None) -> None:
        """Run the kernel.

        Raises:
            MemoryError: nothing has been changed.
        """
        if self._taken:
            self._run(hyperparameters, table, measuring=False)

    def _run(
        self, hyperparameters: list[Hyperparameters], table: Tensor | None, measuring: bool
    ) -> None:
        shared = self._rows(table)
        if measuring and shared is None:
            return
        numbers = self._scalars(hyperparameters)
        # autograd learns that they are no longer what they were
        if not measuring:
            torch.autograd.graph.increment_version(self._changing)
        given = self._table(self._g, address(numbers), 0 if shared is None else address(shared))
        how = (int(measuring), torch.get_num_threads(), *kernel.threads())
        if kernel.loaded().step(ctypes.byref(given), *how):
            raise MemoryError("no memory for the sums of the largest tensor")

    def _rows(self, table: Tensor | None) -> array[int] | None:
        """Where the sums of each part lie, 0 for whole tensors; None: all are whole."""
        if self._shared is None or table is None:
            return None
        start, size = table.data_ptr(), table.stride(0) * table.itemsize
        numbers = [self._shared[i] for i in self._taken]
        return array("Q", [0 if i is None or i < 0 else start + i * size for i in numbers])
