"""The fused back end for CUDA and ROCm: all tensors in a few launches of one Triton kernel.

This module decides which tensors the kernel can take, and collects the scalars of a step.
``launch_schedule.py`` assigns runs of elements to programs and launches; ``kernel.py`` computes.
"""

from __future__ import annotations

import os
from array import array
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import chain
from operator import attrgetter
from typing import Any

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
from apollo_qn.secant import Sums, arithmetic

_f16, _bf16, _f32, _f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# (parameter, gradient, state) types that the kernel takes
TYPES = {
    *((_f32, g, _f32) for g in (_f32, _bf16, _f16)),
    *((p, g, _f32) for p in (_bf16, _f16) for g in (p, _f32)),
    (_f64, _f64, _f64),
    (_f32, _f32, _bf16),
    *((p, p, _bf16) for p in (_bf16, _f16)),
}
# Types of device that are served. Tests add "cpu" under Triton's interpreter.
DEVICES = {"cuda"}
# Smallest compute capability of NVIDIA GPUs on which the kernel is chosen by default.
_CAPABILITY = (8, 0)


@cache
def why_not() -> str | None:
    """Return the reason why the kernel is missing, or None if it is there."""
    if find_spec("triton") is None:
        return "Triton is not installed (on Linux, PyTorch for CUDA and for ROCm brings it)"
    try:
        from apollo_qn.backends.triton import launch_schedule  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def serves(device: torch.device) -> bool:
    """Return whether the kernel may serve tensors on this device."""
    if device.type not in DEVICES:
        return False
    # the interpreter can only read addresses in host memory
    return device.type == "cpu" or os.environ.get("TRITON_INTERPRET", "0") != "1"


def why_not_default(device: torch.device) -> str | None:
    """Return the reason why the kernel is not chosen on this device unless ``fused`` is True."""
    if (reason := why_not() or _why_not_tried(device)) is not None:
        return reason
    if device not in _compiler_errors:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # nothing can be compiled now; the launch asks for an earlier step
        _compiler_errors[device] = _compiler_error(device)
    return _compiler_errors[device]


_compiler_errors: dict[torch.device, str | None] = {}


@cache
def _why_not_tried(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernel has not been tried on ROCm"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"the Triton kernel has not been tried on {torch.cuda.get_device_name(device)}"
    return None


def _compiler_error(device: torch.device) -> str | None:
    from apollo_qn.backends.triton import launch_schedule

    try:
        launch_schedule.try_compiler(device)
    except Exception as error:  # a compiler is missing, or does not know the GPU
        return f"Triton cannot compile a kernel for {device} ({type(error).__name__}: {error})"
    return None


def available() -> bool:
    """Return whether the kernel and a device for it are available."""
    return why_not() is None and (torch.cuda.is_available() or "cpu" in DEVICES)


class Triton(Backend):
    """Back end that updates all tensors of all batches in a few launches.

    An instance caches the tables of the last step on each device. The next step reuses them if all
    addresses are the same. The caller keeps the tensors alive during a call. A launch on another
    CUDA stream than that of the tables is recorded with the allocator.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, tuple[Any, Any]] = {}

    def takes(self, batches: list[Batch]) -> list[list[bool]]:
        """Return for each tensor whether the kernel can update it."""
        flags: list[list[bool]] = [[] for _ in batches]
        for indices in _by_device(batches):
            rows = iter(_fit([batches[i] for i in indices]))
            for i in indices:
                flags[i] = [next(rows) for _ in batches[i].tensors.params]
        return flags

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        found: dict[int, Sums] = {}
        for indices in _by_device(batches):
            columns = _Columns([batches[i] for i in indices])
            count, device = len(columns.params), columns.params[0].device
            table = torch.zeros(count, 4, dtype=torch.float64, device=device)
            self._launch(columns, table, measuring=True)
            parts = table.split_with_sizes([len(batches[i].tensors) for i in indices])
            for i, rows in zip(indices, parts, strict=True):
                found[i] = Sums.from_table(rows, batches[i].h.belief)
        return [found[i] for i in range(len(batches))]

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Update all tensors, or return False and change none if one cannot be taken."""
        devices = _by_device(batches)
        every = [_Columns([batches[i] for i in indices]) for indices in devices]
        if not all(c.have_its_layout() and all(c.are_apart()) for c in every):
            return False
        for indices, columns in zip(devices, every, strict=True):
            table = None if sums is None else torch.cat([sums[i].table() for i in indices])
            self._launch(columns, table, measuring=False)
            increment_version(columns.written)
        return True

    def _launch(self, columns: _Columns, table: Tensor | None, measuring: bool) -> None:
        from apollo_qn.backends.triton.launch_schedule import Tables

        batches, device = columns.batches, columns.params[0].device
        capturable = any(isinstance(batch.scalars.t, Tensor) for batch in batches)
        *addresses, gradients = columns.addresses
        sizes = columns.sizes
        rows = list(range(len(sizes))) if table is not None else [-1] * len(sizes)
        rng_keys = [key or 0 for key in TensorLists.column(columns.lists, "rng_keys")]
        signature = (addresses, sizes, columns.types, rows, rng_keys)
        key = (device, capturable)
        known, tables = self._tables.get(key, (None, None))
        if known != signature:
            tables = Tables(device, addresses, sizes, columns.types, rows, rng_keys, capturable)
            self._tables[key] = (signature, tables)
        which, scalars = _scalars(batches, device, capturable)
        belief = any(batch.h.belief for batch in batches)
        tables.launch(gradients, which, scalars, table, belief, measuring)


def _by_device(batches: list[Batch]) -> list[list[int]]:
    """Return the indices of the batches on each device."""
    indices: dict[torch.device, list[int]] = {}
    for i, batch in enumerate(batches):
        if batch.tensors.params:
            indices.setdefault(batch.tensors.params[0].device, []).append(i)
    return list(indices.values())


def _scalars(
    batches: list[Batch], device: torch.device, capturable: bool
) -> tuple[list[int], array[float] | Tensor]:
    """Return the row of each tensor in a matrix of scalars, and that matrix."""
    if not capturable:
        which = [row for row, batch in enumerate(batches) for _ in batch.tensors.params]
        return which, array("d", [x for batch in batches for x in step_scalars(batch)])
    found = []
    for batch in batches:
        # multiply ones instead of copying from the host, which a CUDA graph cannot capture
        ones = torch.ones(len(batch.tensors), dtype=_f64, device=device)
        found.append(torch.stack([ones * x for x in step_scalars(batch)], 1))
    return list(range(sum(map(len, found)))), torch.cat(found)


def _fit(batches: list[Batch]) -> list[bool]:
    """Return for each tensor of batches on one device whether the kernel can update it."""
    flags = _have_its_layout(batches)
    rest = iter(flags)
    indices = [[i for i in range(len(batch.tensors)) if next(rest)] for batch in batches]
    fitting = [b.select(some) for b, some in zip(batches, indices, strict=True) if some]
    apart = iter(_Columns(fitting).are_apart() if fitting else [])
    return [on and next(apart) for on in flags]


def _have_its_layout(batches: list[Batch]) -> list[bool]:
    """Return for each tensor whether the kernel takes its types and layout; overlaps aside."""
    columns = _Columns(batches)
    count, all_have = len(columns.params), columns.have_its_layout()
    if all_have or count == 1:
        return [all_have] * count
    # by halves, because mostly few have not
    if len(batches) > 1:
        middle = len(batches) // 2
        halves = batches[:middle], batches[middle:]
    else:
        first, second = slice(count // 2), slice(count // 2, None)
        halves = [batches[0].slice(first)], [batches[0].slice(second)]
    return [flag for half in halves for flag in _have_its_layout(half)]


class _Columns:
    """Tensors of some batches on one device, in columns with one row per parameter.

    A property is read for a whole column at once, which is several times faster than row by row.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        names = ("params", "exp_avgs", "hessian_diags", "thresholds", "compensations", "grads")
        self.lists = [batch.tensors for batch in batches]
        self._columns = [TensorLists.column(self.lists, name) for name in names]
        self.params, m, self._hessian_diags, thresholds, low, self.grads = self._columns
        self._thresholds, self._low = ([x for x in xs if x is not None] for xs in (thresholds, low))
        self._large: list[list[Tensor]] = [self.params, m, self._hessian_diags, self.grads]
        self.types = list(
            zip(*(map(_DTYPE, xs) for xs in (self.params, self.grads, m)), strict=True)
        )
        self.sizes = list(map(Tensor.numel, self.params))

    @property
    def written(self) -> list[Tensor]:
        """Return all tensors that an update changes."""
        return [x for column in self._columns[:5] for x in column if x is not None]

    @cached_property
    def addresses(self) -> list[array[int]]:
        """Addresses of p, m, B, threshold, compensation and gradient; 0 where there is none."""
        p, m, B, *optional, g = self._columns
        needed = [array("q", map(Tensor.data_ptr, column)) for column in (p, m, B, g)]
        others = (array("q", [0 if x is None else x.data_ptr() for x in xs]) for xs in optional)
        return [*needed[:3], *others, needed[3]]

    def have_its_layout(self) -> bool:
        """Return whether all rows have types and layouts of the kernel, overlaps aside."""
        every = [*chain(*self._large), *self._thresholds, *self._low]
        if not is_plain(every) or any(map(Tensor.is_neg, every)):
            return False
        if len(set(map(_DEVICE, every))) > 1 or not serves(every[0].device):
            return False
        state_types = [m for *_, m in self.types]
        if list(map(_DTYPE, self._hessian_diags)) != state_types:
            return False
        if not TYPES.issuperset(self.types):
            return False
        for threshold, (p, _, m) in zip(self._columns[3], self.types, strict=True):
            if threshold is None:
                continue
            if threshold.dtype is not arithmetic(p, m) or threshold.numel() != 1:
                return False
        try:
            addresses = self.addresses
        except (RuntimeError, NotImplementedError):  # sparse, or a wrapper without memory
            return False
        never_zero = (*addresses[:3], addresses[5], self.sizes)
        return all(map(all, never_zero)) and self._same_layout()

    def _same_layout(self) -> bool:
        """Return whether the elements of each row lie in the same order in dense memory."""
        shapes = list(map(_SHAPE, self.params))
        if any(list(map(_SHAPE, column)) != shapes for column in self._large[1:]):
            return False
        if not self._low and all(all(map(Tensor.is_contiguous, xs)) for xs in self._large):
            return True
        for row in zip(*self._large, self._columns[4], strict=True):
            p, *others = (x for x in row if x is not None)
            if any(x.shape != p.shape for x in others):
                return False
            if not all(x.is_contiguous() for x in (p, *others)) and not (
                _dense(p) and all(x.stride() == p.stride() for x in others)
            ):
                return False
        return True

    def are_apart(self) -> list[bool]:
        """Return for each row whether its memory overlaps that of no other row.

        If a row reads what another writes, the order of all updates matters, and all are False.
        """
        count = len(self.params)
        starts, ends = self._spans()
        first, last = starts[5], ends[5]
        there = starts[:5].flatten().nonzero().flatten()
        starts, order = starts.flatten()[there].sort()
        ends, furthest = ends.flatten()[there][order].cummax(0)
        before = torch.searchsorted(starts, last)  # number of spans that begin before its end
        if ((before > 0) & (ends[before - 1] > first)).any():
            return [False] * count
        flags = [True] * count
        later = (starts[1:] < ends[:-1]).nonzero().flatten()
        for entry in torch.cat([order[later + 1], order[furthest[later]]]).tolist():
            flags[int(there[entry]) % count] = False
        return flags

    def _spans(self) -> tuple[Tensor, Tensor]:
        """Return where each tensor begins and ends in memory, of shape (column, row)."""
        starts = torch.stack([torch.frombuffer(x, dtype=torch.int64) for x in self.addresses])
        kinds = {types: i for i, types in enumerate(dict.fromkeys(self.types))}
        widths = []
        for p, g, m in kinds:
            columns = (p, m, m, arithmetic(p, m), p, g)
            widths.append([dtype.itemsize for dtype in columns])
        which = torch.tensor([kinds[types] for types in self.types], device="cpu")
        width = torch.tensor(widths, device="cpu")[which].t()
        nbytes = width * torch.tensor(self.sizes, device="cpu")
        nbytes[3] = width[3]  # a threshold is one number
        return starts, starts + nbytes


_DTYPE, _DEVICE, _SHAPE = map(attrgetter, ("dtype", "device", "shape"))


def _dense(x: Tensor) -> bool:
    """Return whether ``x`` is contiguous in some order of its dimensions."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()
