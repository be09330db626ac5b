"""Batch normalization over all processes, in a process group of one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apollo_bench.training.sync_batch_norm import convert_sync_batch_norm


@pytest.mark.usefixtures("single_process_group")
def test_one_process_normalizes_as_pytorch_does() -> None:
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4, 5, 3, 3, dtype=torch.float64)
    network = nn.Sequential(nn.BatchNorm2d(5)).double()
    nn.init.uniform_(network[0].weight)
    nn.init.uniform_(network[0].bias)
    converted = convert_sync_batch_norm(copy.deepcopy(network), torch.device("cpu"))
    outputs = [one(x) for one in (network, converted)]
    gradients = [
        torch.autograd.grad(y.square().sum(), list(one.parameters()))
        for one, y in zip((network, converted), outputs, strict=True)
    ]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("single_process_group")
def test_running_statistics_are_pytorchs() -> None:
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(2, 5, 2, 2, dtype=torch.float64)
    network = nn.Sequential(nn.BatchNorm2d(5)).double()
    converted = convert_sync_batch_norm(copy.deepcopy(network), torch.device("cpu"))
    for _ in range(2):
        network(x)
        converted(x)
    torch.testing.assert_close(converted.state_dict(), network.state_dict())
    torch.testing.assert_close(converted.eval()(x), network.eval()(x))
