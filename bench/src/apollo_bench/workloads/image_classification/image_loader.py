"""Images of any size, decoded for each use in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

import numpy
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from apollo_bench.errors import ExperimentError
from apollo_bench.seeds import derived_seed
from apollo_bench.workloads.image_classification.cropping import center_crop, random_resized_crop
from apollo_bench.workloads.image_classification.encoded_images import (
    EncodedImages,
    EncodedImageSet,
)
from apollo_bench.workloads.image_classification.image_decoding import decode
from apollo_bench.workloads.image_classification.image_settings import PhotographData
from apollo_bench.workloads.image_classification.image_source import (
    BatchRequest,
    ImageBatch,
    rank_part,
)

_EVALUATION_PIXELS = 1 << 23  # per batch: 167 images of 224 x 224


class DecodingImageSource:
    """An image source that decodes and crops encoded images in worker processes.

    A decoded image is a function of seed, epoch and image, whichever process decodes it.

    Args:
        images: encoded images.
        mean: mean of each channel of the training images, in units of the brightest pixel.
        std: standard deviation of each channel, likewise.
        data: subset and augmentation.
        device: device of the batches.
        workers: worker processes; 0: this process.
    """

    channels = 3

    def __init__(
        self,
        images: EncodedImageSet,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        data: PhotographData,
        device: torch.device,
        workers: int,
    ) -> None:
        count = len(images.train.labels)
        self.train_size, held_out = rank_part(count, data)
        self.fingerprint = images.fingerprint
        self.classes = images.classes
        self._data, self._device, self._workers = data, device, workers
        self._mean, self._std = (
            torch.tensor(values, device=device).reshape(1, -1, 1, 1) for values in (mean, std)
        )
        self._train = images.train
        # Files are sorted by class. Shuffled once, their first or last n are a fair sample.
        mixed = torch.randperm(count, generator=Generator().manual_seed(0))
        self._order = mixed[: self.train_size]
        if data.validation:
            self._evaluated, self._evaluation_order = images.train, mixed[held_out:]
        else:
            self._evaluated, self._evaluation_order = (
                images.test,
                torch.arange(len(images.test.labels)),
            )

    def training(self, steps: Iterable[BatchRequest]) -> Iterator[ImageBatch]:
        """Yield random resized crops, mirrored at random."""
        requests = (
            _Request(self._order[step.examples[step.part]].tolist(), step.seed[:2])
            for step in steps
        )
        return self._decoded(self._train, requests)

    def evaluation(self, rank: int, world: int) -> Iterator[ImageBatch]:
        """Yield center crops of the test images, or of the held-out training images."""
        images = self._evaluation_order[rank::world].tolist()
        count = max(1, _EVALUATION_PIXELS // self._data.size**2)
        requests = (
            _Request(images[start : start + count], None) for start in range(0, len(images), count)
        )
        return self._decoded(self._evaluated, requests)

    def _decoded(self, images: EncodedImages, requests: Iterator[_Request]) -> Iterator[ImageBatch]:
        loader = DataLoader(
            _Decoder(images, self._data),
            batch_size=None,
            sampler=requests,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # a generator of its own: the default one would draw from torch's global generator
            generator=Generator(),
        )
        for pixels, labels, error in loader:
            if error:
                raise ExperimentError(error)
            batch = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            normalised = (batch.float().div(255) - self._mean) / self._std
            yield normalised, labels.to(self._device, non_blocking=True)


class _Request(NamedTuple):
    """Images to decode together."""

    images: list[int]
    seed: tuple[int, ...] | None  # of the crops; None: their centres


class _Decoder(Dataset[tuple[Tensor, Tensor, str]]):
    def __init__(self, images: EncodedImages, data: PhotographData) -> None:
        self._images, self._data = images, data

    def __getitem__(self, request: _Request) -> tuple[Tensor, Tensor, str]:
        """Return pixels, shape (n, size, size, 3), labels, and an error message or ""."""
        data = self._data
        pixels = numpy.zeros((len(request.images), data.size, data.size, 3), dtype=numpy.uint8)
        error = ""
        try:
            for row, index in enumerate(request.images):
                image = decode(self._images.read(index), self._images.where(index))
                if request.seed is None:
                    square = center_crop(image, data.test_resize, data.size)
                else:
                    random = Random(derived_seed(*request.seed, index))
                    square = random_resized_crop(image, data.size, data.min_area, data.flip, random)
                pixels[row] = numpy.asarray(square)
        except ExperimentError as raised:
            # an exception of a worker would have its whole traceback as message
            error = str(raised)
        return torch.from_numpy(pixels), self._images.labels[request.images], error
