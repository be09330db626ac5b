"""Images of any size, decoded for each use in worker processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from apollo_bench.errors import ExperimentError, first_line
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
    split_bounds,
)

_EVALUATION_PIXELS = 1 << 23  # per batch: 167 images of 224 x 224
_PREFETCH = 2  # batches per worker; DataLoader's default
_TIMEOUT = 600.0  # seconds for a batch
_SHARED_MEMORY = "/dev/shm"
_SHARE = 0.25  # of the free shared memory; other runs need some too

# pixels, labels and an error message
_DecodedBatch = tuple[Tensor | NDArray[numpy.uint8], Tensor | NDArray[numpy.int64], str]


class DecodingImageSource:
    """An image source that decodes and crops encoded images in worker processes.

    A decoded image is a function of seed, epoch and image, whichever process decodes it.

    Args:
        images: encoded images.
        mean: mean of each channel of the training images, in units of the brightest pixel.
        std: standard deviation of each channel, in the same unit.
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
        self.train_size, held_out = split_bounds(count, data)
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
        first = next(requests, None)
        if first is None:
            return
        size = len(first.images) * 3 * self._data.size**2
        loader = DataLoader(
            _Decoder(images, self._data, fits_shared_memory(size, self._workers)),
            batch_size=None,
            sampler=itertools.chain([first], requests),
            num_workers=self._workers,
            collate_fn=_unchanged,
            pin_memory=self._device.type == "cuda",
            timeout=_TIMEOUT if self._workers else 0,
            # a generator of its own: the default one would draw from torch's global generator
            generator=Generator(),
        )
        for pixels, labels, error in _with_readable_errors(loader):
            if error:
                raise ExperimentError(error)
            batch = torch.as_tensor(pixels).to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            normalized = (batch.float().div(255) - self._mean) / self._std
            yield normalized, torch.as_tensor(labels).to(self._device, non_blocking=True)


def fits_shared_memory(size: int, workers: int) -> bool:
    """Return whether batches of a size in bytes can pass through shared memory.

    A container has 64 MB of it by default. Where it is full, a worker waits for ever or is killed.
    """
    try:
        free = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return True  # not Linux
    in_flight = workers * _PREFETCH + 1
    return size * in_flight <= _SHARE * free.f_bavail * free.f_frsize


def _unchanged(batch: Any) -> Any:
    """Return a batch as it is; DataLoader would make tensors of arrays."""
    return batch


def _with_readable_errors(loader: Iterable[_DecodedBatch]) -> Iterator[_DecodedBatch]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise ExperimentError(
                f"the processes that decode images do not answer ({first_line(error)}); check "
                "memory, shared memory (/dev/shm) and the disk"
            ) from None
        yield batch


class _Request(NamedTuple):
    """Images to decode together."""

    images: list[int]
    seed: tuple[int, ...] | None  # of the crops; None: their centers


class _Decoder(Dataset[_DecodedBatch]):
    """Decodes requests; as tensors they pass through shared memory, as arrays through a pipe."""

    def __init__(self, images: EncodedImages, data: PhotographData, as_tensors: bool) -> None:
        self._images, self._data, self._as_tensors = images, data, as_tensors

    def __getitem__(self, request: _Request) -> _DecodedBatch:
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
            # returned, because the message of a worker's exception is its whole traceback
            error = str(raised)
        labels = self._images.labels[request.images]
        if self._as_tensors:
            return torch.from_numpy(pixels), labels, error
        return pixels, labels.numpy(), error
