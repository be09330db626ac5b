"""Numerics of the secant condition, eq. (7) and (8): scaled sums, their merging, the coefficient.

Algorithm 1 takes the fourth power of ||d||_4. In float32 this power overflows above 1e9 and
underflows below 1e-9. The sums therefore run over u = d / scale, with a scale near max |d|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of one step over a tensor, shape (), or over each of n tensors, shape (n,).

    With u = d / ``scale`` and y = m' - m: ``q4`` = sum u^4 and ``k`` = <u, y + B d>. With belief,
    ``largest`` = max |g - m|. Sums over a shard of a tensor have the same form.
    """

    scale: Tensor
    q4: Tensor
    k: Tensor
    largest: Tensor | None = None

    def of(self, i: int) -> Sums:
        """Return the sums of tensor ``i``."""
        largest = None if self.largest is None else self.largest[i]
        return Sums(self.scale[i], self.q4[i], self.k[i], largest)

    @classmethod
    def concatenate(cls, sums: Sequence[Sums], join: Callable[[list[Tensor]], Tensor]) -> Sums:
        """Concatenate the sums of many tensors; ``join`` is ``torch.cat`` or ``torch.stack``."""
        largest = [one.largest for one in sums if one.largest is not None]
        return cls(
            join([one.scale for one in sums]),
            join([one.q4 for one in sums]),
            join([one.k for one in sums]),
            join(largest) if largest else None,
        )

    def merged(self) -> Sums:
        """Merge the sums of parts along the first dimension into those of the full tensor."""
        scale = self.scale.amax(0)
        share = (self.scale / torch.where(scale == 0, 1, scale)).to(self.k.dtype)
        largest = None if self.largest is None else self.largest.amax(0)
        return Sums(scale, (self.q4 * share**4).sum(0), (self.k * share).sum(0), largest)

    def table(self) -> Tensor:
        """Return float64 rows of scale, q4, k and largest, shape (n, 4)."""
        largest = torch.zeros_like(self.k) if self.largest is None else self.largest
        columns = (self.scale, self.q4, self.k, largest)
        return torch.stack([column.to(torch.float64) for column in columns], 1)

    @classmethod
    def from_table(cls, table: Tensor, belief: bool) -> Sums:
        """Return the sums that :meth:`table` wrote."""
        scale, q4, k, largest = table.unbind(1)
        return cls(scale, q4, k, largest if belief else None)


def arithmetic(theta: torch.dtype, state: torch.dtype) -> torch.dtype:
    """Return the type of the arithmetic: the state's, float32 at least."""
    return torch.promote_types(theta, torch.float32) if state.itemsize < 4 else state


def accumulator(device: torch.device) -> torch.dtype:
    """Return the type of sums over a tensor: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def secant_sums(d: Tensor, y: Tensor, delta: Tensor, B: Tensor, belief: bool) -> Sums:
    """Return the sums over a tensor or over a shard.

    Args:
        d: displacement of the step before, divided by minus its rate; any shape.
        y: m' - m, in d's shape.
        delta: g - m, in d's shape.
        B: diagonal of the Hessian approximation, in d's shape.
        belief: whether max |g - m| is needed.
    """
    scale = d.detach().abs().amax()
    u = d / torch.where(scale == 0, 1, scale)
    largest = delta.abs().amax() if belief else None
    return Sums(scale, (u**4).sum(), (u * (y + B * d)).sum(), largest)


def secant_coefficient(scale: Tensor, q4: Tensor, k: Tensor, eps: float) -> Tensor:
    """Return c with B' = B - c u^2, from the sums over the tensor; all arguments of one shape.

    With u = d / scale, c u^2 equals Algorithm 1's
    a d^2 = (<d, y> + <d, B d>) / (||d||_4 + eps)^4 d^2. No factor of c overflows or underflows
    before c does.
    """
    q4 = torch.where(scale == 0, 1, q4)  # the root has no derivative at 0
    n = scale * q4.sqrt().sqrt() + eps
    nothing = n == 0  # eps = 0 and d = 0: no displacement, no information
    n = torch.where(nothing, 1, n)
    return torch.where(nothing, 0, (scale / n) ** 3 * (k / n))


def correction(sums: Sums, eps: float, dtype: torch.dtype) -> Tensor:
    """Return c with B' = B - c u^2 in ``dtype``, the type of B."""
    wide = accumulator(sums.k.device)
    c = secant_coefficient(sums.scale.to(wide), sums.q4.to(wide), sums.k.to(wide), eps)
    return saturate(c, dtype)


def saturate(c: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``c`` in ``dtype``, clamped if it is too large for ``dtype``; NaN stays NaN."""
    largest = torch.finfo(dtype).max / 8
    return c.clamp(-largest, largest).to(dtype)
