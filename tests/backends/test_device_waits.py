"""A step does not wait for the device, and its memory is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_qn.backends import foreach as foreach_module
from apollo_qn.hyperparameters import StepScalars
from apollo_qn.state import hyperparameters
from tests.backends.test_backends import SetBlock
from tests.helpers import (
    DEVICE,
    follow,
    give_gradients,
    make,
    parameters,
    references,
    run_steps,
)
from tests.modes import (
    MODE_IDS,
    MODES,
)
from tests.numpy_reference import Settings


class Watched(TorchDispatchMode):
    """Counts the operations that reach the dispatcher; keeps the size of their largest output."""

    def __init__(self, forbidden: Sequence[str] = ()) -> None:
        super().__init__()
        self.forbidden = forbidden
        self.calls: Counter[str] = Counter()
        self.largest_by_storage: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.forbidden:
            raise AssertionError(f"{name} would wait for the device")
        self.calls[name] += 1
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor):
                self.largest_by_storage[x.untyped_storage().data_ptr()] = (
                    x.untyped_storage().nbytes()
                )
        return out


WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2")


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_nothing_waits_for_the_device(mode: dict[str, Any], set_block: SetBlock) -> None:
    """A capturable step reads no tensor's value on the host: no .item(), no shape from data."""
    set_block(600)
    optimizer = make(
        parameters(), Settings(lr=0.3, warmup_steps=3, **mode), foreach=True, capturable=True
    )
    run_steps(optimizer, range(2))
    with Watched(WAITS) as watched:
        run_steps(optimizer, range(2, 4))
    assert watched.calls


def test_scalars_are_selected_without_sending_indices() -> None:
    """A GPU would wait for a list of indices, and a CUDA graph cannot capture their copy."""
    h = hyperparameters(make(parameters([(1,)]), Settings(lr=0.3)).param_groups[0])
    scalars = StepScalars.at(torch.arange(4.0, device=DEVICE), h)
    with Watched(("index", "lift_fresh")):
        selected = scalars.select([2, 0])
    assert torch.equal(selected.t, scalars.t[[2, 0]])
    assert torch.equal(selected.alpha, scalars.alpha[[2, 0]])


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_only_scalars_of_the_host_are_read(mode: dict[str, Any]) -> None:
    """Without capturable nothing but step and previous_lr, which lie on the host, is read."""
    params = parameters()
    optimizer = make(params, Settings(lr=0.3, warmup_steps=3, **mode), foreach=True)
    run_steps(optimizer, range(2))
    with Watched() as watched:
        optimizer.step()
    scalars = 2 if mode.get("decoupled_weight_decay") else 1
    assert watched.calls["_local_scalar_dense"] <= scalars * len(params)
    assert not any(watched.calls[name] for name in WAITS[1:])


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_operations_do_not_grow_with_the_tensors(mode: dict[str, Any], capturable: bool) -> None:
    counts = []
    for n in (8, 64):
        params = parameters([(3,), (2, 5), (), (300,)] * (n // 4))
        settings = Settings(lr=0.3, warmup_steps=3, **mode)
        optimizer = make(params, settings, foreach=True, capturable=capturable)
        run_steps(optimizer, range(2))
        with Watched() as watched:
            optimizer.step()
        # ``step`` is read on the host, and views do no work
        for name in ("_local_scalar_dense", "view"):
            watched.calls.pop(name, None)
        for p in params:
            assert p.grad is not None
        counts.append(watched.calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
def test_working_memory_is_that_of_a_block(mode: dict[str, Any], set_block: SetBlock) -> None:
    """No temporary of a large tensor's size: new memory is at most a few blocks at once."""
    block = 1000
    set_block(block)
    params = parameters([(100_000,)])
    optimizer = make(params, Settings(lr=0.3, **mode), foreach=True)
    run_steps(optimizer, range(1))
    give_gradients(params, 1)
    p = params[0]
    assert p.grad is not None
    known = {
        x.untyped_storage().data_ptr()
        for x in (p, p.grad, *(v for v in optimizer.state[p].values()))
    }
    with Watched() as watched:
        optimizer.step()
    new = [n for place, n in watched.largest_by_storage.items() if place not in known]
    assert max(new) <= 5 * block * 4


def test_layouts_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(foreach_module, "KEPT_LAYOUTS"):
        pytest.skip("no layouts are kept")
    monkeypatch.setattr(foreach_module, "KEPT_LAYOUTS", 2)
    for n in range(1, 8):
        params = parameters([(n,), (n + 1,)], torch.float64)
        settings = Settings(lr=0.3, warmup_steps=0)
        wanted = references(params, settings)
        optimizer = make(params, settings, foreach=True)
        follow(optimizer, params, wanted, 3, torch.float64)
