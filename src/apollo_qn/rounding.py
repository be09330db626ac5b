"""Rounding to 16 bits in plain integer arithmetic, which is bit-identical on every back end.

Algorithm 1 computes in float32 or wider. A 16-bit parameter stores theta' in one of three ways.
``nearest`` loses every update that is smaller than half a unit in the last place. ``stochastic``
rounds up or down at random, so that the mean is right. ``kahan`` keeps the rounding error in a
second tensor, as in Kahan's compensated summation; theta is the sum of both tensors.

In a bfloat16 state m is rounded to nearest, because its errors decay as its gradients do. B is
rounded stochastically, because it sums up small changes. Rounded to nearest, the sum of B over a
tensor drifted by 1 % in 400 steps, and the secant condition is about that sum.

The random bits of an element are a hash of five numbers: seed, position of the parameter in the
optimizer, index of the shard, step, and offset of the element in memory. They do not depend on back
end, threads, device or earlier draws. All keys and random bits are unsigned 32-bit integers. Python
numbers and int64 tensors hold them in [0, 2^32).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "kahan"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "kahan")
DEFAULT: Rounding = "stochastic"  # measured: docs/low_precision.md

# Number of bits by which float32 exceeds the normal numbers of each 16-bit type.
DROPPED = {torch.bfloat16: 16, torch.float16: 13}
# Types of parameters whose updates are rounded to 16 bits. A complex32 is two float16.
NARROW = {*DROPPED, torch.complex32}

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
_SMALLEST_NORMAL = 2.0**-14  # smallest normal float16

Bits32: TypeAlias = "int | Tensor"


def mix(x: Any) -> Any:
    """Hash a 32-bit integer by a bijection (found by C. Wellons' hash-prospector)."""
    x = x ^ (x >> 16)
    # factors 0x21f0aaad, and 0xd35a2d97 - 2^32 so that no product overflows int64
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * (0xD35A2D97 - (1 << 32))) & _MASK
    return x ^ (x >> 15)


def rng_key(seed: int, position: int) -> int:
    """Return the 32-bit key of the parameter at ``position``, unique for a given seed."""
    key: int = mix(mix(mix(seed & _MASK) ^ (seed >> 32)) ^ (position & _MASK))
    return key


def shard_key(tensor_key: int, index: int) -> int:
    """Return the key of shard ``index`` of a parameter, from the key of the full parameter."""
    key: int = mix(tensor_key ^ mix(index + 1))
    return key


def keys(rng_key: Bits32, step: Bits32) -> tuple[Any, Any]:
    """Return two 32-bit keys for a parameter and a step (0 first); each pair is unique."""
    first = mix(step ^ rng_key)
    return first, mix(first ^ rng_key ^ _GOLDEN)


def random_bits(offsets: Tensor, first: Bits32, second: Bits32) -> Tensor:
    """Return 32 random bits per element, from its offset in memory and both keys (broadcast)."""
    bits: Tensor = mix(mix((offsets & _MASK) ^ first) ^ second ^ (offsets >> 32))
    return bits


def memory_offsets(tensor: Tensor) -> Tensor:
    """Return the offset of each element from the first in memory, in elements, as int64."""
    if tensor.is_contiguous():
        return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    result = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        line = torch.arange(size, device=tensor.device) * stride
        result = result.unsqueeze(-1) + line
    return result


def stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round ``x`` at random to one of the two neighboring numbers of ``dtype``.

    The nearer neighbor is the more likely one, so that the mean is ``x``. Probabilities are
    multiples of 2^-16 (bfloat16) or 2^-13 (float16). Subnormal numbers of float16 are 2^-24 apart.
    Numbers that ``dtype`` holds exactly do not change. NaN, infinities and numbers beyond the
    largest finite one are rounded to nearest.

    Args:
        x: float32 or float64 tensor of any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        random: 32 random bits per element, int64 of x's shape; the highest 16 (13) are used.
    """
    exact = x.detach().to(torch.float32)
    rounded = _rounded(exact, dtype, random >> (32 - DROPPED[dtype])).to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return (
            x.to(dtype) + (rounded - x.to(dtype)).detach()
        )  # straight-through, the gradient of rounding to nearest
    return rounded


def _rounded(x: Tensor, dtype: torch.dtype, added: Tensor | None) -> Tensor:
    """Round float32 ``x`` to a number of ``dtype``; keep numbers beyond its largest unchanged.

    ``added`` is added to the bits before the lowest are dropped. None rounds to nearest, with ties
    to even.
    """
    dropped = DROPPED[dtype]
    # adding 2^-14 to subnormal numbers gives them float16's fixed number of binary places
    shift = _SMALLEST_NORMAL if dtype is torch.float16 else 0.0
    size = x.abs()
    small = size < shift
    pattern = torch.where(small, size + shift, size).view(torch.int32).to(torch.int64)
    if added is None:
        added = (1 << (dropped - 1)) - 1 + ((pattern >> dropped) & 1)
    pattern = (pattern + added) >> dropped << dropped
    rounded = pattern.to(torch.int32).view(torch.float32)
    rounded = torch.where(small, rounded - shift, rounded).copysign(x)
    return torch.where(size < torch.finfo(dtype).max, rounded, x)  # also keeps NaN


def is_drawn(dtype: torch.dtype, rounding: Rounding) -> bool:
    """Return whether a parameter of this type is rounded stochastically."""
    return rounding == "stochastic" and dtype in DROPPED


def low_half(random: Tensor) -> Tensor:
    """Move the lower 16 of 32 random bits to the highest 16."""
    return (random << 16) & _MASK


def join(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of a parameter and its compensation, which is exact in float32."""
    return high.to(dtype) + low.to(dtype)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``x`` rounded to nearest in ``dtype``, and the rounding error in ``dtype``.

    The error is 0 where the rounded number is not finite.
    """
    if torch.compiler.is_compiling():
        # inductor removes a cast to fewer bits and back, which would make the error 0
        rounded = _rounded(x.detach().to(torch.float32), dtype, None).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            rounded = x + (rounded - x).detach()
    else:
        rounded = x.to(dtype).to(x.dtype)
    low = torch.where(rounded.isfinite(), x - rounded, 0)
    return rounded.to(dtype), low.to(dtype)
