"""Residual networks for small images (He et al., 2016, section 4.2): 6n + 2 layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apollo_bench.workloads.image_classification.residual_network import (
    ResidualNetwork,
    shortcut,
    stages_and_strides,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; shape (n, inputs, h, w) -> (n, outputs, h/s, w/s)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class ResNet(ResidualNetwork):
    """ResNet-(6n + 2): three stages of n blocks with width, 2 width and 4 width channels."""

    def __init__(self, blocks: int, width: int, in_channels: int, classes: int) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
        for stage, stride in stages_and_strides([blocks] * 3):
            layers.append(BasicBlock(channels, width << stage, stride))
            channels = width << stage
        super().__init__(layers, channels, classes)


def resnet(depth: int, width: int = 16, in_channels: int = 3, classes: int = 10) -> ResNet:
    """Build ResNet-``depth``, drawn from torch's global generator.

    Args:
        depth: 6n + 2 layers, n >= 1: 8, 14, 20, ..., 110.
        width: channels of the first stage; the paper's is 16.
        in_channels: channels of the images.
        classes: number of classes.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth is {depth}, allowed are 8, 14, 20, ... (6n + 2)")
    return ResNet((depth - 2) // 6, width, in_channels, classes)
