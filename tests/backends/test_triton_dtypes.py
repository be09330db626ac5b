"""Types and 16-bit storage in the Triton kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import apollo_qn
from apollo_qn import rounding
from tests import tolerances
from tests.backends.interpreter import SetSizes
from tests.backends.test_backends import check_sixteen_bits, stored_bits
from tests.backends.test_triton import FUSED, SHAPES
from tests.helpers import (
    DEVICE,
    Comparison,
    as_numpy,
    normal,
    references,
    same,
)
from tests.modes import MODES, STORING, slow_except
from tests.numpy_reference import Settings


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize(
    ("of_parameter", "of_gradient"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_types(
    of_parameter: torch.dtype, of_gradient: torch.dtype, capturable: bool, interpreted: SetSizes
) -> None:
    """Each step starts from the same rounded parameter, with state in float32."""
    settings = Settings(lr=0.3, warmup_steps=0, rebound="belief", eps=0.1, weight_decay=0.05)
    theta = [normal(shape, "theta", shape).to(of_parameter) for shape in [(5,), (300,)]]
    wanted = references(theta, settings)
    m, B = ([torch.zeros_like(x, dtype=torch.float32) for x in theta] for _ in range(2))
    home = DEVICE if capturable else "cpu"
    steps = [torch.zeros((), device=home) for _ in theta]
    thresholds = [torch.zeros((), device=DEVICE) for _ in theta]
    limit_m, limit_B = tolerances.STATE_OF_16_BIT[capturable]
    compare, ulp = Comparison(), torch.finfo(of_parameter).eps
    for t in range(3):
        grads = [(normal(x.shape, "g", t, x.shape) + 2).to(of_gradient) for x in theta]
        apollo_qn.apollo(
            theta,
            grads,
            m,
            B,
            steps,
            thresholds=thresholds,
            capturable=capturable,
            **FUSED,
            **{k: v for k, v in vars(settings).items() if k != "warmup_init_lr"},
        )
        for i, reference in enumerate(wanted):
            reference.step(as_numpy(grads[i]))
            tolerance = tolerances.ROUNDED_PARAMETER * ulp
            if of_parameter is torch.float32:
                tolerance = tolerances.TRAJECTORY[of_parameter]
            compare.check((i, "theta"), theta[i], reference.theta, tolerance)
            reference.theta = as_numpy(theta[i])
            compare.check((i, "m"), m[i], reference.m, limit_m)
            compare.check((i, "B"), B[i], reference.B, limit_B)


@slow_except(
    "mode, storing",
    (rows := list(itertools.product([MODES[2], MODES[-1]], STORING))),
    [rows[i] for i in (1, 12)],
)
def test_sixteen_bits_follow_the_reference(
    mode: dict[str, Any], storing: Any, interpreted: SetSizes
) -> None:
    check_sixteen_bits(mode, False, storing, FUSED, SHAPES, steps=3)


@slow_except("storing", [(x,) for x in STORING], [(x,) for x in STORING[1:3]])
def test_what_is_stored_has_the_bits_of_the_rule(storing: Any, interpreted: SetSizes) -> None:
    bits = [stored_bits(storing, end, SHAPES) for end in (FUSED, {"foreach": False})]
    assert same(*bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_rounding_has_the_bits_of_the_rule(
    dtype: torch.dtype, interpreted: SetSizes
) -> None:
    """Finite numbers of every kind: subnormal, the largest, and beyond the target's range."""
    largest = torch.finfo(dtype).max
    numbers = [0.0, -0.0, 1.0, 0.3, -7e-3, largest, 1.0001 * largest]
    numbers += [2.0**-14, 2.0**-14 * 0.999, 1e-7, -3e-8, 1e-40, 2.0**-24, 65504.0, 65519.0, -1e-45]
    theta = torch.tensor(numbers * 60, device=DEVICE)
    p = torch.zeros_like(theta, dtype=dtype)
    m, B = torch.zeros_like(theta), torch.zeros_like(theta)
    # theta' = 0 - 1 * m' / max(|B'|, 1) with m' = g
    apollo_qn.apollo([p], [-theta], [m], [B], [torch.zeros(())], warmup_steps=0, seed=3, **FUSED)
    first, second = rounding.keys(rounding.rng_key(3, 0), 0)
    random = rounding.random_bits(rounding.memory_offsets(p), first, second)
    assert same(p, rounding.stochastic(0 - -theta, dtype, random))
