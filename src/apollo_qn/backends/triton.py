"""The fused back end for CUDA and ROCm: all tensors in a few launches of one Triton kernel.

This module finds out which tensors the kernel can take, and the numbers of a step.
``triton_launch.py`` says which program works on what and when, ``triton_kernel.py`` what it does.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor

from apollo_qn.backends import kernel, memory, plan
from apollo_qn.backends.kernel import address
from apollo_qn.rule import Hyperparameters, arithmetic

# the row of each tensor in a matrix of numbers, and that matrix
Numbers: TypeAlias = "tuple[Iterable[int], array[float] | Tensor]"

_f16, _bf16, _f32, _f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# of parameter, gradient and state: the number of what has the same sizes on the CPU
KINDS = {
    (_f32, _f32, _f32): 0,
    (_f32, _bf16, _f32): 1,
    (_f32, _f16, _f32): 1,
    (_bf16, _bf16, _f32): 2,
    (_f16, _f16, _f32): 2,
    (_bf16, _f32, _f32): 3,
    (_f16, _f32, _f32): 3,
    (_f64, _f64, _f64): 4,
    (_f32, _f32, _bf16): 5,
    (_bf16, _bf16, _bf16): 6,
    (_f16, _f16, _bf16): 6,
}
_RATE = 1  # its column among the numbers
# Types of device that are served; under Triton's interpreter "cpu" may be another.
DEVICES = {"cuda"}


@cache
def why_not() -> str | None:
    """Why there is no kernel; None: there is one."""
    if find_spec("triton") is None:
        return "Triton is not installed (on Linux, PyTorch for CUDA and for ROCm brings it)"
    try:
        from apollo_qn.backends import triton_launch  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def serves(device: torch.device) -> bool:
    """Whether tensors there may be the kernel's."""
    if device.type not in DEVICES:
        return False
    # the interpreter reads addresses in the host's memory
    return device.type == "cpu" or os.environ.get("TRITON_INTERPRET", "0") != "1"


class Plan(plan.Plan):
    """What the kernel does for the tensors of one device, whose ``step`` lies on the host."""

    KINDS = KINDS
    capturable = False

    def step(self, hyperparameters: list[Hyperparameters], table: Tensor | None) -> None:
        """Launch the step; nothing waits for it."""
        if self._taken:
            scalars = self._launch(hyperparameters, table, measuring=False)
            torch.autograd.graph.increment_version(self._changing)
            self._record(scalars)

    def measure(self, hyperparameters: list[Hyperparameters], table: Tensor) -> None:
        """Launch the measuring of parts into their rows of ``table``."""
        if self._taken and self._tables.has_parts:
            self._launch(hyperparameters, table, measuring=True)

    def fits(self, large: list[Tensor], numbers: list[Tensor | None]) -> bool:
        """Whether all lie on one device that is served, the numbers where ``capturable`` says."""
        step, previous_lr, threshold = numbers
        device = large[0].device
        return (
            serves(device)
            and all(x.device == device for x in large)
            and self._numbers_fit(step, previous_lr, device)
            and (threshold is None or threshold.device == device)
            and (threshold is None or threshold.dtype is arithmetic(large[0].dtype, large[2].dtype))
        )

    def _numbers_fit(
        self, step: Tensor | None, previous_lr: Tensor | None, device: torch.device
    ) -> bool:
        return all(
            x is None or (x.is_cpu and x.dtype is dtype)
            for x, dtype in ((step, _f32), (previous_lr, _f64))
        )

    def check_writable(self, ranges: set[memory.Range], tensors: plan.Tensors) -> None:
        """A device's memory is."""

    def _take(self, tensors: plan.Tensors, taken: list[int], kinds: list[int | None]) -> None:
        super()._take(tensors, taken, kinds)
        if not taken:
            return
        from apollo_qn.backends.triton_launch import Tables

        p, m, B, _, _, threshold, low = self._addresses
        columns = (tensors.params, tensors.grads, tensors.exp_avgs)
        self._tables = Tables(
            tensors.params[taken[0]].device,
            [p, m, B, threshold, low],
            list(self._n),
            [tuple(column[i].dtype for column in columns) for i in taken],
            [-1 if row is None else row for row in self._shared_of(taken)],
            self._stream,
            self.capturable,
        )

    def _shared_of(self, taken: list[int]) -> list[int | None]:
        return [None if self._shared is None else self._shared[i] for i in taken]

    def _launch(
        self, hyperparameters: list[Hyperparameters], table: Tensor | None, measuring: bool
    ) -> Numbers:
        which, scalars = self._numbers(hyperparameters)
        belief = any(h.belief for h in hyperparameters)
        self._tables.launch(self._g, which, scalars, table, belief, measuring)
        return which, scalars

    def _numbers(self, hyperparameters: list[Hyperparameters]) -> Numbers:
        return self._which, self._scalars(hyperparameters)

    def _record(self, numbers: Any) -> None:
        """Steps and rates, which lie on the host."""
        which, scalars = numbers
        _, _, _, step, previous_lr, *_ = self._addresses
        if kernel.available():
            columns = (step, previous_lr, which, scalars)
            kernel.loaded().record(len(self._taken), *map(address, columns))
            return
        torch._foreach_add_(self._steps, 1.0)
        for i, rate in enumerate(self._rates):
            if rate is not None:
                rate.fill_(scalars[plan.SCALARS * which[i] + _RATE])


class CapturablePlan(Plan):
    """The same where ``step`` lies on the device: its numbers are computed there."""

    capturable = True

    def _numbers_fit(
        self, step: Tensor | None, previous_lr: Tensor | None, device: torch.device
    ) -> bool:
        return all(
            x is None or (x.device == device and x.is_floating_point()) for x in (step, previous_lr)
        )

    def _numbers(self, hyperparameters: list[Hyperparameters]) -> Numbers:
        found = []
        for group, h in enumerate(hyperparameters):
            mine = [i for i, its in enumerate(self._group) if its == group]
            if not mine:
                continue
            rates = [rate for i in mine if (rate := self._rates[i]) is not None]
            t = torch.stack([self._steps[i] for i in mine])
            before = torch.stack(rates) if h.decoupled else None
            row = plan.scalars(h, t, before)
            # by multiplication, which copies nothing from the host: a graph may be captured
            ones = torch.ones_like(t, dtype=_f64)
            found.append(torch.stack([ones * x for x in row], 1))
        return range(len(self._taken)), torch.cat(found)

    def _record(self, numbers: Any) -> None:
        _, scalars = numbers
        torch._foreach_add_(self._steps, 1.0)
        new = zip(self._rates, scalars[:, _RATE].unbind(), strict=True)
        kept = [(x, rate) for x, rate in new if x is not None]
        if kept:
            torch._foreach_copy_([x for x, _ in kept], [rate for _, rate in kept])
