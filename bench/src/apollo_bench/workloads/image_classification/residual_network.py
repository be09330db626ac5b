"""The parts that ResNet and ResNeXt share: stages, shortcuts, classifier and initialization."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn


class ResidualNetwork(nn.Module):
    """Features, their mean over all pixels, and a linear classifier.

    Args:
        features: stem and blocks, applied one after another.
        channels: channels of the last block.
        classes: number of classes.
    """

    output = "classifier"  # the layer of the logits

    def __init__(self, features: Iterable[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(channels, classes)
        he_initialization(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, shape (n, in_channels, height, width), to logits, shape (n, classes)."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def stages_and_strides(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the stage and the stride of each block; every stage but the first halves the image.

    Example:
        >>> list(stages_and_strides([1, 2]))
        [(0, 1), (1, 2), (1, 1)]

    Args:
        blocks: number of blocks of each stage.
    """
    for stage, count in enumerate(blocks):
        for block in range(count):
            yield stage, 2 if stage > 0 and block == 0 else 1


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the identity, or a 1x1 convolution if the shape changes, as in the authors' release.

    Args:
        inputs: channels before the block.
        outputs: channels after the block.
        stride: stride of the block.
    """
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def he_initialization(network: nn.Module) -> None:
    """Initialize convolutions by He et al. (2015), from torch's global generator.

    Weights are normal with variance 2 / fan. The fan is outputs x kernel area, also for grouped
    convolutions, as in the published implementations of ResNet and ResNeXt. The classifier keeps
    torch's weights; its bias is zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
