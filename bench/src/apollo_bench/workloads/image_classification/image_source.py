"""The contract between an image workload and its data, in memory or decoded on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from apollo_bench.workloads.image_classification.image_settings import ImageData

ImageBatch = tuple[Tensor, Tensor]  # normalized images (n, channels, height, width), labels (n,)


class BatchRequest(NamedTuple):
    """The examples of one training step, and the part of them for this process."""

    examples: Tensor  # shape=(batch size,), dtype=int64: of the training split, on the CPU
    part: slice  # of the examples
    seed: tuple[int, int, int]  # of the run; epoch; step


class ImageSource(Protocol):
    """Images and labels of a training split and of an evaluation split."""

    fingerprint: str  # which data a run has seen
    classes: int
    channels: int
    train_size: int

    def training(self, steps: Iterable[BatchRequest]) -> Iterator[ImageBatch]:
        """Yield the parts of these steps, augmented by seed, epoch, step and example only."""

    def evaluation(self, rank: int, world: int) -> Iterator[ImageBatch]:
        """Yield every ``world``-th image to evaluate on, from the ``rank``-th on, unaugmented."""


def split_bounds(images: int, examples: ImageData) -> tuple[int, int]:
    """Return the number of training images, and the index of the first held-out image.

    Args:
        images: number of labelled images outside the test data.
        examples: how many of them to train on and to hold out.
    """
    held_out = images - examples.validation
    return max(0, min(held_out, examples.train_examples or held_out)), held_out
