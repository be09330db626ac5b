"""A user's optimizers, for the tests: a test copies this file into its own folder."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor


class SignDescent(torch.optim.Optimizer):
    """Takes steps along the sign of the averaged gradient."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0,
        nesterov: bool = False,
        scales: tuple[float, float] = (1.0, 1.0),
        foreach: bool | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, allowed is 0 <= momentum < 1")
        assert isinstance(scales, tuple)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        average = self.state[p].setdefault("average", torch.zeros_like(p))
        average.lerp_(grad, 1 - group["momentum"])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * average.sign())


class ScheduleFree(SignDescent):
    """Trains at one point and evaluates at the average of all, as schedule-free optimizers do."""

    modes: ClassVar[list[str]] = []

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01) -> None:
        super().__init__(params, lr)
        self._trains = False

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def _swap(self, trains: bool) -> None:
        assert trains is not self._trains
        self.modes.append("train" if trains else "eval")
        for group in self.param_groups:
            for p in group["params"]:
                if "other" in self.state[p]:
                    other = self.state[p]["other"]
                    kept = p.clone()
                    p.copy_(other)
                    other.copy_(kept)
        self._trains = trains

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        assert self._trains
        super()._update(p, grad, group)
        self.state[p].setdefault("other", p.clone()).lerp_(p, 0.1)


class Forgetful(SignDescent):
    """Counts its steps outside of the state dict."""

    steps = 0

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super()._update(p, grad, {**group, "lr": group["lr"] / (1 + self.steps)})
        self.steps += 1


class SecondOrder(SignDescent):
    """Divides by a sampled diagonal of the Hessian, as Sophia does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters]
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in parameters]
        products = torch.autograd.grad(grads, parameters, signs)
        with torch.no_grad():
            for p, sign, product in zip(parameters, signs, products, strict=True):
                size = (sign * product).abs().clamp(min=1.0)
                p.sub_(self.param_groups[0]["lr"] * p.grad / size)


class NeedsClosure(SignDescent):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class InsistsOnClosure(SignDescent):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "a closure is needed"


class Leaves(SignDescent):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise SystemExit(3)


class Unsavable(SignDescent):
    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self.state[p]["hook"] = lambda: None


class Unreadable(SignDescent):
    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self.state[p]["place"] = pathlib.PurePosixPath("x")


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor], speed: float = 1.0) -> None:
        super().__init__(params, {"speed": speed})


class TakesAnything(SignDescent):
    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, **more: Any) -> None:
        super().__init__(params, lr)


class NeedsLength(SignDescent):
    def __init__(self, params: Iterable[Tensor], total: int, lr: float | None = None) -> None:
        super().__init__(params, lr or 0.01)


class NoOptimizer:
    pass


def make(params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.5) -> SignDescent:
    return SignDescent(params, lr, momentum)


def make_nothing(params: Iterable[Tensor], lr: float = 0.01) -> None:
    return None
