"""ResNeXt for photographs (Xie et al., 2017, table 1): bottlenecks with grouped convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apollo_bench.workloads.image_classification.initialization import he_initialization

# bottlenecks in each of the four stages
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 and a shortcut; (n, inputs, h, w) -> (n, outputs, h/s, w/s)."""

    def __init__(self, inputs: int, inner: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        # the stride stands here, not in the first convolution
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return torch.relu(y + self.shortcut(x))


class ResNeXt(nn.Module):
    """A 7x7 stem that quarters the image, four stages of bottlenecks, mean, classifier."""

    output = "classifier"  # the layer of the logits

    def __init__(
        self,
        stages: tuple[int, ...],
        groups: int,
        group_width: int,
        in_channels: int,
        classes: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = 64
        for stage, blocks in enumerate(stages):
            inner = groups * group_width << stage
            outputs = 64 * _EXPANSION << stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, inner, outputs, groups, stride))
                channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        he_initialization(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images, shape (n, in_channels, height, width), to logits, shape (n, classes)."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def resnext(
    depth: int, groups: int = 32, group_width: int = 4, in_channels: int = 3, classes: int = 1000
) -> ResNeXt:
    """Build ResNeXt-``depth`` ``groups`` x ``group_width``d, drawn from torch's global generator.

    Args:
        depth: 50 or 101 layers.
        groups: of the 3x3 convolutions (the cardinality); the paper's is 32.
        group_width: channels of a group in the first stage; the paper's is 4.
        in_channels: of the images.
        classes: logits.

    Raises:
        ValueError: another depth.
    """
    if depth not in STAGES:
        raise ValueError(f"depth is {depth}, allowed are {', '.join(map(str, STAGES))}")
    return ResNeXt(STAGES[depth], groups, group_width, in_channels, classes)
