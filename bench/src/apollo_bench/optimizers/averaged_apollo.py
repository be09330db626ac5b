"""Apollo with a moving average of B, which section 3.2 of the paper leaves to future work.

An experiment, and no part of the optimizer: what came of it stands in results/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apollo_qn import Apollo


class AveragedApollo(torch.optim.Optimizer):
    """Algorithm 1, but D is that of the exponential moving average of B, its bias corrected.

    B itself still follows the secant condition for the direction that was taken. With
    ``hessian_beta = 0`` this is Apollo. One loop over tensors; L2 decay; float32.

    Args:
        params: parameters, one group.
        lr: learning rate.
        beta: of the moving average of gradients.
        hessian_beta: of the moving average of B.
        eps: as of Apollo.
        sigma: likewise.
        weight_decay: likewise, L2.
        warmup_steps: likewise.
        warmup_init_lr: likewise.
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
        # one that is given is a share of the rate that it was given with, as Apollo's
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
    t, beta, own = int(state["step"]), group["beta"], group["hessian_beta"]
    g = g + group["weight_decay"] * p if group["weight_decay"] else g
    d = m / _rectified(average, own, t, group["sigma"])
    change = (g - m) * ((1 - beta) / (1 - beta ** (t + 1)))
    norm = d.double().pow(4).sum() ** 0.25 + group["eps"] / group["sigma"]
    a = ((d * change).double().sum() + (d * b * d).double().sum()) / norm**4
    b -= a.to(b.dtype) * d * d
    m += change
    average.lerp_(b, 1 - own)
    warmup = group["warmup_steps"]
    share = min(1.0, t / warmup) if warmup else 1.0
    rate = group["lr"] * (group["warmup_start"] + (1 - group["warmup_start"]) * share)
    p -= rate * (m / _rectified(average, own, t + 1, group["sigma"]))
    state["step"] += 1


def _rectified(average: Tensor, beta: float, steps: int, sigma: float) -> Tensor:
    """D of the average over so many steps."""
    correction = 1 - beta**steps if steps else 1.0
    return (average / correction).abs().clamp(min=sigma)
