"""The functional form of the optimizer: take one step on lists of tensors."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from apollo_qn import advice
from apollo_qn import rounding as storage
from apollo_qn.backends.base import TensorLists
from apollo_qn.hyperparameters import (
    Hyperparameters,
    Rebound,
    Scalar,
    check_ranges,
    warmup_start,
)
from apollo_qn.plan import TRACED, Backends, execute, prepare
from apollo_qn.rounding import Rounding
from apollo_qn.validation import check_length, check_lists, required_list


@partial(advice.advises, advice=advice.FUNCTIONAL, name="apollo")
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
    """Take one step of Apollo (Algorithm 1 of the paper), in place.

    See :class:`apollo_qn.Apollo` for the hyperparameters. The caller owns the state. All state
    tensors must be zeros before the first step.

    Args:
        params, grads: tensors of any shapes.
        exp_avgs, hessian_diags: m and B, in the parameters' shapes, as bfloat16, float32 or float64
            (complex for complex parameters).
        state_steps: number of steps done, a 0-dim floating tensor per parameter. The call adds 1.
            The tensors lie on the CPU unless ``capturable`` is True.
        warmup_base_lr: divisor of ``warmup_init_lr``. None means ``lr``.
        previous_lrs: rate of the step before, a 0-dim tensor per parameter, needed with decoupled
            weight decay. The call overwrites it with the new rate.
        thresholds: threshold of the step before, a 0-dim tensor per parameter on its device, needed
            with ``rebound="belief"``. The call overwrites it with the new threshold.
        compensations: one tensor per bfloat16 or float16 parameter, of its shape and type, needed
            with ``rounding="kahan"``. Entries of other parameters are ignored and may be None.
        seed: seed of the random bits of stochastic rounding. None means 0.
        positions: an integer per parameter, on which its random bits depend. None means 0, 1, ...

    Raises:
        TypeError: a keyword is one of another optimizer, such as ``betas``; the message says what
            to use instead.
        ValueError: the lists differ in length, or hold other things than said above; a list that
            the mode needs is missing; ``rounding`` or ``seed`` is out of its range.
        RuntimeError: a gradient is sparse; shapes or devices differ; ``fused=True`` without a fused
            back end; ``foreach``, ``fused`` and ``differentiable`` exclude each other.

    Example:
        >>> theta, g = torch.ones(3), torch.full((3,), 0.5)
        >>> m, B, step = torch.zeros(3), torch.zeros(3), torch.zeros(())
        >>> apollo([theta], [g], [m], [B], [step], lr=0.1, warmup_steps=0)
        >>> theta
        tensor([0.9500, 0.9500, 0.9500])
    """
    seed = 0 if seed is None else seed
    check_ranges({"rounding": rounding, "seed": seed})
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
    numbers = range(len(params)) if positions is None else positions
    check_length("positions", numbers, params, "number")
    tensors = TensorLists(
        list(params),
        list(grads),
        list(exp_avgs),
        list(hessian_diags),
        list(state_steps),
        required_list(
            "previous_lrs",
            previous_lrs,
            params,
            decoupled_weight_decay,
            "decoupled_weight_decay=True",
        ),
        required_list("thresholds", thresholds, params, rebound == "belief", "rebound='belief'"),
        list(compensations or []) if rounding == "kahan" else [],
        [storage.rng_key(seed, number) for number in numbers],
    )
    for name in ("grads", "exp_avgs", "hessian_diags", "state_steps"):
        check_length(name, getattr(tensors, name), params)
    if torch.compiler.is_compiling():
        execute(prepare([(tensors, h)], TRACED))
        return
    check_lists(tensors)
    execute(prepare([(tensors, h)], Backends()))
