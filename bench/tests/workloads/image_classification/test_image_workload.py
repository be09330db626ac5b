"""The image workload: batches, their parts, loss and metrics."""

from __future__ import annotations

import pytest
import torch

from apollo_bench.config import recipe
from apollo_bench.errors import ExperimentError
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_bench.workloads.image_classification.image_settings import (
    PhotographData,
    ResNetModel,
    ResNeXtModel,
    SmallImageData,
)
from apollo_bench.workloads.image_classification.image_workload import ImageClassification
from apollo_bench.workloads.image_classification.in_memory_images import InMemoryImageSource

MODEL = ResNetModel(family="resnet", depth=8, width=2)


def task_of(data: SmallImageData, batch_size: int) -> ImageClassification:
    source = InMemoryImageSource(fashion_mnist.load(), 10, data, torch.device("cpu"))
    return ImageClassification(source, MODEL, batch_size)


def test_batches_are_a_function_of_seed_epoch_and_step() -> None:
    task = task_of(SmallImageData(train_examples=100), 32)
    assert task.steps_per_epoch == 3
    whole = list(task.batches(1, 4, 0))
    rest = list(task.batches(1, 4, 2))
    assert len(whole) == 3
    assert len(rest) == 1
    assert all(torch.equal(one, two) for one, two in zip(whole[2], rest[0], strict=True))
    for other in (task.batches(2, 4, 0), task.batches(1, 5, 0)):
        assert not torch.equal(next(other)[0], whole[0][0])


def test_an_epoch_shows_every_training_image_once() -> None:
    images = fashion_mnist.load()
    plain = SmallImageData(train_examples=96, crop_padding=0, flip=False)
    task = task_of(plain, 32)
    shown = torch.cat([batch[0] for batch in task.batches(1, 0, 0)])
    pixels = images.train_images[:96].float() / 255
    expected = (pixels - pixels.mean()) / pixels.std()
    one, two = (sorted(map(tuple, values.flatten(1).tolist())) for values in (shown, expected))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two))


class Recorder(torch.nn.Module):
    """Records its inputs and always predicts class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10).float()


@pytest.mark.parametrize("validation", [0, 500])
def test_evaluation_sees_the_untouched_held_out_images(validation: int) -> None:
    images = fashion_mnist.load()
    task = task_of(SmallImageData(validation=validation), 64)
    recorder = Recorder()
    metrics = task.metrics(task.evaluate(recorder))
    trained = images.train_images[: 8000 - validation].float() / 255
    held = images.train_images[-500:] if validation else images.test_images
    labels = images.train_labels[-500:] if validation else images.test_labels
    expected = (held.float() / 255 - trained.mean()) / trained.std()
    torch.testing.assert_close(torch.cat(recorder.seen), expected)
    assert metrics["accuracy"] == pytest.approx(100 * (labels == 0).float().mean().item())
    assert task.steps_per_epoch == (8000 - validation) // 64


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ExperimentError, match=r"10 training images are left.*batch of 64"):
        task_of(SmallImageData(validation=7990), 64)


@pytest.mark.parametrize("world", [2, 4])
def test_the_parts_of_several_processes_are_the_batch_of_one(world: int) -> None:
    task = task_of(SmallImageData(train_examples=100), 32)
    whole = list(task.batches(1, 4, 1))
    parts = [list(task.batches(1, 4, 1, rank, world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        for values, *shares in zip(batch, *(part[step] for part in parts), strict=True):
            assert {len(share) for share in shares} == {32 // world}
            assert torch.equal(torch.cat(shares), values)


def test_processes_that_cannot_share_a_batch() -> None:
    task = task_of(SmallImageData(train_examples=100), 32)
    with pytest.raises(ExperimentError, match=r"batch_size is 32, which 3 processes cannot share"):
        task.batches(1, 0, 0, 0, 3)


def test_the_tallies_of_several_processes_add_up() -> None:
    task = task_of(SmallImageData(validation=1003), 32)
    torch.manual_seed(0)
    model = task.model().eval()
    with torch.no_grad():
        parts = [task.evaluate(model, rank, 4) for rank in range(4)]
        whole = task.evaluate(model)
        assert [part[2].item() for part in parts] == [251, 251, 251, 250]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    # a process without images adds nothing
    assert task.evaluate(model, 2000, 2001).tolist() == [0, 0, 0]


def test_the_model_is_the_recipes() -> None:
    spec = recipe.load("fashion-mnist").run("sgd", 1)
    assert len(list(tasks.make(spec).model().parameters())) == 9 * 3 + 2
    model = ResNeXtModel(family="resnext", depth=50, groups=2, group_width=4)
    network = tasks.make(spec.model_copy(update={"model": model})).model()
    assert len(list(network.parameters())) == 53 * 3 + 2
    assert next(network.parameters()).shape == (64, 1, 7, 7)


def test_tasks_that_do_not_fit() -> None:
    spec = recipe.load("fashion-mnist").run("sgd", 1)
    with pytest.raises(ExperimentError, match="task is 'mnist', allowed are "):
        tasks.make(spec.model_copy(update={"task": "mnist"}))
    photographs = PhotographData(kind="photographs")
    with pytest.raises(ExperimentError, match="'photographs', the task fashion-mnist needs 'small"):
        tasks.make(spec.model_copy(update={"data": photographs}))


@pytest.mark.parametrize(("width", "channels_last"), [(2, False), (4, False), (8, True)])
def test_memory_of_networks_that_are_narrow(width: int, channels_last: bool) -> None:
    """In channels-last memory the backward pass of a narrow network may write beyond its memory."""
    source = InMemoryImageSource(
        fashion_mnist.load(), 10, SmallImageData(train_examples=32), torch.device("cpu")
    )
    task = ImageClassification(source, ResNetModel(family="resnet", depth=8, width=width), 32)
    network, orders = task.model(), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *given: orders.append(given[-1].stride(1) == 1))
    network(next(task.batches(1, 0, 0))[0])
    assert set(orders) == {channels_last}
