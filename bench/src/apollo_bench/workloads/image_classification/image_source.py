"""What an image task asks of its data, wherever they live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from apollo_bench.config.schema import ImageData

ImageBatch = tuple[Tensor, Tensor]  # normalised images (n, channels, height, width), labels (n,)


class BatchRequest(NamedTuple):
    """The examples of one step of training, and which of them this process sees."""

    examples: Tensor  # shape=(batch size,), dtype=int64: of the training split, on the CPU
    part: slice  # of the examples
    seed: tuple[int, int, int]  # of the run; epoch; step


class ImageSource(Protocol):
    """Images and labels of a training split, and of the split that is evaluated on."""

    fingerprint: str  # which data a run has seen
    classes: int
    channels: int
    train_size: int

    def training(self, steps: Iterable[BatchRequest]) -> Iterator[ImageBatch]:
        """The parts of these steps, augmented as a function of seed, epoch, step and example."""

    def evaluation(self, rank: int, world: int) -> Iterator[ImageBatch]:
        """The images to evaluate on, as they are; every ``world``-th, from the ``rank``-th on."""


def rank_part(images: int, examples: ImageData) -> tuple[int, int]:
    """How many images are trained on, from the first, and at which the held-out ones begin."""
    held_out = images - examples.validation
    return max(0, min(held_out, examples.train_examples or held_out)), held_out
