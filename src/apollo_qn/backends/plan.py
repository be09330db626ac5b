"""What a fused back end finds, and keeps from step to step.

Which tensors the kernel can take, their addresses, and what that was concluded from: from step to
step it is only compared with what is there, so that the overhead stays near a microsecond a tensor.
"""

from __future__ import annotations

import bisect
import ctypes
import operator
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from apollo_qn.backends import Group, kernel, memory
from apollo_qn.backends.kernel import address
from apollo_qn.rule import Hyperparameters, Scalar, StepScalars, arithmetic

Types: TypeAlias = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient and state

_f32, _f64, _bf16 = torch.float32, torch.float64, torch.bfloat16
# what kernel.c has, and its number there
KINDS: dict[Types, int] = {
    (_f32, _f32, _f32): 0,
    (_f32, _bf16, _f32): 1,
    (_bf16, _bf16, _f32): 2,
    (_bf16, _f32, _f32): 3,
    (_f64, _f64, _f64): 4,
    (_f32, _f32, _bf16): 5,
    (_bf16, _bf16, _bf16): 6,
}
# bytes of parameter, gradient, state and arithmetic
_SIZES = [(p.itemsize, g.itemsize, m.itemsize, arithmetic(p, m).itemsize) for p, g, m in KINDS]
_PLAIN = (Tensor, torch.nn.Parameter)
_KEPT = 8  # plans
SCALARS = 16  # numbers of a step


def planned(groups: list[Group], plan: Plan | None, make: type[Plan]) -> Plan:
    """What a kernel will do for these groups; nothing is changed.

    Args:
        groups: with float or CPU tensor learning rates.
        plan: what the last call returned.
        make: the kind of plan.

    Raises:
        ValueError: a tensor lies in read-only memory.
    """
    tensors = Tensors.of(groups)
    known = [] if plan is None else [plan, *plan.others]
    found = next((one for one in known if one.renew(tensors)), None)
    if found is None:
        known = [one for one in known if one.is_of(tensors)]
        found = make(tensors, known)
    for one in known:
        one.others = []
    # which parameters have gradients may go to and fro, as with two losses in turn
    found.others = [one for one in known if one is not found][: _KEPT - 1]
    return found


@dataclass(slots=True)
class Tensors:
    """The tensors of all groups in one row, column by column.

    A column is None where no group needs it, and holds None for those that do not.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    hessian_diags: list[Tensor]
    steps: list[Tensor]
    previous_lrs: list[Tensor | None] | None
    thresholds: list[Tensor | None] | None
    compensations: list[Tensor | None] | None
    streams: list[int | None] | None
    shared: list[int | None] | None
    sizes: list[int]  # of the groups

    @classmethod
    def of(cls, groups: list[Group]) -> Tensors:
        """Those of the groups, in their order."""

        def row(name: str) -> Any:
            columns = [getattr(group, name) for group in groups]
            if all(column is None for column in columns):
                return None
            if len(groups) == 1:
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
            row("compensations"),
            row("streams"),
            row("shared"),
            [len(group.params) for group in groups],
        )

    def kept(self) -> tuple[list[Any] | None, ...]:
        """What are the same objects from step to step, in the order of the kernel's table."""
        state = (self.exp_avgs, self.hessian_diags)
        scalars = (self.steps, self.previous_lrs, self.thresholds)
        return (self.params, *state, *scalars, self.compensations)

    def numbers_of(self, i: int) -> list[Tensor | None]:
        """Step, rate before and threshold of tensor ``i``."""
        columns = (self.steps, self.previous_lrs, self.thresholds)
        return [None if column is None else column[i] for column in columns]


class _Look:
    """What a step finds, to be compared with what the last one found."""

    def __init__(self, tensors: Tensors, room: int = 0) -> None:
        """Look at all tensors; ``room``, if it is enough, spares a second look.

        Raises:
            RuntimeError: of torch, for a tensor without memory of its own.
        """
        grads = tensors.grads
        self._types = [type(g) for g in grads]
        self._negated = [g.is_neg() for g in grads]
        self._sizes = tensors.sizes
        columns = [grads, *tensors.kept()]
        describe = kernel.loaded().describe if kernel.available() else None
        find = self._ask_torch if describe is None else self._ask_dlpack
        objects, addresses = find(columns, len(grads), room)
        self._objects = objects[len(grads) :]
        self.g, self._addresses = addresses[: len(grads)], addresses[len(grads) :]

    def _ask_dlpack(
        self, columns: list[list[Any] | None], count: int, room: int
    ) -> tuple[array[int], array[int]]:
        lists = array("Q", [0 if column is None else id(column) for column in columns])
        objects, addresses = (array("Q", [0]) * (len(columns) * count) for _ in range(2))
        ready = kernel.loaded()
        while True:
            words = array("q", [0]) * max(room, 1)
            used = ready.look(
                *(ready.describe, len(columns), address(lists), count, id(None)),
                *(address(objects), address(addresses), address(words), len(words)),
            )
            if used <= len(words):
                break
            room = used
        self._properties: Any = words
        return objects, addresses

    def _ask_torch(
        self, columns: list[list[Any] | None], count: int, _room: int
    ) -> tuple[array[int], array[int]]:
        every = [x for column in columns for x in column or [None] * count]
        self._properties = [
            (x.dtype, x.device, x.shape, x.stride()) for x in every if x is not None
        ]
        addresses = array("Q", [0 if x is None else x.data_ptr() for x in every])
        return array("Q", map(id, every)), addresses

    @property
    def room(self) -> int:
        return len(self._properties)

    def same(self, other: _Look) -> bool:
        """Whether only the gradients' addresses differ."""
        return (
            self._objects == other._objects
            and self._addresses == other._addresses
            and self._properties == other._properties
            and self._types == other._types
            and self._negated == other._negated
            and self._sizes == other._sizes
        )


class Plan(ABC):
    """Which tensors a kernel takes, their addresses, and what this was concluded from.

    ``left`` are for each group the indices of the tensors that the kernel does not take, ``others``
    the plans of other tensors that were needed lately. ``KINDS`` numbers the types of parameter,
    gradient and state that the kernel takes, by what has the same sizes in ``kernel.c``.
    """

    KINDS: ClassVar[Mapping[Types, int]]

    def __init__(self, tensors: Tensors, known: Sequence[Plan] = ()) -> None:
        self.others: list[Plan] = []
        try:
            self._look: _Look | None = _Look(tensors)
        except (RuntimeError, NotImplementedError, BufferError):
            self._look = None  # to be looked at anew at the next step
        # alive, so that their ids remain theirs
        self._kept = [column and list(column) for column in tensors.kept()]
        self._shared = tensors.shared and list(tensors.shared)
        self._streams = tensors.streams and list(tensors.streams)
        kinds = [self._kind(tensors, i) for i in range(len(tensors.params))]
        self._take(tensors, [i for i, kind in enumerate(kinds) if kind is not None], kinds)
        new = self._written.difference(*(one._written for one in known))
        self.check_writable(new, tensors)
        overlapping = memory.overlapping(self._ranges())
        if overlapping:
            self._look = None
            self._take(tensors, [i for i in self._taken if i not in overlapping], kinds)
        if self._overlapping_gradient(self._g):
            # what one tensor reads another writes: the order of all of them matters
            self._look = None
            self._take(tensors, [], kinds)
        taken = set(self._taken)
        self.left: list[list[int]] = []
        first = 0
        for size in tensors.sizes:
            self.left.append([i for i in range(size) if first + i not in taken])
            first += size

    @abstractmethod
    def fits(self, large: list[Tensor], numbers: list[Tensor | None]) -> bool:
        """Whether a tensor's parameter, gradient, state, and its numbers lie where they should."""

    @abstractmethod
    def measure(self, hyperparameters: list[Hyperparameters], table: Tensor) -> None:
        """Write the sums of parts of tensors into their rows of ``table``; see :meth:`step`."""

    @abstractmethod
    def step(self, hyperparameters: list[Hyperparameters], table: Tensor | None) -> None:
        """Run the kernel with the settings of each group.

        Args:
            hyperparameters: one for each group.
            table: float64, where the tensors are, contiguous; row i holds scale (a power of 2), q4,
                k and largest of :class:`apollo_qn.rule.Sums` for the tensor whose ``shared`` is i.
        """

    @abstractmethod
    def check_writable(self, ranges: set[memory.Range], tensors: Tensors) -> None:
        """Raise ValueError for what lies in memory that cannot be written."""

    def _kind(self, tensors: Tensors, i: int) -> int | None:
        """The number of what tensor ``i`` consists of; None: the kernel cannot take it."""
        p, g, m, B = (
            column[i]
            for column in (tensors.params, tensors.grads, tensors.exp_avgs, tensors.hessian_diags)
        )
        low = None if tensors.compensations is None else tensors.compensations[i]
        large, numbers = [p, g, m, B], tensors.numbers_of(i)
        large += [] if low is None else [low]
        every = [*large, *(x for x in numbers if x is not None)]
        if any(type(x) not in _PLAIN for x in every):
            return None
        if not self.fits(large, numbers) or any(x.layout is not torch.strided for x in every):
            return None
        if any(x.is_neg() or x.is_inference() for x in every):
            return None
        if any(x is not None and x.numel() != 1 for x in numbers):
            return None
        if p.numel() == 0 or m.dtype is not B.dtype or any(x.shape != p.shape for x in large):
            return None
        if not all(x.is_contiguous() for x in large) and not (
            _dense(p) and all(x.stride() == p.stride() for x in large)
        ):
            return None
        try:
            if not all(x.data_ptr() for x in every):
                return None
        except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own
            return None
        return self.KINDS.get((p.dtype, g.dtype, m.dtype))

    def _take(self, tensors: Tensors, taken: list[int], kinds: list[int | None]) -> None:
        def addresses(column: list[Any] | None) -> array[int]:
            row = [None if column is None else column[i] for i in taken]
            return array("Q", [0 if x is None else x.data_ptr() for x in row])

        self._taken = taken
        self._all = len(taken) == len(kinds)
        self._n = array("q", [tensors.params[i].numel() for i in taken])
        self._kind_of = array("i", [kinds[i] or 0 for i in taken])
        groups = [group for group, size in enumerate(tensors.sizes) for _ in range(size)]
        self._group = array("i", [groups[i] for i in taken])
        self._steps = [tensors.steps[i] for i in taken]
        self._rates = [tensors.numbers_of(i)[1] for i in taken]
        self._g = addresses(tensors.grads)
        self._addresses = [addresses(column) for column in self._kept]
        streams = tensors.streams or [0] * len(kinds)
        self._stream = array("I", [streams[i] or 0 for i in taken])
        large = (tensors.params, tensors.exp_avgs, tensors.hessian_diags, tensors.compensations)
        changing = [column[i] for column in large if column is not None for i in taken]
        self._changing = [x for x in changing if x is not None]
        # what Kernel.numbers writes
        self._which, self._run_group = (array("i", [0]) * len(taken) for _ in range(2))
        self._run_step, self._run_lr = (array("d", [0]) * len(taken) for _ in range(2))
        self._written = set(self._ranges())
        self._starts = array("Q", sorted(found.start for found in self._written))
        self._ends = array("Q", sorted(found.end for found in self._written))

    def _ranges(self) -> Iterator[memory.Range]:
        """What the kernel writes, by tensor."""
        for row, i in enumerate(self._taken):
            kind, n = self._kind_of[row], self._n[row]
            p, _, state, wide = _SIZES[kind]
            sizes = (n * p, n * state, n * state, 4, 8, wide, n * p)
            for column, size in zip(self._addresses, sizes, strict=True):
                if column[row]:
                    yield memory.Range(column[row], column[row] + size, i)

    def _overlapping_gradient(self, g: array[int]) -> set[int]:
        """The first tensor whose gradient lies in what the kernel writes, if there is one."""
        if not kernel.available():
            return self._overlapping_gradient_slowly(g)
        found = kernel.loaded().overlap(
            ctypes.byref(self._table(g)),
            address(self._starts),
            address(self._ends),
            len(self._starts),
        )
        return set() if found < 0 else {self._taken[found]}

    def _overlapping_gradient_slowly(self, g: array[int]) -> set[int]:
        for row, i in enumerate(self._taken):
            end = g[row] + self._n[row] * _SIZES[self._kind_of[row]][1]
            before = bisect.bisect_left(self._starts, end)
            if before and self._ends[before - 1] > g[row]:
                return {i}
        return set()

    def renew(self, tensors: Tensors) -> bool:
        """Take over the gradients of another step; False: more has changed, a new plan is due."""
        if self._look is None or not self._knows(tensors.params):
            return False
        if self._shared != tensors.shared or self._streams != tensors.streams:
            return False
        try:
            look = _Look(tensors, self._look.room)
        except (RuntimeError, NotImplementedError, BufferError):
            return False
        if not look.same(self._look):
            return False
        g = look.g if self._all else array("Q", [look.g[i] for i in self._taken])
        if g != self._g and self._overlapping_gradient(g):
            return False
        self._look, self._g = look, g
        return True

    def _scalars(self, hyperparameters: list[Hyperparameters]) -> array[float]:
        """Rows of the step's numbers; ``_which`` says which row is a tensor's."""
        numbers = array("d")
        for i in range(self._runs()):
            h = on_host(hyperparameters[self._run_group[i]])
            numbers.extend(scalars(h, self._run_step[i], self._run_lr[i]))
        return numbers

    def _runs(self) -> int:
        _, _, _, step, previous_lr, *_ = self._addresses
        written = (self._which, self._run_group, self._run_step, self._run_lr)
        if kernel.available():
            columns: tuple[array[Any], ...] = (self._group, step, previous_lr, *written)
            found: int = kernel.loaded().numbers(len(self._taken), *map(address, columns))
            return found
        known: dict[tuple[int, float, float], int] = {}
        for i, (t, rate) in enumerate(zip(self._steps, self._rates, strict=True)):
            key = (self._group[i], t.item(), 0.0 if rate is None else rate.item())
            run = self._which[i] = known.setdefault(key, len(known))
            self._run_group[run], self._run_step[run], self._run_lr[run] = key
        return len(known)

    def is_of(self, tensors: Tensors) -> bool:
        """Whether no parameter has another state by now, which this plan would keep alive."""
        columns = (tensors.params, tensors.exp_avgs, tensors.hessian_diags, tensors.steps)
        now = {id(p): (id(m), id(B), id(t)) for p, m, B, t in zip(*columns, strict=True)}
        mine = (column or [] for column in self._kept[:4])
        return all(
            now.get(id(p), (id(m), id(B), id(t))) == (id(m), id(B), id(t))
            for p, m, B, t in zip(*mine, strict=True)
        )

    def _knows(self, params: list[Tensor]) -> bool:
        mine = self._kept[0] or []
        return len(mine) == len(params) and all(map(operator.is_, mine, params))

    def _table(self, g: array[int], scalars: int = 0, shared: int = 0) -> kernel.Table:
        p, *others = self._addresses
        numbers = (self._n, self._kind_of, self._which, self._stream)
        columns: tuple[array[Any], ...] = (p, g, *others, *numbers)
        return kernel.Table(len(self._taken), *map(address, columns), scalars, shared)


def _dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous in some order of its dimensions."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def on_host(h: Hyperparameters) -> Hyperparameters:
    """With the learning rate as a number."""
    return replace(h, lr=h.lr.item()) if isinstance(h.lr, Tensor) else h


def scalars(h: Hyperparameters, t: Scalar, previous_lr: Scalar | None) -> Iterator[Any]:
    """The numbers of a step, ``SCALARS`` of them: kernel.c's ``step_scalars``.

    Tensors where ``t`` and ``previous_lr`` are.
    """
    s = StepScalars.at(t, h, previous_lr, h.sigma)
    yield from (s.alpha, h.rate(t), s.offset, s.previous_threshold, s.previous_offset)
    yield from (s.kappa, s.omega, h.sigma, h.secant_eps, -1.0 if h.maximize else 1.0)
    yield from (h.weight_decay if on else 0.0 for on in (h.l2, h.decoupled))
    yield from (float(h.weight_decay != 0), float(h.belief))
    yield from (float(h.rounding == "stochastic"), t)
