"""The Triton kernel against the float64 reference, interpreted where there is no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_qn import Apollo, ApolloWarning
from apollo_qn.backends import cpu, triton
from apollo_qn.backends.base import Batch
from apollo_qn.hyperparameters import StepScalars
from tests import tolerances
from tests.backends.interpreter import BLOCK, RUN, RUNS, SetSizes
from tests.backends.test_shards import MODES as MODES_OF_SHARDS
from tests.backends.test_shards import check_shards
from tests.helpers import (
    DEVICE,
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
from tests.modes import MODES, slow_except
from tests.numpy_reference import ReferenceApollo, Settings
from tests.test_algorithm import EXTREMES
from tests.test_algorithm import follow as follow_extremes

# one element, around a block and a run, several runs, and more runs than a tensor may have
SHAPES: list[tuple[int, ...]] = [(), (0,), (63,), (2, 3, 4, 5), (RUN + 1,), (11, 30), (2, 301)]
FUSED = {"fused": True}


def tables(optimizer: Apollo) -> Any:
    """Return the tables of the last launch."""
    assert optimizer._backends is not None
    ((_, found),) = optimizer._backends.triton._tables.values()
    return found


def left_over(optimizer: Apollo) -> list[Tensor]:
    """Return the parameters with a gradient that the kernel hands back."""
    found = []
    for group in optimizer.param_groups:
        lists, h = optimizer._tensor_lists(group, group["params"], 0)
        batch = Batch(lists, h, StepScalars.at(1.0, h, 0.0))
        (taken,) = triton.Triton().takes([batch])
        found += [p for p, on in zip(lists.params, taken, strict=True) if not on]
    return found


def check_all_taken(optimizer: Apollo) -> None:
    """Check that the kernel takes every tensor that has elements."""
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
    """Results are bit-identical for any windows and any other tensors."""
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
    assert launches == 1 + 5  # five tensors have more than one run, and each is a window
    assert same(one, many)
    assert same(one[4:5], trained(1 << 20, slice(4, 5))[0])


def test_schedule(interpreted: SetSizes) -> None:
    """Every run is measured and then updated, once, in launches that follow each other."""
    from apollo_qn.backends.triton import kernel, launch_schedule

    n = [5, 4 * RUN, 3 * RUN + 1, 100 * RUN, 128, 129]
    interpreted(cache=int(20 * RUN * 12 / launch_schedule.WINDOW))
    types = [(torch.float32,) * 3] * 6
    tables = launch_schedule.Tables(torch.device("cpu"), [[0] * 6] * 5, n, types, [-1] * 6, [0] * 6)
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
    # 4 + 4 runs share a window; a tensor larger than a window is alone
    assert len(one.steps) == 4


def test_offsets_beyond_32_bits(interpreted: SetSizes) -> None:
    from apollo_qn.backends.triton import kernel, launch_schedule

    interpreted(block=1024, run=4096, runs=512)
    n = 2**33 + 5
    types = [(torch.bfloat16, torch.bfloat16, torch.float32)]
    tables = launch_schedule.Tables(torch.device("cpu"), [[0]] * 5, [n], types, [-1], [0])
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
    """Only tensors that the kernel cannot take go to another back end."""
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
    """Views into a flat buffer may be unaligned, so that 16 bytes must not be read at once."""
    flat = normal((1000,), "flat", dtype=torch.float32)
    params = [torch.nn.Parameter(flat[i : i + 300]) for i in (1, 350)]
    wanted = references(params, settings := Settings(lr=0.3))
    optimizer = make(params, settings, **FUSED)
    follow(optimizer, params, wanted, 2, torch.float32)
    assert tables(optimizer)._aligned == [False] * 2
    # how a tensor is read must not depend on others, because its sums would round differently
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
    """Train longer than warmup, schedule and the decay of beta^t take."""
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


def test_the_kernel_is_the_default_where_it_compiles(
    interpreted: SetSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apollo_qn.backends.triton import launch_schedule

    def trained() -> Apollo:
        optimizer = make(parameters([(300,), (5,)]), Settings(lr=0.3))
        run_steps(optimizer, range(2))
        return optimizer

    triton._compiler_errors.clear()
    check_all_taken(trained())

    def fail(device: torch.device) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(launch_schedule, "try_compiler", fail)
    triton._compiler_errors.clear()
    with pytest.warns(ApolloWarning, match="no C compiler.*foreach back end serves"):
        optimizer = trained()
    assert optimizer._backends is not None
    assert not optimizer._backends.triton._tables
    triton._compiler_errors.clear()


@pytest.mark.parametrize("why", ["another kind of GPU", "no compiler"])
def test_a_capture_uses_the_back_end_of_the_step_before(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a CUDA graph captures, nothing is compiled, but earlier answers hold."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton, "why_not", lambda: None)
    device = torch.device("cuda", 77)
    if why == "no compiler":
        monkeypatch.setattr(triton, "_why_not_tried", lambda _: None)
        monkeypatch.setattr(triton, "_compiler_errors", {})
        assert triton.why_not_default(device) is None
        triton._compiler_errors[device] = why
    else:
        monkeypatch.setattr(triton, "_why_not_tried", lambda _: why)
    assert triton.why_not_default(device) == why


def test_a_schedule_that_could_not_be_uploaded_is_not_kept(
    interpreted: SetSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step makes it again; otherwise programs would read rows of the old schedule."""
    from apollo_qn.backends.triton import launch_schedule

    results = []
    for fails in (False, True):
        params = parameters([(300,), (40,)])
        optimizer = make(params, Settings(lr=0.3), **FUSED)
        run_steps(optimizer, range(2))
        give_gradients(params, 2)
        # another alignment needs another schedule
        params[0].grad = torch.cat([torch.zeros(1).to(params[0]), params[0].grad])[1:]  # type: ignore[list-item]
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(launch_schedule, "_on_device", lambda table, device: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
        optimizer.step()
        results.append([p.detach().clone() for p in params])
    assert same(*results)


def test_a_gpus_tensors_are_not_the_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would read device addresses in host memory."""
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
