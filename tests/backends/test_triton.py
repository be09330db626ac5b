"""The Triton kernel against the float64 reference, interpreted where there is no GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import apollo_qn
from apollo_qn import Apollo, rounding
from apollo_qn.backends import cpu, triton
from apollo_qn.backends.base import Batch
from apollo_qn.hyperparameters import StepScalars
from tests import tolerances
from tests.backends import interpreter
from tests.backends.interpreter import BLOCK, RUN, RUNS
from tests.backends.test_backends import check_sixteen_bits, stored_bits
from tests.backends.test_shards import MODES as MODES_OF_SHARDS
from tests.backends.test_shards import check_shards
from tests.helpers import (
    DEVICE,
    ON_GPU,
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
from tests.modes import MODES, STORING, slow_except
from tests.numpy_reference import ReferenceApollo, Settings
from tests.test_algorithm import EXTREMES
from tests.test_algorithm import follow as follow_extremes

SetSizes = Callable[..., None]

# one element, around a block and a run, of several runs, of more runs than there may be of a block
SHAPES: list[tuple[int, ...]] = [(), (0,), (63,), (2, 3, 4, 5), (RUN + 1,), (11, 30), (2, 301)]
FUSED = {"fused": True}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> SetSizes:
    """Fused means the Triton kernel, interpreted where there is no GPU; sets sizes."""
    if ON_GPU and triton.why_not() is None:
        return interpreter.set_sizes(monkeypatch)
    if not interpreter.AVAILABLE:
        pytest.skip(interpreter.REASON)
    return interpreter.interpret(monkeypatch)


def tables(optimizer: Apollo) -> Any:
    """The tables of the last launch."""
    assert optimizer._backends is not None
    ((_, found),) = optimizer._backends.triton._tables.values()
    return found


def left_over(optimizer: Apollo) -> list[Tensor]:
    """The parameters that the kernel hands back, among those that have a gradient."""
    found = []
    for group in optimizer.param_groups:
        lists, h = optimizer._tensor_lists(group, group["params"], 0)
        batch = Batch(lists, h, StepScalars.at(1.0, h, 0.0))
        (taken,) = triton.Triton().takes([batch])
        found += [p for p, on in zip(lists.params, taken, strict=True) if not on]
    return found


def check_all_taken(optimizer: Apollo) -> None:
    """The kernel takes every tensor that has an element."""
    assert all(p.numel() == 0 for p in left_over(optimizer))
    assert tables(optimizer)


DTYPES = [torch.float64, torch.float32]


@slow_except(
    "mode, capturable, dtype",
    itertools.product(MODES, [False, True], DTYPES),
    # each mode once
    [(mode, i % 2 == 1, DTYPES[i // 2 % 2]) for i, mode in enumerate(MODES)],
)
def test_every_mode_follows_the_reference(
    mode: dict[str, Any], capturable: bool, dtype: torch.dtype, interpreted: SetSizes
) -> None:
    settings = Settings(lr=0.3, sigma=0.5, maximize=capturable, warmup_steps=2, **mode)
    params = parameters(SHAPES, dtype)
    wanted = references(params, settings)
    optimizer = make(params, settings, capturable=capturable, **FUSED)
    compare = Comparison()
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
        step_references(params, wanted)
        compare.check_all(optimizer, params, wanted, dtype, capturable)
    check_all_taken(optimizer)


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
    """One step after the other from the same rounded parameter, state in float32."""
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
    """For every kind of finite number: subnormal, the largest, and beyond the target's range."""
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


@pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=["plain", "belief-decoupled"])
@pytest.mark.parametrize("cache", [1, 1 << 20], ids=["windows", "one window"])
def test_sizes_around_borders(mode: dict[str, Any], cache: int, interpreted: SetSizes) -> None:
    interpreted(cache=cache)
    border = [BLOCK, RUN, 2 * RUN, RUN * RUNS, RUN * RUNS + BLOCK]
    shapes = [(1,), (2,), *((n + i,) for n in border for i in (-1, 0, 1)), (9 * RUN + 7,)]
    params = parameters(shapes, torch.float64)
    wanted = references(params, settings := Settings(lr=0.3, warmup_steps=2, **mode))
    follow(make(params, settings, **FUSED), params, wanted, 2, torch.float64)


@pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=["plain", "belief-decoupled"])
def test_windows_change_no_bit(mode: dict[str, Any], interpreted: SetSizes) -> None:
    """Nor do other tensors: each tensor has the bits that it has alone."""
    shapes = [(130,), (700,), (5,), (300,), (2000,), (129,)]
    settings = Settings(lr=0.3, warmup_steps=3, **mode)

    def trained(cache: int, which: slice = slice(None)) -> tuple[list[Any], int]:
        interpreted(cache=cache)
        params = parameters(shapes)
        optimizer = make(params[which], settings, **FUSED)
        for t in range(2):
            give_gradients(params, t)
            optimizer.step()
        launches = sum(len(one.steps) for one in tables(optimizer)._sets)
        result = [[p.detach(), dict(optimizer.state[p])] for p in params[which]]
        return result, launches

    one, launches = trained(1 << 20)
    assert launches == 2
    many, launches = trained(1)
    assert launches == 1 + 5  # five tensors of more than one run, each a window
    assert same(one, many)
    assert same(one[4:5], trained(1 << 20, slice(4, 5))[0])


def test_schedule(interpreted: SetSizes) -> None:
    """Every run is measured and then updated, once, in launches that follow each other."""
    from apollo_qn.backends.triton import kernel, schedule

    n = [5, 4 * RUN, 3 * RUN + 1, 100 * RUN, 128, 129]
    interpreted(cache=int(20 * RUN * 12 / schedule.WINDOW))
    types = [(torch.float32,) * 3] * 6
    tables = schedule.Tables(torch.device("cpu"), [[0] * 6] * 5, n, types, [-1] * 6, [0] * 6)
    tables._schedule([True] * 6)
    (one,) = tables._sets
    seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for launch, (first, count) in enumerate(one.steps):
        for tensor, role, start, length, _ in tables._work[first : first + count].tolist():
            seen.setdefault((tensor, role), []).append((start, length, launch))
    for tensor, size in enumerate(n):
        if size <= RUN:
            assert seen.pop((tensor, kernel.ALL)) == [(0, size, 0)]
            continue
        measured = seen.pop((tensor, kernel.MEASURE))
        updated = seen.pop((tensor, kernel.APPLY))
        assert len(measured) <= RUNS
        assert [start for start, _, _ in measured] == sorted(start for start, _, _ in measured)
        assert measured[0][0] == 0
        for (start, length, _), (following, _, _) in itertools.pairwise(measured):
            assert start + length == following
        assert sum(measured[-1][:2]) == size
        assert [run[:2] for run in reversed(updated)] == [run[:2] for run in measured]
        launches = {launch for _, _, launch in measured}, {launch for _, _, launch in updated}
        assert all(len(found) == 1 for found in launches)
        assert launches[0].pop() + 1 == launches[1].pop()
    assert not seen
    # 4 + 4 runs together; what exceeds a window alone
    assert len(one.steps) == 4


def test_offsets_beyond_32_bits(interpreted: SetSizes) -> None:
    from apollo_qn.backends.triton import kernel, schedule

    interpreted(block=1024, run=4096, runs=512)
    n = 2**33 + 5
    types = [(torch.bfloat16, torch.bfloat16, torch.float32)]
    tables = schedule.Tables(torch.device("cpu"), [[0]] * 5, [n], types, [-1], [0])
    tables._schedule([True])
    last = tables._work[kernel.RUNS - 1].tolist()
    assert last[2] + last[3] == n
    assert tables._work[:, 3].max() < 2**31


def test_many_tensors_with_gradients_that_come_and_go(interpreted: SetSizes) -> None:
    sets = [
        Settings(lr=0.3, warmup_steps=5),
        Settings(lr=0.1, rebound="belief", eps=1e-2, beta=0.5, weight_decay=0.1, warmup_steps=0),
        Settings(lr=0.5, weight_decay=0.2, decoupled_weight_decay=True, warmup_init_lr=0.1),
    ]
    params = parameters([(3,), (), (70,), (4, 5), (300,), (2, 3)] * 5, torch.float64)
    groups = [params[i::3] for i in range(3)]
    given = [{"params": g, **vars(s)} for g, s in zip(groups, sets, strict=True)]
    optimizer = Apollo(given, **FUSED)
    wanted = [references(g, s) for g, s in zip(groups, sets, strict=True)]
    compare = Comparison()
    for t in range(4):
        give_gradients(params, t)
        for i, p in enumerate(params):
            if (t * 7 + i * 5) % 3 == 0:
                p.grad = None
        optimizer.step()
        for group, group_wanted in zip(groups, wanted, strict=True):
            step_references(group, group_wanted)
            compare.check_all(optimizer, group, group_wanted, torch.float64)
    check_all_taken(optimizer)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=["plain", "belief-decoupled"])
def test_a_bad_gradient_stays_in_its_tensor(
    bad: float, mode: dict[str, Any], interpreted: SetSizes
) -> None:
    def trained(spoilt: bool) -> tuple[list[torch.nn.Parameter], Apollo]:
        params = parameters([(3,), (40,), (300,), (700,), (257,)])
        optimizer = make(params, Settings(lr=0.3, warmup_steps=2, **mode), **FUSED)
        for t in range(3):
            give_gradients(params, t)
            for i in (1, 3) if spoilt and t else ():
                grad = params[i].grad
                assert grad is not None
                grad.view(-1)[7] = bad
            optimizer.step()
        return params, optimizer

    clean, spoilt = trained(False), trained(True)
    for i, (p, q) in enumerate(zip(clean[0], spoilt[0], strict=True)):
        if i in (1, 3):
            assert not torch.isfinite(q).all()
        else:
            assert same([p.data, dict(clean[1].state[p])], [q.data, dict(spoilt[1].state[q])])


@pytest.mark.parametrize("shape", [(40,), (300,)], ids=str)
@pytest.mark.parametrize("rebound", ["constant", "belief"])
@pytest.mark.parametrize("scales", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_gradients(
    scales: list[float], rebound: Any, shape: tuple[int, ...], interpreted: SetSizes
) -> None:
    settings = Settings(lr=0.1, warmup_steps=0, rebound=rebound)
    follow_extremes(scales, settings, shape, FUSED)


@pytest.mark.parametrize("size", [1, 100, 3000])
@pytest.mark.parametrize("mode", MODES_OF_SHARDS, ids=["plain", "decoupled", "belief"])
def test_shards_step_as_the_unsharded_tensor(
    mode: dict[str, Any], size: int, interpreted: SetSizes
) -> None:
    check_shards(triton.Triton(), mode, size, steps=4)


def test_strides_and_types_may_be_mixed(interpreted: SetSizes) -> None:
    """What the kernel cannot take is left to another back end, the rest is not."""
    dtypes = [torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.float32]
    params = [torch.nn.Parameter(normal((5, 7), i, dtype=dtype)) for i, dtype in enumerate(dtypes)]
    params.append(torch.nn.Parameter(normal((2, 6, 8), "sliced")[:, ::2, ::2]))
    plain = make([torch.nn.Parameter(p.detach().clone()) for p in params], Settings(lr=0.3))
    optimizer = make(params, Settings(lr=0.3), **FUSED)
    for t in range(3):
        give_gradients(params, t)
        for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
            q.grad = p.grad
        optimizer.step()
        plain.step()
    assert [tuple(p.shape) for p in left_over(optimizer)] == [(5, 7), (2, 3, 4)]
    for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)


def test_unaligned_tensors(interpreted: SetSizes) -> None:
    """Views into a flat buffer begin anywhere: then no access of 16 bytes is promised."""
    flat = normal((1000,), "flat", dtype=torch.float32)
    params = [torch.nn.Parameter(flat[i : i + 300]) for i in (1, 350)]
    wanted = references(params, settings := Settings(lr=0.3))
    optimizer = make(params, settings, **FUSED)
    follow(optimizer, params, wanted, 2, torch.float32)
    assert tables(optimizer)._aligned == [False] * 2
    # what one is read with does not depend on the others, whose sums would have other roundings
    both = parameters([(300,), (200,)])
    wanted = references(both, settings)
    optimizer = make(both, settings, **FUSED)
    follow(optimizer, both, wanted, 1, torch.float32)
    assert tables(optimizer)._aligned == [True, True]
    give_gradients(both, 1)
    grad = both[0].grad
    assert grad is not None
    both[0].grad = torch.empty(301, device=DEVICE)[1:].copy_(grad)
    optimizer.step()
    step_references(both, wanted)
    Comparison().check_all(optimizer, both, wanted, torch.float32)
    assert tables(optimizer)._aligned == [False, True]
    assert [one.aligned for one in tables(optimizer)._sets] == [False, True]


@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=["plain", "decoupled"])
def test_without_the_cpu_kernel(
    mode: dict[str, Any], interpreted: SetSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU machine need not have had a C compiler."""
    settings = Settings(lr=0.3, warmup_steps=3, **mode)

    def trained() -> list[Any]:
        optimizer = make(parameters([(3,), (300,)]), settings, **FUSED)
        run_steps(optimizer, range(3))
        return snapshot(optimizer)

    with_it = trained()
    monkeypatch.setattr(cpu, "why_not", lambda: "there is none")
    without = trained()
    for group in (with_it[0], without[0]):
        group.pop("fused")
    assert same(with_it, without)


def test_a_checkpoint_goes_on(interpreted: SetSizes) -> None:
    def optimizer() -> Apollo:
        return make(parameters([(3,), (300,)]), Settings(lr=0.3, **MODES[-1]), **FUSED)

    whole, first, second = optimizer(), optimizer(), optimizer()
    run_steps(whole, range(4))
    run_steps(first, range(2))
    for p, q in zip(*(o.param_groups[0]["params"] for o in (first, second)), strict=True):
        q.data.copy_(p.data)
    second.load_state_dict(first.state_dict())
    run_steps(second, range(2, 4))
    assert same(snapshot(whole), snapshot(second))


def test_a_schedule_beyond_warmup(interpreted: SetSizes) -> None:
    """As long as warmup, a schedule and the decay of beta^t take."""
    theta = normal((70,), "theta")
    p = torch.nn.Parameter(theta.float())
    settings = Settings(lr=0.3, warmup_steps=5, weight_decay=0.05, decoupled_weight_decay=True)
    reference, optimizer = ReferenceApollo(as_numpy(p), settings), make([p], settings, **FUSED)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    compare = Comparison()
    for t in range(25):
        give_gradients([p], t)
        optimizer.step()
        reference.lr = settings.lr * 0.97**t
        reference.step(as_numpy(p.grad))  # type: ignore[arg-type]
        scheduler.step()
        compare.check("theta", p, reference.theta, tolerances.TRAJECTORY[torch.float32])


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from apollo_qn.backends.triton import kernel

f32, f64, bf16 = tl.float32, tl.float64, tl.bfloat16
pointers = {"tensors": "*i64", "work": "*i64", "gradients": "*i64"}
pointers |= {name: "*fp64" for name in ("scalars", "rows", "full_sums")}
order = list(kernel.step.arg_names)

def made(target, P, G, M, S, belief, aligned):
    constants = dict(P=P, G=G, M=M, S=S, BELIEF=belief, ALIGNED=aligned, KAHAN=False)
    constants["DRAWS"] = bf16 in (P, M)
    constants |= dict(BLOCK=kernel.BLOCK, RUNS=kernel.RUNS)
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in order}
    divisible = {(order.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel.step, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": kernel.WARPS, "enable_fp_fusion": True}  # as schedule.py
    return triton.compile(source, target=target, options=options).asm

for types, belief in (((f32,) * 4, False), ((bf16, bf16, bf16, f32), True)):
    ptx = made(GPUTarget("cuda", 90, 32), *types, belief, True)["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        ptxas = (get_ptxas(90) if get_ptxas.__code__.co_argcount else get_ptxas()).path
        command = [ptxas, "-v", "--gpu-name=sm_90a", path, "-o", Path(folder, "kernel.cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill" in told or "spill" not in told, told
    assert int(re.search(r"Used (\\d+) registers", told)[1]) <= 128, told
    wide = len(re.findall(r"ld\\.global\\.v4\\.b32", ptx))
    print("loads of 16 bytes:", wide)
    assert wide >= 4 or bf16 in types, wide  # in both passes
made(GPUTarget("cuda", 80, 32), *(f64,) * 4, True, False)
try:
    assert made(GPUTarget("hip", "gfx942", 64), *(f32,) * 4, False, True)["amdgcn"]
except Exception as error:
    if "ROCm linker" not in str(error):  # Triton 3.4 comes without one
        raise
print("compiled")
"""


def test_compiles_for_gpus_that_are_not_here() -> None:
    """NVIDIA and AMD: no register is spilt, and 16 bytes are loaded at once."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("compiled\n")


def test_a_gpus_tensors_are_not_the_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel would read addresses of the device in the host's memory."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not triton.serves(torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton.serves(torch.device("cuda"))
    assert not triton.serves(torch.device("cpu"))


def test_no_gradient_is_kept_alive(interpreted: SetSizes) -> None:
    import weakref

    params = parameters([(300,)])
    optimizer = make(params, Settings(lr=0.3), **FUSED)
    run_steps(optimizer, range(2))
    grad: Tensor | None = params[0].grad
    known = weakref.ref(grad)  # type: ignore[arg-type]
    optimizer.zero_grad()
    del grad
    assert known() is None


@pytest.mark.parametrize("how", ["replaced", "stored otherwise", "removed"])
def test_no_old_state_is_kept_alive(how: str, interpreted: SetSizes) -> None:
    import weakref

    params = parameters([(300,), (5,)])
    optimizer = make(params, Settings(lr=0.3), **FUSED)
    run_steps(optimizer, range(2))
    old = weakref.ref(optimizer.state[params[1]]["exp_avg"])
    if how == "replaced":
        state = optimizer.state[params[1]]
        state["exp_avg"] = state["exp_avg"].clone()
    elif how == "stored otherwise":
        optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    else:
        p = optimizer.param_groups[0]["params"].pop()
        del optimizer.state[p], params[1], p
    give_gradients(params, 2)
    optimizer.step()
    assert old() is None
