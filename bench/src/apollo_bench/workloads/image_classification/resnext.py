"""ResNeXt for photographs (Xie et al., 2017, table 1): bottlenecks with grouped convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apollo_bench.workloads.image_classification.residual_network import (
    ResidualNetwork,
    shortcut,
    stages_and_strides,
)

# number of bottlenecks in each of the four stages
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 and a shortcut; (n, inputs, h, w) -> (n, outputs, h/s, w/s)."""

    def __init__(self, inputs: int, inner: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        # the stride is here, not in the first convolution
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return torch.relu(y + self.shortcut(x))


class ResNeXt(ResidualNetwork):
    """A 7x7 stem that quarters the image, four stages of bottlenecks, mean, classifier."""

    def __init__(
        self,
        stages: tuple[int, ...],
        groups: int,
        group_width: int,
        in_channels: int,
        classes: int,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = 64
        for stage, stride in stages_and_strides(stages):
            inner = groups * group_width << stage
            outputs = 64 * _EXPANSION << stage
            layers.append(Bottleneck(channels, inner, outputs, groups, stride))
            channels = outputs
        super().__init__(layers, channels, classes)


def resnext(
    depth: int, groups: int = 32, group_width: int = 4, in_channels: int = 3, classes: int = 1000
) -> ResNeXt:
    """Build ResNeXt-``depth`` ``groups`` x ``group_width``d, drawn from torch's global generator.

    Args:
        depth: 50 or 101 layers.
        groups: groups of the 3x3 convolutions (the cardinality); the paper's is 32.
        group_width: channels of a group in the first stage; the paper's is 4.
        in_channels: channels of the images.
        classes: number of classes.

    Raises:
        ValueError: another depth.
    """
    if depth not in STAGES:
        raise ValueError(f"depth is {depth}, allowed are {', '.join(map(str, STAGES))}")
    return ResNeXt(STAGES[depth], groups, group_width, in_channels, classes)
