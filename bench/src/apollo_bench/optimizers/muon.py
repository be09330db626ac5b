"""Muon as it is commonly used: for the hidden matrices, with AdamW for the other parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apollo_bench.errors import ExperimentError


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW under one learning rate.

    Muon updates the hidden weights of two or more dimensions; a convolution's filters form a matrix
    with one row per output channel. AdamW updates embeddings, the output layer, biases and norms
    (Jordan, 2024, "Muon: an optimizer for hidden layers"). Muon's step is scaled to the size of
    AdamW's ("match_rms_adamw", Liu et al., 2025), so that both use one rate and one decay.

    Args:
        network: on its device; its attribute ``output`` names its output layer, if it has one.
        lr: learning rate of both.
        weight_decay: decoupled decay of both.
        momentum: Nesterov momentum of Muon.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ExperimentError: torch is older than 2.9, which brought Muon.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ExperimentError(
                f"method is 'muon', which needs torch 2.9 or newer, got torch {torch.__version__}"
            )
        matrices, others = split(network)
        super().__init__(
            [{"params": group} for group in (matrices, others) if group],
            {"lr": lr, "weight_decay": weight_decay},
        )
        self._inner: list[torch.optim.Optimizer] = []
        # the same memory, as the matrix that Muon needs
        self._views = [(p, nn.Parameter(as_matrix(p.detach()))) for p in matrices]
        if matrices:
            self._inner.append(
                torch.optim.Muon(
                    [view for _, view in self._views],
                    lr,
                    weight_decay,
                    momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._inner.append(torch.optim.AdamW(others, lr, betas, eps, weight_decay, fused=True))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, view in self._views:
            view.grad = None if p.grad is None else as_matrix(p.grad, p)
        for inner, group in zip(self._inner, self.param_groups, strict=True):
            inner.param_groups[0]["lr"] = group["lr"]
            inner.param_groups[0]["weight_decay"] = group["weight_decay"]
            inner.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and the states of both optimizers."""
        return {**super().state_dict(), "inner": [inner.state_dict() for inner in self._inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of the same network."""
        groups = dict(state_dict)
        for inner, state in zip(self._inner, groups.pop("inner"), strict=True):
            inner.load_state_dict(state)
        super().load_state_dict(groups)


def split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that Muon updates, and all others."""
    outer = {
        id(p)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    last = getattr(network, "output", None)
    if last is not None:
        outer |= {id(p) for p in network.get_submodule(last).parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in network.parameters():
        (matrices if p.dim() >= 2 and id(p) not in outer else others).append(p)
    return matrices, others


def as_matrix(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a tensor as a matrix with one row per output.

    The order of the columns follows the memory of ``like`` (None: of ``x``), so that the result is
    a view. Orthogonalization does not depend on that order.
    """
    like = x if like is None else like
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)
