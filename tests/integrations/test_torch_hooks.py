"""Hooks of steps and of state dicts, as torch.optim has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn
from torch.optim import optimizer as torch_optimizer

from apollo_qn import Apollo
from tests.helpers import same, snapshot
from tests.integrations.data import loss_of, network
from tests.integrations.test_torch import train


@pytest.fixture
def no_global_hooks() -> Iterator[None]:
    tables = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.usefixtures("no_global_hooks")
def test_hooks_of_a_step_in_their_order() -> None:
    model = network()
    optimizer = Apollo(model.parameters(), lr=0.5)
    calls: list[str] = []

    def note(name: str) -> Any:
        def hook(found: Any, args: Any, kwargs: Any) -> None:
            assert found is optimizer
            count = {float(state["step"]) for state in optimizer.state.values()}
            calls.append(f"{name} {max(count, default=0.0):.0f}")

        return hook

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(note("global before")),
        torch_optimizer.register_optimizer_step_post_hook(note("global after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    train(model, optimizer, range(1))
    assert calls == ["global before 0", "before 0", "after 1", "global after 1"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(1))
    assert len(calls) == 4


def test_a_step_hook_may_change_the_gradients_and_the_arguments() -> None:
    results = []
    for by_hook in (True, False):
        model = network()
        optimizer = Apollo(model.parameters(), lr=0.5)
        seen: list[Any] = []

        def clip(*_: Any, model: nn.Module = model) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

        def closure_for(
            found: Any, args: Any, kwargs: Any, seen: list[Any] = seen
        ) -> tuple[Any, Any]:
            seen.append(args)
            return (found, lambda: 7.0), kwargs

        if by_hook:
            optimizer.register_step_pre_hook(clip)
            optimizer.register_step_pre_hook(closure_for)
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if not by_hook:
                clip()
            assert optimizer.step() == (7.0 if by_hook else None)
        results.append(snapshot(optimizer))
    assert same(*results)


def test_hooks_of_state_dict_in_their_order() -> None:
    model = network()
    optimizer = Apollo(model.parameters(), lr=0.5)
    train(model, optimizer, range(2))
    calls: list[str] = []

    def before(name: str) -> Any:
        return lambda found: calls.append(name)

    def after(name: str) -> Any:
        def hook(found: Any, state: dict[str, Any]) -> dict[str, Any]:
            calls.append(name)
            return {**state, "noted": [*state.get("noted", []), name]}

        return hook

    optimizer.register_state_dict_pre_hook(before("pre"))
    optimizer.register_state_dict_pre_hook(before("pre, first"), prepend=True)
    optimizer.register_state_dict_post_hook(after("post"))
    optimizer.register_state_dict_post_hook(after("post, first"), prepend=True)
    state = optimizer.state_dict()
    assert calls == ["pre, first", "pre", "post, first", "post"]
    assert state["noted"] == ["post, first", "post"]


def test_hooks_of_load_state_dict_in_their_order() -> None:
    """Pre-hooks may translate the loaded state; post-hooks see the final state."""
    model = network()
    optimizer = Apollo(model.parameters(), lr=0.5, rebound="belief")
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    foreign = {"theirs": copy.deepcopy(saved)}
    calls: list[str] = []

    fresh = Apollo(network().parameters(), lr=0.5, rebound="belief")

    def unpack(found: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre, first")
        result: dict[str, Any] = state["theirs"]
        return result

    def look(found: Any, state: dict[str, Any]) -> None:
        calls.append("pre")
        assert "param_groups" in state

    def found_state(name: str) -> Any:
        def hook(found: Any) -> None:
            calls.append(name)
            assert same(list(found.state.values()), list(optimizer.state.values()))

        return hook

    fresh.register_load_state_dict_pre_hook(look)
    fresh.register_load_state_dict_pre_hook(unpack, prepend=True)
    fresh.register_load_state_dict_post_hook(found_state("post"))
    fresh.register_load_state_dict_post_hook(found_state("post, first"), prepend=True)
    fresh.load_state_dict(foreign)
    assert calls == ["pre, first", "pre", "post, first", "post"]
    fresh.load_state_dict(foreign)  # the hooks that load_state_dict registered itself are gone
    assert len(calls) == 8
