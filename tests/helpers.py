"""Shared parts of the tests: parameters of many shapes and layouts, gradients, distances."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo
from apollo_qn.backends import cpu, triton
from tests import tolerances
from tests.modes import pairs
from tests.numpy_reference import Array, ReferenceApollo, Settings

# Device of the parameters, see `make test DEVICE=cuda`. Comparisons are made on the host.
DEVICE_VARIABLE = "APOLLO_QN_TEST_DEVICE"
DEVICE = torch.device(os.environ.get(DEVICE_VARIABLE, "cpu"))
ON_GPU = DEVICE.type == "cuda"
NEEDS_CPU = pytest.mark.skipif(ON_GPU, reason="of the CPU's kernel: run without DEVICE=cuda")
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: make test DEVICE=cuda")

# How a back end is chosen.
WHY_NOT_FUSED = triton.why_not() if ON_GPU else cpu.why_not()
NEEDS_KERNEL = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
NEEDS_FUSED = pytest.mark.skipif(WHY_NOT_FUSED is not None, reason=str(WHY_NOT_FUSED))
BACK_END_OPTIONS: dict[str, Any] = {
    "rule": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": pytest.param({"fused": True}, marks=NEEDS_FUSED),
}
BACK_ENDS = pairs(back_end=BACK_END_OPTIONS)

# 0-dim, empty, around ROW = 256 of the foreach back end, larger than a (patched) block
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (1,),
    (3, 5),
    (255,),
    (256,),
    (257,),
    (2, 3, 4, 5),
    (11, 30),
    (3, 401),
)


def generator(*seed: Any) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def normal(shape: Iterable[int], *seed: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return Gaussian numbers that depend on the seed only, not on the order of calls."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    drawn = torch.randn(tuple(shape), generator=generator(*seed), dtype=wide, device="cpu")
    return drawn.to(DEVICE, dtype)


def laid_out(x: Tensor) -> Tensor:
    """Return 4-dim tensors as channels-last and (11, 30) transposed; others unchanged."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.shape == (11, 30):
        return x.t().contiguous().t()
    return x


def parameters(
    shapes: Iterable[Iterable[int]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(laid_out(normal(shape, "theta", i, dtype=dtype)))
        for i, shape in enumerate(shapes)
    ]


@cache
def gradient(shape: torch.Size, dtype: torch.dtype, place: int, t: int) -> Tensor:
    """Return noise around a mean of size 1 to 4, with a random sign per element.

    With pure noise the moving average, and so d, would come near 0 in tensors of one element. There
    B' = B - y / d would be so ill-conditioned that no tolerance could show an error.
    """
    mean = normal(shape, "mean", place, dtype=dtype)
    noise = normal(shape, "g", place, t, dtype=dtype)
    if dtype.is_complex:
        parts = torch.view_as_real(mean)
        mean = torch.view_as_complex(parts + parts.sign())
    else:
        mean = mean + mean.sign()
    return laid_out(mean + noise / 2)


def give_gradients(params: list[torch.nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        p.grad = gradient(p.shape, p.dtype, i, t).clone()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default type within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_steps(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take steps with the gradients of :func:`give_gradients`, over all groups in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        give_gradients(params, t)
        optimizer.step()


def as_numpy(x: Tensor) -> Array:
    """Return a float64 array; complex numbers become pairs of real ones."""
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.to("cpu", torch.float64).numpy().copy()


def references(params: Iterable[Tensor], settings: Settings) -> list[ReferenceApollo]:
    return [ReferenceApollo(as_numpy(p), settings) for p in params]


def make(params: Any, settings: Settings, **others: Any) -> Apollo:
    return Apollo(params, **vars(settings), **{"seed": 0, **others})


class Comparison:
    """Compares quantities relative to the largest value that each has had."""

    def __init__(self) -> None:
        self.largest: dict[Any, float] = {}

    def distance(self, key: Any, got: Tensor, wanted: Array) -> float:
        if wanted.size == 0:
            assert got.numel() == 0
            return 0.0
        largest = max(self.largest.get(key, 0.0), float(np.max(np.abs(wanted))))
        self.largest[key] = largest
        found = as_numpy(got)
        assert found.shape == wanted.shape
        assert np.isfinite(found).all(), key
        difference = float(np.max(np.abs(found - wanted)))
        # float32 may flush values below its smallest normal number
        difference = max(0.0, difference - torch.finfo(torch.float32).tiny)
        return difference / largest if largest else difference

    def check(self, key: Any, got: Tensor, wanted: Array, tolerance: float) -> None:
        distance = self.distance(key, got, wanted)
        assert distance <= tolerance, f"{key}: {distance:.3g} > {tolerance:.3g}"

    def check_all(
        self,
        optimizer: Apollo,
        params: list[torch.nn.Parameter],
        wanted: list[ReferenceApollo],
        dtype: torch.dtype,
        capturable: bool = False,
    ) -> None:
        """Compare parameter, m and B of every tensor, with the tolerances of ``dtype``."""
        narrow = (tolerances.CAPTURABLE if capturable else tolerances.TRAJECTORY)[dtype]
        wide = (tolerances.CAPTURABLE_B if capturable else tolerances.TRAJECTORY_B)[dtype]
        for i, (p, reference) in enumerate(zip(params, wanted, strict=True)):
            self.check((i, "theta"), p, reference.theta, narrow)
            state = optimizer.state.get(p)
            if state:
                self.check((i, "m"), state["exp_avg"], reference.m, narrow)
                self.check((i, "B"), state["hessian_diag"], reference.B, wide)


def step_references(params: Iterable[Tensor], wanted: Iterable[ReferenceApollo]) -> None:
    """Step each reference with its parameter's gradient, if there is one."""
    for p, reference in zip(params, wanted, strict=True):
        if p.grad is not None:
            reference.step(as_numpy(p.grad))


def follow(
    optimizer: Apollo,
    params: list[torch.nn.Parameter],
    wanted: list[ReferenceApollo],
    steps: int,
    dtype: torch.dtype,
) -> None:
    """Step the optimizer and the references, and compare them after each step."""
    compare = Comparison()
    for t in range(steps):
        give_gradients(params, t)
        optimizer.step()
        step_references(params, wanted)
        compare.check_all(optimizer, params, wanted, dtype)


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return copies of everything that a step may change, for :func:`same`."""
    result: list[Any] = []
    for group in optimizer.param_groups:
        # each optimizer has a seed of its own
        result.append({k: v for k, v in group.items() if k not in ("params", "seed")})
        for p in group["params"]:
            result.append(p.detach().clone())
            state = optimizer.state.get(p, {})
            result.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})
    return result


def same(a: Any, b: Any) -> bool:
    """Return whether values are bit-identical; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        x, y = a.detach().contiguous(), b.detach().contiguous()
        return torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def rates(optimizer: Apollo, steps: int, after: Callable[[], None] = lambda: None) -> list[float]:
    """Return the steps' rates: with beta = 0, B = 0 and gradients of 1 a step moves by its rate."""
    (p,) = optimizer.param_groups[0]["params"]
    used = []
    for _ in range(steps):
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        used.append(before - p.item())
        after()
    return used


def of_one_parameter(**settings: Any) -> Apollo:
    """Return an optimizer whose B stays 0: constant gradients give y = 0, up to rounding."""
    p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64, device=DEVICE))
    return Apollo([p], beta=0.0, **settings)
