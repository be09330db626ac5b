"""The networks of image classification."""

from __future__ import annotations

from torch import nn

from apollo_bench.workloads.image_classification.image_settings import ResNetModel, ResNeXtModel
from apollo_bench.workloads.image_classification.resnet import resnet
from apollo_bench.workloads.image_classification.resnext import resnext


def build_network(model: ResNetModel | ResNeXtModel, in_channels: int, classes: int) -> nn.Module:
    """Make the network of a recipe, drawn from torch's global generator."""
    if isinstance(model, ResNetModel):
        return resnet(model.depth, model.width, in_channels, classes)
    return resnext(model.depth, model.groups, model.group_width, in_channels, classes)
