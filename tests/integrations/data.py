"""Real data for tiny trainings."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist


@cache
def images() -> tuple[Tensor, Tensor]:
    """Return 640 images of Fashion-MNIST, every other pixel, shape (640, 196), and labels."""
    found = fashion_mnist.load()
    pixels = found.train_images[:640, 0, ::2, ::2].float() / 255
    return pixels.flatten(1), found.train_labels[:640]


def batch(t: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return batch ``t``, cyclically."""
    inputs, labels = images()
    at = torch.arange(t * size, (t + 1) * size) % len(inputs)
    return inputs[at], labels[at]


def network(normalized: bool = False) -> nn.Sequential:
    """Return a network with the same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(16)] if normalized else []
        return nn.Sequential(nn.Linear(196, 16), *middle, nn.ReLU(), nn.Linear(16, 10))


def loss_of(model: nn.Module, t: int) -> Tensor:
    inputs, labels = batch(t)
    return functional.cross_entropy(model(inputs), labels)
