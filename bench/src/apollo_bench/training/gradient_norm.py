"""The norm of all gradients of a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def gradient_norm(network: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients, 0-dim; every process of a sharded network must call."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return full_norm(get_total_norm(gradients, foreach=None))


def full_norm(norm: Any) -> Tensor:
    """Return the norm of the full gradients from the one that clipping returned, maybe sharded."""
    full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full
