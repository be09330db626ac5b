"""A set of small decoded images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apollo_bench.errors import ExperimentError


class ImageSet(NamedTuple):
    """Decoded images, as they are on disk."""

    train_images: Tensor  # shape=(train, channels, height, width), dtype=uint8
    train_labels: Tensor  # shape=(train,), dtype=int64
    test_images: Tensor  # shape=(test, channels, height, width), dtype=uint8
    test_labels: Tensor  # shape=(test,), dtype=int64
    fingerprint: str  # of the files or of the pixels; identifies the data of a run
    published: bool = False  # whether the files are known to be the published ones

    @classmethod
    def of_pixels(
        cls, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
    ) -> ImageSet:
        """Return a set whose fingerprint is that of its pixels and labels."""
        digest = hashlib.sha256()
        for values in (train_images, train_labels, test_images, test_labels):
            digest.update(repr(tuple(values.shape)).encode())
            digest.update(values.contiguous().numpy().data)
        return cls(train_images, train_labels, test_images, test_labels, digest.hexdigest())


def checked_labels(values: Sequence[Any], classes: int | None, where: str) -> Tensor:
    """Return labels as an int64 tensor.

    Args:
        values: the labels.
        classes: number of classes; None: any.
        where: name of the labels in errors; the row is added.

    Raises:
        ExperimentError: a label is not an integer from 0 to ``classes`` - 1.
    """
    for number, value in enumerate(values):
        if not isinstance(value, int) or value < 0 or (classes is not None and value >= classes):
            allowed = "0, 1, 2, ..." if classes is None else f"0 to {classes - 1}"
            raise ExperimentError(f"{where}, row {number}: label {value!r}, allowed are {allowed}")
    return torch.tensor(values, dtype=torch.int64)
