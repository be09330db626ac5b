"""The fused back end for CUDA and ROCm: all tensors in a few launches of one Triton kernel.

This module decides which tensors the kernel can take, and collects the scalars of a step.
``launch_schedule.py`` assigns runs of elements to programs and launches; ``kernel.py`` computes.
"""

from __future__ import annotations

import bisect
import os
from array import array
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from apollo_qn.backends.base import Backend, Batch, is_plain, step_scalars
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
        flags = [[_fits(batch, i) for i in range(len(batch.tensors))] for batch in batches]
        written: list[tuple[int, int, int]] = []
        read: list[tuple[int, int]] = []
        for number, (b, i) in enumerate(_members(batches)):
            if flags[b][i]:
                written += [(*_span(x), number) for x in _written(batches[b], i)]
                read.append(_span(batches[b].tensors.grads[i]))
        overlapping = _overlapping(written)
        for number, (b, i) in enumerate(_members(batches)):
            flags[b][i] = flags[b][i] and number not in overlapping
        if _reaches_into(read, written):
            # one tensor reads what another writes, so the order of all updates matters
            return [[False] * len(mask) for mask in flags]
        return flags

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        count = sum(len(batch.tensors) for batch in batches)
        device = batches[0].tensors.params[0].device
        table = torch.zeros(count, 4, dtype=torch.float64, device=device)
        self._launch(batches, table, measuring=True)
        tables = table.split_with_sizes([len(batch.tensors) for batch in batches])
        return [
            Sums.from_table(rows, batch.h.belief)
            for rows, batch in zip(tables, batches, strict=True)
        ]

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Update all tensors, or return False and change none if one cannot be taken."""
        if not all(map(all, self.takes(batches))):
            return False
        table = None if sums is None else torch.cat([one.table() for one in sums])
        self._launch(batches, table, measuring=False)
        changed = [x for b, i in _members(batches) for x in _written(batches[b], i)]
        torch.autograd.graph.increment_version(changed)
        return True

    def _launch(self, batches: list[Batch], table: Tensor | None, measuring: bool) -> None:
        from apollo_qn.backends.triton.launch_schedule import Tables

        device = batches[0].tensors.params[0].device
        capturable = any(isinstance(batch.scalars.t, Tensor) for batch in batches)

        def column(name: str) -> list[Any]:
            return [
                x
                for batch in batches
                for x in getattr(batch.tensors, name) or [None] * len(batch.tensors)
            ]

        names = ("params", "exp_avgs", "hessian_diags", "thresholds", "compensations")
        addresses = [_addresses(column(name)) for name in names]
        params, grads, states = column("params"), column("grads"), column("exp_avgs")
        types = [(p.dtype, g.dtype, m.dtype) for p, g, m in zip(params, grads, states, strict=True)]
        rows = list(range(len(params))) if table is not None else [-1] * len(params)
        rng_keys = [key or 0 for key in column("rng_keys")]
        sizes = [p.numel() for p in params]
        signature = (addresses, sizes, types, rows, rng_keys)
        key = (device, capturable)
        known, tables = self._tables.get(key, (None, None))
        if known != signature:
            tables = Tables(device, addresses, sizes, types, rows, rng_keys, capturable)
            self._tables[key] = (signature, tables)
        which, scalars = _scalars(batches, device, capturable)
        belief = any(batch.h.belief for batch in batches)
        tables.launch(_addresses(grads), which, scalars, table, belief, measuring)


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


def _members(batches: list[Batch]) -> Iterator[tuple[int, int]]:
    for b, batch in enumerate(batches):
        for i in range(len(batch.tensors)):
            yield b, i


def _written(batch: Batch, i: int) -> list[Tensor]:
    lists = batch.tensors
    columns = [lists.params, lists.exp_avgs, lists.hessian_diags]
    columns += [lists.thresholds, lists.compensations]
    return [column[i] for column in columns if column and column[i] is not None]


def _fits(batch: Batch, i: int) -> bool:
    """Return whether parameter, gradient and state of a tensor have the layout of the kernel."""
    lists = batch.tensors
    p, g, m, B = (column[i] for column in lists.large)
    low = lists.compensations[i] if lists.compensations else None
    large = [p, g, m, B] + ([] if low is None else [low])
    every = large + ([lists.thresholds[i]] if lists.thresholds else [])
    if not is_plain(every) or any(x.layout is not torch.strided for x in every):
        return False
    if not serves(p.device) or any(x.device != p.device for x in every):
        return False
    if any(x.is_neg() or x.is_conj() or x.is_inference() for x in every):
        return False
    if lists.thresholds and lists.thresholds[i].dtype is not arithmetic(p.dtype, m.dtype):
        return False
    if p.numel() == 0 or m.dtype is not B.dtype or any(x.shape != p.shape for x in large):
        return False
    same_layout = all(x.is_contiguous() for x in large) or (
        _dense(p) and all(x.stride() == p.stride() for x in large)
    )
    if not same_layout or (p.dtype, g.dtype, m.dtype) not in TYPES:
        return False
    try:
        return all(x.data_ptr() for x in every)
    except (RuntimeError, NotImplementedError):  # a wrapper has no memory of its own
        return False


def _dense(x: Tensor) -> bool:
    """Return whether ``x`` is contiguous in some order of its dimensions."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _addresses(tensors: list[Any]) -> array[int]:
    return array("Q", [0 if x is None else x.data_ptr() for x in tensors])


def _span(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize


def _reaches_into(read: list[tuple[int, int]], written: list[tuple[int, int, int]]) -> bool:
    """Return whether a span that is read overlaps one that is written."""
    ordered = sorted(written)
    starts, ends = (
        [start for start, *_ in ordered],
        list(accumulate((e for _, e, _ in ordered), max)),
    )
    for first, last in read:
        before = bisect.bisect_left(starts, last)
        if before and ends[before - 1] > first:
            return True
    return False


def _overlapping(spans: list[tuple[int, int, int]]) -> set[int]:
    """Return the owners of spans that overlap."""
    owners: set[int] = set()
    furthest, owner = 0, -1
    for start, end, index in sorted(spans):
        if start < furthest:
            owners |= {index, owner}
        if end > furthest:
            furthest, owner = end, index
    return owners
