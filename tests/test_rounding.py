"""The random bits, and storing in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from apollo_qn import Apollo, rounding
from apollo_qn.backends import layout
from tests.helpers import BACK_ENDS, normal, same

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
N = 1 << 16
Words = NDArray[np.uint32]


def mixed(x: Words) -> Words:
    """Return the hash in unsigned 32-bit arithmetic, for which it was designed."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97)
    return x ^ (x >> np.uint32(15))


def drawn(seed: int = 0, position: int = 0, step: int = 0, first: int = 0, n: int = N) -> Tensor:
    keys = rounding.keys(rounding.rng_key(seed, position), step)
    return rounding.random_bits(torch.arange(first, first + n), *keys)


def of_elements(n: int) -> Tensor:
    return drawn(n=n)


def of_steps(n: int) -> Tensor:
    first, second = rounding.keys(rounding.rng_key(0, 0), torch.arange(n))
    return rounding.random_bits(torch.zeros(n, dtype=torch.int64), first, second)


def of_positions(n: int) -> Tensor:
    rng_keys = torch.tensor([rounding.rng_key(0, i) for i in range(n)])
    return rounding.random_bits(torch.zeros(n, dtype=torch.int64), *rounding.keys(rng_keys, 7))


def of_seeds(n: int) -> Tensor:
    rng_keys = torch.tensor([rounding.rng_key(i, 0) for i in range(n)])
    return rounding.random_bits(torch.zeros(n, dtype=torch.int64), *rounding.keys(rng_keys, 7))


def of_parts(n: int) -> Tensor:
    rng_keys = torch.tensor([rounding.shard_key(rounding.rng_key(0, 0), i) for i in range(n)])
    return rounding.random_bits(torch.zeros(n, dtype=torch.int64), *rounding.keys(rng_keys, 7))


SEQUENCES = pytest.mark.parametrize(
    "sequence", [of_elements, of_steps, of_positions, of_seeds, of_parts]
)


def bits(words: Tensor) -> Tensor:
    """Return the bits as -1 and 1, shape (n, 32)."""
    return ((words.unsqueeze(1) >> torch.arange(32)) & 1).double() * 2 - 1


def test_the_hash_is_one_function_of_32_bits() -> None:
    """The hash is the same for Python numbers, int64 tensors and 32-bit arithmetic."""
    edges = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
    words = torch.cat([torch.tensor(edges), torch.arange(0, 1 << 32, 104_729)])
    found = rounding.mix(words)
    assert np.array_equal(found.numpy(), mixed(words.numpy().astype(np.uint32)))
    assert [rounding.mix(x) for x in edges] == found[: len(edges)].tolist()
    assert found.unique().numel() == words.unique().numel()


def test_keys_of_parameters_and_steps_all_differ() -> None:
    rng_keys = torch.tensor([rounding.rng_key(3, i) for i in range(300)])
    assert rng_keys.unique().numel() == 300
    first, second = rounding.keys(rng_keys.unsqueeze(1), torch.arange(300).unsqueeze(0))
    assert ((first << 31) + second).unique().numel() == 300 * 300
    assert rounding.rng_key(1, 0) != rounding.rng_key(1 << 32, 0)


def test_offsets_beyond_32_bits_have_other_bits() -> None:
    assert not torch.equal(drawn(n=100), drawn(first=1 << 32, n=100))


@SEQUENCES
def test_random_bits_are_uniform(sequence: Callable[[int], Tensor]) -> None:
    """Chi-square of each bit and of each byte's 256 values is within 5 standard deviations."""
    words = sequence(N)
    assert words.min() >= 0
    assert words.max() < 1 << 32
    assert bits(words).sum(0).abs().max() < 5 * math.sqrt(N)
    for byte in range(4):
        counts = ((words >> 8 * byte) & 255).bincount(minlength=256).double()
        chi2 = float(((counts - N / 256) ** 2 / (N / 256)).sum())
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255), (byte, chi2)


@SEQUENCES
@pytest.mark.parametrize("lag", [1, 2, 16, 256])
def test_bits_of_neighbors_are_independent(sequence: Callable[[int], Tensor], lag: int) -> None:
    """No bit is correlated with one of a neighboring number (1,024 pairs), nor with its own
    others."""
    table = bits(sequence(N))
    between = table[lag:].T @ table[:-lag] / math.sqrt(N)
    assert between.abs().max() < 5.5
    within = table.T @ table / math.sqrt(N)
    assert within.fill_diagonal_(0).abs().max() < 5.5


def test_each_bit_of_a_place_changes_half_of_the_word() -> None:
    keys = rounding.keys(rounding.rng_key(0, 0), 0)
    places = torch.arange(4096)
    before = rounding.random_bits(places, *keys)
    for bit in range(32):
        flipped = bits(rounding.random_bits(places ^ (1 << bit), *keys) ^ before).mean(0)
        assert flipped.abs().max() < 5.5 / math.sqrt(4096), bit


def values(dtype: torch.dtype) -> Tensor:
    """Return float32 numbers between those of ``dtype``: all sizes, both signs, subnormal."""
    info = torch.finfo(dtype)
    sizes = [1.001, 1.999, 3.14159, 1e-3, info.max * 0.999, info.tiny * 1.37, info.tiny * 0.9]
    sizes += [info.smallest_normal * x for x in (0.3, 0.01)] if dtype is torch.float16 else []
    sizes += [info.tiny * info.eps * 0.4] if dtype is torch.float16 else []
    x = torch.tensor(sizes, dtype=torch.float32)
    return torch.cat([x, -x, normal((20,), "values", dtype=torch.float32)])


@NARROW
def test_the_mean_over_all_random_bits_is_the_value(dtype: torch.dtype) -> None:
    """The mean is exact to the resolution of the random bits, and only both neighbors occur."""
    dropped = rounding.DROPPED[dtype]
    every = torch.arange(1 << dropped) << (32 - dropped)
    for x in values(dtype):
        found = rounding.stochastic(x.expand(len(every)), dtype, every)
        assert found.dtype is dtype
        both = found.unique().double()
        assert len(both) == 2, x
        assert both[0] < x.double() < both[1]
        gap = float(both[1] - both[0])
        assert abs(float(found.double().mean() - x.double())) <= gap / (1 << dropped)
        # both are neighbors: no number lies between
        middle = ((both[0] + both[1]) / 2).to(dtype).double()
        assert middle in both.tolist()


@NARROW
def test_the_mean_of_many_words_is_the_value(dtype: torch.dtype) -> None:
    for i, x in enumerate(values(dtype)):
        found = rounding.stochastic(x.expand(N), dtype, drawn(position=i)).double()
        error = float(found.std() / math.sqrt(N))
        assert abs(float(found.mean() - x.double())) < 4.5 * error + abs(float(x)) * 2**-24


@NARROW
def test_what_is_exact_or_beyond_is_not_drawn(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    half = most * torch.finfo(dtype).eps / 4  # half a unit in the last place of the largest number
    exact = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    for random in (0, 0xFFFFFFFF):
        kept = rounding.stochastic(exact.float(), dtype, torch.full((len(exact),), random))
        number = ~exact.isnan()
        assert same(kept[number], exact[number])  # also -0 and infinities
        assert kept[~number].isnan().all()
        x = torch.tensor([most + half * 0.99, most + half * 1.01, math.inf], dtype=torch.float32)
        wanted = torch.tensor([most, math.inf, math.inf], dtype=dtype)
        words = torch.full((3,), random)
        assert same(rounding.stochastic(x, dtype, words), wanted)
        assert same(rounding.stochastic(-x, dtype, words), -wanted)


def test_what_a_compiler_rounds_is_the_nearest() -> None:
    """Compiled rounding uses integers, because a cast there and back may be removed."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.abs() < torch.finfo(torch.bfloat16).max]
    ties = every * (1 + 2.0**-8)
    for x in (every, ties, normal((100_000,), "x", dtype=torch.float32)):
        x = x[x.abs() < torch.finfo(torch.bfloat16).max]
        assert same(rounding._rounded(x, torch.bfloat16, None), x.bfloat16().float())


@NARROW
def test_high_and_low_are_the_value(dtype: torch.dtype) -> None:
    x = normal((10_000,), "x", dtype=torch.float32)
    high, low = rounding.split(x, dtype)
    assert same(high, x.to(dtype))
    eps = torch.finfo(dtype).eps
    error = (rounding.join(high, low, torch.float32) - x).abs()
    assert (error <= x.abs() * eps**2 / 4 + torch.finfo(dtype).smallest_normal * eps / 2).all()
    # splitting again loses nothing
    both = rounding.join(high, low, torch.float32)
    again = rounding.join(*rounding.split(both, dtype), torch.float32)
    assert same(both, again)
    high, low = rounding.split(torch.tensor([math.inf, -math.inf, math.nan]), dtype)
    assert not high.isfinite().any()
    assert low.eq(0).all()


def test_places_are_those_in_memory() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert same(rounding.memory_offsets(x).flatten(), torch.arange(120))
    last = x.contiguous(memory_format=torch.channels_last)
    assert same(rounding.memory_offsets(last).permute(0, 2, 3, 1).flatten(), torch.arange(120))
    assert rounding.memory_offsets(x[:, ::2])[1, 1, 0, 3] == 60 + 40 + 3
    assert rounding.memory_offsets(torch.empty(())).item() == 0


def test_foreach_draws_the_bits_of_each_element() -> None:
    """The bits in a matrix of several tensors are those of each tensor alone, row by row."""
    params = [torch.empty(700), torch.empty(3), torch.empty(2, 30, 4, 5)]
    params.append(torch.empty(2, 30, 4, 5).contiguous(memory_format=torch.channels_last))
    firsts, seconds = (torch.arange(1, 5) * factor for factor in (1 << 20, 77))
    shapes = tuple(p.shape for p in params)
    rows = layout.RowLayout(shapes, torch.device("cpu"), torch.float32)
    found = rows.views(rows.random_bits(params, firsts, seconds))
    for p, bits, first, second in zip(params, found, firsts, seconds, strict=True):
        assert same(bits, rounding.random_bits(rounding.memory_offsets(p), first, second))


@BACK_ENDS
def test_every_back_end_draws_the_same_bits(back_end: dict[str, Any]) -> None:
    """The first step subtracts lr * g, which is exact, so that only the bits could differ."""

    def stepped(**settings: Any) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (700, 3, 5000)]
        optimizer = Apollo(params, lr=2.0**-9, warmup_steps=0, seed=5, **settings)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [p.detach() for p in params]

    found = stepped(**back_end)
    assert set(found[0].tolist()) == {1.0, 1 - 2.0**-8}
    assert same(found, stepped(foreach=False, fused=False))


@BACK_ENDS
def test_a_state_of_16_bits_is_rounded_at_random(back_end: dict[str, Any]) -> None:
    """Elements with equal gradients have equal B, which is stored as one of two neighbors."""
    p = torch.nn.Parameter(torch.ones(4000))
    settings = {"lr": 0.1, "warmup_steps": 0, "seed": 0, "state_dtype": torch.bfloat16}
    optimizer = Apollo([p], **settings, **back_end)
    for g in (1.0, 0.3):
        p.grad = torch.full_like(p, g)
        optimizer.step()
    B = optimizer.state[p]["hessian_diag"]
    low, high = B.float().unique().tolist()
    assert abs(high - low) <= 2.0**-7 * max(abs(high), abs(low))  # neighbors
    assert 100 < int(B.float().eq(low).sum()) < 3900


def small_updates(steps: int, **settings: Any) -> tuple[float, float]:
    """Return mean and spread of 1,000 weights of 1 after updates of a 16th of an ulp."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = Apollo([p], lr=2.0**-8 / 16, warmup_steps=0, **{"seed": 0, **settings})
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    theta = p.detach().double()
    if "compensation" in optimizer.state[p]:
        theta = theta + optimizer.state[p]["compensation"].double()
    return float(theta.mean()), float(theta.std())


@BACK_ENDS
def test_small_updates_add_up(back_end: dict[str, Any]) -> None:
    """Small updates add up; rounding to nearest loses all of them."""
    steps = 50
    wanted = 1 - steps * 2.0**-8 / 16
    assert small_updates(steps, rounding="nearest", **back_end) == (1.0, 0.0)
    mean, spread = small_updates(steps, rounding="kahan", **back_end)
    assert spread == 0
    assert abs(mean - wanted) < steps * 2.0**-18  # a rounding of the low number at each step
    mean, spread = small_updates(steps, rounding="stochastic", **back_end)
    assert 0 < spread < 2.0**-8 * math.sqrt(steps / 16) * 1.2
    assert abs(mean - wanted) < 4.5 * spread / math.sqrt(1000)
    assert small_updates(steps, **back_end) == (mean, spread)  # the default


def trained(
    back_end: dict[str, Any], without: tuple[int, ...] = (), **settings: Any
) -> list[Tensor]:
    params = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = Apollo(groups, lr=2.0**-9, warmup_steps=0, **{"seed": 0, **back_end, **settings})
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = None if i in without else torch.ones_like(p)
        optimizer.step()
    return [p.detach() for p in params]


@BACK_ENDS
def test_what_the_bits_depend_on(back_end: dict[str, Any]) -> None:
    """The bits depend on seed and position, not on which other parameters have gradients."""
    found = trained(back_end)
    assert same(found, trained(back_end))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    for i, other in enumerate(trained(back_end, seed=1)):
        assert not torch.equal(found[i], other)
    assert same(trained(back_end, without=(0, 1))[2], found[2])
