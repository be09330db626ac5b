"""Algorithm 1 of Ma (2020) on one tensor: the definition of the update.

Every back end is a faster form of :func:`update` and is tested against it. The letters are the
paper's: ``theta`` parameter, ``g`` gradient, ``m`` moving average of gradients, ``B`` diagonal of
the Hessian approximation, ``D`` its rectified absolute value, ``d`` update direction.
"""

from __future__ import annotations

from torch import Tensor

from apollo_qn.hyperparameters import Hyperparameters, Scalar, StepScalars
from apollo_qn.secant import Sums, arithmetic, correction, secant_sums


def update(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    B: Tensor,
    h: Hyperparameters,
    s: StepScalars,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor, Scalar]:
    """Return one step of Algorithm 1 on one real tensor; nothing is changed in place.

    Args:
        theta, g: parameter and gradient, any shape and floating type.
        m, B: state of the same shape. The arithmetic is in the state's type, float32 or wider.
        h, s: hyperparameters of the group, and the scalars of this step.
        sums: sums over the full tensor, needed if only a shard of it is given.

    Returns:
        theta', m', B' and the threshold that this step's direction used.
    """
    theta, g, m, B, d, delta = _secant_pair(theta, g, m, B, h, s)

    # m' = m + alpha (g - m), eq. (9)
    y = s.alpha * delta
    m = m + y

    # B' = B - a d^2 with a = (<d, y> + <d, B d>) / (||d||_4 + eps)^4, eq. (8)
    sums = secant_sums(d, y, delta, B, h.belief) if sums is None else sums
    u = d / sums.scale.where(sums.scale != 0, 1).to(d.dtype)
    B = B - correction(sums, h.secant_eps(), m.dtype) * u**2

    # theta' = theta - lr d' with d' = m' / D', eq. (11)
    threshold: Scalar = h.sigma if sums.largest is None else sums.largest.to(m.dtype)
    d = m / rectify(B, threshold, s.offset)
    if h.decoupled:
        d = d + h.weight_decay * theta
    return theta - s.rate * d, m, B, threshold


def measure(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    B: Tensor,
    h: Hyperparameters,
    s: StepScalars,
) -> Sums:
    """Return the sums of :func:`update` over a tensor or a shard."""
    _, _, _, B, d, delta = _secant_pair(theta, g, m, B, h, s)
    return secant_sums(d, s.alpha * delta, delta, B, h.belief)


def rectify(B: Tensor, threshold: Scalar, offset: Scalar) -> Tensor:
    """Return D = max(|B|, threshold) + offset: eq. (11) with threshold = sigma and offset = 0."""
    D = B.abs().clamp(min=threshold)
    return D if isinstance(offset, float) and offset == 0 else D + offset


def displacement(
    theta: Tensor,
    m: Tensor,
    B: Tensor,
    h: Hyperparameters,
    s: StepScalars,
) -> Tensor:
    """Rebuild d of the step before, which moved theta by -rate d, from m and B.

    At t = 0 the result is 0 because m is 0.
    """
    d = m / rectify(B, s.previous_threshold, s.previous_offset)
    return s.kappa * d + s.omega * theta if h.decoupled else d


def _secant_pair(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    B: Tensor,
    h: Hyperparameters,
    s: StepScalars,
) -> tuple[Tensor, ...]:
    """Return theta, g, m and B in the arithmetic's type, d of the step before, and g - m."""
    dtype = arithmetic(theta.dtype, m.dtype)
    theta, g, m, B = theta.to(dtype), g.to(dtype), m.to(dtype), B.to(dtype)
    if h.maximize:
        g = -g
    if h.l2:
        g = g + h.weight_decay * theta
    return theta, g, m, B, displacement(theta, m, B, h, s), g - m
