"""Hyperparameters: names, ranges, and the scalars of one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from apollo_qn.rounding import ROUNDINGS, Rounding

Scalar: TypeAlias = "float | Tensor"  # a Python number, or a tensor that is not read on the host
Rebound = Literal["constant", "belief"]

UNDETERMINED = 1e-6  # |1 - lr * weight_decay| below which theta_before cannot be rebuilt


class Hyperparameters(NamedTuple):
    """Settings of one parameter group in one step, named as in :class:`apollo_qn.Apollo`.

    ``warmup_start`` is ``warmup_init_lr`` divided by the initial learning rate. ``rounding`` says
    how a 16-bit parameter stores its update. The last four choose and constrain the back end.
    """

    lr: Scalar
    beta: Scalar
    eps: float
    sigma: float
    weight_decay: Scalar
    decoupled_weight_decay: bool
    rebound: Rebound
    warmup_steps: int
    warmup_start: float
    maximize: bool
    rounding: Rounding = "stochastic"
    foreach: bool | None = None
    fused: bool | None = None
    capturable: bool = False
    differentiable: bool = False

    @property
    def belief(self) -> bool:
        """Return whether D uses the threshold of the authors' later code."""
        return self.rebound == "belief"

    @property
    def decays(self) -> bool:
        """Return whether weight decay takes part; a tensor counts as non-zero."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0

    @property
    def l2(self) -> bool:
        """Return whether decay is added to the gradient."""
        return not self.decoupled_weight_decay and self.decays

    @property
    def decoupled(self) -> bool:
        """Return whether decay is added to the direction."""
        return self.decoupled_weight_decay and self.decays

    def secant_eps(self) -> float:  # Dynamo of torch 2.10 cannot read the number of a property
        """Return the number added to ||d||_4: eps with belief, else eps / sigma (Theorem 1)."""
        return self.eps if self.belief else self.eps / self.sigma

    def alpha(self, t: Scalar) -> Scalar:
        """Return the weight of the new gradient in m at step ``t``, eq. (9).

        The weight is exactly 1 at t = 0, whatever the type of ``t``, and tends to 1 - beta.
        """
        alpha = (1 - self.beta) / (1 - self.beta ** (t + 1))
        return torch.where(t == 0, 1.0, alpha) if isinstance(t, Tensor) else alpha

    def rate(self, t: Scalar) -> Scalar:
        """Return the learning rate of step ``t``, warmed up linearly (section 3.4)."""
        if self.warmup_steps == 0:
            return self.lr
        w, share = self.warmup_start, t / self.warmup_steps
        factor = w + (1 - w) * share
        if isinstance(share, Tensor):
            return self.lr * torch.where(share >= 1, 1, factor)
        return self.lr * factor if share < 1 else self.lr

    def offset(self, t: Scalar) -> Scalar:
        """Return the number added to D at step ``t``: eps / alpha with belief, otherwise 0."""
        return self.eps / self.alpha(t) if self.belief else 0.0


class StepScalars(NamedTuple):
    """Scalars of one step ``t`` (0 first), for one tensor or for many.

    Each is a float, a 0-dim tensor, or a tensor of shape (n,) with an element per tensor.
    ``previous_threshold`` and ``previous_offset`` give D of the step before. The displacement of
    the step before is kappa d + omega theta. ``kappa`` and ``omega`` are 1 and 0 unless weight
    decay is decoupled.
    """

    t: Scalar
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
        """Return the scalars of step ``t``.

        Args:
            t: number of steps done before.
            h: hyperparameters of the group.
            previous_lr: rate of the step before, needed with decoupled decay.
            previous_threshold: threshold of the step before with belief, needed for its D.
        """
        if isinstance(t, Tensor):
            # in float32 the relative error of alpha would be 3e-7
            t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        kappa: Scalar = 1.0
        omega: Scalar = 0.0
        if h.decoupled:
            assert previous_lr is not None
            kappa, omega = _displacement_weights(t, previous_lr, h.weight_decay)
        previous_offset: Scalar = 0.0
        if h.belief:
            before = (t - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0)
            previous_offset = h.offset(before)
        threshold = h.sigma if previous_threshold is None else previous_threshold
        return cls(t, h.alpha(t), h.rate(t), h.offset(t), threshold, previous_offset, kappa, omega)

    def select(self, which: Any) -> StepScalars:
        """Return the scalars of some of n tensors.

        Args:
            which: index, slice or list of indices into a tensor of shape (n,).
        """

        def selected(x: Tensor) -> Tensor:
            # no tensor of indices, because its copy to a GPU would wait and cannot be captured
            return torch.stack([x[i] for i in which]) if isinstance(which, list) else x[which]

        return StepScalars(*(selected(x) if isinstance(x, Tensor) and x.dim() else x for x in self))

    def with_threshold(self, before: Tensor) -> StepScalars:
        """Return the scalars with another ``previous_threshold``."""
        t, alpha, rate, offset, _, *others = self  # Dynamo of torch 2.8 cannot trace _replace
        return StepScalars(t, alpha, rate, offset, before, *others)

    def to(self, dtype: torch.dtype) -> StepScalars:
        """Return the scalars with all tensors except ``t`` in ``dtype``."""
        t, *others = self
        return StepScalars(t, *(x.to(dtype) if isinstance(x, Tensor) else x for x in others))


def _displacement_weights(t: Scalar, lr: Scalar, weight_decay: Scalar) -> tuple[Scalar, Scalar]:
    """Return kappa and omega with d + wd theta_before = kappa d + omega theta.

    They follow from theta = theta_before - lr (d + wd theta_before). If lr wd = 1, theta does not
    depend on theta_before, and d alone is taken as the displacement. At t = 0 there was no step.
    """
    kept = 1 - lr * weight_decay
    if isinstance(kept, Tensor) or isinstance(t, Tensor):
        started = t > 0
        if not isinstance(kept, Tensor):
            assert isinstance(t, Tensor)
            kept = torch.full_like(t, kept)
        if isinstance(started, Tensor):
            started = started.to(kept.device)
        known = (kept.abs() >= UNDETERMINED) & started
        safe = torch.where(known, kept, 1)
        return 1 / safe, torch.where(known, weight_decay / safe, 0)
    if t == 0 or abs(kept) < UNDETERMINED:
        return 1.0, 0.0
    return 1 / kept, weight_decay / kept


def number(x: Scalar) -> float:
    """Return a scalar as a float."""
    return float(x.detach() if isinstance(x, Tensor) else x)


def warmup_start(warmup_init_lr: float | None, base_lr: Scalar) -> float:
    """Return ``warmup_init_lr`` divided by the initial learning rate, or 1 / 1000 for None."""
    if warmup_init_lr is None:
        return 1e-3
    return warmup_init_lr / float(base_lr) if warmup_init_lr else 0.0  # avoids 0 / 0 if lr is 0


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


_NOT_NEGATIVE = (lambda x: _is_number(x) and 0 <= x < math.inf, "a finite number >= 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _NOT_NEGATIVE,
    "beta": (lambda x: _is_number(x) and 0 <= x < 1, "in [0, 1)"),
    "eps": _NOT_NEGATIVE,
    "sigma": (lambda x: _is_number(x) and 0 < x < math.inf, "a finite number > 0"),
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": (
        lambda x: _is_number(x) and 0 <= x < math.inf and x == int(x),
        "a whole number >= 0",
    ),
    "warmup_init_lr": (
        lambda x: x is None or (_is_number(x) and 0 <= x < math.inf),
        "None or a finite number >= 0",
    ),
    "rebound": (lambda x: x in ("constant", "belief"), "'constant' or 'belief'"),
    "rounding": (
        lambda x: x in (None, *ROUNDINGS),
        "None, 'nearest', 'stochastic' or 'kahan'",
    ),
    "seed": (
        lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 64,
        "a whole number in [0, 2**64)",
    ),
}


def check_ranges(given: Mapping[str, Any], lr: str = "lr") -> None:
    """Raise ValueError for the first hyperparameter that is out of its range.

    Args:
        given: hyperparameters by name; missing names are skipped.
        lr: name of the learning rate in ``given``.
    """
    for known, (holds, what) in _RANGES.items():
        name = lr if known == "lr" else known
        if name in given and not holds(given[name]):
            raise ValueError(f"{name} must be {what}, got {given[name]!r}")
    if given.get(lr) == 0 and (given.get("warmup_init_lr") or 0) > 0:
        raise ValueError(
            f"warmup_init_lr must be None or 0 where {lr} is 0, got {given['warmup_init_lr']!r}"
        )
    if given.get("rebound") == "belief" and given.get("eps") == 0:
        raise ValueError("eps must be > 0 with rebound='belief', got 0")
