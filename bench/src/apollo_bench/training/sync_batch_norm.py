"""Batch normalization over the batches of all processes, also on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def convert_sync_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch normalization use the mean and variance over all processes.

    A batch then trains the network in many processes as in one. Parameters, buffers and their names
    stay the same.

    Args:
        network: changed in place.
        device: device of the network.

    Returns:
        The network.
    """
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _BatchNorm2d  # replaces forward, keeps parameters and settings
    return network


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization over all processes; ``nn.SyncBatchNorm`` works on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = _sum(torch.cat([x.sum((0, 2, 3)), count]))
        count = sums[-1]
        mean = sums[:-1] / count
        centered = x - mean[:, None, None]
        variance = _sum(centered.square().sum((0, 2, 3))) / count
        self._update_running(mean.detach(), variance.detach(), count.detach())
        scale = torch.rsqrt(variance + self.eps) * self.weight
        y: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return y.to(dtype)

    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        for running, now in (
            (self.running_mean, mean),
            (self.running_var, variance * count / (count - 1)),
        ):
            running.lerp_(now.to(running), self.momentum)


class _Sum(torch.autograd.Function):
    """Sum over all processes; the loss of every process depends on the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def _sum(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total
