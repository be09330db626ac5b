"""ImageNet: a folder tree of JPEG files, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads import arrow_tables
from apollo_bench.workloads.image_classification.encoded_images import (
    EncodedImageSet,
    HubImages,
    ImageFiles,
)
from apollo_bench.workloads.image_classification.image_folder import (
    ClassFolder,
    check_images,
    index_tree,
    unused_files,
)
from apollo_bench.workloads.validation_cache import ValidationCache

HUB = "ILSVRC/imagenet-1k"
# Of each channel of the training images, in units of the brightest pixel. All pipelines for
# ImageNet use these values; measuring them would need a pass over the set.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_PUBLISHED = (1000, 1_281_167, 50_000)  # classes, training and validation images of ILSVRC 2012
_SPLITS = ("train", "val")
_REMEDY = "--data needs a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG"


def load(root: Path | None = None, hub: str = HUB, cache: Path | None = None) -> EncodedImageSet:
    """Find and validate all images.

    Args:
        root: folder that contains ``train`` and ``val``; None: the hub.
        hub: name of the data set on the hub.
        cache: folder of the validation cache; None: below the user's cache.

    Raises:
        ExperimentError: the data are missing, or files are missing, cut short or no images.
    """
    if root is None:
        return _from_hub(hub, cache)
    for split in _SPLITS:
        if not (root / split).is_dir():
            raise ExperimentError(f"{root / split}: no such folder; {_REMEDY}")
    folders = index_tree(root, _SPLITS, cache)
    classes: dict[str, dict[str, ClassFolder]] = {"train": {}, "val": {}}
    for folder in folders:
        split, _, name = folder.name.partition("/")
        classes[split][name] = folder
    for here, there in (("val", "train"), ("train", "val")):
        for name in classes[there].keys() - classes[here].keys():
            raise ExperimentError(
                f"{root / here / name}: no such folder, there is {root / there / name}; {_REMEDY}"
            )
    digest = hashlib.sha256()
    for folder in folders:
        digest.update(repr((folder.name, folder.files, folder.sizes)).encode("utf-8", "replace"))
    numbers = {name: number for number, name in enumerate(classes["train"])}
    train, val = (_files(root, classes[split], numbers) for split in ("train", "val"))
    remarks = unused_files(root, _SPLITS, folders)
    published = (len(numbers), len(train.labels), len(val.labels)) == _PUBLISHED
    return EncodedImageSet(train, val, len(numbers), digest.hexdigest(), remarks, published)


def _files(root: Path, folders: dict[str, ClassFolder], numbers: dict[str, int]) -> ImageFiles:
    names = [f"{folder.name}/{file}" for folder in folders.values() for file in folder.files]
    labels = [numbers[name] for name, folder in folders.items() for _ in folder.files]
    return ImageFiles(root, names, torch.tensor(labels, dtype=torch.int64))


def _from_hub(name: str, cache: Path | None) -> EncodedImageSet:
    splits = arrow_tables.open_hub(name, _REMEDY)
    digest = hashlib.sha256()
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    both = []
    for split in ("train", "validation"):
        where = f"{name}, split {split}"
        if split not in splits:
            raise ExperimentError(f"{where}: not there, only {', '.join(splits)}; {_REMEDY}")
        rows = splits[split]
        table = rows.select_columns("label").with_format("arrow")[:]
        labels = arrow_tables.labels(table, None, where)
        digest.update(labels.numpy().data)
        both.append(HubImages(rows, arrow_tables.image_column(rows, where), labels, where))
        check_images(both[-1], split, rows._fingerprint, ValidationCache(f"hub-{key}.json", cache))
    classes = 1 + max(int(images.labels.max()) for images in both)
    return EncodedImageSet(both[0], both[1], classes, digest.hexdigest())
