"""Classification of small images that live decoded in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from apollo_qn.experiments.data import fashion_mnist
from apollo_qn.experiments.data.augment import crop_and_flip
from apollo_qn.experiments.data.fashion_mnist import ImageSet
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.models.resnet import resnet
from apollo_qn.experiments.recipe import Data, Model
from apollo_qn.experiments.tasks.base import Batch, derived_seed

_EVALUATION_BATCH = 500


class ImageTask:
    """Images to classes; cross entropy; accuracy in percent on images never trained on.

    Args:
        images: the set, uint8.
        classes: how many.
        model: which network.
        data: which part of the set, and the augmentation.
        batch_size: images in a step; what is left over at an epoch's end is dropped.

    Raises:
        ExperimentError: fewer images than one batch.
    """

    def __init__(
        self, images: ImageSet, classes: int, model: Model, data: Data, batch_size: int
    ) -> None:
        held_out = len(images.train_images) - data.validation
        count = min(held_out, data.train_examples or held_out)
        if count < batch_size:
            raise ExperimentError(
                f"{max(count, 0)} training images are left, fewer than one batch of {batch_size}; "
                "check data.validation, data.train_examples and train.batch_size"
            )
        self.fingerprint = images.fingerprint
        self.batch_size = batch_size
        self.steps_per_epoch = count // batch_size
        self._classes = classes
        self._model = model
        self._data = data
        self._images, self._labels = images.train_images[:count], images.train_labels[:count]
        pixels = self._images.float().div(255)
        self._mean = pixels.mean(dim=(0, 2, 3), keepdim=True)
        self._std = pixels.std(dim=(0, 2, 3), keepdim=True)
        if data.validation:
            evaluation = images.train_images[held_out:], images.train_labels[held_out:]
        else:
            evaluation = images.test_images, images.test_labels
        self._evaluation = self._normalised(evaluation[0]), evaluation[1]

    def _normalised(self, images: Tensor) -> Tensor:
        pixels = (images.float().div(255) - self._mean) / self._std
        return pixels.contiguous(memory_format=torch.channels_last)

    def model(self) -> nn.Module:
        """A new network in channels-last memory, a quarter faster on the CPU."""
        channels = self._images.shape[1]
        network = resnet(self._model.depth, self._model.width, channels, self._classes)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """Images, shape (batch, channels, height, width), float32, and labels, shape (batch,)."""
        shuffle = Generator().manual_seed(derived_seed(seed, epoch))
        order = torch.randperm(len(self._images), generator=shuffle)
        for step in range(start, self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            generator = Generator().manual_seed(derived_seed(seed, epoch, step))
            cut = crop_and_flip(
                self._images[chosen], self._data.crop_padding, self._data.flip, generator
            )
            yield self._normalised(cut), self._labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy (percent) and mean loss on the whole test set, or the validation images."""
        images, labels = self._evaluation
        loss, right = 0.0, 0
        for start in range(0, len(images), _EVALUATION_BATCH):
            part = slice(start, start + _EVALUATION_BATCH)
            logits = model(images[part])
            loss += float(functional.cross_entropy(logits, labels[part], reduction="sum"))
            right += int((logits.argmax(1) == labels[part]).sum())
        return {"accuracy": 100.0 * right / len(images), "test_loss": loss / len(images)}


def fashion(model: Model, data: Data, batch_size: int, folder: Path | None) -> ImageTask:
    """Fashion-MNIST: embedded, or whole from ``folder``; raises ExperimentError for bad files."""
    images = fashion_mnist.load(folder)
    return ImageTask(images, len(fashion_mnist.CLASSES), model, data, batch_size)
