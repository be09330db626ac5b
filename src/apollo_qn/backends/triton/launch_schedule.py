"""Launch schedule of the Triton kernel: which program processes which run of elements, and when.

The sums of a tensor must be complete before its first element changes. Therefore g, m and B are
read twice, which moves 10 numbers per element. If the second read hits the L2 cache, only 7 come
from memory. So the tensors are grouped into windows that fit the cache, and each launch updates one
window and takes the sums of the next. A tensor larger than a window is updated in reverse order,
beginning with what was read last.

Tables on the device keep all that does not change between steps. A step uploads the addresses of
the gradients and its scalars in one copy, if they have changed, and waits for nothing.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import triton.language as tl
from torch import Tensor

from apollo_qn.backends.base import copy_to_device
from apollo_qn.backends.triton import kernel
from apollo_qn.secant import arithmetic

Types: TypeAlias = tuple[torch.dtype, ...]  # types of parameter, gradient and state
Span: TypeAlias = tuple[int, int]  # first program of a launch, and number of programs

# Smallest number of elements in a run. One program processes a run.
RUN = 8192
# Share of the L2 cache for the gradients and states of a window. The rest is for the parameters of
# the window, and for the reads of the next window.
WINDOW = 0.3
_L2 = 40 << 20  # assumed size of the L2 cache in bytes, if the device does not report it
_ALIGNMENT = 16  # bytes
_PROGRAMS = 4  # smallest number of programs per multiprocessor in a window
_SPARE = 4  # number of CUDA graphs that may be captured without a step between them

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Memory that replays of CUDA graphs read. A graph may outlive the optimizer that it captured.
_captured: list[Any] = []


@dataclass
class _Set:
    """Tensors that share types, way of rounding and alignment."""

    types: Types
    kahan: bool
    aligned: bool  # whether all addresses are aligned to 16 bytes, which are read at once
    members: list[int]

    @property
    def draws(self) -> bool:
        """Return whether random bits may be needed."""
        p, _, state = self.types
        return state.itemsize == 2 or (p.itemsize == 2 and not self.kahan)

    @property
    def constants(self) -> tuple[Any, ...]:
        """Return the kernel's type constants: parameter, gradient, state and arithmetic."""
        p, _, state = self.types
        return tuple(_TYPES[dtype] for dtype in (*self.types, arithmetic(p, state)))

    measuring: list[Span] = field(default_factory=list)  # launches that take the sums of shards
    steps: list[Span] = field(default_factory=list)
    keep: list[Span] = field(default_factory=list)  # last launches, which store thresholds


class _WorkTable:
    """Builder of the table of work, with one row per program."""

    def __init__(self, n: Sequence[int]) -> None:
        self.pieces: list[Tensor] = []
        self.count = 0
        block, most = kernel.BLOCK, kernel.RUNS
        self.length = [max(RUN, -(-size // (most * block)) * block) for size in n]
        self.runs = [-(-size // length) for size, length in zip(n, self.length, strict=True)]
        self.row = [0]  # row of sums of each tensor's first run
        for runs in self.runs:
            self.row.append(self.row[-1] + runs)
        self.n = n

    def launch(self, *works: tuple[int, Iterable[int]]) -> list[Span]:
        """Add one launch of all runs of the tensors, given by role; empty if there are none."""
        first = self.count
        for role, tensors in works:
            for i in tensors:
                self._add(role, i)
        return [(first, self.count - first)] if self.count > first else []

    def _add(self, role: int, i: int) -> None:
        on_elements = role not in (kernel.KEEP, kernel.WRITE_SUMS)
        number = torch.arange(self.runs[i] if on_elements else 1, device="cpu")
        start = number * self.length[i]
        rows = torch.zeros(len(number), kernel.WORK, dtype=torch.int64, device="cpu")
        rows[:, 0], rows[:, 1], rows[:, 4] = i, role, self.row[i] + number
        if on_elements:
            rows[:, 2], rows[:, 3] = start, (self.n[i] - start).clamp(max=self.length[i])
        # updates go in reverse order, because the runs that were read last are in the cache
        self.pieces.append(rows.flip(0) if role == kernel.APPLY else rows)
        self.count += len(rows)


class Tables:
    """Device tables of tensors and work, and the launches that use them.

    Args:
        device: device of all tensors.
        addresses: columns p, m, B, threshold and compensation, one address per tensor; 0 if a
            tensor has no threshold or compensation.
        n: number of elements per tensor, >= 1.
        types: types per tensor.
        shared: row of each shard in the table of global sums; -1 for a full tensor.
        rng_keys: key of each tensor's random bits, see :mod:`apollo_qn.rounding`.
        capturable: whether launches may be captured in a CUDA graph.
    """

    def __init__(
        self,
        device: torch.device,
        addresses: Sequence[Sequence[int]],
        n: Sequence[int],
        types: Sequence[Types],
        shared: Sequence[int],
        rng_keys: Sequence[int],
        capturable: bool = False,
    ) -> None:
        self._device = device
        self._addresses, self._n, self._types, self._shared = addresses, n, types, shared
        self.has_parts = any(row >= 0 for row in shared)
        work = _WorkTable(n)
        columns = [*addresses, work.row[:-1], work.runs, shared, rng_keys]
        table = torch.tensor([list(column) for column in columns], dtype=torch.int64, device="cpu")
        self._aligned_states = (table[: len(addresses)] % _ALIGNMENT == 0).all(0)
        self._tensors = _on_device(table.t().contiguous(), device)
        self._rows = torch.empty(work.row[-1], kernel.SUMS, dtype=torch.float64, device=device)
        self._upload = _Upload(device, capturable)
        self._gradients: array[int] | None = None
        self._sets: list[_Set] = []
        self._aligned: list[bool] = []
        self._work = self._tensors
        self._home_stream = _stream(device)

    def _schedule(self, aligned: list[bool]) -> None:
        """Build the table of work."""
        kahan = [low != 0 for low in self._addresses[4]]
        kinds = list(zip(self._types, kahan, aligned, strict=True))
        # sets per alignment, so that how a tensor is read does not depend on the others
        sets = [
            _Set(*kind, [i for i, other in enumerate(kinds) if other == kind])
            for kind in dict.fromkeys(kinds)
        ]
        work = _WorkTable(self._n)
        for one in sets:
            _schedule(one, work, self._shared, _budget(self._device))
        self._work = _on_device(torch.cat(work.pieces), self._device)  # may raise
        self._sets, self._aligned = sets, aligned

    def launch(
        self,
        gradients: array[int],
        which: Iterable[int],
        scalars: array[float] | Tensor,
        full_sums: Tensor | None,
        belief: bool,
        measuring: bool,
    ) -> None:
        """Launch a step, or take the sums of shards.

        Args:
            gradients: address of each tensor's gradient.
            which: row of each tensor in ``scalars``.
            scalars: rows of scalars, on the host or on the device.
            full_sums: global sums of sharded tensors. With ``measuring`` the sums over the shards
                are written here instead.
            belief: whether any tensor uses belief.
            measuring: whether only to take the sums of shards.
        """
        words = array("q", bytes(16 * len(gradients)))
        words[::2], words[1::2] = gradients, array("q", which)
        if isinstance(scalars, array):
            words.frombytes(scalars.tobytes())
        aligned = self._aligned
        if gradients != self._gradients:
            there = torch.frombuffer(gradients, dtype=torch.int64) % _ALIGNMENT == 0
            aligned = (there & self._aligned_states).tolist()
        with _on(self._device):
            if aligned != self._aligned:
                self._schedule(aligned)
            self._gradients = gradients
            uploaded = self._upload(words, self._tensors, self._work, self._rows)
            self._record_stream(uploaded)
            numbers = scalars
            if not isinstance(numbers, Tensor):
                numbers = uploaded[2 * len(gradients) :].view(torch.float64)
            given = (uploaded, numbers, self._rows, self._rows if full_sums is None else full_sums)
            for one in self._sets:
                spans = one.measuring if measuring else one.steps + (one.keep if belief else [])
                for first, count in spans:
                    kernel.step[(count,)](
                        *(self._tensors, self._work, first, *given),
                        *(*one.constants, belief, one.kahan, one.draws),
                        *(one.aligned, kernel.BLOCK, kernel.RUNS),
                        num_warps=kernel.WARPS,
                        enable_fp_fusion=True,  # the default until Triton 3.9
                    )

    def _record_stream(self, uploaded: Tensor) -> None:
        """Tell the allocator that a CUDA stream other than the tables' own uses the tables.

        Otherwise the allocator could reuse their memory before this stream has read it.
        """
        stream = _stream(self._device)
        if stream != self._home_stream:
            for table in (self._tensors, self._work, self._rows, uploaded):
                table.record_stream(stream)


def _schedule(one: _Set, work: _WorkTable, shared: Sequence[int], budget: float) -> None:
    parts = [i for i in one.members if shared[i] >= 0]
    full = [i for i in one.members if shared[i] < 0]
    small = [i for i in full if work.runs[i] == 1]
    large = [i for i in full if work.runs[i] > 1]
    one.measuring = work.launch((kernel.MEASURE, parts)) + work.launch((kernel.WRITE_SUMS, parts))
    _, g, state = (dtype.itemsize for dtype in one.types)
    windows: list[list[int]] = []
    room = 0.0
    for i in large:
        size = work.n[i] * (g + 2 * state)
        if size > room or not windows:
            windows.append([])
            room = budget
        windows[-1].append(i)
        room -= size
    before: list[int] = []
    for window in [*windows, []]:
        first = not one.steps
        one.steps += work.launch(
            (kernel.APPLY, reversed(before)),
            (kernel.MEASURE, window),
            # in the first launch, where only sums are taken
            (kernel.APPLY, parts if first else []),
            (kernel.ALL, small if first else []),
        )
        before = window
    one.keep = work.launch((kernel.KEEP, [*parts, *large]))


def _budget(device: torch.device) -> float:
    """Return the number of bytes of gradients and states in a window."""
    if device.type != "cuda":
        return WINDOW * _L2
    properties = torch.cuda.get_device_properties(device)
    window = WINDOW * (getattr(properties, "L2_cache_size", 0) or _L2)
    # one window for all, if smaller ones would leave multiprocessors idle
    smallest = properties.multi_processor_count * _PROGRAMS * RUN * 12
    return window if window >= smallest else math.inf


def try_compiler(device: torch.device) -> None:
    """Compile and launch a tiny kernel; raise what Triton raises if it cannot."""
    with _on(device):
        kernel.one[(1,)](torch.empty(1, device=device))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table to the device without waiting."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first step with these tensors is being captured in a CUDA graph: do one before, "
            "as torch.cuda.graph asks of every warmup"
        )
    return copy_to_device(table, device)


class _Upload:
    """Copy of 64-bit words on the device, refreshed when the words change."""

    def __init__(self, device: torch.device, capturable: bool) -> None:
        self._device = device
        self._spares = _SPARE if capturable else 0
        self._words: array[int] | None = None
        self._tensor = torch.empty(0, dtype=torch.int64, device=device)
        # pinned memory for captured copies, because none can be allocated during a capture
        self._spare: list[Tensor] = []

    def __call__(self, words: array[int], *tables: Tensor) -> Tensor:
        given = torch.frombuffer(words, dtype=torch.int64)
        if self._device.type != "cuda":
            return given.clone()
        if torch.cuda.is_current_stream_capturing():
            fitting = [spare for spare in self._spare if len(spare) == len(words)]
            self._spare = fitting[1:]
            if not fitting:
                raise RuntimeError(
                    f"{_SPARE} CUDA graphs have been captured without a step between them: do a "
                    "step before the next"
                )
            pinned = fitting[0].copy_(given)
            _captured.append((pinned, tables))
            return torch.empty_like(given, device=self._device).copy_(pinned, non_blocking=True)
        if [len(spare) for spare in self._spare] != [len(words)] * self._spares:
            self._spare = [_pinned(len(words)) for _ in range(self._spares)]
        if words != self._words:
            # allocated for each copy; the allocator reuses it after the device has read it
            pinned = _pinned(len(words)).copy_(given)
            if self._tensor.numel() != len(words):
                self._tensor = torch.empty_like(given, device=self._device)
            self._tensor.copy_(pinned, non_blocking=True)
            self._words = words
        return self._tensor


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)
