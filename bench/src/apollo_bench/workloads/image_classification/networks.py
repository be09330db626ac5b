"""The networks of image classification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from apollo_bench.workloads.image_classification.resnet import resnet
from apollo_bench.workloads.image_classification.resnext import resnext

if TYPE_CHECKING:
    from apollo_bench.config.schema import ResNetModel, ResNeXtModel


def build_network(model: ResNetModel | ResNeXtModel, in_channels: int, classes: int) -> nn.Module:
    """Make the network of a recipe, drawn from torch's global generator."""
    from apollo_bench.config.schema import ResNetModel  # not needed for a network itself

    if isinstance(model, ResNetModel):
        return resnet(model.depth, model.width, in_channels, classes)
    return resnext(model.depth, model.groups, model.group_width, in_channels, classes)
