"""Tests that need a GPU: graphs, streams, devices, waiting, memory, 2^31 elements."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apollo_qn import Apollo
from tests import tolerances
from tests.helpers import (
    BACK_ENDS,
    DEVICE,
    NEEDS_FUSED,
    NEEDS_GPU,
    Comparison,
    as_numpy,
    give_gradients,
    gradient,
    make,
    parameters,
    run_steps,
    same,
    snapshot,
)
from tests.numpy_reference import Settings

pytestmark = NEEDS_GPU

MODES: list[dict[str, Any]] = [
    {"rebound": rebound, "weight_decay": wd, "decoupled_weight_decay": decoupled}
    for rebound, (wd, decoupled) in itertools.product(
        ("constant", "belief"), [(0.0, False), (0.05, False), (0.05, True)]
    )
]
LARGE = [(9_000_001,), (3, 5), (2048, 2048), (300,), (4_000_000,), (70_000,)]  # several windows


@pytest.fixture(autouse=True)
def current_device() -> Iterator[None]:
    with torch.cuda.device(DEVICE):
        yield
        torch.cuda.synchronize()


def settled(**others: Any) -> Settings:
    return Settings(lr=0.3, warmup_steps=3, **others)


def fixed_gradients(params: list[torch.nn.Parameter]) -> None:
    """Return gradients that keep their memory, as a CUDA graph needs."""
    for p in params:
        p.grad = torch.zeros_like(p)


def feed(params: list[torch.nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        assert p.grad is not None
        p.grad.copy_(gradient(p.shape, p.dtype, i, t))


def captured(optimizer: Apollo) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


# CUDA graphs


@BACK_ENDS
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_replays_are_eager_steps(mode: dict[str, Any], back_end: dict[str, Any]) -> None:
    """Replays, later eager steps and a second capture are bit-identical to eager steps."""
    mine, theirs = parameters(), parameters()
    graphed = make(mine, settled(**mode), capturable=True, **back_end)
    eager = make(theirs, settled(**mode), capturable=True, **back_end)
    steps = itertools.count()

    def both(step: Any) -> None:
        t = next(steps)
        feed(mine, t)
        feed(theirs, t)
        step()
        eager.step()
        assert same(snapshot(graphed), snapshot(eager)), t

    fixed_gradients(mine)
    fixed_gradients(theirs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(graphed.step)
        both(graphed.step)
    torch.cuda.current_stream().wait_stream(side)

    before = snapshot(graphed)
    graph = captured(graphed)
    assert same(before, snapshot(graphed))  # a capture does nothing
    for _ in range(4):
        both(graph.replay)
    both(graphed.step)
    both(graph.replay)

    kept = [p.grad for p in mine]  # keep them, so that new gradients have other addresses
    fixed_gradients(mine)
    both(graphed.step)
    other = captured(graphed)
    for _ in range(3):
        both(other.replay)
    both(graphed.step)
    # the first graph still reads the gradients that it has seen
    for p, first in zip(mine, kept, strict=True):
        p.grad = first
    both(graph.replay)


@NEEDS_FUSED
def test_a_graph_outlives_its_optimizer() -> None:
    """The memory that a replay reads outlives the plan of its step."""
    mine, theirs = parameters(), parameters()
    graphed = make(mine, settled(), capturable=True, fused=True)
    eager = make(theirs, settled(), capturable=True, fused=True)
    for params, optimizer in ((mine, graphed), (theirs, eager)):
        fixed_gradients(params)
        feed(params, 0)
        optimizer.step()
    graph = captured(graphed)
    state = {p: dict(graphed.state[p]) for p in mine}
    del graphed
    gc.collect()
    rubbish = [torch.full((1 << 16,), -1, device=DEVICE) for _ in range(64)]
    for t in range(1, 4):
        feed(mine, t)
        feed(theirs, t)
        graph.replay()
        eager.step()
    del rubbish
    for p, q in zip(mine, theirs, strict=True):
        assert same(p.data, q.data)
        assert same(state[p], dict(eager.state[q]))


# streams, devices, waiting


@BACK_ENDS
def test_a_graph_needs_capturable(back_end: dict[str, Any]) -> None:
    """Without capturable every replay would repeat the rates of one step."""
    params = parameters()
    optimizer = make(params, settled(), **back_end)
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="capturable must be True"):
        captured(optimizer)
    assert same(before, snapshot(optimizer))


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_steps_on_several_streams(capturable: bool, back_end: dict[str, Any]) -> None:
    """Each step waits for the one before, on another stream."""
    mine, theirs = parameters(), parameters()
    moving = make(mine, settled(), capturable=capturable, **back_end)
    staying = make(theirs, settled(), capturable=capturable, **back_end)
    streams = [torch.cuda.Stream() for _ in range(3)]
    run_steps(staying, range(7))
    for t in range(7):
        stream = streams[t % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run_steps(moving, range(t, t + 1))
        torch.cuda.current_stream().wait_stream(stream)
    assert same(snapshot(moving), snapshot(staying))


@BACK_ENDS
def test_optimizers_on_two_streams_at_once(back_end: dict[str, Any]) -> None:
    both = [make(parameters(LARGE), settled(), **back_end) for _ in range(2)]
    alone = make(parameters(LARGE), settled(), **back_end)
    streams = [torch.cuda.Stream() for _ in both]
    for optimizer in (*both, alone):
        fixed_gradients(optimizer.param_groups[0]["params"])
    for t in range(3):
        for optimizer in (*both, alone):
            feed(optimizer.param_groups[0]["params"], t)
        for optimizer, stream in zip(both, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimizer.step()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        alone.step()
    for optimizer in both:
        assert same(snapshot(optimizer), snapshot(alone))


@NEEDS_FUSED
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_two_devices(capturable: bool) -> None:
    """Results equal those on one device, whichever device is current."""
    together, apart = parameters(), parameters()
    others = [torch.device("cuda", i) for i in range(2)]
    apart = [
        torch.nn.Parameter(p.detach().to(others[i % 2], memory_format=torch.preserve_format))
        for i, p in enumerate(apart)
    ]
    one = make(together, settled(rebound="belief"), capturable=capturable, fused=True)
    two = make(apart, settled(rebound="belief"), capturable=capturable, fused=True)
    for t in range(5):
        give_gradients(together, t)
        for p, q in zip(together, apart, strict=True):
            assert p.grad is not None
            q.grad = p.grad.to(q.device, memory_format=torch.preserve_format)
        one.step()
        with torch.cuda.device(t % 2):
            two.step()
    for p, q in zip(together, apart, strict=True):
        assert same(p.detach().cpu(), q.detach().cpu())
        for name, value in one.state[p].items():
            assert same(value.cpu(), two.state[q][name].cpu()), name


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_step_waits_for_nothing(
    mode: dict[str, Any], capturable: bool, back_end: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = make(params, settled(**mode), capturable=capturable, **back_end)
    run_steps(optimizer, range(2))
    give_gradients(params, 2)  # new addresses
    with no_waiting():
        optimizer.step()
        optimizer.step()


@BACK_ENDS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_groups_of_different_rates_wait_for_nothing(
    capturable: bool, back_end: dict[str, Any]
) -> None:
    params = parameters()
    groups = [{"params": params[i::3], "lr": 0.1 * (i + 1)} for i in range(3)]
    optimizer = Apollo(groups, warmup_steps=3, capturable=capturable, **back_end)
    run_steps(optimizer, range(2))
    give_gradients(params, 2)
    with no_waiting():
        optimizer.step()


def test_waiting_is_noticed() -> None:
    """Check that the test above can fail."""
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=DEVICE).item()


# results and memory


@NEEDS_FUSED
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_same_bits_whatever_else_runs(
    mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are bit-identical over runs, beside other work, and for any windows."""
    from apollo_qn.backends.triton import launch_schedule

    results = []
    for busy, window in ((False, 0.6), (False, 0.6), (True, 0.6), (False, 0.05), (False, 1e9)):
        monkeypatch.setattr(launch_schedule, "WINDOW", window)
        params = parameters(LARGE)
        optimizer = make(params, settled(**mode), fused=True)
        side = torch.cuda.Stream()
        for t in range(3):
            give_gradients(params, t)
            if busy:
                with torch.cuda.stream(side):
                    x = torch.ones(2048, 2048, device=DEVICE)
                    for _ in range(20):
                        x = x @ x / 2048
            optimizer.step()
        torch.cuda.synchronize()
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert same(results[0], other)


@NEEDS_FUSED
@pytest.mark.parametrize("spread", [0.5, 0.0], ids=["spread", "alike"])
def test_sixteen_million_elements(spread: float) -> None:
    """If all elements are equal, all roundings of a running sum have the same sign."""
    n = 1 << 24
    draw = torch.Generator(DEVICE).manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.randn(n, generator=draw, device=DEVICE)

    theta = drawn() * 2 * spread + 0.1
    optimizers = []
    for dtype, back_end in ((torch.float32, {"fused": True}), (torch.float64, {"foreach": True})):
        p = torch.nn.Parameter(theta.to(dtype))
        optimizers.append(Apollo([p], lr=0.3, warmup_steps=0, **back_end))
    for t in range(3):
        g = drawn() * spread + (0.93, 0.7, 1.02)[t]
        for optimizer in optimizers:
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = g.to(p.dtype)
            optimizer.step()
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    state, wanted = optimizers[0].state[p], optimizers[1].state[q]
    names = ("exp_avg", "hessian_diag")
    for got, right in [(p, q), *((state[name], wanted[name]) for name in names)]:
        distance = (got.detach().double() - right.detach()).abs().max() / right.detach().abs().max()
        assert distance <= tolerances.SIXTEEN_MILLION


@NEEDS_FUSED
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_a_step_allocates_tables_only(capturable: bool) -> None:
    params = parameters([(1 << 24,), (3,), (4096, 1024)])
    optimizer = make(params, settled(rebound="belief"), capturable=capturable, fused=True)
    run_steps(optimizer, range(2))
    for renewed in (False, True):
        if renewed:  # other gradients need another plan
            params[1].grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 1 << 20


@NEEDS_FUSED
def test_more_than_two_to_the_31_elements() -> None:
    """The foreach back end works in blocks of 2^24 elements, so 2^31 is no limit for it."""
    n = (1 << 31) + 5
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 27 * n:
        pytest.skip(
            f"needs {27 * n / 1e9:.0f} GB of the device's memory, {free / 1e9:.0f} are free"
        )
    draw = torch.Generator(DEVICE).manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.randn(n, generator=draw, device=DEVICE, dtype=torch.bfloat16)

    start = drawn()
    optimizers = []
    for back_end in ({"fused": True}, {"foreach": True}):
        p = torch.nn.Parameter(start.clone())
        optimizers.append(Apollo([p], lr=0.3, warmup_steps=0, **back_end))
    del start
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    for t in range(2):
        p.grad = q.grad = drawn()
        for optimizer in optimizers:
            optimizer.step()
        p.grad = q.grad = None
        got, wanted = optimizers[0].state[p], optimizers[1].state[q]
        pairs = [
            (p.detach(), q.detach(), tolerances.ROUNDED_PARAMETER * torch.finfo(p.dtype).eps),
            (got["exp_avg"], wanted["exp_avg"], tolerances.TRAJECTORY[torch.float32]),
            (got["hessian_diag"], wanted["hessian_diag"], tolerances.TRAJECTORY_B[torch.float32]),
        ]
        for mine, theirs, limit in pairs:
            largest = off = 0.0
            # in parts, because memory has no room for the full difference
            for a, b in zip(mine.split(1 << 27), theirs.split(1 << 27), strict=True):
                off = max(off, float((a.float() - b.float()).abs().max()))
                largest = max(largest, float(b.abs().max()))
            assert (0 if t else -1) < largest < float("inf")  # B is 0 after the first step
            assert off <= limit * largest
            # some elements may differ by two roundings; the next step begins from equal ones
            mine.copy_(theirs)


# overhead on the host


@NEEDS_FUSED
def test_fused_is_the_default() -> None:
    """Without fused and foreach, results are bit-identical to fused=True."""
    results = []
    for back_end in ({}, {"fused": True}):
        optimizer = make(parameters(), settled(), **back_end)
        run_steps(optimizer, range(4))
        results.append(snapshot(optimizer)[1:])
    assert same(*results)


@NEEDS_FUSED
def test_fused_follows_foreach() -> None:
    mine, theirs = parameters(LARGE), parameters(LARGE)
    optimizers = [
        make(params, settled(), **back_end)
        for params, back_end in ((mine, {"fused": True}), (theirs, {"foreach": True}))
    ]
    compare = Comparison()
    for t in range(4):
        for optimizer in optimizers:
            run_steps(optimizer, range(t, t + 1))
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            compare.check(i, p, as_numpy(q), tolerances.TRAJECTORY[torch.float32])
