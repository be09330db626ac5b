"""Apollo with a moving average of B, which section 3.2 of the paper leaves to future work.

An experiment, not part of the optimizer. results/ has what it measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apollo_qn import Apollo


class AveragedApollo(torch.optim.Optimizer):
    """Algorithm 1 with D taken from the bias-corrected exponential moving average of B.

    B itself still follows the secant condition for the direction that was taken. With
    ``hessian_beta = 0`` this is Apollo. It loops over tensors, with L2 decay, in float32.

    Args:
        params: parameters, as one group.
        lr: learning rate.
        beta: decay of the moving average of gradients.
        hessian_beta: decay of the moving average of B.
        eps: as in Apollo.
        sigma: as in Apollo.
        weight_decay: as in Apollo, L2.
        warmup_steps: as in Apollo.
        warmup_init_lr: as in Apollo.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        beta: float,
        hessian_beta: float,
        eps: float,
        sigma: float,
        weight_decay: float,
        warmup_steps: int,
        warmup_init_lr: float | None,
    ) -> None:
        params = list(params)
        plain = Apollo(
            params, lr, beta, eps, sigma, weight_decay,
            warmup_steps=warmup_steps, warmup_init_lr=warmup_init_lr,
        )  # fmt: skip
        if not 0 <= hessian_beta < 1:
            raise ValueError(f"hessian_beta is {hessian_beta!r}, allowed is 0 <= hessian_beta < 1")
        # like Apollo's, warmup_init_lr is a fraction of the lr that it was given with
        first = plain.param_groups[0]["warmup_init_lr"]
        share = 1e-3 if first is None else first / lr
        super().__init__(
            params,
            {
                "lr": lr, "beta": beta, "hessian_beta": hessian_beta, "eps": eps, "sigma": sigma,
                "weight_decay": weight_decay, "warmup_steps": warmup_steps, "warmup_start": share,
            },
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad, self.state[p], group)
        return loss


def _update(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "hessian_diag", "hessian_avg"):
            state[name] = torch.zeros_like(p)
    m, b, average = state["exp_avg"], state["hessian_diag"], state["hessian_avg"]
    t, beta, hessian_beta = int(state["step"]), group["beta"], group["hessian_beta"]
    g = g + group["weight_decay"] * p if group["weight_decay"] else g
    d = m / _rectified(average, hessian_beta, t, group["sigma"])
    change = (g - m) * ((1 - beta) / (1 - beta ** (t + 1)))
    norm = d.double().pow(4).sum() ** 0.25 + group["eps"] / group["sigma"]
    a = ((d * change).double().sum() + (d * b * d).double().sum()) / norm**4
    b -= a.to(b.dtype) * d * d
    m += change
    average.lerp_(b, 1 - hessian_beta)
    warmup = group["warmup_steps"]
    share = min(1.0, t / warmup) if warmup else 1.0
    rate = group["lr"] * (group["warmup_start"] + (1 - group["warmup_start"]) * share)
    p -= rate * (m / _rectified(average, hessian_beta, t + 1, group["sigma"]))
    state["step"] += 1


def _rectified(average: Tensor, beta: float, steps: int, sigma: float) -> Tensor:
    """Return D of the average over the given number of steps."""
    correction = 1 - beta**steps if steps else 1.0
    return (average / correction).abs().clamp(min=sigma)
