"""The networks of image classification."""

from __future__ import annotations

from torch import nn

from apollo_bench.workloads.custom_model import CustomModel, make_model
from apollo_bench.workloads.image_classification.image_settings import ResNetModel, ResNeXtModel
from apollo_bench.workloads.image_classification.resnet import resnet
from apollo_bench.workloads.image_classification.resnext import resnext

ImageModel = ResNetModel | ResNeXtModel | CustomModel


def build_network(model: ImageModel, in_channels: int, classes: int) -> nn.Module:
    """Make the network of a recipe, drawn from torch's global generator."""
    if isinstance(model, CustomModel):
        return make_model(model, in_channels=in_channels, classes=classes)
    if isinstance(model, ResNetModel):
        return resnet(model.depth, model.width, in_channels, classes)
    return resnext(model.depth, model.groups, model.group_width, in_channels, classes)
