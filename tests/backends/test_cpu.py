"""The fused CPU back end: sizes, threads, memory that it must not touch, processes that fork."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo, ApolloW, apollo
from tests import tolerances
from tests.backends.test_backends import Watched
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


# what builds the table of scalars, and the profiler's mark of a step
TABLES = {"lift_fresh", "detach", "empty", "_local_scalar_dense", "profiler::_record_function_exit"}
TABLES |= {"profiler::_record_function_enter_new"}


def done_by_the_operator(optimizer: Apollo) -> bool:
    """Do a step; return whether one call of the operator has done all of it."""
    with Watched() as watched:
        optimizer.step()
    others = watched.calls.keys() - TABLES - {"apollo_qn::step_"}
    assert not others, others
    # of each group the first counter and its rate
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


# of parameter, gradient and state, and how the parameter is rounded
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
# every mode of the first five; of the others, which differ only in how they load and store, three
FEW = [MODES[i] for i in (0, 3, 6)]
OF_KINDS = [(mode, kind) for i, kind in enumerate(KINDS) for mode in (MODES if i < 5 else FEW)]
# the fast tests have each mode once and the first five kinds
EVERY_KIND = slow_except("mode, kind", OF_KINDS, zip(MODES, itertools.cycle(KINDS[:5])))


def trained(mode: dict[str, Any], kind: Kind, steps: int = 3) -> Train:
    """A functional run over small and large tensors of one kind."""
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
    """Each step from the same state, so that a rounded parameter does not add up."""
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


def test_only_what_the_kernel_cannot_take_falls_back() -> None:
    """Types, layouts and aliases that others serve, beside tensors that the kernel takes."""
    shapes = [(4, 6)] * 9
    settings: dict[str, Any] = {"lr": 0.3, "warmup_steps": 0}

    def build() -> list[torch.nn.Parameter]:
        params = parameters(shapes, torch.float32)
        dtypes = [torch.float32, torch.float16, torch.complex64]
        for i, dtype in enumerate(dtypes):
            params[i] = torch.nn.Parameter(params[i].detach().to(dtype))
        whole = params[3].detach().repeat(2, 2)
        params[3] = torch.nn.Parameter(whole[::2, ::2])  # not dense
        line = torch.arange(40.0) / 40
        params[4], params[5] = (torch.nn.Parameter(line[i : i + 24].view(4, 6)) for i in (0, 16))
        return params

    def gradients(params: list[torch.nn.Parameter], t: int) -> None:
        give_gradients(params, t)
        assert params[6].grad is not None
        params[6].grad = params[6].grad.t().contiguous().t()
        params[7].grad = normal((4, 1), t, dtype=torch.float32).expand(4, 6)
        params[8].grad = (
            torch.view_as_complex(normal((24, 2), t, dtype=torch.float32)).conj().imag.view(4, 6)
        )

    results = []
    for back_end in ({"fused": True}, {"foreach": True}):
        params = build()
        optimizer = Apollo(params, **settings, **back_end)
        for t in range(4):
            gradients(params, t)
            optimizer.step()
        results.append([p.detach() for p in params])
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        ulp = torch.finfo(got.dtype).eps
        assert (got - wanted).abs().max() <= 20 * ulp * wanted.abs().max(), i


def test_views_of_one_storage_that_do_not_overlap_are_taken() -> None:
    line = torch.randn(40, generator=generator("line"))
    params = [torch.nn.Parameter(line[i : i + 10]) for i in (0, 10, 20, 30)]
    optimizer = Apollo(params)
    run_steps(optimizer, range(2))
    give_gradients(params, 2)
    assert done_by_the_operator(optimizer)


@pytest.mark.parametrize("shift", [0, 3])
def test_a_gradient_that_lies_in_a_parameter(shift: int) -> None:
    """g of the first tensor is part of theta of the second: any order is right, torn reads are
    not."""
    whole = torch.randn(200_000, generator=generator("whole"))

    def train(**back_end: Any) -> Tensor:
        line = whole.clone()
        p = torch.nn.Parameter(line[: 100_000 - shift])
        optimizer = Apollo([p], warmup_steps=0, lr=0.1, **back_end)
        p.grad = line[shift:100_000]  # its own memory, shifted
        for _ in range(3):
            optimizer.step()
        return line

    assert torch.allclose(train(fused=True), train(foreach=False), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_another_parameter() -> None:
    """The first reads what the second writes: in the order of the rule."""

    def train(**back_end: Any) -> list[Tensor]:
        a, b, c = (torch.nn.Parameter(torch.full((40,), float(i))) for i in range(3))
        a.grad, b.grad, c.grad = b.data, torch.full((40,), 0.5), torch.full((40,), -2.0)
        optimizer = Apollo([a, b, c], lr=1.0, warmup_steps=0, **back_end)
        for _ in range(3):
            optimizer.step()
        return [a.detach(), b.detach(), c.detach()]

    fused, rule = train(fused=True), train(foreach=False, fused=False)
    torch.testing.assert_close(fused, rule)


@pytest.mark.parametrize("state", [2, 3], ids=["exp_avg", "hessian_diag"])
def test_state_that_is_the_parameter(state: int) -> None:
    found = []
    for back_end in ({"fused": True}, {"foreach": False, "fused": False}):
        columns = [[normal((100,), i, dtype=torch.float32)] for i in range(4)]
        columns[state] = columns[0]
        apollo(*columns, [torch.tensor(3.0)], lr=0.1, **back_end)  # type: ignore[arg-type]
        found.append(columns[0][0])
    torch.testing.assert_close(*found)


def test_tuples_for_lists() -> None:
    found = []
    for kind in (list, tuple):
        p, g = torch.linspace(-1, 1, 9), torch.linspace(2, -1, 9)
        columns = [kind([x]) for x in (p, g, torch.zeros(9), torch.zeros(9), torch.zeros(()))]
        apollo(*columns, lr=0.1, fused=True)  # type: ignore[arg-type]
        found.append(p)
    assert torch.equal(*found)


def test_gradients_that_come_and_go() -> None:
    """Another gradient is missing in each step: counters differ from tensor to tensor."""
    optimizers = []
    for back_end in ({"fused": True}, {"foreach": False, "fused": False}):
        params = [torch.nn.Parameter(normal((n,), n, dtype=torch.float32)) for n in (5, 70, 9)]
        optimizers.append(ApolloW(params, warmup_steps=5, weight_decay=0.1, lr=0.1, **back_end))
    for t in range(12):
        for optimizer in optimizers:
            params = optimizer.param_groups[0]["params"]
            for i, p in enumerate(params):
                g = normal(tuple(p.shape), ("g", t, i), dtype=torch.float32)
                p.grad = None if i == t % 3 else g
            optimizer.step()
    for one, other in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        torch.testing.assert_close(one, other)


UNLIKE = {
    "steps": ("step", torch.tensor(1.0)),
    "type": ("step", torch.tensor(3.0, dtype=torch.float64)),
    "rate": ("previous_lr", torch.tensor(0.05, dtype=torch.float64)),
    "type of the rate": ("previous_lr", torch.tensor(0.08)),
}


@pytest.mark.parametrize("case", UNLIKE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_counter_unlike_the_others(case: str, place: int) -> None:
    name, value = UNLIKE[case]

    def train(**back_end: Any) -> list[Any]:
        params = parameters([(5,), (70,), (9,)], torch.float64)
        optimizer = ApolloW(params, lr=0.1, warmup_steps=9, weight_decay=0.1, **back_end)
        run_steps(optimizer, range(3))
        optimizer.state[params[place]][name] = value.clone()
        run_steps(optimizer, range(3, 6))
        states = [optimizer.state[p] for p in params]
        steps = [float(state["step"]) for state in states]
        return [*(p.detach() for p in params), steps, [float(s["previous_lr"]) for s in states]]

    *fused, steps, rates = train(fused=True)
    *rule, wanted, wanted_rates = train(foreach=False, fused=False)
    torch.testing.assert_close(fused, rule)
    assert steps == wanted == [4.0 if case == "steps" and i == place else 6.0 for i in range(3)]
    assert rates == pytest.approx(wanted_rates)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "wrong",
    [torch.tensor(float("nan")), torch.tensor(3.0, device="meta"), torch.full((2,), 3.0)],
    ids=["no number", "elsewhere", "two"],
)
def test_a_counter_that_no_back_end_takes(wrong: Tensor, place: int) -> None:
    params = parameters([(5,), (70,), (9,)], torch.float32)
    optimizer = Apollo(params, fused=True)
    run_steps(optimizer, range(3))
    optimizer.state[params[place]]["step"] = wrong.clone()
    give_gradients(params, 3)
    columns = [params, *([optimizer.state[p][name] for p in params] for name in STATE)]
    before = [x.detach().clone() for column in columns for x in column]
    with pytest.raises(RuntimeError):
        optimizer.step()
    for x, y in zip((x for column in columns for x in column), before, strict=True):
        assert x.is_meta or torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))


def test_shared_gradients_and_steps() -> None:
    """Two parameters may share a gradient; a shared step counts twice, as with foreach."""
    params = [normal((300,), i, dtype=torch.float32) for i in range(2)]
    g = normal((300,), "g", dtype=torch.float32)

    def train(**back_end: Any) -> list[Any]:
        ps = [p.clone() for p in params]
        m, B = ([torch.zeros(300) for _ in ps] for _ in range(2))
        step = torch.zeros(())
        for _ in range(3):
            apollo(ps, [g, g], m, B, [step, step], lr=0.3, **back_end)
        return [*ps, *m, step]

    for got, wanted in zip(train(fused=True), train(foreach=True), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_tensors_may_change_between_steps() -> None:
    """New memory, new state, other gradients: found out at the next step."""

    def train(**back_end: Any) -> list[Any]:
        params = parameters([(3, 4), (300,), (2, 3, 4, 5), (70,)], torch.float64)
        optimizer = ApolloW(params, lr=0.2, warmup_steps=0, weight_decay=0.05, **back_end)
        run_steps(optimizer, range(2))
        with torch.no_grad():
            params[0].data = params[0].detach().clone().t().contiguous().t()
            params[2].data = params[2].detach().contiguous()
        run_steps(optimizer, range(2, 4))
        state = optimizer.state[params[1]]
        state["exp_avg"] = state["exp_avg"].clone().mul_(0.5)
        state["hessian_diag"].set_(torch.full((300,), 0.25, dtype=torch.float64))
        run_steps(optimizer, range(4, 6))
        give_gradients(params, 6)
        params[3].grad = None
        optimizer.step()
        optimizer.add_param_group({"params": parameters([(9,)], torch.float64), "lr": 0.1})
        run_steps(optimizer, range(7, 9))
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    for got, wanted in zip(train(fused=True), train(foreach=False), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_shrank_in_place_is_not_read_beyond_its_end() -> None:
    params = parameters([(1000,)], torch.float32)
    optimizer = Apollo(params)
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    assert params[0].grad is not None
    params[0].grad.resize_(3)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert same(before, snapshot(optimizer))


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
    with pytest.raises(RuntimeError, match="no fused back end serves the parameter"):
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


def _new_memory(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    p.data = p.detach().clone()


def _share(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    for x in (p, *optimizer.state[p].values()):
        x.share_memory_()


def _other_layout(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    if p.dim() == 2:
        p.data = p.detach().t().contiguous().t()


def _new_state(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    for name, x in optimizer.state[p].items():
        optimizer.state[p][name] = x.clone()


def _state_set(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    for x in optimizer.state[p].values():
        x.set_(x.clone())


def _swap(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))


def _no_gradient(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    p.grad = None


def _strided_gradient(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    if p.grad is not None and p.dim() == 2:
        p.grad = p.grad.t().contiguous().t()


def _reload(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _other_rate(optimizer: Apollo, p: torch.nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] *= 0.9


CHANGES = [
    _new_memory,
    _share,
    _other_layout,
    _new_state,
    _state_set,
    _swap,
    _no_gradient,
    _strided_gradient,
    _reload,
    _other_rate,
]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_changes_between_steps(seed: int) -> None:
    """Memory, layout, state and gradients change at random; the rule's numbers come out."""
    results = []
    for back_end in ({"fused": True}, {"foreach": False}):
        chance = random.Random(seed)
        params = parameters([(3, 4), (300,), (7, 9), (), (70,)], torch.float64)
        groups = [{"params": params[:3]}, {"params": params[3:], "rebound": "belief"}]
        optimizer = ApolloW(groups, lr=0.2, warmup_steps=4, weight_decay=0.05, **back_end)
        run_steps(optimizer, range(1))
        for t in range(1, 15):
            give_gradients(params, t)
            for _ in range(chance.randrange(3)):
                chance.choice(CHANGES)(optimizer, chance.choice(params))
            optimizer.step()
        results.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
