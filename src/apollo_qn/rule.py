"""Algorithm 1 of Ma (2020) on one tensor: the only place that says what the update is.

Every back end is a faster form of :func:`update` and is tested against it. The letters are the
paper's: ``theta`` parameter, ``g`` gradient, ``m`` moving average of gradients, ``B`` diagonal of
the Hessian approximation, ``D`` its rectified absolute value, ``d`` update direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from apollo_qn.rounding import Rounding

Scalar: TypeAlias = "float | Tensor"  # a Python number, or a tensor: no host synchronisation
Rebound = Literal["constant", "belief"]

UNDETERMINED = 1e-6  # |1 - lr * weight_decay| below which theta_before cannot be rebuilt


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What a parameter group says of one step; the names are those of :class:`apollo_qn.Apollo`.

    ``warmup_start`` is ``warmup_init_lr`` as a share of the initial learning rate; ``rounding``
    says how theta' is stored where the parameter has 16 bits.
    """

    lr: Scalar
    beta: float
    eps: float
    sigma: float
    weight_decay: float
    decoupled_weight_decay: bool
    rebound: Rebound
    warmup_steps: int
    warmup_start: float
    maximize: bool
    rounding: Rounding = "nearest"

    @property
    def belief(self) -> bool:
        """Whether the threshold is that of the authors' later code."""
        return self.rebound == "belief"

    @property
    def l2(self) -> bool:
        """Whether decay is added to the gradient."""
        return self.weight_decay != 0 and not self.decoupled_weight_decay

    @property
    def decoupled(self) -> bool:
        """Whether decay is added to the direction."""
        return self.weight_decay != 0 and self.decoupled_weight_decay

    @property
    def secant_eps(self) -> float:
        """What is added to ||d||_4: eps / sigma, so that Theorem 1 is exact; eps with belief."""
        return self.eps if self.belief else self.eps / self.sigma

    def alpha(self, t: Scalar) -> Scalar:
        """Weight of the new gradient in m at step ``t``, eq. (9): 1 at t = 0, then 1 - beta."""
        return (1 - self.beta) / (1 - self.beta ** (t + 1))

    def rate(self, t: Scalar) -> Scalar:
        """Learning rate of step ``t``, warmed up linearly (section 3.4)."""
        if self.warmup_steps == 0:
            return self.lr
        w, share = self.warmup_start, t / self.warmup_steps
        factor = w + (1 - w) * share
        if isinstance(factor, Tensor):
            return self.lr * torch.where(torch.as_tensor(share) >= 1, 1, factor)
        return self.lr * factor if share < 1 else self.lr

    def offset(self, t: Scalar) -> Scalar:
        """What is added to D at step ``t``: eps / alpha with belief, nothing otherwise."""
        return self.eps / self.alpha(t) if self.belief else 0.0


@dataclass(frozen=True, slots=True)
class StepScalars:
    """The numbers of one step ``t`` (0 first): floats, or tensors that broadcast over ``theta``.

    ``threshold`` and ``offset`` of the step before give its D. ``kappa`` and ``omega`` turn its
    direction into its displacement, kappa d + omega theta; they are 1 and 0 unless weight decay is
    decoupled.
    """

    alpha: Scalar
    rate: Scalar
    offset: Scalar
    previous_threshold: Scalar
    previous_offset: Scalar
    kappa: Scalar
    omega: Scalar

    @classmethod
    def at(
        cls,
        t: Scalar,
        h: Hyperparameters,
        previous_lr: Scalar | None = None,
        previous_threshold: Scalar | None = None,
    ) -> StepScalars:
        """Scalars of step ``t``; the two last are needed with decoupled decay and with belief."""
        before = (t - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0)
        kappa: Scalar = 1.0
        omega: Scalar = 0.0
        if h.decoupled:
            assert previous_lr is not None
            kappa, omega = _displacement_weights(t, previous_lr, h.weight_decay)
        if h.belief:
            assert previous_threshold is not None
        return cls(
            alpha=h.alpha(t),
            rate=h.rate(t),
            offset=h.offset(t),
            previous_threshold=previous_threshold if previous_threshold is not None else h.sigma,
            previous_offset=h.offset(before),
            kappa=kappa,
            omega=omega,
        )


def _displacement_weights(t: Scalar, lr: Scalar, weight_decay: float) -> tuple[Scalar, Scalar]:
    """kappa and omega with d + wd theta_before = kappa d + omega theta.

    From theta = theta_before - lr (d + wd theta_before). Where lr wd = 1 theta holds nothing of
    theta_before, and d alone stands for the displacement. At t = 0 there was no step.
    """
    kept = 1 - lr * weight_decay
    if isinstance(kept, Tensor) or isinstance(t, Tensor):
        kept = torch.as_tensor(kept)
        known = (kept.abs() >= UNDETERMINED) & torch.as_tensor(t > 0, device=kept.device)
        safe = torch.where(known, kept, 1)
        return 1 / safe, torch.where(known, weight_decay / safe, 0)
    if t == 0 or abs(kept) < UNDETERMINED:
        return 1.0, 0.0
    return 1 / kept, weight_decay / kept


def rectify(B: Tensor, threshold: Scalar, offset: Scalar) -> Tensor:
    """D = max(|B|, threshold) + offset: eq. (11) with threshold = sigma and offset = 0."""
    D = B.abs().clamp(min=threshold)
    return D if isinstance(offset, float) and offset == 0 else D + offset


def arithmetic(theta: torch.dtype, state: torch.dtype) -> torch.dtype:
    """Type of the arithmetic: that of the state, but float32 at least."""
    return torch.promote_types(theta, torch.float32) if state.itemsize < 4 else state


def accumulator(device: torch.device) -> torch.dtype:
    """Type of the sums over a tensor: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def secant_coefficient(scale: Tensor, q4: Tensor, k: Tensor, eps: float) -> Tensor:
    """c with B' = B - c u^2, from the sums over the tensor; all arguments of one shape.

    With ``scale`` = max |d|, u = d / scale, ``q4`` = sum u^4 and ``k`` = <u, y + B d> this is
    Algorithm 1's a d^2 = (<d, y> + <d, B d>) / (||d||_4 + eps)^4 d^2, in factors of which none
    overflows or underflows before the result does. A saturated B stays finite.
    """
    q4 = torch.where(scale == 0, 1, q4)  # the root has no derivative at 0
    n = scale * q4.sqrt().sqrt() + eps
    nothing = n == 0  # eps = 0 and d = 0: no displacement, no information
    n = torch.where(nothing, 1, n)
    return torch.where(nothing, 0, (scale / n) ** 3 * (k / n))


def correction(sums: Sums, h: Hyperparameters, dtype: torch.dtype) -> Tensor:
    """c with B' = B - c u^2 in ``dtype``, the type of B."""
    wide = accumulator(sums.k.device)
    c = secant_coefficient(sums.scale.to(wide), sums.q4.to(wide), sums.k.to(wide), h.secant_eps)
    return finite(c, dtype)


def finite(c: Tensor, dtype: torch.dtype) -> Tensor:
    """``c`` in ``dtype``, saturated where it is too large for it; NaN stays NaN."""
    largest = torch.finfo(dtype).max / 8
    return c.clamp(-largest, largest).to(dtype)


@dataclass(frozen=True, slots=True)
class Sums:
    """What a step needs of a whole tensor, or of each of many: 0-dim tensors, or one for each.

    With u = d / scale, where ``scale`` is max |d| or a number near it: ``q4`` = sum u^4, ``k`` =
    <u, y + B d> and, with belief, ``largest`` = max |g - m|. Of a part of a tensor likewise.
    """

    scale: Tensor
    q4: Tensor
    k: Tensor
    largest: Tensor | None = None

    @classmethod
    def joined(cls, sums: Sequence[Sums], join: Callable[[list[Tensor]], Tensor]) -> Sums:
        """Those of many as one; ``join`` is ``torch.cat`` or ``torch.stack``."""
        largest = [one.largest for one in sums if one.largest is not None]
        return cls(
            join([one.scale for one in sums]),
            join([one.q4 for one in sums]),
            join([one.k for one in sums]),
            join(largest) if largest else None,
        )

    def merged(self) -> Sums:
        """The sums of the whole from those of its parts, which lie along the first dimension."""
        scale = self.scale.amax(0)
        share = (self.scale / torch.where(scale == 0, 1, scale)).to(self.k.dtype)
        largest = None if self.largest is None else self.largest.amax(0)
        return Sums(scale, (self.q4 * share**4).sum(0), (self.k * share).sum(0), largest)


def measure(
    theta: Tensor, g: Tensor, m: Tensor, B: Tensor, h: Hyperparameters, s: StepScalars
) -> Sums:
    """The sums of :func:`update` over a tensor, or over the part of it that is given."""
    theta, g, m, B = _wide(theta, g, m, B)
    d, delta = _secant_pair(theta, g, m, B, h, s)
    return _sums(d, s.alpha * delta, delta, B, h)


def update(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    B: Tensor,
    h: Hyperparameters,
    s: StepScalars,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor, Scalar]:
    """One step of Algorithm 1 on one real tensor; nothing is changed in place.

    Args:
        theta, g: parameter and gradient, any shape and floating type.
        m, B: state, of the same shape and any floating type. All results are of the type of the
            arithmetic, in which this is done: that of the state, but float32 at least.
        h, s: hyperparameters and the scalars of this step.
        sums: those of the whole tensor where only a part of it is given; None: it is whole.

    Returns:
        theta', m', B' and the threshold that this step's direction used.
    """
    theta, g, m, B = _wide(theta, g, m, B)
    # the displacement of the step before, rebuilt; 0 at t = 0 because m = 0
    d, delta = _secant_pair(theta, g, m, B, h, s)
    y = s.alpha * delta  # m' - m
    m = m + y

    # B' = B - a d^2, a = (<d, y> + <d, B d>) / (||d||_4 + eps)^4, eq. (8)
    sums = _sums(d, y, delta, B, h) if sums is None else sums
    u = d / torch.where(sums.scale == 0, 1, sums.scale).to(d.dtype)
    B = B - correction(sums, h, m.dtype) * u**2

    threshold: Scalar = h.sigma if sums.largest is None else sums.largest.to(m.dtype)
    d = m / rectify(B, threshold, s.offset)
    if h.decoupled:
        d = d + h.weight_decay * theta
    return theta - s.rate * d, m, B, threshold


def _wide(theta: Tensor, g: Tensor, m: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = arithmetic(theta.dtype, m.dtype)
    return theta.to(dtype), g.to(dtype), m.to(dtype), B.to(dtype)


def displacement(theta: Tensor, m: Tensor, B: Tensor, h: Hyperparameters, s: StepScalars) -> Tensor:
    """d of the step before ``s``, which moved theta by -rate d; rebuilt from the state it left."""
    d = m / rectify(B, s.previous_threshold, s.previous_offset)
    return s.kappa * d + s.omega * theta if h.decoupled else d


def _secant_pair(
    theta: Tensor, g: Tensor, m: Tensor, B: Tensor, h: Hyperparameters, s: StepScalars
) -> tuple[Tensor, Tensor]:
    """d, the direction of the step before (its displacement), and g - m."""
    if h.maximize:
        g = -g
    if h.l2:
        g = g + h.weight_decay * theta
    return displacement(theta, m, B, h, s), g - m


def _sums(d: Tensor, y: Tensor, delta: Tensor, B: Tensor, h: Hyperparameters) -> Sums:
    scale = d.detach().abs().amax()
    u = d / torch.where(scale == 0, 1, scale)
    largest = delta.abs().amax() if h.belief else None
    return Sums(scale, (u**4).sum(), (u * (y + B * d)).sum(), largest)
