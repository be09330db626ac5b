"""The functional form of the optimizer: lists of tensors in, a back end chosen, one step done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apollo_qn.backends import Batch
from apollo_qn.backends.foreach import step as foreach_step
from apollo_qn.backends.reference import step as reference_step
from apollo_qn.rule import Hyperparameters, Rebound, Scalar

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
) -> None:
    """One step of Apollo (Algorithm 1 of the paper), in place.

    See :class:`apollo_qn.Apollo` for the hyperparameters. The caller owns the state, which starts
    as zeros.

    Args:
        params, grads: tensors of any shapes.
        exp_avgs, hessian_diags: m and B, of the parameters' shapes, float32 or float64 (complex for
            complex parameters).
        state_steps: a 0-dim floating tensor for each parameter, the number of steps done; one is
            added. Only with ``capturable`` may they lie on another device than the CPU.
        warmup_base_lr: what ``warmup_init_lr`` is a share of; None: ``lr``.
        previous_lrs: a 0-dim tensor for each parameter, needed with decoupled weight decay: the
            rate of the step before, read and then overwritten.
        thresholds: a 0-dim tensor for each parameter on its device, needed with
            ``rebound="belief"``: the threshold of the step before, read and then overwritten.

    Raises:
        ValueError: the lists differ in length, or one that the mode needs is missing.
        RuntimeError: ``fused=True`` (no fused back end serves these tensors), or a combination of
            ``foreach``, ``fused`` and ``differentiable`` that cannot be.
    """
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
    )
    run(
        h,
        params,
        grads,
        exp_avgs,
        hessian_diags,
        state_steps,
        previous_lrs=previous_lrs,
        thresholds=thresholds,
        foreach=foreach,
        fused=fused,
        capturable=capturable,
        differentiable=differentiable,
    )


def warmup_share(warmup_init_lr: float | None, base_lr: Scalar) -> float:
    """``warmup_init_lr`` as a share of the initial learning rate; None: a thousandth."""
    if warmup_init_lr is None:
        return 1e-3
    return warmup_init_lr / float(base_lr) if warmup_init_lr else 0.0  # 0 / 0 where lr is 0


def run(
    h: Hyperparameters,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessian_diags: list[Tensor],
    state_steps: list[Tensor],
    *,
    previous_lrs: list[Tensor] | None,
    thresholds: list[Tensor] | None,
    foreach: bool | None,
    fused: bool | None,
    capturable: bool,
    differentiable: bool,
) -> None:
    """:func:`apollo` with its hyperparameters already in one object."""
    check_back_end_choice(foreach, fused, differentiable)
    needed = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "hessian_diags": hessian_diags,
        "state_steps": state_steps,
    }
    if h.decoupled_weight_decay:
        needed["previous_lrs"] = previous_lrs = _given("previous_lrs", previous_lrs)
    if h.belief:
        needed["thresholds"] = thresholds = _given("thresholds", thresholds)
    for name, tensors in needed.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{name} must have one tensor for each of the {len(params)} in params, "
                f"got {len(tensors)}"
            )

    # numbers are read on the host only where they lie there and no compiler is tracing
    compiling = torch.compiler.is_compiling()
    on_host = not capturable and not compiling
    if on_host and isinstance(h.lr, Tensor):
        if h.lr.device.type != "cpu":
            raise ValueError(f"lr as a tensor on {h.lr.device} needs capturable=True")
        if not differentiable:
            h = replace(h, lr=h.lr.item())

    rates_on_host = on_host and not differentiable  # autograd runs through the rate before
    # a compiler fuses the plain rule by itself
    may_be_fast = foreach is not False and not differentiable and not compiling
    together: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if p.numel() == 0:
            continue  # nothing to update, and no maximum to take
        numbers = (
            state_steps[i].item() if on_host else None,
            previous_lrs[i].item() if rates_on_host and previous_lrs is not None else None,
        )
        fast = may_be_fast and type(p) in _PLAIN and type(grads[i]) in _PLAIN
        kind = (fast, p.device, p.dtype, grads[i].dtype, exp_avgs[i].dtype)
        together.setdefault((kind, numbers), []).append(i)

    for ((fast, *_), (t, previous_lr)), members in together.items():
        steps = [state_steps[i] for i in members]
        rates = None if previous_lrs is None else [previous_lrs[i] for i in members]
        batch = Batch(
            _real([params[i] for i in members]),
            _real([grads[i] for i in members]),
            _real([exp_avgs[i] for i in members]),
            _real([hessian_diags[i] for i in members]),
            t if on_host else steps,
            previous_lr if rates_on_host else rates,
            None if thresholds is None else [thresholds[i] for i in members],
        )
        (foreach_step if fast else reference_step)(batch, h)
        if rates is not None:
            _record(h.rate(t if on_host else torch.stack(steps)), rates)
    if state_steps:
        torch._foreach_add_(state_steps, 1.0)


def _given(name: str, tensors: list[Tensor] | None) -> list[Tensor]:
    if tensors is None:
        mode = "rebound='belief'" if name == "thresholds" else "decoupled_weight_decay=True"
        raise ValueError(f"{name} must be a list of 0-dim tensors with {mode}, got None")
    return tensors


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


def check_back_end_choice(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Raise RuntimeError for choices that cannot be served."""
    if foreach and fused:
        raise RuntimeError("foreach and fused cannot both be True: choose one, or None for both")
    if fused:
        raise RuntimeError(
            "fused=True: this installation has no fused back end; use fused=None for the fastest "
            "one that there is"
        )
    if foreach and differentiable:
        raise RuntimeError(
            "foreach=True does not support differentiable=True; use foreach=None or foreach=False"
        )
