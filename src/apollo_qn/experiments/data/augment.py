"""Augmentation of whole batches that live decoded in memory."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: Generator) -> Tensor:
    """Shift each image at random within a frame of zeros, and mirror half of them.

    Args:
        images: shape (n, channels, height, width), any type; left as it is.
        padding: width of the frame in pixels, >= 0; an image moves by at most as much.
        flip: mirror left and right with probability 1/2.
        generator: the only source of randomness, on the CPU.

    Returns:
        A new tensor of the same shape and type, in channels-last memory.
    """
    n, _, height, width = images.shape
    top = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    columns = torch.arange(width).expand(n, width)
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows = top + torch.arange(height)
    columns = left + columns
    framed = functional.pad(images, (padding, padding, padding, padding))
    picture = torch.arange(n)
    # one gather does both; its result is (n, height, width, channels)
    cut = framed[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)
