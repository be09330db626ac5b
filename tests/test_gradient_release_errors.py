"""Errors of gradient release: reading released gradients, second gradients, sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apollo_qn import Apollo, GradientRelease
from tests.helpers import same, snapshot
from tests.test_gradient_release import Net, loss_of, make, pair, step

READS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "clip_grad_norm_": lambda params: nn.utils.clip_grad_norm_(params, 1.0),
    "clip_grad_norm_ foreach": lambda params: nn.utils.clip_grad_norm_(params, 1.0, foreach=True),
    "clip_grad_norm_ inf": lambda params: nn.utils.clip_grad_norm_(params, 1.0, float("inf")),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 1.0),
    "get_total_norm": lambda params: nn.utils.get_total_norm([p.grad for p in params]),
    "by hand": lambda params: [p.grad.mul_(0.5) for p in params],
    "in .data": lambda params: [p.grad.data.mul_(0.5) for p in params],
    "a norm": lambda params: sum(p.grad.norm() ** 2 for p in params) ** 0.5,
    "noise": lambda params: [torch.randn_like(p.grad) + p.grad for p in params],
    "zeros": lambda params: [p.grad.zero_() for p in params],
    "share_memory_": lambda params: [p.grad.share_memory_() for p in params],
    "untyped_storage": lambda params: [p.grad.untyped_storage() for p in params],
    "data_ptr": lambda params: [p.grad.data_ptr() for p in params],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_a_released_gradient(read: Callable[[Any], Any]) -> None:
    net, optimizer = next(pair())
    GradientRelease(optimizer)
    step(net, optimizer, 0)
    optimizer.zero_grad()
    loss_of(net, 1).backward()
    params = [p for p in net.parameters() if p.grad is not None]
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"gradient has been released.*clip_grad_norm_"):
        read(params)
    assert same(before, snapshot(optimizer))
    assert params[0].grad.shape == params[0].shape
    assert "released gradient of shape (20, 8)" in repr(params[0].grad)
    optimizer.step()  # training continues without the release
    step(net, optimizer, 2)


def test_a_gradient_scaler() -> None:
    net, optimizer = next(pair())
    GradientRelease(optimizer)
    for unscale in (True, False):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(net, 0)).backward()
        with pytest.raises(RuntimeError, match=r"has been released.*torch\.amp\.GradScaler"):
            (scaler.unscale_ if unscale else scaler.step)(optimizer)
        optimizer.step()


def twice(net: Net, optimizer: Apollo) -> None:
    for _ in range(2):
        loss_of(net, 0).backward()


def discarded(net: Net, optimizer: Apollo) -> None:
    """Discard gradients, as those of a generator's pass through the discriminator."""
    loss_of(net, 0).backward()
    optimizer.zero_grad()
    loss_of(net, 1).backward()


def reentrant(net: Net, optimizer: Apollo) -> None:
    start = torch.ones((), requires_grad=True)

    def of(x: Tensor, t: int) -> Tensor:
        return loss_of(net, t) * x

    sum(checkpoint(of, start, t, use_reentrant=True) for t in range(2)).backward()


@pytest.mark.parametrize("passes", [twice, discarded, reentrant])
def test_a_second_gradient_in_one_step(passes: Callable[[Net, Apollo], None]) -> None:
    net, optimizer = next(pair())
    GradientRelease(optimizer)
    with pytest.raises(RuntimeError, match=r"under release\.accumulate\(\)"):
        passes(net, optimizer)


def test_twice_on_one_optimizer() -> None:
    _, optimizer = next(pair())
    release = GradientRelease(optimizer)
    with pytest.raises(RuntimeError, match=r"has a GradientRelease already: call its remove\(\)"):
        GradientRelease(optimizer)
    release.remove()
    GradientRelease(optimizer).remove()


def test_what_cannot_be_released() -> None:
    net = Net()
    with pytest.raises(TypeError, match="optimizer must be an Apollo, got SGD"):
        GradientRelease(torch.optim.SGD(net.parameters()))  # type: ignore[arg-type]
    optimizer = make(net, differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        GradientRelease(optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_a_sparse_gradient() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    GradientRelease(Apollo(net.parameters()))
    with pytest.raises(RuntimeError, match="needs dense gradients"):
        net(torch.tensor([1, 2])).sum().backward()
