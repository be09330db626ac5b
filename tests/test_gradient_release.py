"""Steps in the backward pass are bit-identical to ordinary ones."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from apollo_qn import Apollo, GradientRelease
from apollo_qn.diagnostics import Recorder
from tests.helpers import BACK_ENDS, normal, same, snapshot

MODES: list[dict[str, Any]] = [
    {"rebound": rebound, "weight_decay": wd, "decoupled_weight_decay": decoupled, **others}
    for rebound, (wd, decoupled), others in itertools.product(
        ("constant", "belief"),
        [(0.0, False), (0.05, False), (0.05, True)],
        [{"maximize": False}, {"maximize": True, "capturable": True}],
    )
]


class Net(nn.Module):
    """Some weights are used twice, some only in some steps, and some have unusual layouts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tied = nn.Parameter(normal((20, 8), "tied"))
        self.branches = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.filters = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.large = nn.Linear(8, 900)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.never = nn.Parameter(torch.ones(3))
        for i, p in enumerate(self.parameters()):
            if p is not self.scale and p is not self.never:
                p.data = normal(p.shape, "net", i).float() / 4
        self.filters.to(memory_format=torch.channels_last)
        self.to(dtype)

    def forward(self, words: Tensor, t: int) -> Tensor:
        h = functional.embedding(words, self.tied)
        h = h + self.branches[t % 2](h)
        images = h.reshape(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        h = h + self.filters(images).sum((1, 2, 3)).reshape(*h.shape[:2], -1).mean(-1, True)
        h = self.norm(h) * self.scale + self.large(h).mean(-1, keepdim=True)
        return functional.linear(h, self.tied)


def loss_of(net: nn.Module, t: int, micro: int = 0) -> Tensor:
    words = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(100 * t + micro))
    result: Tensor = net(words, t).float()
    return functional.cross_entropy(result.flatten(0, 1), words.roll(1, 1).flatten())


def groups_of(net: Net) -> list[dict[str, Any]]:
    params = list(net.parameters())
    return [
        {"params": params[:3]},
        {"params": params[3:6], "lr": 0.02, "warmup_steps": 0, "beta": 0.5},
        {"params": params[6:], "weight_decay": 0.0},
    ]


def make(net: Net, **settings: Any) -> Apollo:
    return Apollo(groups_of(net), lr=0.05, **{"warmup_steps": 3, "seed": 0, **settings})


def pair(dtype: torch.dtype = torch.float32, **settings: Any) -> Iterator[tuple[Net, Apollo]]:
    """Return two equal models with their optimizers."""
    for _ in range(2):
        net = Net(dtype)
        yield net, make(net, **settings)


def step(net: nn.Module, optimizer: Apollo, t: int) -> None:
    optimizer.zero_grad()
    loss_of(net, t).backward()
    optimizer.step()


def assert_same_training(
    one: tuple[Net, Apollo], other: tuple[Net, Apollo], steps: range = range(6)
) -> None:
    for t in steps:
        step(*one, t)
        step(*other, t)
        assert same(snapshot(one[1]), snapshot(other[1])), t


# bit-identical results


@BACK_ENDS
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_bit_by_bit_the_ordinary_step(mode: dict[str, Any], back_end: dict[str, Any]) -> None:
    ordinary, released = pair(**back_end, **mode)
    GradientRelease(released[1])
    assert_same_training(ordinary, released)
    steps = {int(state["step"]) for state in released[1].state.values()}
    assert steps == {3, 6}  # parameters of the branches have fewer steps than the others
    assert released[0].never not in released[1].state


@BACK_ENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype: torch.dtype, back_end: dict[str, Any]) -> None:
    ordinary, released = pair(dtype, **back_end, weight_decay=0.01)
    GradientRelease(released[1])
    assert_same_training(ordinary, released)


@pytest.mark.parametrize("release", [False, True])
def test_gradients_are_freed_one_after_the_other(release: bool) -> None:
    """No other gradient exists while a parameter is updated."""
    net, optimizer = next(pair())
    earlier: list[StorageWeakRef] = []
    seen = []

    def look(p: Tensor) -> None:
        seen.append(sum(not storage.expired() for storage in earlier))
        assert p.grad is not None
        earlier.append(StorageWeakRef(p.grad.untyped_storage()))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(look)
    if release:
        GradientRelease(optimizer)
    loss_of(net, 0).backward()
    assert seen == ([0] * 10 if release else list(range(10)))
    optimizer.step()
    assert sum(p.grad is not None for p in net.parameters()) == (0 if release else 10)


def test_update_happens_in_the_backward_pass() -> None:
    net, optimizer = next(pair(warmup_steps=0))
    GradientRelease(optimizer)
    before = net.tied.detach().clone()
    loss_of(net, 0).backward()
    assert not torch.equal(before, net.tied)
    after = net.tied.detach().clone()
    optimizer.step()
    assert torch.equal(after, net.tied)
    assert float(optimizer.state[net.tied]["step"]) == 1


# the loop stays as it is


def test_schedulers_see_the_steps() -> None:
    ordinary, released = pair()
    GradientRelease(released[1])
    schedules = [
        lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.StepLR(optimizer, 2, gamma=0.3),
                lr_scheduler.CosineAnnealingLR(optimizer, 4),
            ],
            [3],
        )
        for _, optimizer in (ordinary, released)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # SequentialLR of torch 2.8 calls its schedulers in a deprecated way
        warnings.filterwarnings("ignore", "The epoch parameter")
        for t in range(6):
            assert_same_training(ordinary, released, range(t, t + 1))
            for schedule in schedules:
                schedule.step()


def test_hooks_and_closures() -> None:
    ordinary, released = pair()
    GradientRelease(released[1])
    calls: list[str] = []
    released[1].register_step_pre_hook(lambda *_: calls.append("before"))
    released[1].register_step_post_hook(lambda *_: calls.append("after"))
    for t in range(4):
        losses = []
        for net, optimizer in (ordinary, released):

            def closure(net: Net = net, optimizer: Apollo = optimizer, t: int = t) -> Any:
                optimizer.zero_grad()
                loss = loss_of(net, t)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        assert torch.equal(*losses)
        assert same(snapshot(ordinary[1]), snapshot(released[1]))
    assert calls == ["before", "after"] * 4


def test_a_backward_pass_before_the_closure_is_the_first_one() -> None:
    """Trainers accumulate gradients and pass the last backward pass as a closure."""
    _, (net, optimizer) = pair()
    GradientRelease(optimizer)
    loss_of(net, 0).backward()

    def closure() -> Any:
        loss = loss_of(net, 1)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"under\s+release\.accumulate"):
        optimizer.step(closure)


def test_a_tensor_lr() -> None:
    ordinary, released = pair()
    GradientRelease(released[1])
    for _, optimizer in (ordinary, released):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    assert_same_training(ordinary, released, range(3))


@pytest.mark.parametrize("after_accumulation", [False, True])
def test_clipped_tensor_by_tensor(after_accumulation: bool) -> None:
    """Clip by a hook of the parameter, as the documentation says."""

    def clip(p: Tensor) -> None:
        nn.utils.clip_grad_norm_([p], 0.01)

    ordinary, released = pair()
    for p in released[0].parameters():
        if after_accumulation:
            p.register_post_accumulate_grad_hook(clip)
        else:
            p.register_hook(lambda g: g.clamp(-0.001, 0.001))
    GradientRelease(released[1])
    for t in range(4):
        net, optimizer = ordinary
        optimizer.zero_grad()
        loss_of(net, t).backward()
        for p in [p for p in net.parameters() if p.grad is not None]:
            if after_accumulation:
                nn.utils.clip_grad_norm_([p], 0.01)
            else:
                nn.utils.clip_grad_value_([p], 0.001)
        optimizer.step()
        step(*released, t)
        assert same(snapshot(ordinary[1]), snapshot(released[1]))


@pytest.mark.parametrize("last_by_hand", [False, True])
@pytest.mark.parametrize("micro_steps", [2, 3])
def test_accumulation(micro_steps: int, last_by_hand: bool) -> None:
    """Parameters that only an earlier pass reached are updated at the end."""
    ordinary, released = pair()
    release = GradientRelease(released[1])
    for t in range(4):
        for net, optimizer in (ordinary, released):
            optimizer.zero_grad()
            for micro in range(micro_steps):
                last = micro == micro_steps - 1 and not last_by_hand
                with release.accumulate(not last):
                    (loss_of(net, t + micro, micro) / micro_steps).backward()
            optimizer.step()
        assert same(snapshot(ordinary[1]), snapshot(released[1]))


def test_accumulate_ends_with_an_error() -> None:
    net, optimizer = next(pair(warmup_steps=0))
    release = GradientRelease(optimizer)

    def released() -> bool:
        loss_of(net, 0).backward()
        try:
            return "released" in repr(net.tied.grad)
        finally:
            optimizer.step()
            optimizer.zero_grad()

    def fail() -> None:
        with release.accumulate():
            with release.accumulate(False):
                assert released()
            assert not released()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert released()


@pytest.mark.parametrize("at", [0, 3])
def test_saved_and_loaded_in_mid_run(at: int) -> None:
    ordinary, released = pair(rebound="belief")
    GradientRelease(released[1])
    assert_same_training(ordinary, released, range(at))
    kept = copy.deepcopy(released[1].state_dict())
    weights = copy.deepcopy(released[0].state_dict())
    assert_same_training(ordinary, released, range(at, at + 2))

    state = weakref.ref(released[1].state[released[0].tied]["hessian_diag"])
    released[0].load_state_dict(weights)
    released[1].load_state_dict(kept)
    gc.collect()
    assert state() is None  # nothing keeps the previous state alive
    fresh_net, fresh = next(pair(rebound="belief"))
    fresh_net.load_state_dict(weights)
    fresh.load_state_dict(kept)
    assert_same_training((fresh_net, fresh), released, range(at, at + 3))


def test_copies_of_model_and_optimizer_are_ordinary() -> None:
    net, optimizer = next(pair())
    GradientRelease(optimizer)
    step(net, optimizer, 0)
    both = copy.deepcopy((net, optimizer))
    GradientRelease(both[1])  # this optimizer has no release yet
    assert_same_training((net, optimizer), both, range(1, 3))


def test_groups_added_and_layers_unfrozen_later() -> None:
    pairs = []
    for _ in range(2):
        net = Net()
        net.norm.requires_grad_(False)
        groups = groups_of(net)
        pairs.append(((net, Apollo(groups[:2], lr=0.05, seed=0)), groups[2]))
    (ordinary, late), (released, other_late) = pairs
    GradientRelease(released[1])
    for t in range(6):
        if t == 2:
            ordinary[1].add_param_group(late)
            released[1].add_param_group(other_late)
        if t == 4:
            ordinary[0].norm.requires_grad_()
            released[0].norm.requires_grad_()
        assert_same_training(ordinary, released, range(t, t + 1))
    loss_of(released[0], 0).backward()
    given = [p for p in released[0].parameters() if p.grad is not None]
    assert len(given) == 10
    assert all("released" in repr(p.grad) for p in given)  # the late ones too


def test_removed() -> None:
    ordinary, released = pair()
    with GradientRelease(released[1]) as release:
        assert_same_training(ordinary, released, range(2))
    assert_same_training(ordinary, released, range(2, 4))
    step(*ordinary, 4)
    with GradientRelease(released[1]) as again:
        released[1].zero_grad()
        loss_of(released[0], 4).backward()
        again.remove()
        assert all(p.grad is None for p in released[0].parameters())
        release.remove()  # a second time, while another release exists
        released[1].step()
    assert same(snapshot(ordinary[1]), snapshot(released[1]))
    loss_of(released[0], 5).backward()
    nn.utils.clip_grad_norm_(released[0].parameters(), 1.0)


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    ordinary, released = pair()
    GradientRelease(released[1])
    for net, _ in (ordinary, released):
        net.forward = torch.compile(net.forward, backend="aot_eager")  # type: ignore[method-assign]
    assert_same_training(ordinary, released, range(3))


def test_checkpointed_activations() -> None:
    ordinary, released = pair()
    GradientRelease(released[1])
    for t in range(3):
        for net, optimizer in (ordinary, released):
            optimizer.zero_grad()
            twice = [checkpoint(loss_of, net, t, i, use_reentrant=False) for i in range(2)]
            sum(twice).backward()
            optimizer.step()
        assert same(snapshot(ordinary[1]), snapshot(released[1]))


# errors of what does not work with a release


def test_diagnostics_of_a_released_optimizer() -> None:
    """Corrections cannot be measured; everything else is."""
    net = torch.nn.Linear(3, 2)
    optimizer = Apollo(net.parameters())
    found: list[Any] = []
    with GradientRelease(optimizer), Recorder(optimizer, lambda _, one: found.append(one), every=1):
        for _ in range(2):
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    assert len(found) == 2
    assert all(one.step_norm > 0 for one in found[-1])
