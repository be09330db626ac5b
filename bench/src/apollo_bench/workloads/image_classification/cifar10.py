"""CIFAR-10: Python pickles, parquet files or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.regular_files import read_regular
from apollo_bench.workloads import arrow_tables, output_files
from apollo_bench.workloads.checksums import read_file
from apollo_bench.workloads.gzip_files import unpack
from apollo_bench.workloads.image_classification.image_decoding import decode_equal
from apollo_bench.workloads.image_classification.image_set import ImageSet, checked_labels
from apollo_bench.workloads.image_classification.safe_unpickle import unpickle_arrays

HUB = "uoft-cs/cifar10"
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
TRAIN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
TEST = ("test_batch",)
_MD5 = {  # of the published batches
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_SIDE = 32  # pixels
_GZIP = b"\x1f\x8b"
_REMEDY = (
    f"--data needs {ARCHIVE}, the folder {FOLDER}, or a folder with the parquet files of "
    "the splits train and test"
)

_Split = tuple[Tensor, Tensor]


def load(source: Path | None = None, hub: str = HUB) -> ImageSet:
    """Read and check the whole set.

    Args:
        source: the archive of Python pickles, the folder that it unpacks to, a folder that contains
            either, or a folder of parquet files; None: the hub.
        hub: name of the set on the hub.

    Raises:
        ExperimentError: a file is missing, corrupt or truncated.
    """
    if source is None:
        return _from_hub(hub)
    if not source.exists():
        raise ExperimentError(f"{source}: no such file or folder; {_REMEDY}")
    if source.is_file():
        return _from_archive(source)
    for folder in (source, source / FOLDER):
        if any((folder / name).exists() for name in TRAIN + TEST):
            return _from_pickles(folder)
    if (source / ARCHIVE).exists():
        return _from_archive(source / ARCHIVE)
    shards = {split: arrow_tables.find_shards(source, split) for split in ("train", "test")}
    if not any(shards.values()):
        raise ExperimentError(f"{source}: no CIFAR-10 in it; {_REMEDY}")
    for split, paths in shards.items():
        if not paths:
            raise ExperimentError(f"{source}: no parquet file of the split {split}; {_REMEDY}")
    return _image_set(*(_from_parquet(paths) for paths in shards.values()))


def prepare(images: ImageSet, out: Path) -> Path:
    """Write the decoded set as the official Python pickles, which ``load`` reads in a second.

    Args:
        images: the whole set.
        out: folder that the folder of pickles is written into.

    Returns:
        The folder of pickles.

    Raises:
        ExperimentError: pickles that no preparation made would be overwritten.
    """
    folder = out / FOLDER
    output_files.reserve(folder, TRAIN + TEST)
    parts = zip(images.train_images.chunk(5), images.train_labels.chunk(5), strict=True)
    batches = dict(zip(TRAIN, parts, strict=False))
    batches[TEST[0]] = (images.test_images, images.test_labels)
    for name, (pixels, labels) in batches.items():
        table = {b"data": pixels.flatten(1).numpy(), b"labels": labels.tolist()}
        write_atomically(folder / name, pickle.dumps(table, protocol=4))
    return folder


def _image_set(train: _Split, test: _Split) -> ImageSet:
    for name, (images, _) in (("train", train), ("test", test)):
        if not len(images):
            raise ExperimentError(f"CIFAR-10: the split {name} is empty; {_REMEDY}")
    return ImageSet.of_pixels(*train, *test)


def _from_hub(name: str) -> ImageSet:
    splits = arrow_tables.open_hub(name, _REMEDY)
    both = []
    for split in ("train", "test"):
        where = f"{name}, split {split}"
        if split not in splits:
            raise ExperimentError(f"{where}: not there, only {', '.join(splits)}; {_REMEDY}")
        both.append(_from_table(splits[split].with_format("arrow")[:], where))
    return _image_set(*both)


def _from_parquet(paths: list[Path]) -> _Split:
    parts = [_from_table(arrow_tables.read_parquet(path), str(path)) for path in paths]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _from_table(table: Any, where: str) -> _Split:
    labels = arrow_tables.labels(table, len(CLASSES), where)
    contents = arrow_tables.image_bytes(table, where)
    return decode_equal(contents, (_SIDE, _SIDE), where), labels


def _from_pickles(folder: Path) -> ImageSet:
    return _from_batches(lambda name: read_file(folder / name, _REMEDY), folder)


def _from_archive(path: Path) -> ImageSet:
    contents: dict[str, bytes] = {}
    try:
        content = read_regular(path)
        if content.startswith(_GZIP):
            # reads to the end, where the checksum is
            content = unpack(io.BytesIO(content)).read()
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.size > len(content):  # a sparse file, of zero bytes without end
                    raise tarfile.TarError(f"{name} has {member.size:,} bytes")
                file = archive.extractfile(member) if name in TRAIN + TEST else None
                if file is not None:
                    contents[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ExperimentError(
            f"{path}: not a whole archive ({first_line(error)}); {_REMEDY}"
        ) from None

    def read(name: str) -> bytes:
        if name not in contents:
            raise ExperimentError(f"{path}: no {name} in it; {_REMEDY}")
        return contents[name]

    return _from_batches(read, path)


def _from_batches(read: Callable[[str], bytes], source: Path) -> ImageSet:
    both = []
    published = True
    for names in (TRAIN, TEST):
        parts = []
        for name in names:
            content = read(name)
            parts.append(_batch(content, str(source / name)))
            published &= hashlib.md5(content, usedforsecurity=False).hexdigest() == _MD5[name]
        images, labels = zip(*parts, strict=True)
        both.append((torch.cat(images), torch.cat(labels)))
    return _image_set(*both)._replace(published=published)


def _batch(content: bytes, where: str) -> _Split:
    """Return images and labels of a pickled dict of ``data``, (n, 3072) bytes, and ``labels``."""
    try:
        table = unpickle_arrays(content)
    except Exception as error:  # damaged pickles raise errors of almost every type
        raise ExperimentError(
            f"{where}: not a whole pickle ({first_line(error)}); {_REMEDY}"
        ) from None
    if isinstance(table, dict):
        # a pickle written by Python 3 may have bytes as keys
        table = {key.decode() if isinstance(key, bytes) else key: table[key] for key in table}
    else:
        table = {}
    data, labels = table.get("data"), table.get("labels")
    if (
        not isinstance(data, numpy.ndarray)
        or data.dtype != numpy.uint8
        or data.ndim != 2
        or data.shape[1] != 3 * _SIDE * _SIDE
    ):
        raise ExperimentError(f"{where}: holds no rows of {3 * _SIDE * _SIDE} bytes; {_REMEDY}")
    if not isinstance(labels, list) or len(labels) != len(data):
        count = len(labels) if isinstance(labels, list) else "no"
        raise ExperimentError(f"{where}: {count} labels for {len(data)} images; {_REMEDY}")
    images = torch.from_numpy(data.reshape(-1, 3, _SIDE, _SIDE).copy())
    return images, checked_labels(labels, len(CLASSES), where)
