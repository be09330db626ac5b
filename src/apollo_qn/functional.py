"""The functional form of the optimizer: lists of tensors in, one step done."""

from __future__ import annotations

from torch import Tensor

from apollo_qn import rounding as storage
from apollo_qn.backends.base import TensorLists
from apollo_qn.hyperparameters import Hyperparameters, Rebound, Scalar, warmup_start
from apollo_qn.plan import Backends, execute, prepare
from apollo_qn.rounding import Rounding
from apollo_qn.validation import check_length, check_rounding, needed_list


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
    check_length("positions", places, params, "number")
    tensors = TensorLists(
        list(params),
        list(grads),
        list(exp_avgs),
        list(hessian_diags),
        list(state_steps),
        needed_list(
            "previous_lrs",
            previous_lrs,
            params,
            decoupled_weight_decay,
            "decoupled_weight_decay=True",
        ),
        needed_list("thresholds", thresholds, params, rebound == "belief", "rebound='belief'"),
        list(compensations or []) if rounding == "kahan" else [],
        [storage.rng_stream(seed, place) for place in places],
    )
    execute(prepare([(tensors, h)], Backends()))
