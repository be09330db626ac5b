"""CIFAR-10 from each of its forms, and errors for damaged files."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.config import recipe
from apollo_bench.errors import ExperimentError
from apollo_bench.workloads import tasks
from apollo_bench.workloads.image_classification import cifar10
from apollo_bench.workloads.image_classification.image_set import ImageSet
from apollo_bench.workloads.image_classification.image_settings import ResNetModel
from apollo_bench.workloads.image_classification.safe_unpickle import unpickle_arrays

SHARED = Path(__file__).parents[5] / "shared" / "data"


def rows(count: int, seed: int) -> tuple[numpy.ndarray[Any, Any], list[int]]:
    random = numpy.random.default_rng(seed)
    data = random.integers(0, 256, (count, 3072), dtype=numpy.uint8)
    return data, [int(label) for label in random.integers(0, 10, count)]


def python2_pickle(data: numpy.ndarray[Any, Any], labels: list[int]) -> bytes:
    """Return a pickle as Python 2 and its NumPy wrote the published archive."""
    count = len(data).to_bytes(2, "little")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M"
        + count
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb\x89T"
        + data.nbytes.to_bytes(4, "little")
        + data.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def batches() -> dict[str, tuple[numpy.ndarray[Any, Any], list[int]]]:
    named = enumerate((*cifar10.TRAIN, *cifar10.TEST))
    return {name: rows(3 + number, number) for number, name in named}


def write_pickles(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, (data, labels) in batches().items():
        (folder / name).write_bytes(python2_pickle(data, labels))
    return folder


def write_archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, (data, labels) in batches().items():
            content = python2_pickle(data, labels)
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(pixels: numpy.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(names: tuple[str, ...], column: str = "image", nested: bool = False) -> pyarrow.Table:
    chosen = [batches()[name] for name in names]
    images = [png(row.reshape(3, 32, 32).transpose(1, 2, 0)) for data, _ in chosen for row in data]
    labels = [label for _, values in chosen for label in values]
    values = [{"bytes": one, "path": None} for one in images] if nested else images
    return pyarrow.table({column: values, "label": labels})


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    pyarrow.parquet.write_table(table(cifar10.TRAIN), folder / "cifar10_train.parquet")
    pyarrow.parquet.write_table(table(cifar10.TEST), folder / "cifar10_test.parquet")
    return folder


def write_hub(folder: Path) -> Path:
    """Write the set as the hub stores it, with the training split in two shards."""
    (folder / "plain_text").mkdir(parents=True)
    for name, names in {
        "train-00000-of-00002": cifar10.TRAIN[:2],
        "train-00001-of-00002": cifar10.TRAIN[2:],
        "test-00000-of-00001": cifar10.TEST,
    }.items():
        part = table(names, "img", nested=True)
        pyarrow.parquet.write_table(part, folder / "plain_text" / f"{name}.parquet")
    return folder


def assert_is_the_set(images: ImageSet) -> None:
    train = numpy.concatenate([batches()[name][0] for name in cifar10.TRAIN])
    assert torch.equal(images.train_images.flatten(1), torch.from_numpy(train))
    assert images.train_images.shape == (25, 3, 32, 32)
    assert images.train_images.is_contiguous()
    labels = [label for name in cifar10.TRAIN for label in batches()[name][1]]
    assert images.train_labels.tolist() == labels
    test, labels = batches()["test_batch"]
    assert torch.equal(images.test_images.flatten(1), torch.from_numpy(test))
    assert images.test_labels.tolist() == labels


def test_every_form_is_the_same_set(tmp_path: Path) -> None:
    pickles = write_pickles(tmp_path / "a" / cifar10.FOLDER)
    (tmp_path / "b").mkdir()
    archive = write_archive(tmp_path / "b" / cifar10.ARCHIVE)
    places = [
        *(pickles, pickles.parent),
        *(archive, archive.parent),
        write_parquet(tmp_path / "c"),
        write_hub(tmp_path / "d"),
    ]
    sets = [cifar10.load(place) for place in places]
    for images in sets:
        assert_is_the_set(images)
    assert len({images.fingerprint for images in sets}) == 1


def test_prepared_it_is_the_same_set(tmp_path: Path) -> None:
    raw, out = write_parquet(tmp_path / "raw"), tmp_path / "out"
    command = ["prepare", "cifar10", "--raw", str(raw), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"Prepared: --data {out / cifar10.FOLDER}" in done.output
    for place in (out, out / cifar10.FOLDER):
        images = cifar10.load(place)
        assert_is_the_set(images)
        assert images.fingerprint == cifar10.load(raw).fingerprint


def test_fingerprint_is_of_pixels_and_labels(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "set")
    before = cifar10.load(folder).fingerprint
    data, labels = rows(3, 0)
    labels[0] = (labels[0] + 1) % 10
    (folder / "data_batch_1").write_bytes(python2_pickle(data, labels))
    assert cifar10.load(folder).fingerprint != before


def test_the_published_files_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pickles(tmp_path / "set")
    assert not cifar10.load(folder).published
    digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(cifar10, "_MD5", digests)
    assert cifar10.load(folder).published
    assert cifar10.load(write_archive(tmp_path / cifar10.ARCHIVE)).published
    data, labels = rows(3, 1)
    (folder / "data_batch_1").write_bytes(python2_pickle(data, labels))
    assert not cifar10.load(folder).published


def test_pickles_of_python_3(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "set")
    for protocol, key in ((2, b"data"), (4, "data")):
        data, labels = batches()["data_batch_2"]
        label_key = b"labels" if isinstance(key, bytes) else "labels"
        content = pickle.dumps({key: data, label_key: labels}, protocol)
        (folder / "data_batch_2").write_bytes(content)
        assert_is_the_set(cifar10.load(folder))


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_cannot_run_anything(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "set")
    target = tmp_path / "attacked"
    for protocol in (0, 2, 4):
        content = pickle.dumps({"data": Attack(target)}, protocol)
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(ExperimentError, match=r"test_batch: not a whole pickle \(it asks for "):
            cifar10.load(folder)
        assert not target.exists()
    with pytest.raises(pickle.UnpicklingError, match="a string in the encoding 'zip'"):
        unpickle_arrays(b"\x80\x02c_codecs\nencode\nU\x01aU\x03zip\x86R.")


@pytest.mark.parametrize("kept", [0, 1, 40, 1000, 9000])
def test_truncated_pickle(tmp_path: Path, kept: int) -> None:
    folder = write_pickles(tmp_path / "set")
    path = folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ExperimentError, match=r"data_batch_3: not a whole pickle .*--data needs"):
        cifar10.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_archive(tmp_path: Path, share: float) -> None:
    path = write_archive(tmp_path / cifar10.ARCHIVE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ExperimentError, match=rf"{path.name}: not a whole archive") as caught:
        cifar10.load(path)
    assert "\n" not in str(caught.value)


def test_corrupt_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / cifar10.ARCHIVE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=rf"{path.name}: not a whole archive"):
        cifar10.load(path)


def test_missing_batches(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "set")
    (folder / "data_batch_4").unlink()
    with pytest.raises(ExperimentError, match=r"data_batch_4: no such file; --data needs"):
        cifar10.load(folder)
    path = tmp_path / "other.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder / "data_batch_1")
    with pytest.raises(ExperimentError, match=r"other.tar: no data_batch_2 in it"):
        cifar10.load(path)
    with pytest.raises(ExperimentError, match="none: no such file or folder; --data needs"):
        cifar10.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExperimentError, match="empty: no CIFAR-10 in it; --data needs"):
        cifar10.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1], "holds no rows of 3072 bytes"),
        ({"data": [1], "labels": [1]}, "holds no rows of 3072 bytes"),
        ({"data": numpy.zeros((2, 3072)), "labels": [1, 2]}, "holds no rows of 3072 bytes"),
        ({"data": numpy.zeros((2, 9), numpy.uint8), "labels": [1]}, "holds no rows"),
        ({"data": numpy.zeros((2, 3072), numpy.uint8), "labels": [1]}, "1 labels for 2 images"),
        ({"data": numpy.zeros((2, 3072), numpy.uint8)}, "no labels for 2 images"),
        (
            {"data": numpy.zeros((2, 3072), numpy.uint8), "labels": [1, 10]},
            "row 1: label 10, allowed are 0 to 9",
        ),
    ],
)
def test_wrong_content_of_a_pickle(tmp_path: Path, content: Any, expected: str) -> None:
    folder = write_pickles(tmp_path / "set")
    (folder / "data_batch_5").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ExperimentError, match=rf"data_batch_5.*: .*{expected}|{expected}"):
        cifar10.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_truncated_parquet(tmp_path: Path, share: float) -> None:
    folder = write_parquet(tmp_path / "set")
    path = folder / "cifar10_train.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ExperimentError, match=r"cifar10_train.parquet: not a whole parquet file"):
        cifar10.load(folder)


def test_corrupt_image_in_parquet(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set")
    path = folder / "cifar10_test.parquet"
    good = table(cifar10.TEST)
    images = good["image"].to_pylist()
    wrong_size = png(numpy.zeros((28, 28, 3), numpy.uint8))
    for bad, expected in (
        (images[3][:900], "row 3: not a whole image"),
        (b"", "row 3: empty"),
        (b"no image", "row 3: not an image"),
        (None, "row 3: holds no image"),
        (wrong_size, "row 3: an image of 28 x 28 pixels, not 32 x 32"),
    ):
        changed = pyarrow.table({"image": [*images[:3], bad], "label": [0] * 4})
        pyarrow.parquet.write_table(changed, path)
        with pytest.raises(ExperimentError, match=rf"cifar10_test.parquet, {expected}") as caught:
            cifar10.load(folder)
        assert "\n" not in str(caught.value)
    for columns, expected in (
        ({"picture": images, "label": good["label"]}, ": no column image or img, there are pic"),
        ({"image": images}, ": no column label, there are image"),
        ({"image": images, "label": [-1] * len(images)}, ", row 0: label -1, allowed are 0 to 9"),
        ({"image": images, "label": ["cat"] * len(images)}, ", row 0: label 'cat', allowed"),
        ({"image": images[:0], "label": [0][:0]}, "the split test is empty"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(ExperimentError, match=expected):
            cifar10.load(folder)


def test_parquet_files_that_are_missing_or_unclear(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "set")
    (folder / "plain_text" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(
        ExperimentError, match=r"train-00001-of-00002.parquet: no such file; 1 of 2 are there"
    ):
        cifar10.load(folder)
    (folder / "plain_text" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ExperimentError, match="no parquet file of the split train"):
        cifar10.load(folder)
    folder = write_parquet(tmp_path / "other")
    (folder / "another_train.parquet").write_bytes(b"")
    with pytest.raises(ExperimentError, match="several files could hold the split train: another"):
        cifar10.load(folder)


IN_ANOTHER_PROCESS = """
import sys
from apollo_bench.workloads.image_classification import cifar10
from apollo_bench.errors import ExperimentError
print(cifar10.load(None, sys.argv[1]).fingerprint)
try:
    cifar10.load(None)
except ExperimentError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_hub(tmp_path: Path) -> None:
    """A folder laid out like the hub's, read by the hub's library; then the hub, unreachable."""
    pytest.importorskip("datasets")
    folder = write_hub(tmp_path / "set")
    # the library reads the environment once, when it is imported
    environment = dict(os.environ, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    fingerprint, error = done.stdout.splitlines()
    assert fingerprint == cifar10.load(folder).fingerprint
    assert error.startswith("uoft-cs/cifar10: cannot be loaded from the Hugging Face hub (")
    assert error.endswith("the parquet files of the splits train and test")


@pytest.mark.parametrize("missing", ["datasets", "pyarrow.parquet"])
def test_without_the_library(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    place = None if missing == "datasets" else write_parquet(tmp_path / "set")
    with pytest.raises(ExperimentError) as caught:
        cifar10.load(place)
    package = missing.partition(".")[0]
    assert f"needs the package {package}, which is not installed" in str(caught.value)
    assert f"pip install {package}" in str(caught.value)


def test_the_task(tmp_path: Path) -> None:
    spec = recipe.load("cifar10").run("apollo", 1)
    small = ResNetModel(family="resnet", depth=8, width=2)
    training = spec.train.model_copy(update={"batch_size": 10})
    spec = spec.model_copy(update={"model": small, "train": training})
    task = tasks.make(spec, write_pickles(tmp_path / "set"))
    assert task.steps_per_epoch == 2
    images, labels = next(task.batches(1, 0, 0))
    assert images.shape == (10, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    model = task.model()
    batch = (images, labels)
    assert task.loss(model, batch, batch, ())[0].isfinite()
    assert set(task.metrics(task.evaluate(model.eval()))) == {"accuracy", "test_loss"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_real_images() -> None:
    images = cifar10.load(SHARED)
    assert images.train_images.shape == (50_000, 3, 32, 32)
    assert images.train_labels.bincount().tolist() == [5_000] * 10
    assert images.test_labels.bincount().tolist() == [1_000] * 10
    # the known means of CIFAR-10: 0.4914, 0.4822, 0.4465
    mean = images.train_images.float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-4, rtol=0)
