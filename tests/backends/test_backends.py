"""All back ends against the float64 NumPy reference, in every pair of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo
from apollo_qn.backends import cpu
from tests import tolerances
from tests.helpers import (
    BACK_END_OPTIONS,
    BACK_ENDS,
    ON_GPU,
    SHAPES,
    Comparison,
    as_numpy,
    follow,
    give_gradients,
    make,
    normal,
    parameters,
    references,
    run_steps,
    same,
    snapshot,
    step_references,
)
from tests.modes import (
    MODE_IDS,
    MODE_OPTIONS,
    MODES,
    STORING_OPTIONS,
    Storing,
    pairs,
)
from tests.numpy_reference import Settings

STEPS = 20

SetBlock = Callable[[int], None]


@pairs(
    back_end=BACK_END_OPTIONS,
    dtype={str(x): x for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)},
    warmup_steps={"no warmup": 0, "warmup": 7},
    capturable={"host": False, "capturable": True},
    maximize={"min": False, "max": True},
    mode=MODE_OPTIONS,
)
def test_every_pair_of_options_follows_the_reference(
    mode: dict[str, Any],
    maximize: bool,
    capturable: bool,
    warmup_steps: int,
    dtype: torch.dtype,
    back_end: dict[str, Any],
    set_block: SetBlock,
) -> None:
    set_block(600)  # three tensors are gathered, one is split in blocks, others are alone
    settings = Settings(lr=0.3, sigma=0.5, maximize=maximize, warmup_steps=warmup_steps, **mode)
    params = parameters(dtype=dtype)
    wanted = references(params, settings)
    optimizer = make(params, settings, capturable=capturable, **back_end)
    compare = Comparison()
    narrow = dtype in (torch.bfloat16, torch.float16)
    limit_m, limit_B = tolerances.STATE_OF_16_BIT[capturable]
    for t in range(9 if narrow else STEPS):
        give_gradients(params, t)
        optimizer.step()
        step_references(params, wanted)
        if not narrow:
            compare.check_all(optimizer, params, wanted, dtype, capturable)
            continue
        ulp = torch.finfo(dtype).eps
        for i, (p, reference) in enumerate(zip(params, wanted, strict=True)):
            compare.check((i, "theta"), p, reference.theta, tolerances.ROUNDED_PARAMETER * ulp)
            reference.theta = as_numpy(p)  # so that the next step starts from the same parameter
            state = optimizer.state[p]
            assert state["exp_avg"].dtype is state["hessian_diag"].dtype is torch.float32
            compare.check((i, "m"), state["exp_avg"], reference.m, limit_m)
            rebuilt = mode.get("decoupled_weight_decay") and mode.get("weight_decay")
            limit = max(limit_B, tolerances.REBUILT_FROM_16_BIT * ulp) if rebuilt else limit_B
            compare.check((i, "B"), state["hessian_diag"], reference.B, limit)


@pairs(
    back_end=BACK_END_OPTIONS,
    storing=STORING_OPTIONS,
    capturable={"host": False, "capturable": True},
    mode=MODE_OPTIONS,
)
def test_sixteen_bits_follow_the_reference(
    mode: dict[str, Any],
    capturable: bool,
    storing: Storing,
    back_end: dict[str, Any],
    set_block: SetBlock,
) -> None:
    set_block(600)
    check_sixteen_bits(mode, capturable, storing, back_end)


def check_sixteen_bits(
    mode: dict[str, Any],
    capturable: bool,
    storing: Storing,
    back_end: dict[str, Any],
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 5,
) -> None:
    """Compare each step alone: the reference starts from the numbers stored before it."""
    dtype, rounding, state_dtype = storing
    settings = Settings(lr=0.3, sigma=0.5, warmup_steps=2, **mode)
    params = parameters(shapes, dtype)
    wanted = references(params, settings)
    optimizer = make(
        params,
        settings,
        capturable=capturable,
        rounding=rounding,
        state_dtype=state_dtype,
        **back_end,
    )
    compare = Comparison()
    for t in range(steps):
        give_gradients(params, t)
        optimizer.step()
        step_references(params, wanted)
        for i, (p, reference) in enumerate(zip(params, wanted, strict=True)):
            state = optimizer.state[p]
            theta = p.detach().float()
            limit = tolerances.ROUNDED_PARAMETER * torch.finfo(dtype).eps
            if dtype is torch.float32:
                limit = tolerances.TRAJECTORY[dtype]
            elif rounding == "kahan":
                theta = theta + state["compensation"].float()
                limit = tolerances.COMPENSATED[dtype]
            assert ("compensation" in state) == (rounding == "kahan" and dtype.itemsize == 2)
            if capturable:
                limit = max(limit, tolerances.CAPTURABLE[torch.float32])
            compare.check((i, "theta"), theta, reference.theta, limit)
            found = {}
            limits = tolerances.STATE_OF_16_BIT[capturable]
            for name, limit in zip(("exp_avg", "hessian_diag"), limits, strict=True):
                assert state[name].dtype is (state_dtype or torch.float32)
                if state_dtype is not None:
                    limit = tolerances.STORED_STATE[name] * torch.finfo(state_dtype).eps
                right = reference.m if name == "exp_avg" else reference.B
                compare.check((i, name), state[name], right, limit)
                found[name] = as_numpy(state[name])
            reference.go_on_from(as_numpy(theta), found["exp_avg"], found["hessian_diag"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_what_is_stored_has_the_same_bits_everywhere(
    rounding: Any, state_dtype: torch.dtype | None, dtype: torch.dtype, set_block: SetBlock
) -> None:
    """The numbers are such that theta', m' and B' are exact in any order of operations."""
    ends: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}]
    ends += [{"foreach": False, "capturable": True}, {"foreach": True, "capturable": True}]
    ends += [{"fused": True}] if cpu.why_not() is None else []
    for block in (600, 1 << 18):
        set_block(block)
        results = []
        for back_end in ends:
            results.append(stored_bits((dtype, rounding, state_dtype), back_end))
        for other in results[1:]:
            assert same(results[0], other)


def stored_bits(
    storing: Storing,
    back_end: dict[str, Any],
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> list[Tensor]:
    """Return parameters and state after two steps whose arithmetic is exact."""
    dtype, rounding, state_dtype = storing
    params = parameters(shapes, dtype)
    optimizer = Apollo(
        params,
        lr=0.3,
        beta=0.5,
        warmup_steps=0,
        rounding=rounding,
        state_dtype=state_dtype,
        seed=1 << 40,
        **back_end,
    )
    run_steps(optimizer, range(1))  # makes the state
    for i, p in enumerate(params):
        state = optimizer.state[p]
        state["exp_avg"].zero_()  # d = 0, so that B' = B
        state["hessian_diag"].copy_(normal(p.shape, "B", i))
    for _ in range(2):
        # alpha is not exact in float32, but with the gradient m it does not matter: m' = m
        for p in params:
            p.grad = optimizer.state[p]["exp_avg"].to(p.dtype)
        optimizer.step()
    return [x for p in params for x in (p.detach(), *tensors_of(optimizer, p))]


def tensors_of(optimizer: Apollo, p: Tensor) -> list[Tensor]:
    state = optimizer.state[p]
    names = ("exp_avg", "hessian_diag", "compensation")
    return [state[name] for name in names if name in state]


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("block", [1, 200, 256, 257, 1024, 1029, 4096, 1 << 18])
def test_sizes_around_blocks(mode: dict[str, Any], block: int, set_block: SetBlock) -> None:
    """Tensors just below and above the size of a block, and of one element."""
    set_block(block)
    border = (block // 4 - 1, block // 4, block // 4 + 1, block - 1, block, block + 1, 2 * block)
    sizes = [n for n in border if 0 <= n <= 8192]
    if block == 1:
        sizes = [1, 2, 5]
    shapes: list[tuple[int, ...]] = [(n,) for n in [*sizes, 3, 1, *reversed(sizes)]]
    if block > 1:
        shapes += [(257,), (2, 3, 4, 5), (11, 30)]
    settings = Settings(lr=0.3, warmup_steps=3, **mode)
    params = parameters(shapes, torch.float64)
    wanted = references(params, settings)
    optimizer = make(params, settings, foreach=True)
    follow(optimizer, params, wanted, 4, torch.float64)


@pairs(
    back_end=BACK_END_OPTIONS,
    dtype={str(x): x for x in (torch.complex64, torch.complex128)},
    mode=MODE_OPTIONS,
)
def test_complex_parameters_are_viewed_as_real(
    dtype: torch.dtype, mode: dict[str, Any], back_end: dict[str, Any], set_block: SetBlock
) -> None:
    set_block(600)
    settings = Settings(lr=0.3, warmup_steps=3, **mode)
    shapes = [(), (0,), (5,), (3, 43), (2, 3, 4, 5), (11, 30)]
    params = parameters(shapes, dtype)
    wanted = references(params, settings)
    optimizer = make(params, settings, **back_end)
    follow(optimizer, params, wanted, STEPS, dtype.to_real())
    for p in params:
        assert not p.numel() or optimizer.state[p]["exp_avg"].dtype is dtype


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_groups_differ_and_gradients_come_and_go(
    back_end: dict[str, Any], capturable: bool
) -> None:
    """One optimizer has groups with different settings, types and numbers of steps."""
    sets = [
        Settings(lr=0.3, warmup_steps=5),
        Settings(lr=0.1, rebound="belief", eps=1e-2, beta=0.5, weight_decay=0.1, warmup_steps=0),
        Settings(
            lr=0.5, sigma=0.3, weight_decay=0.2, decoupled_weight_decay=True, warmup_init_lr=0.1
        ),
        Settings(
            lr=0.2, rebound="belief", weight_decay=0.1, decoupled_weight_decay=True, maximize=True
        ),
    ]
    params = parameters([(3,), (), (70,), (4, 5), (300,), (2, 3)] * 4, torch.float64)
    groups = [params[i::4] for i in range(4)]
    optimizer = Apollo(
        [{"params": g, **vars(s)} for g, s in zip(groups, sets, strict=True)],
        **back_end,
        capturable=capturable,
    )
    wanted = [references(g, s) for g, s in zip(groups, sets, strict=True)]
    compare = Comparison()
    for t in range(STEPS):
        give_gradients(params, t)
        for i, p in enumerate(params):
            if (t * 7 + i * 5) % 3 == 0 or (i == 6 and t < 15):
                p.grad = None
        optimizer.step()
        for group, group_wanted in zip(groups, wanted, strict=True):
            step_references(group, group_wanted)
        flat = [reference for g in wanted for reference in g]
        compare.check_all(
            optimizer, [p for g in groups for p in g], flat, torch.float64, capturable
        )
    done = {int(state["step"]) for state in optimizer.state.values()}
    assert len(done) > 2


@BACK_ENDS
def test_types_and_layouts_may_be_mixed(back_end: dict[str, Any]) -> None:
    params = [
        torch.nn.Parameter(normal((5, 7), "mixed", i, dtype=dtype))
        for i, dtype in enumerate(
            [torch.float32, torch.float64, torch.complex64, torch.float32, torch.float64]
        )
    ]
    params.append(torch.nn.Parameter(normal((2, 6, 8), "sliced")[:, ::2, ::2]))
    params.append(torch.nn.Parameter(normal((6, 1), "expanded").expand(6, 4).clone()))
    settings = Settings(lr=0.3, warmup_steps=0)
    wanted = references(params, settings)
    optimizer = make(params, settings, **back_end)
    compare = Comparison()
    for t in range(5):
        give_gradients(params, t)
        # a gradient's layout need not be its parameter's; an expanded one has overlapping memory
        assert params[0].grad is not None
        params[0].grad = params[0].grad.t().contiguous().t()
        params[6].grad = normal((6, 1), "g", t).expand(6, 4)
        optimizer.step()
        step_references(params, wanted)
        compare.check_all(optimizer, params, wanted, torch.float32)


@pairs(
    back_end=BACK_END_OPTIONS,
    bad={bad: float(bad) for bad in ("nan", "inf", "-inf")},
    mode=MODE_OPTIONS,
)
def test_a_bad_gradient_stays_in_its_tensor(
    bad: float, mode: dict[str, Any], back_end: dict[str, Any], set_block: SetBlock
) -> None:
    set_block(600)
    settings = Settings(lr=0.3, warmup_steps=2, **mode)

    def trained(spoilt: bool) -> tuple[list[torch.nn.Parameter], Apollo]:
        params = parameters([(3,), (40,), (5, 5), (300,), (700,), (257,)])
        optimizer = make(params, settings, **back_end)
        for t in range(4):
            give_gradients(params, t)
            if spoilt and t >= 1:
                for i in (1, 4):
                    grad = params[i].grad
                    assert grad is not None
                    grad.view(-1)[7] = bad
            optimizer.step()
        return params, optimizer

    clean, spoilt = trained(False), trained(True)
    for i, (p, q) in enumerate(zip(clean[0], spoilt[0], strict=True)):
        if i in (1, 4):
            assert not torch.isfinite(q).all()
        else:
            assert same(p.data, q.data)
            assert same(dict(clean[1].state[p]), dict(spoilt[1].state[q]))
    # nothing of the NaN is left in memory that is kept between steps
    again = trained(False)
    assert same(snapshot(clean[1]), snapshot(again[1]))


@BACK_ENDS
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_deterministic(mode: dict[str, Any], back_end: dict[str, Any], set_block: SetBlock) -> None:
    set_block(600)
    results = []
    for _ in range(2):
        optimizer = make(parameters(), Settings(lr=0.3, warmup_steps=3, **mode), **back_end)
        run_steps(optimizer, range(5))
        results.append(snapshot(optimizer))
    assert same(*results)


@BACK_ENDS
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_a_tensor_alone_and_among_others(mode: dict[str, Any], back_end: dict[str, Any]) -> None:
    """The step of a tensor does not depend on the other tensors of the optimizer."""
    settings = Settings(lr=0.3, warmup_steps=3, **mode)
    together = parameters()
    optimizer = make(together, settings, **back_end)
    run_steps(optimizer, range(5))
    for i, q in enumerate(parameters()):
        alone = make([q], settings, **back_end)
        for t in range(5):
            give_gradients(parameters_with(q, i), t)
            alone.step()
        if ON_GPU and back_end.get("foreach"):
            # there the order in which torch sums a matrix depends on its number of rows
            compare = Comparison()
            compare.check(i, together[i], as_numpy(q), tolerances.TRAJECTORY[torch.float32])
        else:
            assert same(together[i].data, q.data), i


def parameters_with(p: torch.nn.Parameter, place: int) -> list[torch.nn.Parameter]:
    """Return the list with ``p`` at its index, because gradients are drawn by index."""
    return [*parameters()[:place], p]
