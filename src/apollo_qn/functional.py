"""The functional form of the optimizer: validate lists of tensors, choose back ends, do one step.

The way of a step: :func:`prepare` validates all groups and splits them into batches, one back end
each; :func:`execute` runs the batches and counts the step. Nothing is changed before all of it has
been validated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apollo_qn import distributed
from apollo_qn import rounding as storage
from apollo_qn.backends import cpu, triton
from apollo_qn.backends.base import Backend, Batch, TensorLists, is_plain, joined
from apollo_qn.backends.foreach import Foreach
from apollo_qn.backends.reference import Reference
from apollo_qn.distributed import Group, Reduction
from apollo_qn.hyperparameters import (
    Hyperparameters,
    Rebound,
    Scalar,
    StepScalars,
    warmup_start,
)
from apollo_qn.rounding import Rounding
from apollo_qn.secant import Sums


def apollo(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessian_diags: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: Scalar = 1.0,
    beta: Scalar = 0.9,
    eps: float = 1e-4,
    sigma: float = 1.0,
    weight_decay: Scalar = 0.0,
    decoupled_weight_decay: bool = False,
    rebound: Rebound = "constant",
    warmup_steps: int = 500,
    warmup_init_lr: float | None = None,
    warmup_base_lr: float | None = None,
    previous_lrs: list[Tensor] | None = None,
    thresholds: list[Tensor] | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    rounding: Rounding | None = None,
    seed: int | None = None,
    compensations: list[Tensor | None] | None = None,
    positions: list[int] | None = None,
) -> None:
    """Do one step of Apollo (Algorithm 1 of the paper), in place.

    See :class:`apollo_qn.Apollo` for the hyperparameters. The caller owns the state, which starts
    as zeros.

    Args:
        params, grads: tensors of any shapes.
        exp_avgs, hessian_diags: m and B, of the parameters' shapes, bfloat16, float32 or float64
            (complex for complex parameters).
        state_steps: a 0-dim floating tensor per parameter, the number of steps done; one is added.
            Only with ``capturable`` may they lie on another device than the CPU.
        warmup_base_lr: the rate that ``warmup_init_lr`` is divided by; None means ``lr``.
        previous_lrs: a 0-dim tensor per parameter, needed with decoupled weight decay: the rate of
            the step before, read and then overwritten.
        thresholds: a 0-dim tensor per parameter on its device, needed with ``rebound="belief"``:
            the threshold of the step before, read and then overwritten.
        compensations: needed with ``rounding="kahan"``: for each bfloat16 or float16 parameter a
            tensor of its shape and type, zeros at first; anything, or None, for the others.
        seed: seed of the random bits of stochastic rounding; None means 0, since nothing here
            could save another one.
        positions: an integer per parameter, from which its random bits follow; None: 0, 1, ...

    Raises:
        ValueError: the lists differ in length, or one that the mode needs is missing; a bad
            ``rounding`` or ``seed``.
        RuntimeError: a sparse gradient; shapes that differ; ``fused=True`` where there is no fused
            back end; a combination of ``foreach``, ``fused`` and ``differentiable`` that cannot be.

    Example:
        >>> theta, g = torch.ones(3), torch.full((3,), 0.5)
        >>> m, B, step = torch.zeros(3), torch.zeros(3), torch.zeros(())
        >>> apollo([theta], [g], [m], [B], [step], lr=0.1, warmup_steps=0)
        >>> theta
        tensor([0.9500, 0.9500, 0.9500])
    """
    seed = 0 if seed is None else seed
    check_rounding(rounding, seed)
    h = Hyperparameters(
        lr=lr,
        beta=beta,
        eps=eps,
        sigma=sigma,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        rebound=rebound,
        warmup_steps=warmup_steps,
        warmup_start=warmup_start(warmup_init_lr, lr if warmup_base_lr is None else warmup_base_lr)
        if warmup_steps
        else 1.0,
        maximize=maximize,
        rounding=rounding or storage.DEFAULT,
        foreach=foreach,
        fused=fused,
        capturable=capturable,
        differentiable=differentiable,
    )
    places = range(len(params)) if positions is None else positions
    _check_length("positions", places, params, "number")
    tensors = TensorLists(
        list(params),
        list(grads),
        list(exp_avgs),
        list(hessian_diags),
        list(state_steps),
        _needed(
            "previous_lrs",
            previous_lrs,
            params,
            decoupled_weight_decay,
            "decoupled_weight_decay=True",
        ),
        _needed("thresholds", thresholds, params, rebound == "belief", "rebound='belief'"),
        list(compensations or []) if rounding == "kahan" else [],
        [storage.rng_stream(seed, place) for place in places],
    )
    execute(prepare([(tensors, h)], Backends()))


def _needed(
    name: str, tensors: list[Tensor] | None, params: list[Tensor], needed: bool, mode: str
) -> list[Tensor]:
    """Return a list that only some modes need; raise ValueError where it is missing."""
    if not needed:
        return []
    if tensors is None:
        raise ValueError(f"{name} must be a list of 0-dim tensors with {mode}, got None")
    _check_length(name, tensors, params)
    return list(tensors)


@dataclass
class Backends:
    """The back ends of one optimizer with their working memory, and its last all-reduce."""

    reference: Reference = field(default_factory=Reference)
    foreach: Foreach = field(default_factory=Foreach)
    cpu: cpu.CPU = field(default_factory=cpu.CPU)
    triton: triton.Triton = field(default_factory=triton.Triton)
    reduction: Reduction | None = None


TRACED = Backends()  # of compiled steps, which torch.compile cannot make


@dataclass
class Part:
    """Batches that one back end updates in one call; None: tensors without elements."""

    backend: Backend | None
    batches: list[Batch]
    sums: list[Sums] | None = None  # over the whole tensors, if the batches consist of shards

    @property
    def sharded(self) -> bool:
        """Whether the batches consist of shards."""
        return bool(self.batches) and bool(self.batches[0].tensors.rows)

    def run(self) -> bool:
        """Do the step of these batches; False: nothing was changed, see :meth:`Backend.step`."""
        if self.backend is not None:
            return self.backend.step(self.batches, self.sums)
        for batch, sums in zip(self.batches, self.sums or (), strict=self.sums is not None):
            if batch.tensors.thresholds and sums.largest is not None:
                torch._foreach_copy_(batch.tensors.thresholds, list(sums.largest.unbind()))
        return True


@dataclass
class Step:
    """A validated step of all groups: who does what."""

    describe: Callable[[Tensor], str]
    backends: Backends
    reduction: Reduction | None = None
    fused: list[Part] = field(default_factory=list)  # all or nothing: it may hand tensors back
    others: list[Part] = field(default_factory=list)
    started: bool = False  # whether anything may have been changed


def prepare(
    groups: list[Group],
    backends: Backends,
    describe: Callable[[Tensor], str] | None = None,
) -> Step:
    """Validate all groups and choose who does what; nothing is changed.

    Args:
        groups: tensor lists and hyperparameters of each parameter group.
        backends: those of the optimizer.
        describe: names a parameter in a message.

    Raises:
        ValueError, RuntimeError: as :func:`apollo` does.
    """
    describe = describe or (lambda p: f"a parameter of shape {tuple(p.shape)}")
    groups = [_checked(lists, h) for lists, h in groups if lists.params]
    reduction = None
    if torch.compiler.is_compiling() or not all(is_plain(lists.params) for lists, _ in groups):
        for lists, _ in groups:
            check_shapes(lists, describe)  # a shard hides the shape of its tensor
        groups, reduction = distributed.localize(groups, backends.reduction)
    step = Step(describe, backends, reduction)
    for lists, h in groups:
        for some in _by_device(lists):
            backend = _fused_backend(some, h, backends)
            if backend is None:
                check_tensors(some, describe)
            for batch in _batches(some, h):
                if backend is None:
                    _add_alike(step, batch)
                else:
                    _append(step.fused, backend, batch)
    for part in step.others:
        if part.backend is backends.foreach and len(part.batches) > 1:
            part.batches = _merged(part.batches)
    return step


def execute(step: Step) -> None:
    """Run a step that :func:`prepare` has validated."""
    if step.reduction is not None or len(step.fused) > 1:
        # the first part must not be changed where a later one is refused
        for part in step.fused:
            _hand_back(step, part)
    if step.reduction is not None:
        _reduce(step, step.reduction)
    for part in step.fused:
        if part.batches and not part.run():
            _hand_back(step, part)
            if part.batches:
                part.run()
        step.started = True
    step.started = True
    for part in step.others:
        part.run()
    for part in (*step.fused, *step.others):
        for batch in part.batches:
            _count(batch)
    if step.backends.reduction is not step.reduction:
        step.backends.reduction = step.reduction


def _hand_back(step: Step, part: Part) -> None:
    """Give the tensors that a fused back end cannot take to the others; nothing is changed."""
    kept = []
    assert part.backend is not None
    for batch, taken in zip(part.batches, part.backend.takes(part.batches), strict=True):
        others = [i for i, on in enumerate(taken) if not on]
        if others:
            rest = batch.select(others)
            check_tensors(rest.tensors, step.describe)
            _add_alike(step, rest)
        if len(others) < len(taken):
            kept.append(batch.select([i for i, on in enumerate(taken) if on]))
    part.batches = kept


def _append(parts: list[Part], backend: Backend | None, batch: Batch) -> None:
    for part in parts:
        if part.backend is backend and part.sharded == bool(batch.tensors.rows):
            part.batches.append(batch)
            return
    parts.append(Part(backend, [batch]))


def _merged(batches: list[Batch]) -> list[Batch]:
    """Return the batches with those as one that differ in nothing but their learning rates."""
    alike: dict[Any, list[Batch]] = {}
    for batch in batches:
        s, p = batch.scalars, batch.tensors.params[0]
        if isinstance(s.rate, Tensor) or isinstance(s.t, Tensor):
            return batches  # counters are on the device
        types = (p.device, *(column[0].dtype for column in batch.tensors.large))
        key = (batch.h._replace(lr=0.0), s._replace(rate=0.0), types)
        alike.setdefault(key, []).append(batch)
    result = []
    for same in alike.values():
        first = same[0]
        scalars, rates = first.scalars, [batch.scalars.rate for batch in same]
        if len(set(rates)) > 1:
            sizes = [len(batch.tensors) for batch in same]
            every = [rate for rate, size in zip(rates, sizes, strict=True) for _ in range(size)]
            device = first.tensors.params[0].device
            scalars = scalars._replace(rate=torch.tensor(every, dtype=torch.float64, device=device))
        result.append(replace(first, tensors=joined([b.tensors for b in same]), scalars=scalars))
    return result


def _add_alike(step: Step, batch: Batch) -> None:
    """Split a batch into tensors that are alike, for the foreach back end or the reference."""
    lists, h = batch.tensors, batch.h
    many = h.foreach is not False and not h.differentiable and not is_traced()
    alike: dict[Any, list[int]] = {}
    for i, (p, g, m) in enumerate(zip(lists.params, lists.grads, lists.exp_avgs, strict=True)):
        which = "foreach" if many and is_plain((p, g)) else "reference"
        if p.numel() == 0:
            which = "none"
        alike.setdefault((which, p.device, p.dtype, g.dtype, m.dtype), []).append(i)
    for (which, *_), members in alike.items():
        backend = None if which == "none" else getattr(step.backends, which)
        _append(step.others, backend, _real(batch.select(members)))


def _real(batch: Batch) -> Batch:
    """Return a batch of alike tensors with real views, and without lists that it does not need."""
    lists = batch.tensors
    if lists.params[0].is_complex():

        def view(tensors: list[Any]) -> list[Any]:
            # a gradient may be conjugated lazily
            return [x if x is None else torch.view_as_real(x.resolve_conj()) for x in tensors]

        lists = replace(
            lists,
            params=view(lists.params),
            grads=view(lists.grads),
            exp_avgs=view(lists.exp_avgs),
            hessian_diags=view(lists.hessian_diags),
            compensations=view(lists.compensations),
        )
    dtype, state_dtype = lists.params[0].dtype, lists.exp_avgs[0].dtype
    if lists.compensations and dtype not in storage.DROPPED:
        lists = replace(lists, compensations=[])
    drawn = state_dtype in storage.DROPPED or storage.is_drawn(dtype, batch.h.rounding)
    if lists.rng_streams and not drawn:
        lists = replace(lists, rng_streams=[])
    return batch if lists is batch.tensors else replace(batch, tensors=lists)


def _batches(lists: TensorLists, h: Hyperparameters) -> list[Batch]:
    """Split a group into tensors with the same counters, of which all are shards or none is."""
    on_host = not h.capturable and not torch.compiler.is_compiling()
    shard = [row >= 0 for row in lists.rows] or [False]
    steps = [x.item() for x in lists.state_steps] if on_host else [0.0]
    rates = [0.0]
    if on_host and lists.previous_lrs and not h.differentiable:  # autograd runs through that rate
        rates = [x.item() for x in lists.previous_lrs]
    columns: tuple[list[Any], ...] = (shard, steps, rates)
    indices: dict[Any, list[int] | None] = {}
    if all(column.count(column[0]) == len(column) for column in columns):
        indices[shard[0], steps[0], rates[0]] = None
    else:
        long = (column * len(lists) if len(column) == 1 else column for column in columns)
        for i, key in enumerate(zip(*long, strict=True)):
            indices.setdefault(key, []).append(i)  # type: ignore[union-attr]
    result = []
    for (is_shard, t, rate), members in indices.items():
        some = lists if members is None else lists.select(members)
        if some.rows and not is_shard:
            some = replace(some, rows=[])
        step: Scalar = t
        previous_lr: Scalar | None = rate
        if not on_host:
            step = torch.stack(some.state_steps)
        if some.previous_lrs and (not on_host or h.differentiable):
            previous_lr = torch.stack(some.previous_lrs)
        result.append(Batch(some, h, StepScalars.at(step, h, previous_lr)))
    return result


def _reduce(step: Step, reduction: Reduction) -> None:
    """Take the sums over all shards, and give each part those over the whole tensors."""
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


def _count(batch: Batch) -> None:
    """Count the step of each tensor, and record its rate: the only place that does."""
    lists, rate = batch.tensors, batch.scalars.rate
    steps, previous = lists.state_steps, lists.previous_lrs
    if _may_count(batch) and (isinstance(rate, float) or not previous):
        cpu.count(steps, previous, rate if isinstance(rate, float) else 0.0)
        return
    torch._foreach_add_(steps, 1.0)
    if not previous:
        return
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float64, device="cpu")
    new = list(rate.expand(len(previous)).unbind())
    if torch.is_grad_enabled():  # foreach_copy_ has no derivative
        for old, value in zip(previous, new, strict=True):
            old.copy_(value)
    else:
        torch._foreach_copy_(previous, new)


def _may_count(batch: Batch) -> bool:
    h = batch.h
    return not (h.capturable or h.differentiable) and not is_traced() and cpu.why_not() is None


def is_traced() -> bool:
    """Return whether a tracer or a transform of torch.func sees the operations of this step."""
    if torch.compiler.is_compiling():
        return True
    mode, key = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return (
        mode(key.PROXY) is not None
        or mode(key.FAKE) is not None
        or mode(key.FUNCTIONAL) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _fused_backend(lists: TensorLists, h: Hyperparameters, backends: Backends) -> Backend | None:
    """Return the fused back end that is asked first; it may hand tensors back."""
    wanted = h.fused or (h.fused is None and h.foreach is None)
    if not wanted or h.differentiable or is_traced():
        return None
    p = lists.params[0]
    if torch.is_grad_enabled() and any(p.requires_grad for p in lists.params):
        return None  # the others raise what autograd has to say
    if triton.serves(p.device):
        if not h.fused:
            return None  # no GPU has run it yet: foreach is what is known to be right
        reason = triton.why_not()
    elif p.is_cpu:
        if h.capturable:
            return None  # counters are not to be read on the host
        reason = cpu.why_not()
    else:
        reason = f"none serves {p.device.type}"
        if not h.fused:
            return None
    if reason is None:
        return backends.triton if triton.serves(p.device) else backends.cpu
    if h.fused:
        raise RuntimeError(
            f"fused=True: no fused back end serves the parameter of shape {tuple(p.shape)} on "
            f"{p.device} ({reason}); use fused=None for the fastest back end that there is"
        )
    _say_once(f"Apollo: {reason}; its foreach back end serves, more slowly")
    return None


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def _by_device(lists: TensorLists) -> list[TensorLists]:
    """Return the lists of each device."""
    if torch.compiler.is_compiling() or len(lists) == 1:
        return [lists]
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [lists]
    devices: dict[torch.device, list[int]] = {}
    for i, p in enumerate(lists.params):
        devices.setdefault(p.device, []).append(i)
    return [lists] if len(devices) == 1 else [lists.select(which) for which in devices.values()]


def _checked(lists: TensorLists, h: Hyperparameters) -> Group:
    """Return the group with a number as its learning rate if possible; raise what is wrong."""
    check_back_end_choice(h.foreach, h.fused, h.differentiable)
    for name in ("grads", "exp_avgs", "hessian_diags", "state_steps"):
        _check_length(name, getattr(lists, name), lists.params)
    if h.rounding == "kahan":
        lists = replace(lists, compensations=_compensations(lists))
    if torch.compiler.is_compiling():
        return lists, h
    if is_traced():
        for p, g in zip(lists.params, lists.grads, strict=True):
            if torch._is_functional_tensor(g) and not torch._is_functional_tensor(p):
                raise RuntimeError(
                    "torch.func.functionalize traces the gradient but not its parameter: give "
                    "parameters and state to the function as arguments, for apollo_qn.apollo"
                )
    if not h.capturable:
        if _is_captured(lists):
            raise RuntimeError(
                "capturable must be True where a step is captured in a CUDA graph: a replay "
                "repeats its numbers, got False"
            )
        key = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(mode) is not None for mode in (key.PROXY, key.FAKE)):
            raise RuntimeError(
                "capturable must be True where a step is traced (make_fx, FakeTensorMode): its "
                "counters cannot be read on the host then, got False"
            )
        if isinstance(h.lr, Tensor):
            if h.lr.device.type != "cpu":
                raise ValueError(f"lr as a tensor on {h.lr.device} needs capturable=True")
            if not h.differentiable:
                h = h._replace(lr=h.lr.item())
    return lists, h


def _check_length(
    name: str, column: Sequence[Any], params: Sequence[Any], what: str = "tensor"
) -> None:
    if len(column) != len(params):
        raise ValueError(
            f"{name} must have one {what} for each of the {len(params)} in params, "
            f"got {len(column)}"
        )


def _compensations(lists: TensorLists) -> list[Tensor | None]:
    """Return those of 16-bit parameters, None for the others; empty where there are no such."""
    narrow = [p.dtype in storage.NARROW for p in lists.params]
    if not any(narrow):
        return []
    _check_length("compensations", lists.compensations, lists.params)
    found = [low if on else None for low, on in zip(lists.compensations, narrow, strict=True)]
    for p, low, on in zip(lists.params, found, narrow, strict=True):
        if on and (low is None or low.shape != p.shape or low.dtype is not p.dtype):
            what = None if low is None else f"shape {tuple(low.shape)} and {low.dtype}"
            raise ValueError(
                f"compensations must have its parameter's shape {tuple(p.shape)} and type "
                f"{p.dtype}, got {what}"
            )
    return found


def check_tensors(lists: TensorLists, describe: Callable[[Tensor], str]) -> None:
    """Raise what no back end can take."""
    for p, g in zip(lists.params, lists.grads, strict=True):
        if g.is_sparse:
            raise RuntimeError(
                f"Apollo needs dense gradients, got a sparse one for {describe(p)}; build its "
                "embedding with sparse=False"
            )
    check_shapes(lists, describe)


def check_shapes(lists: TensorLists, describe: Callable[[Tensor], str]) -> None:
    """Raise RuntimeError where gradient or state have another shape than their parameter."""
    named = {"gradient": lists.grads, "exp_avg": lists.exp_avgs}
    for name, column in {**named, "hessian_diag": lists.hessian_diags}.items():
        for p, x in zip(lists.params, column, strict=True):
            if x.shape == p.shape:
                continue
            message = f"{name} has the shape {tuple(x.shape)}, but belongs to {describe(p)}"
            if name != "gradient":
                message += (
                    ": the parameter was replaced, flattened or resharded after its state had been "
                    "made. Make a new optimizer, or put a state of the new shape in its place"
                )
            raise RuntimeError(message)


def _is_captured(lists: TensorLists) -> bool:
    return (
        bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        and any(p.is_cuda for p in lists.params)
        and torch.cuda.is_current_stream_capturing()
    )


def check_back_end_choice(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Raise RuntimeError for choices that cannot be served."""
    if foreach and fused:
        raise RuntimeError("foreach and fused cannot both be True: choose one, or None for both")
    if fused and differentiable:
        raise RuntimeError(
            "fused=True does not support differentiable=True; use fused=None or fused=False"
        )
    if fused and (reason := cpu.why_not()) is not None and not triton.available():
        raise RuntimeError(
            f"fused=True: {reason}; use fused=None for the fastest back end that there is"
        )
    if foreach and differentiable:
        raise RuntimeError(
            "foreach=True does not support differentiable=True; use foreach=None or foreach=False"
        )


def check_rounding(rounding: Rounding | None, seed: int) -> None:
    """Raise ValueError for a way of rounding that there is not, or a seed out of its range."""
    if rounding not in (None, *storage.ROUNDINGS):
        raise ValueError(
            f"rounding must be None, 'nearest', 'stochastic' or 'kahan', got {rounding!r}"
        )
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r}")
