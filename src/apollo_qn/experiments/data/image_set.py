"""A set of small images, decoded."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImageSet(NamedTuple):
    """Images as they lie on the disk, decoded."""

    train_images: Tensor  # shape=(train, channels, height, width), dtype=uint8
    train_labels: Tensor  # shape=(train,), dtype=int64
    test_images: Tensor  # shape=(test, channels, height, width), dtype=uint8
    test_labels: Tensor  # shape=(test,), dtype=int64
    fingerprint: str  # of the files' bytes or of the pixels: which data a run has seen
