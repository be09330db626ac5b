"""Plan of a step: split validated groups into batches, with one back end each, and run them.

:func:`prepare` validates all groups and chooses a back end for each tensor. :func:`execute` runs
the batches and counts the step. Nothing is changed before all groups have been validated.

The counters of a group are nearly always equal. The plan therefore reads only the first one for a
back end that compares them, and reads all of them if that back end then refuses the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apollo_qn import advice, distributed
from apollo_qn import rounding as storage
from apollo_qn.backends import cpu, triton
from apollo_qn.backends.base import (
    Backend,
    Batch,
    Describe,
    TensorLists,
    copy_to_device,
    is_plain,
    unnamed,
)
from apollo_qn.backends.foreach import Foreach
from apollo_qn.backends.reference import Reference
from apollo_qn.distributed import Group, Reduction
from apollo_qn.hyperparameters import Hyperparameters, Scalar, StepScalars
from apollo_qn.secant import Sums
from apollo_qn.tracing import is_traced
from apollo_qn.validation import check_shapes, check_tensors, checked_group


@dataclass
class Backends:
    """Back ends of one optimizer with their working memory, and the reduction of its last step."""

    reference: Reference = field(default_factory=Reference)
    foreach: Foreach = field(default_factory=Foreach)
    cpu: cpu.CPU = field(default_factory=cpu.CPU)
    triton: triton.Triton = field(default_factory=triton.Triton)
    reduction: Reduction | None = None


TRACED = Backends()  # shared by compiled steps, because torch.compile cannot create one


@dataclass
class Part:
    """Batches that one back end updates in one call.

    ``backend`` is None for tensors without elements.
    """

    backend: Backend | None
    batches: list[Batch]
    sums: list[Sums] | None = None  # over the full tensors, if the batches consist of shards

    @property
    def sharded(self) -> bool:
        """Return whether the batches consist of shards."""
        return len(self.batches) > 0 and _is_sharded(self.batches[0])

    def run(self) -> bool:
        """Update the batches; return False as :meth:`Backend.step` does."""
        if self.backend is not None:
            return self.backend.step(self.batches, self.sums)
        for batch, sums in zip(self.batches, self.sums or (), strict=self.sums is not None):
            if batch.tensors.thresholds and sums.largest is not None:
                torch._foreach_copy_(batch.tensors.thresholds, list(sums.largest.unbind()))
        return True


@dataclass
class Step:
    """A validated step of all groups, with a back end for each tensor."""

    describe: Describe
    backends: Backends
    traced: bool = False  # whether a tracer or a functional transform sees the operations
    reduction: Reduction | None = None
    fused: list[Part] = field(
        default_factory=list
    )  # a fused back end updates all or none, and may hand tensors back
    others: list[Part] = field(default_factory=list)
    started: bool = False  # whether anything may have been changed


def prepare(
    groups: list[Group],
    backends: Backends,
    describe: Describe | None = None,
) -> Step:
    """Validate all groups and choose a back end for each tensor; nothing is changed.

    Args:
        groups: tensor lists and hyperparameters of each parameter group.
        backends: back ends of the optimizer.
        describe: function that returns the name of a parameter for a message.

    Raises:
        ValueError, RuntimeError: as :func:`apollo_qn.apollo` does.
    """
    describe = describe or unnamed
    traced = is_traced()
    groups = [checked_group(lists, h, traced, describe) for lists, h in groups if lists.params]
    reduction = None
    if torch.compiler.is_compiling() or not all(is_plain(lists.params) for lists, _ in groups):
        for lists, _ in groups:
            check_shapes(lists, describe)  # shards do not show the shape of the full tensor
        groups, reduction = distributed.localize(groups, backends.reduction, describe)
    step = Step(describe, backends, traced, reduction)
    for lists, h in groups:
        for local in _by_device(lists):
            backend = None if traced else _fused_backend(local, h, backends)
            if backend is None:
                check_tensors(local, describe)
            trusting = backend is not None and backend.counts
            for batch in _batches(local, h, only_first=trusting):
                if backend is None:
                    _split_homogeneous(step, batch)
                else:
                    _append(step.fused, backend, batch)
    for part in step.others:
        if part.backend is backends.foreach and len(part.batches) > 1:
            part.batches = _merged(part.batches)
    return step


def execute(step: Step) -> None:
    """Run a step that :func:`prepare` has validated."""
    if step.reduction is not None or len(step.fused) > 1:
        # hand back now, because the first part must not change if a later one is refused
        for part in step.fused:
            _hand_back(step, part)
        _check_counters(step.fused)
    if step.reduction is not None:
        _reduce(step, step.reduction)
    for part in step.fused:
        if part.batches and not part.run():
            _hand_back(step, part)
            if part.batches and not part.run():
                raise RuntimeError(
                    "another thread changed a step counter or a previous_lr during the step: step "
                    "in one thread at a time"
                )
        step.started = True
    step.started = True
    for part in step.others:
        part.run()
    for part in (*step.fused, *step.others):
        if part.backend is None or not part.backend.counts:
            _count(part.batches)
    if step.backends.reduction is not step.reduction:
        step.backends.reduction = step.reduction


def _hand_back(step: Step, part: Part) -> None:
    """Move tensors that a fused back end cannot take to other back ends; nothing is changed.

    The batches that remain have equal counters.
    """
    kept = []
    assert part.backend is not None
    batches = part.batches
    if part.backend.counts:  # only the first counter of each batch has been read
        batches = [exact for batch in batches for exact in _batches(batch.tensors, batch.h)]
    for batch, taken in zip(batches, part.backend.takes(batches), strict=True):
        others = [i for i, on in enumerate(taken) if not on]
        if others:
            rest = batch.select(others)
            check_tensors(rest.tensors, step.describe)
            _split_homogeneous(step, rest)
        if len(others) < len(taken):
            kept.append(batch.select([i for i, on in enumerate(taken) if on]))
    part.batches = kept


def _check_counters(parts: list[Part]) -> None:
    """Raise RuntimeError if two parts count on one tensor; the second would find it changed."""
    found = [
        {id(counter) for batch in part.batches for counter in batch.tensors.state_steps}
        for part in parts
    ]
    if sum(map(len, found)) > len(set().union(*found)):
        raise RuntimeError(
            "a sharded and a plain parameter share a tensor of state_steps: give each its own"
        )


def _is_sharded(batch: Batch) -> bool:
    return len(batch.tensors.rows) > 0  # Dynamo of torch 2.10 cannot trace bool() of a list


def _append(parts: list[Part], backend: Backend | None, batch: Batch) -> None:
    for part in parts:
        if part.backend is backend and part.sharded == _is_sharded(batch):
            part.batches.append(batch)
            return
    parts.append(Part(backend, [batch]))


def _merged(batches: list[Batch]) -> list[Batch]:
    """Merge batches that differ only in their learning rates."""
    homogeneous: dict[Any, list[Batch]] = {}
    for batch in batches:
        s, p = batch.scalars, batch.tensors.params[0]
        if isinstance(s.rate, Tensor) or isinstance(s.t, Tensor):
            return batches  # the counters are on the device
        types = (p.device, *(column[0].dtype for column in batch.tensors.large))
        key = (batch.h._replace(lr=0.0), s._replace(rate=0.0), types)
        homogeneous.setdefault(key, []).append(batch)
    result = []
    for members in homogeneous.values():
        first = members[0]
        scalars, rates = first.scalars, [batch.scalars.rate for batch in members]
        if len(set(rates)) > 1:
            sizes = [len(batch.tensors) for batch in members]
            every = [rate for rate, size in zip(rates, sizes, strict=True) for _ in range(size)]
            column = torch.tensor(every, dtype=torch.float64, device="cpu")
            scalars = scalars._replace(rate=copy_to_device(column, first.tensors.params[0].device))
        tensors = TensorLists.concatenate([batch.tensors for batch in members])
        result.append(replace(first, tensors=tensors, scalars=scalars))
    return result


def _split_homogeneous(step: Step, batch: Batch) -> None:
    """Split a batch into homogeneous batches, and add each to the foreach back end or reference."""
    lists, h = batch.tensors, batch.h
    many = h.foreach is not False and not h.differentiable and not step.traced
    homogeneous: dict[Any, list[int]] = {}
    for i, (p, g, m) in enumerate(zip(lists.params, lists.grads, lists.exp_avgs, strict=True)):
        which = "foreach" if many and is_plain((p, g)) else "reference"
        if p.numel() == 0:
            which = "none"
        homogeneous.setdefault((which, p.device, p.dtype, g.dtype, m.dtype), []).append(i)
    for (which, *_), members in homogeneous.items():
        backend = None if which == "none" else getattr(step.backends, which)
        _append(step.others, backend, _real(batch.select(members)))


def _real(batch: Batch) -> Batch:
    """Return a homogeneous batch with real views and without lists that it does not need."""
    lists = batch.tensors
    if lists.params[0].is_complex():

        def view(tensors: list[Any]) -> list[Any]:
            return [x if x is None else torch.view_as_real(x) for x in tensors]

        lists = replace(
            lists,
            params=view(lists.params),
            grads=view([g.resolve_conj() for g in lists.grads]),  # may be conjugated lazily
            exp_avgs=view(lists.exp_avgs),
            hessian_diags=view(lists.hessian_diags),
            compensations=view(lists.compensations),
        )
    dtype, state_dtype = lists.params[0].dtype, lists.exp_avgs[0].dtype
    if lists.compensations and dtype not in storage.DROPPED:
        lists = replace(lists, compensations=[])
    drawn = state_dtype in storage.DROPPED or storage.is_drawn(dtype, batch.h.rounding)
    if lists.rng_keys and not drawn:
        lists = replace(lists, rng_keys=[])
    return batch if lists is batch.tensors else replace(batch, tensors=lists)


def _batches(lists: TensorLists, h: Hyperparameters, only_first: bool = False) -> list[Batch]:
    """Split a group into tensors with equal counters that are all shards or all full tensors.

    With ``only_first`` the counters and previous rates of all are taken to be those of the first.
    """
    # in this order: while Dynamo of torch 2.15 traces, it cannot negate capturable
    on_host = not (torch.compiler.is_compiling() or h.capturable)
    shard = [row >= 0 for row in lists.rows] or [False]
    read = 1 if only_first else len(lists)
    steps = [x.item() for x in lists.state_steps[:read]] if on_host else [0.0]
    rates = [0.0]
    if (
        on_host and lists.previous_lrs and not h.differentiable
    ):  # otherwise autograd runs through the rate
        rates = [x.item() for x in lists.previous_lrs[:read]]
    if on_host and math.isnan(sum(steps) + sum(rates)):
        raise RuntimeError("a step counter or a previous_lr is not a number: load a valid state")
    indices: dict[Any, list[int] | None] = {}
    if len(set(shard)) == len(set(steps)) == len(set(rates)) == 1:
        indices[shard[0], steps[0], rates[0]] = None
    else:
        columns: tuple[list[Any], ...] = (shard, steps, rates)
        long = (column * len(lists) if len(column) == 1 else column for column in columns)
        for i, key in enumerate(zip(*long, strict=True)):
            indices.setdefault(key, []).append(i)  # type: ignore[union-attr]
    result = []
    for (is_shard, t, rate), members in indices.items():
        selected = lists if members is None else lists.select(members)
        if selected.rows and not is_shard:
            selected = replace(selected, rows=[])
        step: Scalar = t
        previous_lr: Scalar | None = rate
        if not on_host:
            step = torch.stack(selected.state_steps)
        if selected.previous_lrs and (not on_host or h.differentiable):
            previous_lr = torch.stack(selected.previous_lrs)
        result.append(Batch(selected, h, StepScalars.at(step, h, previous_lr)))
    return result


def _reduce(step: Step, reduction: Reduction) -> None:
    """Take the sums over all shards and set each part's sums over the full tensors."""
    parts = [part for part in (*step.fused, *step.others) if part.sharded]
    table = reduction.table()
    for part in parts:
        if part.backend is not None:
            found = part.backend.measure(part.batches)
            for batch, sums in zip(part.batches, found, strict=True):
                reduction.put(table, batch.tensors.rows, sums)
    reduction.reduce_(table)
    for part in parts:
        part.sums = [reduction.take(table, batch.tensors.rows) for batch in part.batches]


def _count(batches: list[Batch]) -> None:
    """Count the step of each tensor and record its rate, for back ends that do not count."""
    for batch in batches:
        steps = batch.tensors.state_steps
        if all(step.is_cpu for step in steps) and not torch.compiler.is_compiling():
            # one tensor for all, because a number would be made a tensor for each
            torch._foreach_add_(steps, torch.ones((), device="cpu"), alpha=1.0)
        else:
            torch._foreach_add_(steps, 1.0)
        if batch.tensors.previous_lrs:
            _record(batch.scalars.rate, batch.tensors.previous_lrs)


def _record(rate: Scalar, previous: list[Tensor]) -> None:
    """Write one rate, or one rate per tensor, into ``previous``."""
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float64, device="cpu")
    new = list(rate.unbind()) if rate.dim() else [rate] * len(previous)
    if torch.is_grad_enabled():  # foreach_copy_ has no derivative
        for old, value in zip(previous, new, strict=True):
            old.copy_(value)
    else:
        torch._foreach_copy_(previous, new)


def _fused_backend(lists: TensorLists, h: Hyperparameters, backends: Backends) -> Backend | None:
    """Return the fused back end to try first, or None; it may hand tensors back."""
    wanted = h.fused or (h.fused is None and h.foreach is None)
    if not wanted or h.differentiable:
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in lists.params):
        return None  # the other back ends raise autograd's error for in-place changes
    device = lists.params[0].device
    backend: Backend = backends.cpu
    if triton.serves(device):
        reason = triton.why_not() if h.fused else triton.why_not_default(device)
        backend = backends.triton
    elif device.type == "cpu":
        if h.capturable:
            return None  # the counters must not be read on the host
        reason = cpu.why_not()
    else:
        reason = f"none serves {device.type}"
        if not h.fused:
            return None
    if reason is None:
        return backend
    if h.fused:
        raise RuntimeError(
            f"fused=True: no fused back end serves {unnamed(lists.params[0])} on "
            f"{device} ({reason}); use fused=None for the fastest back end that there is"
        )
    _warn_once(f"Apollo: {reason}; its foreach back end serves, more slowly")
    return None


@cache
def _warn_once(message: str) -> None:
    advice.warn(message, advice.ApolloWarning)


def _by_device(lists: TensorLists) -> list[TensorLists]:
    """Split the lists by device."""
    if torch.compiler.is_compiling() or len(lists) == 1:
        return [lists]
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [lists]
    devices: dict[torch.device, list[int]] = {}
    for i, p in enumerate(lists.params):
        devices.setdefault(p.device, []).append(i)
    return [lists] if len(devices) == 1 else [lists.select(which) for which in devices.values()]
