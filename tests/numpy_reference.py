"""APOLLO in float64 NumPy, written from the paper and the reading notes, not from ``algorithm.py``.

Unlike the package both classes keep the displacement of the step before as an array, as the
paper's Algorithm 1 (``d_t``) and the authors' release (``update``) do, so that they check its
reconstruction too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters by the names of the package's interface."""

    lr: float = 1.0
    beta: float = 0.9
    eps: float = 1e-4
    sigma: float = 1.0
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    rebound: str = "constant"
    warmup_steps: int = 500
    warmup_init_lr: float | None = None
    maximize: bool = False


class ReferenceApollo:
    """Algorithm 1 on one tensor; ``lr`` may be set between steps, as a scheduler does."""

    def __init__(self, theta: Array, settings: Settings) -> None:
        self.settings = settings
        self.lr = settings.lr
        self.theta = np.array(theta, dtype=np.float64)
        self.m = np.zeros_like(self.theta)
        self.B = np.zeros_like(self.theta)
        self.d = np.zeros_like(self.theta)
        self.t = 0
        self.threshold = self.offset = self.used = 0.0  # of the last step

    def step(self, gradient: Array) -> None:
        if self.theta.size == 0:
            self.t += 1
            return
        s = self.settings
        g = np.asarray(gradient, dtype=np.float64)
        if s.maximize:
            g = -g
        if s.weight_decay and not s.decoupled_weight_decay:
            g = g + s.weight_decay * self.theta

        # eq. (9) as printed, with the paper's t counted from 0
        beta, t = s.beta, self.t
        corrected = 1 - beta ** (t + 1)
        m = beta * (1 - beta**t) / corrected * self.m + (1 - beta) / corrected * g

        # eq. (8), whose denominator gets eps (over sigma where sigma is the threshold)
        eps = s.eps if s.rebound == "belief" else s.eps / s.sigma
        norm = np.sum(self.d**4) ** 0.25
        B = self.B
        if norm + eps > 0:
            numerator = np.sum(self.d * (m - self.m)) + np.sum(self.d * self.B * self.d)
            B = self.B - numerator / (norm + eps) ** 4 * self.d**2

        # eq. (11), or the later release's threshold
        self.threshold, self.offset, self.used = s.sigma, 0.0, self.rate()
        if s.rebound == "belief":
            self.threshold = float(np.max(np.abs(g - self.m)))
            self.offset = s.eps * corrected / (1 - beta)
        d = m / (np.maximum(np.abs(B), self.threshold) + self.offset)
        if s.weight_decay and s.decoupled_weight_decay:
            d = d + s.weight_decay * self.theta

        self.theta = self.theta - self.used * d
        self.m, self.B, self.d, self.t = m, B, d, t + 1

    def go_on_from(self, theta: Array, m: Array, B: Array) -> None:
        """Continue from the last step's numbers after they were stored in fewer bits.

        Its displacement is then what can be concluded from them: m / D, with decoupled decay and
        wd theta_before, where theta = theta_before - lr (m / D + wd theta_before).
        """
        s = self.settings
        self.theta, self.m, self.B = theta, m, B
        if theta.size == 0:
            return
        self.d = m / (np.maximum(np.abs(B), self.threshold) + self.offset)
        if s.weight_decay and s.decoupled_weight_decay:
            before = (theta + self.used * self.d) / (1 - self.used * s.weight_decay)
            self.d = self.d + s.weight_decay * before

    def rate(self) -> float:
        """eta of step t: DESIGN's ``lr (w + (1 - w) t / warmup_steps)``."""
        s = self.settings
        if self.t >= s.warmup_steps:
            return self.lr
        first = s.lr / 1000 if s.warmup_init_lr is None else s.warmup_init_lr
        w = first / s.lr if s.lr else 0.0
        return self.lr * (w + (1 - w) * self.t / s.warmup_steps)


class ReleasedApollo:
    """The authors' released optimizer, re-stated: its group keys, its state, its order of steps."""

    def __init__(
        self,
        thetas: list[Array],
        lr: float,
        beta: float = 0.9,
        eps: float = 1e-4,
        rebound: str = "constant",
        warmup: int = 500,
        init_lr: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_type: str = "L2",
        sigma: float = 0.01,
    ) -> None:
        self.thetas = [np.array(theta, dtype=np.float64) for theta in thetas]
        self.sigma = sigma  # fixed in the code: 1 before August 2021, 0.01 since
        self.group: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "eps": eps,
            "rebound": rebound,
            "warmup": warmup,
            "init_lr": lr / 1000 if init_lr is None else init_lr,
            "base_lr": lr,
            "weight_decay": weight_decay,
            "weight_decay_type": weight_decay_type,
        }
        self.state: list[dict[str, Any]] = [
            {
                "step": 0,
                "exp_avg_grad": np.zeros_like(theta),
                "approx_hessian": np.zeros_like(theta),
                "update": np.zeros_like(theta),
            }
            for theta in self.thetas
        ]

    def step(self, gradients: list[Array]) -> None:
        group = self.group
        for i, (grad, state) in enumerate(zip(gradients, self.state, strict=True)):
            theta = self.thetas[i]
            if state["step"] < group["warmup"]:
                rise = (group["base_lr"] - group["init_lr"]) * state["step"] / group["warmup"]
                rate = group["init_lr"] + rise
            else:
                rate = group["lr"]
            if group["weight_decay"] != 0 and group["weight_decay_type"] == "L2":
                grad = grad + group["weight_decay"] * theta
            state["step"] += 1
            alpha = (1 - group["beta"]) / (1 - group["beta"] ** state["step"])

            difference = grad - state["exp_avg_grad"]
            if group["rebound"] == "belief":
                threshold, eps = np.max(np.abs(difference)), group["eps"]
            else:
                threshold, eps = self.sigma, group["eps"] / self.sigma
            state["exp_avg_grad"] = state["exp_avg_grad"] + alpha * difference

            norm = np.sum(state["update"] ** 4) ** 0.25 + eps
            v = state["update"] / norm
            delta = -alpha * np.sum(difference / norm * v) - np.sum(state["approx_hessian"] * v * v)
            state["approx_hessian"] = state["approx_hessian"] + delta * v * v

            if group["rebound"] == "belief":
                D = np.maximum(np.abs(state["approx_hessian"]), threshold) + eps / alpha
            else:
                D = np.maximum(np.abs(state["approx_hessian"]), threshold)
            d = state["exp_avg_grad"] / D
            if group["weight_decay"] != 0 and group["weight_decay_type"] == "decoupled":
                d = d + group["weight_decay"] * theta
            state["update"] = d
            self.thetas[i] = theta - rate * d
