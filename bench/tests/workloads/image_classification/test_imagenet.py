"""ImageNet's folder tree: validation before training, and decoding in workers."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from random import Random

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch

from apollo_bench.config import recipe
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.seeds import derived_seed
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification import image_folder, image_loader, imagenet
from apollo_bench.workloads.image_classification.cropping import center_crop, random_resized_crop
from apollo_bench.workloads.image_classification.encoded_images import EncodedImages, ImageFiles
from apollo_bench.workloads.image_classification.image_decoding import decode
from apollo_bench.workloads.image_classification.image_loader import (
    DecodingImageSource,
    fits_shared_memory,
)
from apollo_bench.workloads.image_classification.image_settings import (
    PhotographData,
    ResNetModel,
    SmallImageData,
)
from apollo_bench.workloads.image_classification.image_workload import ImageClassification
from bench.tests.image_trees import WNIDS, jpeg, photograph, write_tree

DATA = PhotographData(kind="photographs", size=24, test_resize=32)
TINY = ResNetModel(family="resnet", depth=8, width=2)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # keep the validation cache out of the user's own
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tree(tmp_path / "imagenet")


def source(tree: Path, data: PhotographData = DATA, workers: int = 0) -> DecodingImageSource:
    return DecodingImageSource(
        imagenet.load(tree),
        imagenet.MEAN,
        imagenet.STD,
        data,
        torch.device("cpu"),
        workers,
    )


def task_of(tree: Path, data: PhotographData = DATA, workers: int = 0) -> ImageClassification:
    return ImageClassification(source(tree, data, workers), TINY, 4)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Return the bytes of normalized images."""
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (imagenet.MEAN, imagenet.STD))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def error_of(tree: Path) -> str:
    with pytest.raises(ExperimentError) as caught:
        imagenet.load(tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tree_is_listed_class_by_class(tree: Path) -> None:
    (tree / "train" / WNIDS[0] / "README.txt").write_text("no image")
    images = imagenet.load(tree)
    assert images.classes == 3
    assert images.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    path = tree / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    assert images.train.where(6) == str(path)
    assert images.train.read(6) == path.read_bytes()


def test_fingerprint_is_of_names_and_sizes(tree: Path, tmp_path: Path) -> None:
    before = imagenet.load(tree).fingerprint
    shutil.copytree(tree, tmp_path / "copy")
    assert imagenet.load(tmp_path / "copy").fingerprint == before
    path = tree / "val" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    path.write_bytes(path.read_bytes() + b"\x00")
    changed = imagenet.load(tree).fingerprint
    assert changed != before
    path.rename(path.with_name("other.JPEG"))
    assert imagenet.load(tree).fingerprint not in (before, changed)


def test_bad_files_are_named_before_training(tree: Path) -> None:
    paths = sorted(tree.glob("train/*/*"))
    first = paths[1].read_bytes()
    paths[1].write_bytes(first[:-100])
    paths[5].write_bytes(b"")
    message = error_of(tree)
    assert f"{paths[1]}: cut short: {len(first) - 100} bytes" in message
    assert f"{paths[5]}: empty" in message
    paths[7].write_bytes(b"hello")
    paths[9].unlink()
    paths[9].symlink_to(tree / "nowhere")
    assert error_of(tree) == f"{paths[9]}: no such file"
    paths[9].unlink()
    assert error_of(tree).endswith(f"{paths[7]}: not an image")
    paths[2].write_bytes(b"")
    assert error_of(tree).endswith("; and 1 more")
    for number, path in enumerate((paths[1], paths[2], paths[5], paths[7])):
        path.write_bytes(jpeg(photograph(number, 40, 40)))
    imagenet.load(tree)


def test_folders_that_are_missing(tree: Path) -> None:
    shutil.rmtree(tree / "val" / WNIDS[2])
    message = error_of(tree)
    assert message.startswith(f"{tree / 'val' / WNIDS[2]}: no such folder, there is {tree}")
    (tree / "val" / WNIDS[2]).mkdir()
    assert error_of(tree).startswith(f"{tree / 'val' / WNIDS[2]}: no images (.jpeg, .jpg, .png)")
    shutil.copy(next(tree.glob("train/*/*")), tree / "val" / WNIDS[2])
    (tree / "val" / "n999").mkdir()
    shutil.copy(next(tree.glob("train/*/*")), tree / "val" / "n999")
    assert error_of(tree).startswith(f"{tree / 'train' / 'n999'}: no such folder")
    shutil.rmtree(tree / "val")
    assert error_of(tree) == (
        f"{tree / 'val'}: no such folder; "
        "--data needs a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG"
    )
    (tree / "val").mkdir()
    assert error_of(tree).startswith(f"{tree / 'val'}: no folders of classes; each image must")
    # the published archive of validation images has no folders
    shutil.copy(next(tree.glob("train/*/*")), tree / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert error_of(tree).startswith(f"{tree / 'val'}: images, but no folders of classes")


def spoil(path: Path, later: bool) -> None:
    """Damage a file without changing its name or size; with ``later`` its time changes."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    moment = status.st_mtime_ns + (1 if later else 0)
    os.utime(path, ns=(moment, moment))


def test_valid_files_are_cached_until_they_change(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imagenet.load(tree)
    (validated,) = (tmp_path / "cache" / "apollo-bench").iterdir()
    read: list[str] = []

    check = image_folder.check_image_file
    monkeypatch.setattr(
        image_folder, "check_image_file", lambda path: (read.append(path.name), check(path))[1]
    )
    imagenet.load(tree)
    assert read == []
    path = tree / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG"
    spoil(path, later=True)
    assert error_of(tree) == f"{path}: not an image"
    assert len(read) == 4  # all images in the folder of this class
    assert error_of(tree) == f"{path}: not an image"
    path.write_bytes(jpeg(photograph(1, 40, 40)))
    imagenet.load(tree)
    spoil(path, later=False)
    assert error_of(tree) == f"{path}: not an image"
    # a damaged cache is ignored
    path.write_bytes(jpeg(photograph(1, 40, 40)))
    for content in ("", "[1, 2]", "{", "null"):
        validated.write_text(content)
        read.clear()
        imagenet.load(tree)
        assert len(read) == 18


def test_a_cache_that_cannot_be_written(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert imagenet.load(tree).classes == 3


def test_training_images_are_random_squares_seeded_by_epoch_and_image(tree: Path) -> None:
    images = imagenet.load(tree)
    task = task_of(tree)
    assert task.steps_per_epoch == 3
    expected = {}
    for index in range(12):
        random = Random(derived_seed(7, 2, index))
        image = decode(images.train.read(index), "")
        square = numpy.asarray(random_resized_crop(image, 24, 0.08, True, random))
        expected[square.transpose(2, 0, 1).tobytes()] = int(images.train.labels[index])
    shown = []
    for batch, labels in task.batches(7, 2, 0):
        assert batch.shape == (4, 3, 24, 24)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for picture, label in zip(pixels(batch), labels, strict=True):
            key = picture.contiguous().numpy().tobytes()
            assert expected[key] == int(label)
            shown.append(key)
    assert sorted(shown) == sorted(expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(tree: Path, workers: int) -> None:
    ours, theirs = task_of(tree), task_of(tree, workers=workers)
    state = torch.get_rng_state()
    for start in (0, 2):
        pairs = zip(ours.batches(1, 3, start), theirs.batches(1, 3, start), strict=True)
        assert [
            all(torch.equal(*values) for values in zip(*pair, strict=True)) for pair in pairs
        ] == [True] * (3 - start)
    model = ours.model().eval()
    torch.set_rng_state(state)
    with torch.no_grad():
        assert torch.equal(ours.evaluate(model), theirs.evaluate(model))
    assert torch.equal(torch.get_rng_state(), state), "drawn from torch's global generator"
    whole = list(ours.batches(1, 3, 0))
    assert torch.equal(next(ours.batches(1, 3, 2))[0], whole[2][0])
    for other in (ours.batches(2, 3, 0), ours.batches(1, 4, 0)):
        assert not torch.equal(next(other)[0], whole[0][0])


def test_the_parts_of_two_processes_are_the_batch_of_one(tree: Path) -> None:
    task = task_of(tree)
    parts = [task.batches(1, 0, 1, rank, 2) for rank in (0, 1)]
    for whole, one, two in zip(task.batches(1, 0, 1), *parts, strict=True):
        for values, left, right in zip(whole, one, two, strict=True):
            assert torch.equal(torch.cat([left, right]), values)
    torch.manual_seed(0)
    model = task.model().eval()
    with torch.no_grad():
        parts = [task.evaluate(model, rank, 4) for rank in range(4)]
        assert [sums[2].item() for sums in parts] == [2, 2, 1, 1]
        torch.testing.assert_close(sum(parts), task.evaluate(model), rtol=1e-6, atol=0)


def test_evaluation_sees_the_centers_of_the_validation_images(tree: Path) -> None:
    images = imagenet.load(tree)
    ((batch, labels),) = source(tree).evaluation(0, 1)
    assert torch.equal(labels, images.test.labels)
    for index, picture in enumerate(pixels(batch)):
        square = center_crop(decode(images.test.read(index), ""), 32, 24)
        assert numpy.array_equal(picture.permute(1, 2, 0).numpy(), numpy.asarray(square))


class Noted:
    """Records which images are read."""

    def __init__(self, images: EncodedImages) -> None:
        self.labels = images.labels
        self.where = images.where
        self._images = images
        self.indices: list[int] = []

    def read(self, index: int) -> bytes:
        self.indices.append(index)
        return self._images.read(index)


def test_held_out_images_are_of_all_classes_and_not_trained_on(tree: Path) -> None:
    data = DATA.model_copy(update={"validation": 4, "train_examples": 6})
    images = imagenet.load(tree)
    noted = Noted(images.train)
    parts = DecodingImageSource(
        images._replace(train=noted),
        imagenet.MEAN,
        imagenet.STD,
        data,
        torch.device("cpu"),
        0,
    )
    ((_, labels),) = parts.evaluation(0, 1)
    assert labels.tolist() == images.train.labels[noted.indices].tolist()
    assert len(set(labels.tolist())) > 1, "they lie class by class"
    held_out = set(noted.indices)
    assert len(held_out) == 4
    noted.indices.clear()
    list(ImageClassification(parts, TINY, 3).batches(1, 0, 0))
    assert parts.train_size == len(set(noted.indices)) == 6
    assert held_out.isdisjoint(noted.indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_that_only_decoding_shows_is_named(tree: Path, workers: int) -> None:
    path = tree / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    content = bytearray(path.read_bytes())
    table = content.index(b"\xff\xc4") + 5  # the lengths of the Huffman codes
    content[table : table + 16] = b"\xff" * 16
    task = task_of(tree, workers=workers)
    path.write_bytes(content)  # after validation, which would have found the damage
    with pytest.raises(ExperimentError, match=rf"{path.name}: not a whole image") as caught:
        list(task.batches(1, 0, 0))
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ExperimentError, match=rf"{path.name}: cannot be read \(No such file"):
        list(task.batches(1, 0, 0))


def test_a_small_shared_memory_is_not_filled(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come through a pipe instead, and are the same."""
    task = task_of(tree, workers=2)
    wanted = list(task.batches(1, 0, 0))
    assert fits_shared_memory(1, 2)
    free = os.statvfs("/dev/shm")
    small = os.statvfs_result((*free[:4], 5 * 4 * 3 * 24**2 * 4 // free.f_frsize - 1, *free[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    assert not fits_shared_memory(4 * 3 * 24**2, 2)

    def fail(*arguments: object) -> None:
        raise AssertionError("a tensor would be shared")

    for kind in (torch.Tensor, torch.storage.UntypedStorage):  # in the workers, which are forks
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, fail)
    found = list(task.batches(1, 0, 0))
    for one, other in zip(found, wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_worker_that_hangs_or_dies_is_reported(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(self: object, index: int) -> bytes:
        time.sleep(1)  # longer than the time limit, so that the worker is killed
        return b""

    def die(self: object, index: int) -> bytes:
        os.kill(os.getpid(), signal.SIGBUS)
        return b""

    task = task_of(tree, workers=1)
    for read, message in (
        (hang, "timed out after 0.1 seconds"),
        (die, "(exited unexpectedly|killed by signal: Bus err)"),
    ):
        monkeypatch.setattr(ImageFiles, "read", read)
        monkeypatch.setattr(image_loader, "_TIMEOUT", 0.1 if read is hang else 60)
        with pytest.raises(
            ExperimentError, match=rf"do not answer \(DataLoader.*{message}"
        ) as caught:
            list(task.batches(1, 0, 0))
        assert "\n" not in str(caught.value)


def spec_of(batch_size: int = 4) -> RunSpec:
    spec = recipe.load("imagenet").run("apollo", 1)
    schedule = spec.train.schedule.shortened(1)
    training = spec.train.model_copy(update={"batch_size": batch_size, "schedule": schedule})
    return spec.model_copy(update={"model": TINY, "data": DATA, "train": training})


def test_a_run(tree: Path, tmp_path: Path) -> None:
    task = tasks.make(spec_of(), tree, workers=1)
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(spec_of(), task.fingerprint, tree, ["test"])
    assert train(directory, spec_of(), task) == "finished"
    verdict = directory.verdict()
    assert verdict is not None
    assert verdict["step"] == 3


def test_tasks_that_do_not_fit(tree: Path) -> None:
    with pytest.raises(ExperimentError, match="12 training images are left, fewer than one batch"):
        tasks.make(spec_of(batch_size=16), tree)
    small = spec_of().model_copy(update={"data": SmallImageData()})
    with pytest.raises(ExperimentError, match="'small-images', the task imagenet needs 'photogra"):
        tasks.make(small, tree)


def test_a_split_can_be_sent_to_a_process(tree: Path) -> None:
    images = imagenet.load(tree).train
    again = pickle.loads(pickle.dumps(images))
    assert again.read(3) == images.read(3)


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
import torch
from apollo_bench.workloads.image_classification import imagenet
from apollo_bench.workloads.image_classification.encoded_images import EncodedImages
from apollo_bench.workloads.image_classification.image_loader import DecodingImageSource
from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.image_classification.image_settings import PhotographData

data = PhotographData(kind="photographs", size=24, test_resize=32)
both = []
for images in (imagenet.load(None, sys.argv[1]), imagenet.load(Path(sys.argv[2]))):
    device = torch.device("cpu")
    source = DecodingImageSource(images, imagenet.MEAN, imagenet.STD, data, device, 1)
    both.append(list(source.evaluation(0, 1))[0])
    print(images.classes, images.train.labels.tolist())
print(all(torch.equal(*pair) for pair in zip(*both)))
for hub in (sys.argv[3], None):
  try:
    imagenet.load(None, *[hub] * (hub is not None))
  except ExperimentError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_hub(tree: Path, tmp_path: Path) -> None:
    """A folder laid out like the hub's, read by the hub's library; then the hub, unreachable."""
    pytest.importorskip("datasets")
    for hub in ("hub", "damaged"):
        (tmp_path / hub / "data").mkdir(parents=True)
        for split, name in (("train", "train"), ("val", "validation")):
            paths = sorted((tree / split).glob("*/*"))
            contents = [path.read_bytes() for path in paths]
            if hub == "damaged":
                contents[2] = contents[2][:-9]
            rows = {
                "image": [{"bytes": x, "path": "image"} for x in contents],
                "label": [WNIDS.index(path.parent.name) for path in paths],
            }
            target = tmp_path / hub / "data" / f"{name}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.table(rows), target)
    # the library reads the environment once, when it is imported
    environment = dict(os.environ, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [
            *(sys.executable, "-c", IN_ANOTHER_PROCESS),
            *(str(tmp_path / "hub"), str(tree), str(tmp_path / "damaged")),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    hub, local, equal, damaged, error = done.stdout.splitlines()
    assert "damaged, split train, row 2: cut short: " in damaged
    assert hub == local == "3 [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]"
    assert equal == "True"
    assert error.startswith("ILSVRC/imagenet-1k: cannot be loaded from the Hugging Face hub (")
    assert error.endswith("train/CLASS/*.JPEG and val/CLASS/*.JPEG")
