"""How numbers are stored in 16 bits: in plain integer arithmetic, the same bits on every back end.

The rule computes in float32 at least. Its theta' is stored in a 16-bit parameter in one of three
ways. ``nearest`` loses every update that is smaller than half a unit in the last place.
``stochastic`` rounds up or down by chance, so that the mean is right. ``kahan`` keeps what the
rounding cuts off in a second tensor: Kahan's compensated summation in the form of two numbers, a
high and a low one, whose sum is what the rule sees.

Of a bfloat16 state m is rounded to the nearest: it forgets its errors as it forgets its gradients.
B changes by little at a time and adds up, so that it is rounded stochastically; to the nearest its
sum over a tensor, which is what the secant condition is about, drifted by 1 % in 400 steps.

The random bits of an element are a hash of seed, position of the parameter in the optimizer, part
of it where it is sharded, step and place of the element. They depend on nothing else: not on back
end, threads or device, and not on what was drawn before. Words are 32-bit unsigned; as Python's
numbers and in int64 tensors they lie in [0, 2^32).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "kahan"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "kahan")
DEFAULT: Rounding = "stochastic"  # measured: docs/low_precision.md

# The bits that float32 has beyond those of a 16-bit type's normal numbers.
DROPPED = {torch.bfloat16: 16, torch.float16: 13}
# Types of parameters whose updates are rounded to 16 bits; complex32 is two float16.
NARROW = {*DROPPED, torch.complex32}

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
_SMALLEST_NORMAL = 2.0**-14  # of float16

Word: TypeAlias = "int | Tensor"


def mix(x: Any) -> Any:
    """A bijection of 32-bit words that scatters them (C. Wellons' search, hash-prospector)."""
    x = x ^ (x >> 16)
    # 0x21f0aaad, and 0xd35a2d97 less 2^32, so that no product leaves int64
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * (0xD35A2D97 - (1 << 32))) & _MASK
    return x ^ (x >> 15)


def rng_stream(seed: int, position: int) -> int:
    """Return the 32-bit number of the parameter at ``position``; those of one seed all differ."""
    word: int = mix(mix(mix(seed & _MASK) ^ (seed >> 32)) ^ (position & _MASK))
    return word


def shard_stream(whole: int, index: int) -> int:
    """Return the stream of shard ``index`` of a parameter, from that of the whole parameter."""
    word: int = mix(whole ^ mix(index + 1))
    return word


def keys(stream: Word, step: Word) -> tuple[Any, Any]:
    """Two words for a parameter and a step (0 first); no two of these have the same."""
    first = mix(step ^ stream)
    return first, mix(first ^ stream ^ _GOLDEN)


def random_bits(places: Tensor, first: Word, second: Word) -> Tensor:
    """A random word for each element, from its place and both keys, which broadcast."""
    word: Tensor = mix(mix((places & _MASK) ^ first) ^ second ^ (places >> 32))
    return word


def places(tensor: Tensor) -> Tensor:
    """How far in memory each element lies from the first one, in elements; int64."""
    if tensor.is_contiguous():
        return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    result = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        line = torch.arange(size, device=tensor.device) * stride
        result = result.unsqueeze(-1) + line
    return result


def stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """``x`` (float32 or float64) as one of the two numbers of ``dtype`` around it.

    The probability of each is the other's share of their distance, to 2^-16 (bfloat16) or 2^-13
    (float16). Below 2^-14 the numbers of float16 are 2^-24 apart, and so they are here. What
    ``dtype`` holds exactly stays as it is; infinities, NaN and what lies beyond the largest finite
    number are rounded to the nearest.

    Args:
        x: any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        random: int64 of x's shape, of whose 32 bits the highest 16 (13) are used.
    """
    exact = x.detach().to(torch.float32)
    rounded = _rounded(exact, dtype, random >> (32 - DROPPED[dtype])).to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return x.to(dtype) + (rounded - x.to(dtype)).detach()  # as nearest has it, straight through
    return rounded


def _rounded(x: Tensor, dtype: torch.dtype, added: Tensor | None) -> Tensor:
    """float32 ``x`` among the numbers of ``dtype``; what lies beyond their largest as it is.

    ``added`` is what is added to the bits that will be dropped; None: to the nearest, ties to even.
    """
    dropped = DROPPED[dtype]
    # one more bit below 2^-14 for each power of 2: a fixed number of places, as float16 has
    shift = _SMALLEST_NORMAL if dtype is torch.float16 else 0.0
    size = x.abs()
    small = size < shift
    pattern = torch.where(small, size + shift, size).view(torch.int32).to(torch.int64)
    if added is None:
        added = (1 << (dropped - 1)) - 1 + ((pattern >> dropped) & 1)
    pattern = (pattern + added) >> dropped << dropped
    rounded = pattern.to(torch.int32).view(torch.float32)
    rounded = torch.where(small, rounded - shift, rounded).copysign(x)
    return torch.where(size < torch.finfo(dtype).max, rounded, x)  # and NaN as it is


def is_drawn(dtype: torch.dtype, rounding: Rounding) -> bool:
    """Whether a parameter of this type is rounded by random bits."""
    return rounding == "stochastic" and dtype in DROPPED


def low_half(random: Tensor) -> Tensor:
    """The lower 16 bits of words as the highest of others."""
    return (random << 16) & _MASK


def joined(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """What a parameter and its compensation stand for; exact in float32."""
    return high.to(dtype) + low.to(dtype)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest number of ``dtype``, and the nearest to what that leaves of ``x``.

    The low one is 0 where the high one is not finite.
    """
    if torch.compiler.is_compiling():
        # inductor leaves out a cast to fewer bits and back: nothing would remain for the low one
        rounded = _rounded(x.detach().to(torch.float32), dtype, None).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            rounded = x + (rounded - x).detach()
    else:
        rounded = x.to(dtype).to(x.dtype)
    low = torch.where(rounded.isfinite(), x - rounded, 0)
    return rounded.to(dtype), low.to(dtype)
