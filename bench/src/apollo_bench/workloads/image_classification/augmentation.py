"""Augmentation of whole batches of decoded images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional


class CropShifts(NamedTuple):
    """The random shift and mirroring of each image of a batch."""

    top: Tensor  # shape=(n,), dtype=int64, 0 to twice the padding
    left: Tensor  # the same
    mirrored: Tensor  # shape=(n,), dtype=bool

    def part(self, part: slice, device: torch.device) -> CropShifts:
        """Return the shifts of some images of the batch."""
        return CropShifts(*(values[part].to(device, non_blocking=True) for values in self))


def draw_shifts(n: int, padding: int, flip: bool, generator: Generator) -> CropShifts:
    """Draw the shifts of n images; half of the images are mirrored.

    Args:
        n: number of images.
        padding: largest shift in pixels, >= 0.
        flip: whether to mirror.
        generator: the only source of randomness, on the CPU, so that it is the same everywhere.
    """
    top = torch.randint(0, 2 * padding + 1, (n,), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n,), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    return CropShifts(top, left, mirrored if flip else torch.zeros_like(mirrored))


def crop_and_flip(images: Tensor, shifts: CropShifts, padding: int) -> Tensor:
    """Shift each image within a frame of zeros, and mirror left and right.

    Args:
        images: shape (n, channels, height, width), any type, any device; left as it is.
        shifts: of the n images, on their device.
        padding: width of the frame in pixels, the one that the shifts were drawn for.

    Returns:
        A new tensor of the same shape and type, in channels-last memory.
    """
    n, _, height, width = images.shape
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = torch.where(shifts.mirrored[:, None], width - 1 - columns, columns)
    rows = shifts.top[:, None] + torch.arange(height, device=images.device)
    columns = shifts.left[:, None] + columns
    framed = functional.pad(images, (padding, padding, padding, padding))
    picture = torch.arange(n, device=images.device)
    # one gather does both; its result is (n, height, width, channels)
    cut = framed[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)
