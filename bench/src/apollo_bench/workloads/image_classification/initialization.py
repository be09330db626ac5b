"""Initialization of He et al. (2015): normal weights of variance 2 / fan, biases 0."""

from __future__ import annotations

from torch import nn


def he_initialization(network: nn.Module) -> None:
    """Draw every convolution from torch's global generator, and set the biases to zero.

    The fan is outputs x kernel area, also for grouped convolutions, as in the published
    implementations of ResNet and ResNeXt. The classifier keeps torch's weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
