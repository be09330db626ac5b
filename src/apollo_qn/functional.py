"""The functional form of the optimizer: lists of tensors in, a back end chosen, one step done."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apollo_qn import rounding as storing
from apollo_qn.backends import Batch, Group, cpu, foreach, reference, triton
from apollo_qn.backends.plan import Plan, planned
from apollo_qn.rounding import Rounding
from apollo_qn.rule import Hyperparameters, Rebound, Scalar, Sums
from apollo_qn.sharded import Reduction, localized

_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may lack the operations on many tensors


def apollo(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessian_diags: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: Scalar = 1.0,
    beta: float = 0.9,
    eps: float = 1e-4,
    sigma: float = 1.0,
    weight_decay: float = 0.0,
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
    seed: int = 0,
    compensations: list[Tensor | None] | None = None,
    positions: list[int] | None = None,
) -> None:
    """One step of Apollo (Algorithm 1 of the paper), in place.

    See :class:`apollo_qn.Apollo` for the hyperparameters. The caller owns the state, which starts
    as zeros.

    Args:
        params, grads: tensors of any shapes.
        exp_avgs, hessian_diags: m and B, of the parameters' shapes, bfloat16, float32 or float64
            (complex for complex parameters).
        state_steps: a 0-dim floating tensor for each parameter, the number of steps done; one is
            added. Only with ``capturable`` may they lie on another device than the CPU.
        warmup_base_lr: what ``warmup_init_lr`` is a share of; None: ``lr``.
        previous_lrs: a 0-dim tensor for each parameter, needed with decoupled weight decay: the
            rate of the step before, read and then overwritten.
        thresholds: a 0-dim tensor for each parameter on its device, needed with
            ``rebound="belief"``: the threshold of the step before, read and then overwritten.
        compensations: needed with ``rounding="kahan"``: for each bfloat16 or float16 parameter a
            tensor of its shape and type, zeros at first; anything, or None, for the others.
        positions: a whole number for each parameter, which tells its random bits from those of the
            others; None: 0, 1, ...

    Raises:
        ValueError: the lists differ in length, or one that the mode needs is missing; a bad
            ``rounding`` or ``seed``.
        RuntimeError: a sparse gradient; ``fused=True`` where there is no fused back end; or a
            combination of ``foreach``, ``fused`` and ``differentiable`` that cannot be.
    """
    check_rounding(rounding, seed)
    base = lr if warmup_base_lr is None else warmup_base_lr
    h = Hyperparameters(
        lr=lr,
        beta=beta,
        eps=eps,
        sigma=sigma,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        rebound=rebound,
        warmup_steps=warmup_steps,
        warmup_start=warmup_share(warmup_init_lr, base) if warmup_steps else 1.0,
        maximize=maximize,
        rounding=rounding or storing.DEFAULT,
    )
    places = range(len(params)) if positions is None else positions
    if len(places) != len(params):
        raise ValueError(
            f"positions must have one number for each of the {len(params)} in params, "
            f"got {len(places)}"
        )
    run(
        [
            Group(
                h,
                _listed(params),
                _listed(grads),
                _listed(exp_avgs),
                _listed(hessian_diags),
                _listed(state_steps),
                _listed(previous_lrs),
                _listed(thresholds),
                _listed(compensations),
                [storing.stream(seed, place) for place in places],
                foreach=foreach,
                fused=fused,
                capturable=capturable,
                differentiable=differentiable,
            )
        ]
    )


def _listed(tensors: Any) -> Any:
    return list(tensors) if isinstance(tensors, tuple) else tensors


def warmup_share(warmup_init_lr: float | None, base_lr: Scalar) -> float:
    """``warmup_init_lr`` as a share of the initial learning rate; None: a thousandth."""
    if warmup_init_lr is None:
        return 1e-3
    return warmup_init_lr / float(base_lr) if warmup_init_lr else 0.0  # 0 / 0 where lr is 0


@dataclass(frozen=True, slots=True)
class _Home:
    """What the groups of one plan have in common."""

    device: torch.device
    capturable: bool

    @property
    def kind(self) -> type[Plan]:
        """The plan of the back end that serves them."""
        if not triton.serves(self.device):
            return cpu.Plan
        return triton.CapturablePlan if self.capturable else triton.Plan

    @property
    def why_not(self) -> str | None:
        """Why no fused back end serves them."""
        if triton.serves(self.device):
            return triton.why_not()
        return cpu.why_not() if self.device.type == "cpu" else f"none serves {self.device.type}"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step leaves for the next one, which it spares work."""

    plans: dict[_Home, Plan] = field(default_factory=dict)
    reduction: Reduction | None = None


def run(groups: list[Group], kept: Kept | None = None) -> Kept:
    """:func:`apollo` for several groups, all checked before anything is changed.

    Args:
        groups: what is to be updated.
        kept: what the last call with these groups returned.
    """
    kept = kept or Kept()
    groups = [_checked(group) for group in groups]
    groups, reduction = localized(groups, kept.reduction)
    groups, fused = _fused(groups, kept.plans)
    for group in groups:
        _check_tensors(group)
    calls = [call for group in groups if group.params for call in _alike(group)]

    table = None
    if reduction is not None:
        table = reduction.table()
        for plan, hyperparameters in fused.values():
            plan.measure(hyperparameters, table)
        for call in calls:
            if call.rows and call.back_end is not None:
                reduction.put(table, call.rows, call.back_end.measure(call.batch, call.h))
        reduction.reduce_(table)
    for plan, hyperparameters in fused.values():
        plan.step(hyperparameters, table)
    for call in calls:
        sums = None
        if reduction is not None and table is not None and call.rows:
            sums = reduction.take(table, call.rows)
        call.step(sums)
    for group in groups:
        if group.params:
            torch._foreach_add_(group.state_steps, 1.0)
    return Kept({home: plan for home, (plan, _) in fused.items()}, reduction)


def _fused(
    groups: list[Group], plans: dict[_Home, Plan]
) -> tuple[list[Group], dict[_Home, tuple[Plan, list[Hyperparameters]]]]:
    """What is left for the other back ends, and the fused ones' plans with the groups' settings."""
    rest = []
    homes: dict[_Home, list[Group]] = {}
    for group in groups:
        for one in _by_device(group):
            home = _may_be_fused(one)
            if home is None:
                rest.append(one)
            else:
                homes.setdefault(home, []).append(one)
    found = {}
    for home, members in homes.items():
        plan = planned(members, plans.get(home), home.kind)
        rest += [group.part(left) for group, left in zip(members, plan.left, strict=True)]
        found[home] = plan, [group.h for group in members]
    return rest, found


def _cuda_is_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _by_device(group: Group) -> list[Group]:
    """The group's parts on each of several devices, or the group."""
    several = len(group.params) > 1 and _cuda_is_used()
    if not several or torch.compiler.is_compiling():
        return [group]
    devices: dict[torch.device, list[int]] = {}
    for i, p in enumerate(group.params):
        devices.setdefault(p.device, []).append(i)
    return [group] if len(devices) == 1 else [group.part(which) for which in devices.values()]


def _checked(group: Group) -> Group:
    """The group with a number as its learning rate where that can be; raises what is wrong."""
    check_back_end_choice(group.foreach, group.fused, group.differentiable)
    if not group.capturable and _is_captured(group):
        raise RuntimeError(
            "capturable must be True where a step is captured in a CUDA graph: a replay repeats "
            "its numbers, got False"
        )
    needed = ["grads", "exp_avgs", "hessian_diags", "state_steps"]
    needed += ["previous_lrs"] if group.h.decoupled_weight_decay else []
    needed += ["thresholds"] if group.h.belief else []
    for name in needed:
        tensors = getattr(group, name)
        if tensors is None:
            mode = "rebound='belief'" if name == "thresholds" else "decoupled_weight_decay=True"
            raise ValueError(f"{name} must be a list of 0-dim tensors with {mode}, got None")
        if len(tensors) != len(group.params):
            raise ValueError(
                f"{name} must have one tensor for each of the {len(group.params)} in params, "
                f"got {len(tensors)}"
            )
    group = replace(
        group,
        previous_lrs=group.previous_lrs if group.h.decoupled_weight_decay else None,
        thresholds=group.thresholds if group.h.belief else None,
        compensations=_compensations(group) if group.h.rounding == "kahan" else None,
    )
    # numbers are read on the host only where they lie there and no compiler is tracing
    if _on_host(group) and isinstance(group.h.lr, Tensor):
        if group.h.lr.device.type != "cpu":
            raise ValueError(f"lr as a tensor on {group.h.lr.device} needs capturable=True")
        if not group.differentiable:
            return replace(group, h=replace(group.h, lr=group.h.lr.item()))
    return group


def _compensations(group: Group) -> list[Tensor | None] | None:
    """Those of 16-bit parameters; None: there are none."""
    narrow = [p.dtype in storing.DROPPED for p in group.params]
    if not any(narrow):
        return None
    given = group.compensations
    if given is None or len(given) != len(group.params):
        raise ValueError(
            "compensations must be a list with a tensor for each 16-bit parameter with "
            f"rounding='kahan', got {None if given is None else f'{len(given)} of them'} for "
            f"{len(group.params)} in params"
        )
    found = [low if on else None for low, on in zip(given, narrow, strict=True)]
    for p, low, on in zip(group.params, found, narrow, strict=True):
        if on and (low is None or low.shape != p.shape or low.dtype is not p.dtype):
            what = None if low is None else f"shape {tuple(low.shape)} and {low.dtype}"
            raise ValueError(
                f"compensations must have its parameter's shape {tuple(p.shape)} and type "
                f"{p.dtype}, got {what}"
            )
    return found


def _check_tensors(group: Group) -> None:
    """Raise what the back ends that are left cannot take."""
    for p, g in zip(group.params, group.grads, strict=True):
        if group.fused and (reason := _Home(p.device, group.capturable).why_not) is not None:
            raise RuntimeError(
                f"fused=True: no fused back end serves the parameter of shape {tuple(p.shape)} on "
                f"{p.device} ({reason}); use fused=None for the fastest one that there is"
            )
        if g.is_sparse:
            raise RuntimeError(
                f"Apollo needs dense gradients, got a sparse one for a parameter of shape "
                f"{tuple(p.shape)}; build its embedding with sparse=False"
            )


def _is_captured(group: Group) -> bool:
    return (
        not torch.compiler.is_compiling()
        and _cuda_is_used()
        and any(p.is_cuda for p in group.params)
        and torch.cuda.is_current_stream_capturing()
    )


def _on_host(group: Group) -> bool:
    return not group.capturable and not torch.compiler.is_compiling()


def _may_be_fused(group: Group) -> _Home | None:
    """Where a fused back end is asked; it may leave tensors to the others."""
    wanted = group.fused or (group.fused is None and group.foreach is None)
    if not wanted or not group.params or group.differentiable:
        return None
    if torch.compiler.is_compiling():
        return None  # a compiler fuses the plain rule by itself
    device = group.params[0].device
    if device.type != "cpu" and not triton.serves(device):
        return None
    on_device = triton.serves(device)
    home = _Home(device, group.capturable and on_device)
    lr = group.h.lr
    if isinstance(lr, Tensor) and not lr.is_cpu and not home.capturable:
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in group.params):
        return None  # the others raise what autograd has to say
    reason = home.why_not
    if reason is not None:
        _say_once(f"Apollo: {reason}; its foreach back end serves, more slowly")
        return None
    return home


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


@dataclass(frozen=True, slots=True)
class _Call:
    """Tensors that are alike, and the back end that updates them; None: they hold no element."""

    back_end: ModuleType | None
    batch: Batch
    h: Hyperparameters
    rows: list[int]  # of the reduction, where the tensors are parts of others
    rate: Scalar
    rates: list[Tensor] | None  # to be overwritten with it

    def step(self, sums: Sums | None) -> None:
        if self.back_end is not None:
            self.back_end.step(self.batch, self.h, sums)
        elif sums is not None and sums.largest is not None and self.batch.thresholds is not None:
            torch._foreach_copy_(self.batch.thresholds, list(sums.largest.unbind()))
        if self.rates is not None:
            _record(self.rate, self.rates)


def _alike(group: Group) -> Iterator[_Call]:
    """What is alike, for the foreach back end or the rule."""
    h, params, previous_lrs = group.h, group.params, group.previous_lrs
    on_host = _on_host(group)
    rates_on_host = on_host and not group.differentiable  # autograd runs through the rate before
    # a compiler fuses the plain rule by itself
    may_be_fast = (
        group.foreach is not False
        and not group.differentiable
        and not torch.compiler.is_compiling()
    )
    together: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        shared = group.shared is not None and group.shared[i] >= 0
        if p.numel() == 0 and not shared:
            continue  # nothing to update, and no maximum to take
        numbers = (
            group.state_steps[i].item() if on_host else None,
            previous_lrs[i].item() if rates_on_host and previous_lrs is not None else None,
        )
        g = group.grads[i]
        fast = may_be_fast and type(p) in _PLAIN and type(g) in _PLAIN
        back_end = None if p.numel() == 0 else foreach if fast else reference
        kind = (back_end, shared, p.device, p.dtype, g.dtype, group.exp_avgs[i].dtype)
        together.setdefault((kind, numbers), []).append(i)

    for ((back_end, shared, *_), (t, previous_lr)), members in together.items():
        part = group.part(members)
        batch = Batch(
            _real(part.params),
            _real(part.grads),
            _real(part.exp_avgs),
            _real(part.hessian_diags),
            t if on_host else part.state_steps,
            previous_lr if rates_on_host or previous_lrs is None else part.previous_lrs,
            part.thresholds,
            [low for low in part.compensations or [] if low is not None] or None,
            part.streams if _draws(part) else None,
        )
        rows = part.shared if shared and part.shared is not None else []
        rate: Scalar = 0.0
        if part.previous_lrs is not None:
            rate = h.rate(t if on_host else torch.stack(part.state_steps))
        yield _Call(back_end, batch, h, rows, rate, part.previous_lrs)


def _draws(group: Group) -> bool:
    """Whether random bits are needed for tensors that are alike."""
    state = group.exp_avgs[0].dtype in storing.DROPPED
    return state or storing.is_drawn(group.params[0].dtype, group.h.rounding)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].is_complex():
        return [torch.view_as_real(tensor) for tensor in tensors]
    return tensors


def _record(rate: Scalar, rates: list[Tensor]) -> None:
    if isinstance(rate, Tensor):
        new = rate.expand(len(rates)).unbind()
        if torch.is_grad_enabled():  # foreach_copy_ has no derivative
            for old, value in zip(rates, new, strict=True):
                old.copy_(value)
        else:
            torch._foreach_copy_(rates, list(new))
    else:
        torch._foreach_zero_(rates)
        torch._foreach_add_(rates, rate)


def _on_gpu() -> bool:
    """Whether a GPU's fused back end may serve."""
    return torch.cuda.is_available() and triton.why_not() is None


def check_back_end_choice(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Raise RuntimeError for choices that cannot be served."""
    if foreach and fused:
        raise RuntimeError("foreach and fused cannot both be True: choose one, or None for both")
    if fused and differentiable:
        raise RuntimeError(
            "fused=True does not support differentiable=True; use fused=None or fused=False"
        )
    if fused and (reason := cpu.why_not()) is not None and not _on_gpu():
        raise RuntimeError(
            f"fused=True: {reason}; use fused=None for the fastest back end that there is"
        )
    if foreach and differentiable:
        raise RuntimeError(
            "foreach=True does not support differentiable=True; use foreach=None or foreach=False"
        )


def check_rounding(rounding: Rounding | None, seed: int) -> None:
    """Raise ValueError for a way of rounding that there is not, or a seed out of its range."""
    if rounding not in (None, *storing.ROUNDINGS):
        raise ValueError(
            f"rounding must be None, 'nearest', 'stochastic' or 'kahan', got {rounding!r}"
        )
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r}")
