"""What an optimizer keeps alive, and what it frees."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch

from apollo_qn import Apollo, GradientRelease
from apollo_qn.backends import foreach
from tests.helpers import BACK_ENDS, give_gradients, parameters


@pytest.mark.parametrize("capturable", [False, True])
def test_foreach_s_memory_does_not_grow_with_the_subsets_of_gradients(capturable: bool) -> None:
    params = parameters([(16 + i % 37,) for i in range(100)])
    optimizer = Apollo(params, foreach=True, capturable=capturable)
    chance = random.Random(0)
    for t in range(12):
        give_gradients(params, t)
        for p in params:
            if chance.random() < 0.2:
                p.grad = None
        optimizer.step()
    backend = optimizer._backends.foreach  # type: ignore[union-attr]
    size = sum(layout.nbytes for layout in backend._layouts.values())
    assert size == backend._cached_bytes <= foreach.CACHED_BYTES
    memory = sum(x.numel() * x.itemsize for x in backend._memory.values())
    assert memory <= 32 << 20


def test_the_oldest_layouts_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([(10 + i,) for i in range(6)])
    optimizer = Apollo(params, foreach=True)
    for t in range(6):
        give_gradients(params, t)
        params[t].grad = None
        optimizer.step()
        layouts = optimizer._backends.foreach._layouts  # type: ignore[union-attr]
        if t == 0:
            [first] = layouts.values()
            monkeypatch.setattr(foreach, "CACHED_BYTES", 3 * first.nbytes)
    assert [first is each for each in layouts.values()] == [False] * 3


def test_layouts_of_few_rows_are_bounded_too() -> None:
    """A layout of one short vector takes kilobytes."""
    p = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = Apollo([p], foreach=True)
    for n in range(1, 1200):
        p.data, p.grad = torch.zeros(n, 1), torch.zeros(n, 1)
        optimizer.state.clear()
        optimizer.step()
    layouts = optimizer._backends.foreach._layouts  # type: ignore[union-attr]
    assert 100 < len(layouts) < 1000


@BACK_ENDS
def test_a_dropped_optimizer_is_freed_at_once(back_end: dict[str, Any]) -> None:
    params = parameters([(300,), (5, 7)])
    optimizer = Apollo(params, **back_end)
    for t in range(2):
        give_gradients(params, t)
        optimizer.step()
    known = [weakref.ref(x) for x in (optimizer, optimizer.state[params[0]]["exp_avg"])]
    gradient = weakref.ref(params[0].grad)  # type: ignore[arg-type]
    optimizer.zero_grad()
    assert gradient() is None
    del optimizer
    gc.collect()
    assert [x() for x in known] == [None, None]


def test_gradient_release_is_freed_without_remove() -> None:
    def trial() -> list[weakref.ref[Any]]:
        p = torch.nn.Parameter(torch.zeros(10))
        optimizer = Apollo([p], warmup_steps=0)
        release = GradientRelease(optimizer)
        (p * 2).sum().backward()
        optimizer.step()
        assert not torch.equal(p, torch.zeros(10))
        return [weakref.ref(x) for x in (p, optimizer, release)]

    known = trial()
    gc.collect()
    assert [x() for x in known] == [None] * 3


def test_a_release_that_is_not_kept_lives_with_its_optimizer() -> None:
    p = torch.nn.Parameter(torch.zeros(10))
    optimizer = Apollo([p], warmup_steps=0)
    GradientRelease(optimizer)
    gc.collect()
    (p * 2).sum().backward()
    assert not torch.equal(p, torch.zeros(10))
    with pytest.raises(RuntimeError, match="has a GradientRelease already"):
        GradientRelease(optimizer)
