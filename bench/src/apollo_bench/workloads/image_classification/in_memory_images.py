"""Images of one size, kept decoded in the memory of the CPU or of an accelerator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor

from apollo_bench.seeds import derived_seed
from apollo_bench.workloads.image_classification.augmentation import crop_and_flip, draw_shifts
from apollo_bench.workloads.image_classification.image_set import ImageSet
from apollo_bench.workloads.image_classification.image_settings import SmallImageData
from apollo_bench.workloads.image_classification.image_source import (
    BatchRequest,
    ImageBatch,
    split_bounds,
)

_EVALUATION_BATCH = 500


class InMemoryImageSource:
    """An image set on a device, where it is cropped and normalized batch by batch.

    Args:
        images: the set.
        classes: number of classes.
        data: subset and augmentation.
        device: device of the images and of the batches.
    """

    def __init__(
        self, images: ImageSet, classes: int, data: SmallImageData, device: torch.device
    ) -> None:
        self.train_size, held_out = split_bounds(len(images.train_images), data)
        self.fingerprint = images.fingerprint
        self.classes = classes
        self.channels = images.train_images.shape[1]
        self._padding, self._flip = data.crop_padding, data.flip
        used = images.train_images[: self.train_size]
        mean, std = pixel_statistics(used)
        self._mean, self._std = mean.to(device), std.to(device)
        self._images = used.to(device)
        self._labels = images.train_labels[: self.train_size].to(device)
        evaluated = (
            (images.train_images[held_out:], images.train_labels[held_out:])
            if data.validation
            else (images.test_images, images.test_labels)
        )
        self._evaluated = evaluated[0].to(device), evaluated[1].to(device)

    def training(self, steps: Iterable[BatchRequest]) -> Iterator[ImageBatch]:
        """Yield images that are shifted and mirrored at random."""
        device = self._images.device
        for step in steps:
            generator = Generator().manual_seed(derived_seed(*step.seed))
            # drawn for the whole batch: an image's crop does not depend on the number of processes
            shifts = draw_shifts(len(step.examples), self._padding, self._flip, generator)
            chosen = step.examples[step.part].to(device, non_blocking=True)
            cut = crop_and_flip(self._images[chosen], shifts.part(step.part, device), self._padding)
            yield self._normalized(cut), self._labels[chosen]

    def evaluation(self, rank: int, world: int) -> Iterator[ImageBatch]:
        """Yield the test set, or the held-out training images."""
        images, labels = (values[rank::world] for values in self._evaluated)
        for start in range(0, len(images), _EVALUATION_BATCH):
            part = slice(start, start + _EVALUATION_BATCH)
            yield self._normalized(images[part]), labels[part]

    def _normalized(self, images: Tensor) -> Tensor:
        pixels = (images.float().div(255) - self._mean) / self._std
        return pixels.contiguous(memory_format=torch.channels_last)


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, in units of the brightest pixel.

    Args:
        images: shape (n, channels, height, width), uint8.

    Returns:
        Two float32 tensors of shape (1, channels, 1, 1), from exact sums: the same on any machine.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    statistics = []
    for channel in images.unbind(1):
        count = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (count * values).sum() / count.sum()
        squares = (count * (values - mean) ** 2).sum()
        statistics.append((mean, (squares / (count.sum() - 1)).sqrt()))
    mean, std = torch.tensor(statistics).T.float().reshape(2, 1, -1, 1, 1)
    return mean, std
