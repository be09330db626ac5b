"""The fused CPU back end: sizes, threads, memory that it must not touch, processes that fork."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from apollo_qn import Apollo, apollo
from tests import tolerances
from tests.backends.test_device_waits import Watched
from tests.helpers import (
    NEEDS_CPU,
    NEEDS_KERNEL,
    follow,
    generator,
    give_gradients,
    make,
    normal,
    parameters,
    references,
    run_steps,
    same,
    snapshot,
)
from tests.modes import MODE_IDS, MODES, slow_except
from tests.numpy_reference import Settings

pytestmark = [NEEDS_KERNEL, NEEDS_CPU]

# of kernel.h and schedule.h, in elements
BLOCK, CHUNK, SMALL, PORTION = 1024, 32 * 1024, 64 * 1024, 16 * 1024
BORDERS = [n + i for n in (16, 256, BLOCK, PORTION, CHUNK, SMALL) for i in (-1, 0, 1)]
STATE = ("step", "exp_avg", "hessian_diag")
Train = Callable[[], list[Any]]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# operations that build the table of scalars, and the profiler's mark of a step
TABLES = {"lift_fresh", "detach", "empty", "_local_scalar_dense", "profiler::_record_function_exit"}
TABLES |= {"profiler::_record_function_enter_new"}


def done_by_the_operator(optimizer: Apollo) -> bool:
    """Do a step; return whether one call of the operator has done all of it."""
    with Watched() as watched:
        optimizer.step()
    others = watched.calls.keys() - TABLES - {"apollo_qn::step_"}
    assert not others, others
    # the first counter of each group, and its rate
    assert watched.calls["_local_scalar_dense"] <= 2 * len(optimizer.param_groups)
    return watched.calls["apollo_qn::step_"] == 1


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_sizes_around_blocks_and_chunks(
    mode: dict[str, Any], members: int, threads: Callable[[int], None]
) -> None:
    threads(members)
    settings = Settings(lr=0.3, warmup_steps=3, **mode)
    params = parameters([(n,) for n in [*BORDERS, 3, 5 * CHUNK + 7, 0, 1]], torch.float64)
    wanted = references(params, settings)
    optimizer = make(params, settings, fused=True)
    follow(optimizer, params, wanted, 4, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("spread", [0.5, 0.0], ids=["spread", "alike"])
def test_sixteen_million_elements(
    spread: float, mode: dict[str, Any], threads: Callable[[int], None]
) -> None:
    """If all elements are equal, all roundings of a running sum have the same sign."""
    if spread == 0 and mode["rebound"] == "belief":
        pytest.skip("|g - m| of like elements is all rounding")
    threads(2)
    n = 1 << 24
    theta = torch.randn(n, generator=generator("theta")) * 2 * spread + 0.1
    optimizers = []
    for dtype, back_end in ((torch.float32, {"fused": True}), (torch.float64, {"foreach": True})):
        p = torch.nn.Parameter(theta.to(dtype))
        optimizers.append(Apollo([p], lr=0.3, warmup_steps=0, **mode, **back_end))
    for t in range(3):
        # a mean that is not 0, so that the sums grow with the number of elements
        g = torch.randn(n, generator=generator("g", t)) * spread + (0.93, 0.7, 1.02)[t]
        for optimizer in optimizers:
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = g.to(p.dtype)
            optimizer.step()
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    state, wanted = optimizers[0].state[p], optimizers[1].state[q]
    pairs = {"theta": (p, q)}
    for name in ("exp_avg", "hessian_diag"):
        pairs[name] = (state[name], wanted[name])
    for name, (got, right) in pairs.items():
        distance = (got.detach().double() - right.detach()).abs().max() / right.detach().abs().max()
        assert distance <= tolerances.SIXTEEN_MILLION, (name, float(distance))


# dtypes of parameter, gradient and state, and the rounding of the parameter
Kind = tuple[torch.dtype, torch.dtype, torch.dtype, Any]
KINDS: list[Kind] = [
    (torch.float32, torch.float32, torch.float32, None),
    (torch.float32, torch.bfloat16, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, torch.float32, "nearest"),
    (torch.bfloat16, torch.float32, torch.float32, "stochastic"),
    (torch.float64, torch.float64, torch.float64, None),
    (torch.float32, torch.float32, torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, "stochastic"),
    (torch.bfloat16, torch.bfloat16, torch.float32, "kahan"),
]
# all modes of the first five kinds, three of the others: these differ in loads and stores only
FEW = [MODES[i] for i in (0, 3, 6)]
OF_KINDS = [(mode, kind) for i, kind in enumerate(KINDS) for mode in (MODES if i < 5 else FEW)]
# fast: each mode once, and the first five kinds
EVERY_KIND = slow_except("mode, kind", OF_KINDS, zip(MODES, itertools.cycle(KINDS[:5])))


def trained(mode: dict[str, Any], kind: Kind, steps: int = 3) -> Train:
    """Train small and large tensors of one kind with the functional form."""
    dtype, grad_dtype, state, rounding = kind

    def train() -> list[Any]:
        sizes = [5 * CHUNK + 7, 3, 300, PORTION + 1, SMALL + 1, *[40] * 30, 2 * SMALL, SMALL]
        params = [normal((n,), "theta", i, dtype=dtype) for i, n in enumerate(sizes)]
        m, B = ([torch.zeros(n, dtype=state) for n in sizes] for _ in range(2))
        lows = [torch.zeros_like(p) for p in params]
        done = [torch.zeros(()) for _ in sizes]
        rates = [torch.zeros((), dtype=torch.float64) for _ in sizes]
        wide = torch.promote_types(dtype, torch.float32)
        thresholds = [torch.ones((), dtype=wide) for _ in sizes]
        for t in range(steps):
            grads = [normal((n,), "g", i, t, dtype=grad_dtype) for i, n in enumerate(sizes)]
            apollo(
                params,
                grads,
                m,
                B,
                done,
                previous_lrs=rates,
                thresholds=thresholds,
                compensations=lows,
                rounding=rounding,
                lr=0.3,
                fused=True,
                **mode,
            )
        return [params, m, B, done, rates, thresholds, lows]

    return train


@EVERY_KIND
def test_the_number_of_threads_does_not_matter(
    mode: dict[str, Any],
    kind: Kind,
    threads: Callable[[int], None],
) -> None:
    train = trained(mode, kind)
    threads(1)
    wanted = train()
    for members in (2, 4):
        threads(members)
        assert same(train(), wanted), members


@EVERY_KIND
def test_large_tensors_follow_the_rule(
    mode: dict[str, Any], kind: Kind, threads: Callable[[int], None]
) -> None:
    """Each step starts from the same state, so that rounding errors do not add up."""
    threads(2)
    dtype, grad_dtype, state, rounding = kind
    n = 3 * CHUNK + 5
    theta, m = normal((n,), "theta", dtype=dtype), normal((n,), "m", dtype=state) * 0.1
    B = normal((n,), "B", dtype=state)
    g = normal((n,), "g", dtype=grad_dtype)
    results = []
    for back_end, wide in (({"fused": True}, None), ({"foreach": False}, torch.float64)):
        p, g_, m_, B_ = (x.to(wide or x.dtype).clone() for x in (theta, g, m, B))
        low = torch.zeros_like(p)
        apollo(
            [p],
            [g_],
            [m_],
            [B_],
            [torch.tensor(7.0)],
            previous_lrs=[torch.tensor(0.2, dtype=torch.float64)],
            thresholds=[torch.tensor(0.4, dtype=torch.promote_types(p.dtype, torch.float32))],
            compensations=[low],
            rounding=rounding,
            lr=0.3,
            **mode,
            **back_end,
        )
        results.append((p.double() + low.double(), m_, B_))
    wide = torch.promote_types(dtype, torch.float32)
    limits: list[float] = [tolerances.LARGE[wide]] * 3
    if dtype is torch.bfloat16:
        limits[0] = tolerances.ROUNDED_PARAMETER * torch.finfo(dtype).eps
    if rounding == "kahan":
        limits[0] = tolerances.COMPENSATED[dtype]
    if state is torch.bfloat16:
        limits[1:] = [x * torch.finfo(state).eps for x in tolerances.STORED_STATE.values()]
    for got, wanted, limit in zip(*results, limits, strict=True):
        distance = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert distance <= limit


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_one_call_for_all_groups_and_no_temporary(mode: dict[str, Any]) -> None:
    """One call of the operator, whatever the number of tensors and groups."""
    params = parameters([(3,), (2, 5), (), (300,), (2, 3, 4, 5)] * 8)
    groups = [{"params": params[i::4], "lr": 0.1 * (i + 1), **mode} for i in range(4)]
    groups[3].update(decoupled_weight_decay=True, weight_decay=0.1, maximize=True)
    optimizer = Apollo(groups)
    run_steps(optimizer, range(2))
    give_gradients(params, 2)
    assert done_by_the_operator(optimizer)


def test_autograd_hears_of_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Apollo([p])
    p.grad = torch.ones(3)
    loss = (p**2).sum()  # keeps p
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors() -> None:
    results = []
    for back_end in ({"fused": True}, {"foreach": True}):
        with torch.inference_mode():
            params = [torch.ones(5), torch.ones(300)]
            optimizer = Apollo(params, warmup_steps=0, lr=0.1, **back_end)
            for _ in range(3):
                for p in params:
                    p.grad = p * 2
                optimizer.step()
        results.append(params)
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_gradients_on_and_off_autograd() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    lists = [[torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())]]
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        apollo([p], *lists, fused=True)


def test_elsewhere_than_on_the_cpu() -> None:
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="no fused back end serves a parameter"):
        Apollo([p], fused=True).step()


def test_two_optimizers_in_two_threads(threads: Callable[[int], None]) -> None:
    threads(2)

    def train(seed: int, results: dict[int, Any]) -> None:
        params = [
            torch.nn.Parameter(normal((n,), seed, n, dtype=torch.float32)) for n in (200_000, 9)
        ]
        optimizer = Apollo(params, warmup_steps=0, lr=0.1)
        for t in range(20):
            for p in params:
                p.grad = normal(p.shape, seed, t, dtype=torch.float32)
            optimizer.step()
        results[seed] = snapshot(optimizer)

    together: dict[int, Any] = {}
    alone: dict[int, Any] = {}
    workers = [threading.Thread(target=train, args=(seed, together)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (1, 2):
        train(seed, alone)
    assert same(together, alone)


FORK = """
import os, sys, warnings
import torch
from torch.utils.data import DataLoader, Dataset
from apollo_qn import Apollo

torch.set_num_threads(2)

def train(steps):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(10_000)) for _ in range(20)]
    optimizer = Apollo(params, fused=True, warmup_steps=0, lr=0.1)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() * 2 + 1
        optimizer.step()
    return float(sum(p.detach().double().sum() for p in params))

class Numbers(Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return train(2)

wanted = train(2)
loader = DataLoader(Numbers(), num_workers=2, multiprocessing_context="fork")
got = [float(x) for x in loader]
assert got == [wanted] * 6, (got, wanted)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as in a worker of DataLoader: OpenMP's threads do not survive a fork
    os._exit(0 if train(2) == wanted else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert train(2) == wanted
print("as before")
"""


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use() -> None:
    assert python(FORK).strip() == "as before"


@pytest.mark.slow
def test_more_threads_than_openmp_gives() -> None:
    code = FORK.split("class Numbers")[0] + "torch.set_num_threads(8); print(train(3))"
    assert (
        len({python(code), python(code, OMP_THREAD_LIMIT="2"), python(code, OMP_DYNAMIC="true")})
        == 1
    )


def test_denormal_numbers_are_zero_only_to_the_kernel() -> None:
    tiny = torch.full((40,), 1e-40)
    p = torch.nn.Parameter(torch.ones(40))
    p.grad = torch.ones(40)
    Apollo([p]).step()
    assert (tiny + tiny).gt(0).all()


def test_a_parameter_without_gradients_decays_to_zero() -> None:
    """With zero gradients m reaches 0; a denormal number would slow down every step."""
    p = torch.nn.Parameter(torch.ones(3000))
    optimizer = Apollo([p], fused=True, warmup_steps=0)
    p.grad = torch.ones(3000)
    optimizer.step()
    p.grad = torch.zeros(3000)
    for _ in range(1000):
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].eq(0).all()
    assert p.isfinite().all()


def test_the_gradient_dies_in_one_tensor_only() -> None:
    for bad, n in itertools.product((float("nan"), float("inf")), (40, 2 * SMALL)):
        params = parameters([(n,), (n,)], torch.float32)
        optimizer = Apollo(params, rebound="belief")
        give_gradients(params, 0)
        assert params[0].grad is not None
        params[0].grad[n // 2] = bad
        optimizer.step()
        give_gradients(params, 1)
        optimizer.step()
        assert not params[0].isfinite().all()
        assert params[1].isfinite().all()
