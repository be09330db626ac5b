"""The workload of image classification."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from apollo_bench.available_cores import available_cores
from apollo_bench.errors import ExperimentError
from apollo_bench.seeds import derived_seed
from apollo_bench.workloads.batch_shares import share_of_batch
from apollo_bench.workloads.custom_model import CustomModel
from apollo_bench.workloads.image_classification import (
    cifar10,
    custom_images,
    fashion_mnist,
    imagenet,
    networks,
)
from apollo_bench.workloads.image_classification.encoded_images import EncodedImageSet
from apollo_bench.workloads.image_classification.image_loader import DecodingImageSource
from apollo_bench.workloads.image_classification.image_set import ImageSet
from apollo_bench.workloads.image_classification.image_settings import (
    ImageFolderData,
    PhotographData,
    SmallImageData,
)
from apollo_bench.workloads.image_classification.image_source import (
    BatchRequest,
    ImageBatch,
    ImageSource,
)
from apollo_bench.workloads.image_classification.in_memory_images import InMemoryImageSource
from apollo_bench.workloads.workload import Batch, HiddenState, Metric, Resources, WorkloadSpec

ACCURACY = Metric("accuracy", "test accuracy", "%", higher_is_better=True)


class ImageClassification:
    """Image classification: cross entropy, and accuracy in percent on held-out images.

    Args:
        source: the images.
        model: settings of the network.
        batch_size: images per step, over all processes; a last incomplete batch is dropped.

    Raises:
        ExperimentError: there are fewer images than one batch.
    """

    monitored = final = ACCURACY
    has_final_test = False
    unit = "images"

    def __init__(self, source: ImageSource, model: networks.ImageModel, batch_size: int) -> None:
        if source.train_size < batch_size:
            raise ExperimentError(
                f"{source.train_size} training images are left, fewer than one batch of "
                f"{batch_size}; check data.validation, data.train_examples and train.batch_size"
            )
        self.fingerprint = source.fingerprint
        self.remarks: list[str] = []
        self.published = False
        self.batch_size = batch_size
        self.units_per_step = float(batch_size)
        self.steps_per_epoch = source.train_size // batch_size
        self._source = source
        self._model = model

    def model(self) -> nn.Module:
        """Return a new network; in channels-last memory where that is safe.

        Channels-last memory is a quarter faster on a CPU.
        """
        network = networks.build_network(self._model, self._source.channels, self._source.classes)
        if isinstance(self._model, CustomModel) or _is_narrow(network):
            network.register_forward_pre_hook(_contiguous)
            return network
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def batches(
        self, seed: int, epoch: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[ImageBatch]:
        """Yield images, shape (batch / world, channels, height, width), float32, and their labels.

        Raises:
            ExperimentError: the processes cannot share a batch equally.
        """
        rows = share_of_batch(self.batch_size, rank, world)
        part = slice(rows.start, rows.stop)
        return self._source.training(self._steps(seed, epoch, start, part))

    def _steps(self, seed: int, epoch: int, start: int, part: slice) -> Iterator[BatchRequest]:
        shuffle = Generator().manual_seed(derived_seed(seed, epoch))
        order = torch.randperm(self._source.train_size, generator=shuffle)
        for step in range(start, self.steps_per_epoch):
            examples = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield BatchRequest(examples, part, (seed, epoch, step))

    def loss(
        self, model: nn.Module, part: Batch, batch: Batch, hidden_state: HiddenState
    ) -> tuple[Tensor, HiddenState]:
        """Return the mean cross entropy, weighted by the part's share of the batch."""
        images, labels = part
        loss = functional.cross_entropy(model(images), labels)
        return loss * (len(labels) / len(batch[1])), ()

    def evaluate(
        self, model: nn.Module, rank: int = 0, world: int = 1, final: bool = False
    ) -> Tensor:
        """Return summed loss, correct answers and images on the test or the validation images."""
        total = torch.zeros(3, dtype=torch.float64)
        for images, labels in self._source.evaluation(rank, world):
            logits = model(images)
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(1) == labels).sum()
            sums = torch.stack([loss.double(), right.double(), right.new_tensor(len(labels))])
            total = total.to(sums.device) + sums
        return total

    def metrics(self, sums: Tensor, final: bool = False) -> dict[str, float]:
        """Return accuracy (percent) and mean loss."""
        loss, right, images = sums.tolist()
        return {"accuracy": 100.0 * right / images, "test_loss": loss / images}


def make_fashion_mnist(spec: WorkloadSpec, resources: Resources) -> ImageClassification:
    """Return the Fashion-MNIST workload; raise ExperimentError for bad files."""
    data = _small_images(spec)
    images = fashion_mnist.load(resources.folder)
    return _in_memory(images, len(fashion_mnist.CLASSES), spec, data, resources)


def make_cifar10(spec: WorkloadSpec, resources: Resources) -> ImageClassification:
    """Return the CIFAR-10 workload; raise ExperimentError for bad files."""
    data = _small_images(spec)
    images = cifar10.load(resources.folder)
    return _in_memory(images, len(cifar10.CLASSES), spec, data, resources)


def make_imagenet(spec: WorkloadSpec, resources: Resources) -> ImageClassification:
    """Return the ImageNet workload; raise ExperimentError for bad files."""
    if not isinstance(spec.data, PhotographData):
        raise _wrong_kind(spec, "photographs")
    return _decoded(imagenet.load(resources.folder), spec, spec.data, resources)


def make_image_folder(spec: WorkloadSpec, resources: Resources) -> ImageClassification:
    """Make the workload of the user's images; raise ExperimentError for bad files."""
    if not isinstance(spec.data, ImageFolderData):
        raise _wrong_kind(spec, "image-folder")
    images = custom_images.load(resources.folder, spec.data.test_share)
    return _decoded(images, spec, spec.data, resources)


def _decoded(
    images: EncodedImageSet, spec: WorkloadSpec, data: PhotographData, resources: Resources
) -> ImageClassification:
    workers = available_cores() if resources.workers is None else resources.workers
    source = DecodingImageSource(
        images, imagenet.MEAN, imagenet.STD, data, resources.device, workers
    )
    workload = ImageClassification(source, _network(spec), spec.train.batch_size)
    workload.remarks += images.remarks
    workload.published = images.published
    return workload


def _in_memory(
    images: ImageSet, classes: int, spec: WorkloadSpec, data: SmallImageData, resources: Resources
) -> ImageClassification:
    source = InMemoryImageSource(images, classes, data, resources.device)
    workload = ImageClassification(source, _network(spec), spec.train.batch_size)
    workload.published = images.published
    return workload


def _small_images(spec: WorkloadSpec) -> SmallImageData:
    if not isinstance(spec.data, SmallImageData):
        raise _wrong_kind(spec, "small-images")
    return spec.data


def _network(spec: WorkloadSpec) -> networks.ImageModel:
    if not isinstance(spec.model, networks.ImageModel):
        raise ExperimentError(
            f"model.family is {spec.model.family!r}, the task {spec.task} needs 'resnet', "
            "'resnext' or 'custom'"
        )
    return spec.model


def _wrong_kind(spec: WorkloadSpec, needed: str) -> ExperimentError:
    return ExperimentError(
        f"data.kind is {spec.data.kind!r}, the task {spec.task} needs {needed!r}"
    )


def _is_narrow(network: nn.Module) -> bool:
    """Return whether channels-last memory is unsafe.

    The backward pass of a strided 1x1 convolution of fewer than 8 channels then writes beyond its
    memory on processors with AVX2 (torch 2.13, oneDNN).
    """
    return any(
        module.kernel_size == (1, 1) and module.stride != (1, 1) and module.in_channels < 8
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    )


def _contiguous(_: nn.Module, images: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # a copy: contiguous() would keep the channels-last strides of images with one channel
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in images)
