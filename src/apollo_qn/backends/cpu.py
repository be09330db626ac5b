"""The fused kernel for tensors in CPU memory: all tensors of all groups in one call.

This module finds out which tensors the kernel can take and hands it their addresses; ``kernel.c``
does the arithmetic. What was found is kept in a :class:`Plan` and, from step to step, only compared
with what is there, so that the overhead stays near a microsecond a tensor.
"""

from __future__ import annotations

import bisect
import ctypes
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from apollo_qn.backends import Group
from apollo_qn.rule import Hyperparameters, StepScalars

_f32, _f64, _bf16 = torch.float32, torch.float64, torch.bfloat16
# of parameter, gradient and state: the kernel's number for them
KINDS = {
    (_f32, _f32, _f32): 0,
    (_f32, _bf16, _f32): 1,
    (_bf16, _bf16, _f32): 2,
    (_bf16, _f32, _f32): 3,
    (_f64, _f64, _f64): 4,
}
_PLAIN = (Tensor, torch.nn.Parameter)


def planned(groups: list[Group], plan: Plan | None) -> Plan:
    """What the kernel will do for these groups; nothing is changed.

    Args:
        groups: with float or CPU tensor learning rates.
        plan: what the last call returned.

    Raises:
        ValueError: a tensor lies in read-only memory.
    """
    tensors = _Tensors.of(groups)
    return plan if plan is not None and plan.renew(tensors) else Plan(tensors, plan)


def why_not() -> str | None:
    """Why there is no kernel; None: there is one."""
    kernel = _load()
    return kernel if isinstance(kernel, str) else None


@dataclass(frozen=True, slots=True)
class _Kernel:
    """The kernel's functions, and those of OpenMP."""

    step: Any
    numbers: Any
    overlap: Any
    openmp: tuple[int | None, ...]


class _Table(ctypes.Structure):
    """The kernel's ``table``: columns with an entry for each tensor."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "B")),
        *((name, ctypes.c_void_p) for name in ("step", "previous_lr", "threshold")),
        *((name, ctypes.c_void_p) for name in ("n", "kind", "which", "scalars")),
    ]


@cache
def _load() -> _Kernel | str:
    """The kernel, or why there is none."""
    found = find_spec("apollo_qn.backends._kernel")
    if found is None or found.origin is None:
        return (
            "the fused kernel was not compiled when apollo-qn was installed (reinstall it where a "
            "C compiler is at hand)"
        )
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        return f"the fused kernel cannot be loaded ({error})"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    take_step, numbers, overlap = (
        getattr(library, f"apollo_qn_{name}") for name in ("step", "numbers", "overlap")
    )
    take_step.argtypes, take_step.restype = [pointer, ctypes.c_int, *[pointer] * 3], ctypes.c_int
    numbers.argtypes, numbers.restype = [number, *[pointer] * 7], number
    overlap.argtypes, overlap.restype = [*[pointer] * 3, number], number
    return _Kernel(take_step, numbers, overlap, _openmp())


def _openmp() -> tuple[int | None, ...]:
    """Functions of the GNU OpenMP that torch has loaded; None for each where it has another.

    Its threads are torch's own, so that no second pool competes for the cores.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    for path in {region.path for region in _regions() if "libgomp" in region.path}:
        try:
            library = ctypes.CDLL(path)
            return tuple(
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names
            )
        except (OSError, AttributeError):
            continue
    return None, None, None


@dataclass(frozen=True, slots=True)
class _Region:
    """A stretch of this process's memory."""

    start: int
    end: int
    writable: bool
    path: str


def _regions() -> list[_Region]:
    """This process's memory in ascending order; empty where the system is not Linux."""
    try:
        with open("/proc/self/maps") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    result = []
    for span, permissions, _offset, _device, _inode, *path in lines:
        start, end = (int(x, 16) for x in span.split("-"))
        result.append(_Region(start, end, "w" in permissions, path[0].strip() if path else ""))
    return result


_forked = False


def _note_fork() -> None:
    # the child has none of its parent's threads: OpenMP would wait for them for ever
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass(slots=True)
class _Tensors:
    """The tensors of all groups in one row, column by column; None where no mode needs one."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    hessian_diags: list[Tensor]
    steps: list[Tensor]
    previous_lrs: list[Tensor | None] | None
    thresholds: list[Tensor | None] | None
    sizes: list[int]  # of the groups

    @classmethod
    def of(cls, groups: list[Group]) -> _Tensors:
        def row(name: str) -> Any:
            columns = [getattr(group, name) for group in groups]
            if len(groups) == 1 or all(column is None for column in columns):
                return columns[0]
            return list(
                chain.from_iterable(
                    [None] * len(group.params) if column is None else column
                    for column, group in zip(columns, groups, strict=True)
                )
            )

        return cls(
            row("params"),
            row("grads"),
            row("exp_avgs"),
            row("hessian_diags"),
            row("state_steps"),
            row("previous_lrs"),
            row("thresholds"),
            [len(group.params) for group in groups],
        )

    def kept(self) -> tuple[list[Any] | None, ...]:
        """What are the same objects from step to step."""
        return (
            self.params,
            self.exp_avgs,
            self.hessian_diags,
            self.steps,
            self.previous_lrs,
            self.thresholds,
        )

    def signature(self) -> tuple[Any, ...]:
        """What may change from step to step, but for addresses.

        A parameter has its gradient's size; that a state tensor, once looked at, still has it where
        it is the same object at the same address needs no look.
        """
        params, grads = self.params, self.grads
        plain = [p.is_contiguous() for p in params], [g.is_contiguous() for g in grads]
        strides = None
        if not all(plain[0]) or not all(plain[1]):
            strides = [(p.stride(), g.stride()) for p, g in zip(params, grads, strict=True)]
        return (
            self.sizes,
            [type(g) for g in grads],
            [g.dtype for g in grads],
            [g.layout for g in grads],
            [g.is_cpu for g in grads],
            [g.is_neg() for g in grads],
            [g.numel() for g in grads],
            plain,
            strides,
        )


class Plan:
    """Which tensors the kernel takes, their addresses, and what this was concluded from.

    ``left`` are for each group the indices of the tensors that the kernel does not take.
    """

    def __init__(self, tensors: _Tensors, before: Plan | None = None) -> None:
        self._kept = tensors.kept()
        self._signature: tuple[Any, ...] | None = None
        with suppress(RuntimeError, NotImplementedError):  # a tensor without such properties
            self._signature = tensors.signature()
        kinds = [_kind(tensors, i) for i in range(len(tensors.params))]
        self._take(tensors, [i for i, kind in enumerate(kinds) if kind is not None], kinds)
        ranges = self._written()
        _check_writable(ranges, tensors, before._ranges if before is not None else set())
        overlapping = _overlapping(ranges) or self._overlapping_gradients(self._g)
        while overlapping:
            self._signature = None  # to be looked at anew at the next step
            self._take(tensors, [i for i in self._taken if i not in overlapping], kinds)
            overlapping = self._overlapping_gradients(self._g)
        self.left = _left(tensors.sizes, set(self._taken))

    def _take(self, tensors: _Tensors, taken: list[int], kinds: list[int | None]) -> None:
        count = len(taken)
        self._taken = taken
        self._all = count == len(kinds)
        self._n = array("q", [tensors.params[i].numel() for i in taken])
        self._kind = array("i", [kinds[i] or 0 for i in taken])
        self._none = array("Q", bytes(8 * count))
        self._addresses = self._addresses_of(tensors)
        self._g = self._addresses_of_gradients(tensors)
        groups = [g for g, size in enumerate(tensors.sizes) for _ in range(size)]
        self._group = array("i", [groups[i] for i in taken])
        self._which = array("i", bytes(4 * count))
        self._run_group = array("i", bytes(4 * count))
        self._run_step = array("d", bytes(8 * count))
        self._run_lr = array("d", bytes(8 * count))
        ranges = self._written()
        self._ranges = set(ranges)
        self._starts = array("Q", sorted(start for start, _, _ in ranges))
        self._ends = array("Q", sorted(end for _, end, _ in ranges))

    def _of_taken(self, column: list[Any] | None) -> list[Any] | None:
        return column if self._all or column is None else [column[i] for i in self._taken]

    def _addresses_of(self, tensors: _Tensors) -> list[array[int]]:
        return [_addresses(self._of_taken(column), self._none) for column in tensors.kept()]

    def _addresses_of_gradients(self, tensors: _Tensors) -> array[int]:
        return _addresses(self._of_taken(tensors.grads), self._none)

    def _written(self) -> list[tuple[int, int, int]]:
        """Start, end and tensor of each range of memory that the kernel writes."""
        p_sizes, state_sizes = zip(*_SIZES, strict=True)
        result = []
        for row, i in enumerate(self._taken):
            kind, n = self._kind[row], self._n[row]
            sizes = (n * p_sizes[kind], *[n * state_sizes[kind]] * 2, 4, 8, state_sizes[kind])
            for column, size in zip(self._addresses, sizes, strict=True):
                if column[row]:
                    result.append((column[row], column[row] + size, i))
        return result

    def renew(self, tensors: _Tensors) -> bool:
        """Take over the gradients of another step; False: more has changed, a new plan is due."""
        if self._signature is None:
            return False
        for column, before in zip(tensors.kept(), self._kept, strict=True):
            if column is None or before is None:
                if column is not before:
                    return False
            elif len(column) != len(before) or not all(map(is_, column, before)):
                return False
        try:
            if self._signature != tensors.signature():
                return False
            if self._addresses != self._addresses_of(tensors):
                return False
            g = self._addresses_of_gradients(tensors)
        except (RuntimeError, NotImplementedError):
            return False
        if g != self._g:
            if self._overlapping_gradients(g):
                return False
            self._g = g
        return True

    def _table(self, g: array[int], scalars: int = 0) -> _Table:
        p, m, B, *numbers = self._addresses
        columns = (p, g, m, B, *numbers, self._n, self._kind, self._which)
        return _Table(len(self._taken), *(_address(column) for column in columns), scalars)

    def _overlapping_gradients(self, g: array[int]) -> set[int]:
        """The first tensor whose gradient lies in what the kernel writes, if there is one."""
        kernel = _load()
        assert isinstance(kernel, _Kernel)
        found = kernel.overlap(
            ctypes.byref(self._table(g)),
            *map(_address, (self._starts, self._ends)),
            len(self._starts),
        )
        return set() if found < 0 else {self._taken[found]}

    def step(self, hyperparameters: list[Hyperparameters]) -> None:
        """Run the kernel with the settings of each group.

        Raises:
            MemoryError: nothing has been changed.
        """
        if not self._taken:
            return
        kernel = _load()
        assert isinstance(kernel, _Kernel)
        _, _, _, step, previous_lr, _ = self._addresses
        runs = kernel.numbers(
            len(self._taken),
            *map(_address, (self._group, step, previous_lr, self._which)),
            *map(_address, (self._run_group, self._run_step, self._run_lr)),
        )
        scalars = array("d")
        for i in range(runs):
            h = _on_host(hyperparameters[self._run_group[i]])
            scalars.extend(_scalars(h, self._run_step[i], self._run_lr[i]))
        # autograd learns that they are no longer what they were
        torch.autograd.graph.increment_version(
            chain.from_iterable(self._of_taken(column) or () for column in self._kept[:3])
        )
        openmp = (None, None, None) if _forked else kernel.openmp
        table = self._table(self._g, _address(scalars))
        if kernel.step(ctypes.byref(table), torch.get_num_threads(), *openmp):
            raise MemoryError("no memory for the sums of the largest tensor")


# of a parameter's and a state's element, by kind
_SIZES = [(p.itemsize, state.itemsize) for p, _, state in KINDS]


def _address(values: Any) -> int:
    address: int = values.buffer_info()[0]
    return address


def _addresses(tensors: list[Any] | None, none: array[int]) -> array[int]:
    """Those of the tensors' memory; ``none`` where a mode needs no such tensors."""
    if tensors is None:
        return none
    try:
        return array("Q", [x.data_ptr() for x in tensors])
    except AttributeError:  # needed by some groups only
        return array("Q", [0 if x is None else x.data_ptr() for x in tensors])


def _kind(tensors: _Tensors, i: int) -> int | None:
    """The kernel's number for what tensor ``i`` consists of; None: the kernel cannot take it."""
    p, g = tensors.params[i], tensors.grads[i]
    m, B, step = tensors.exp_avgs[i], tensors.hessian_diags[i], tensors.steps[i]
    numbers: list[Tensor | None] = [step]
    for column in (tensors.previous_lrs, tensors.thresholds):
        numbers.append(None if column is None else column[i])
    wanted = [_f32, _f64, m.dtype]
    large = [p, g, m, B]
    if any(type(x) not in _PLAIN for x in [*large, *numbers] if x is not None):
        return None
    for x in [*large, *numbers]:
        if x is not None and not (
            x.is_cpu and x.layout is torch.strided and not x.is_neg() and not x.is_inference()
        ):
            return None
    if any(
        x is not None and (x.dtype is not dtype or x.numel() != 1)
        for x, dtype in zip(numbers, wanted, strict=True)
    ):
        return None
    if p.numel() == 0 or m.dtype is not B.dtype:
        return None
    if any(x.shape != p.shape for x in large):
        return None
    if not all(x.is_contiguous() for x in large) and not (
        _dense(p) and all(x.stride() == p.stride() for x in large)
    ):
        return None
    try:
        if not all(x.data_ptr() for x in [*large, *numbers] if x is not None):
            return None
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own
        return None
    return KINDS.get((p.dtype, g.dtype, m.dtype))


def _dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous in some order of its dimensions."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _overlapping(ranges: list[tuple[int, int, int]]) -> set[int]:
    """The tensors of ranges that reach into each other."""
    found: set[int] = set()
    furthest, owner = 0, -1
    for start, end, i in sorted(ranges):
        if start < furthest:
            found |= {i, owner}
        if end > furthest:
            furthest, owner = end, i
    return found


def _check_writable(
    ranges: list[tuple[int, int, int]], tensors: _Tensors, known: set[tuple[int, int, int]]
) -> None:
    new = [found for found in ranges if found not in known]
    regions = _regions() if new else []
    starts = [region.start for region in regions]
    for start, end, i in new:
        at = max(bisect.bisect_right(starts, start) - 1, 0)
        while at < len(regions) and regions[at].start < end:
            if regions[at].end > start and not regions[at].writable:
                raise ValueError(
                    f"parameter {i} of shape {tuple(tensors.params[i].shape)} or its state lies in "
                    f"read-only memory ({regions[at].path or 'a mapping'}); it must be writable: "
                    "clone it"
                )
            at += 1


def _left(sizes: list[int], taken: set[int]) -> list[list[int]]:
    """For each group the indices that are not taken."""
    result, first = [], 0
    for size in sizes:
        result.append([i for i in range(size) if first + i not in taken])
        first += size
    return result


def _on_host(h: Hyperparameters) -> Hyperparameters:
    return replace(h, lr=h.lr.item()) if isinstance(h.lr, Tensor) else h


def _scalars(h: Hyperparameters, t: float, previous_lr: float) -> Iterator[Any]:
    """The kernel's ``step_scalars``."""
    s = StepScalars.at(t, h, previous_lr, h.sigma)
    yield from (s.alpha, h.rate(t), s.offset, s.previous_threshold, s.previous_offset)
    yield from (s.kappa, s.omega, h.sigma, h.secant_eps, -1.0 if h.maximize else 1.0)
    yield from (h.weight_decay if on else 0.0 for on in (h.l2, h.decoupled))
    yield from (float(h.weight_decay != 0), float(h.belief))
