"""The user's images: a folder with one folder per class, with or without a test split."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Generator

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.image_classification.encoded_images import EncodedImageSet, ImageFiles
from apollo_bench.workloads.image_classification.image_folder import (
    ClassFolder,
    index_tree,
    unused_files,
)

_TRAIN = ("train", "training")
_TEST = ("test", "val", "valid", "validation")
NEEDED = "--data needs a folder with CLASS/*, or with train/CLASS/* and test/CLASS/*"


def load(folder: Path | None, test_share: float, cache: Path | None = None) -> EncodedImageSet:
    """Find and validate all images.

    Args:
        folder: contains ``train`` and ``test`` (or ``val``) with a folder per class, or the folders
            of the classes themselves.
        test_share: part of each class's images that are tested on, in the latter case.
        cache: folder of the validation cache; None: below the user's cache.

    Raises:
        ExperimentError: the folder is missing, a class is in one split only, or files are missing,
            cut short or no images.
    """
    if folder is None or not folder.is_dir():
        where = "no --data" if folder is None else f"{folder}: no such folder"
        raise ExperimentError(f"{where}; {NEEDED}")
    folder = folder.resolve()
    train = next((name for name in _TRAIN if (folder / name).is_dir()), None)
    if train is None:
        return _one_split(folder, test_share, cache)
    tests = [name for name in _TEST if (folder / name).is_dir()]
    if not tests:
        raise ExperimentError(f"{folder}: has {train}, but no {' or '.join(_TEST)}; {NEEDED}")
    return _two_splits(folder, train, tests, cache)


def _two_splits(folder: Path, train: str, tests: list[str], cache: Path | None) -> EncodedImageSet:
    splits = (train, tests[0])
    classes: dict[str, dict[str, ClassFolder]] = {split: {} for split in splits}
    for found in index_tree(folder, splits, cache):
        split, _, name = found.name.partition("/")
        classes[split][name] = found
    for here, there in (splits, splits[::-1]):
        for name in sorted(classes[there].keys() - classes[here].keys()):
            raise ExperimentError(
                f"{folder / here / name}: no such folder, there is {folder / there / name}; both "
                "splits need the same classes"
            )
    names = sorted(classes[train])
    _check_classes(folder / train, names)
    both = [
        [(label, file) for label, name in enumerate(names) for file in _paths(classes[split][name])]
        for split in splits
    ]
    remarks = [_count(names, *both), f"Tested on the images of {tests[0]}."]
    if len(tests) > 1:
        remarks[-1] += f" Those of {', '.join(tests[1:])} were not used."
    folders = [classes[split][name] for split in splits for name in names]
    remarks += unused_files(folder, splits, folders)
    return _image_set(folder, both[0], both[1], len(names), folders, remarks)


def _one_split(folder: Path, test_share: float, cache: Path | None) -> EncodedImageSet:
    found = index_tree(folder, (".",), cache)
    names = [one.name.partition("/")[2] for one in found]
    _check_classes(folder, names)
    generator = Generator().manual_seed(0)
    train: list[tuple[int, str]] = []
    test: list[tuple[int, str]] = []
    for label, one in enumerate(found):
        paths, count = _paths(one), len(one.files)
        tested = max(1, round(test_share * count))
        if tested >= count:
            raise ExperimentError(
                f"{folder / one.name}: {count} images, of which {tested} would be tested "
                "on; add images, or a folder test"
            )
        order = torch.randperm(count, generator=generator).tolist()
        chosen = set(order[:tested])
        test += [(label, path) for index, path in enumerate(paths) if index in chosen]
        train += [(label, path) for index, path in enumerate(paths) if index not in chosen]
    remarks = [
        _count(names, train, test),
        f"{100 * test_share:g} % of each class's images were drawn once and tested on.",
    ]
    remarks += unused_files(folder, (".",), found)
    return _image_set(folder, train, test, len(names), found, remarks)


def _check_classes(folder: Path, names: list[str]) -> None:
    if len(names) < 2:
        raise ExperimentError(
            f"{folder}: one class only, {names[0]}; a classifier needs two or more. If the folders "
            f"of the classes are in {names[0]}, give that folder"
        )


def _paths(folder: ClassFolder) -> list[str]:
    return [f"{folder.name}/{file}" for file in folder.files]


def _count(names: list[str], train: list[tuple[int, str]], test: list[tuple[int, str]]) -> str:
    return f"{len(train):,} + {len(test):,} images of {len(names)} classes."


def _digest(folders: list[ClassFolder]) -> str:
    """Return a fingerprint of the files' names and contents; it does not depend on their folder."""
    digest = hashlib.sha256()
    for folder in folders:
        entry = (folder.name.partition("/")[2], folder.files, folder.contents)
        digest.update(repr(entry).encode("utf-8", "replace"))
    return digest.hexdigest()


def _image_set(
    root: Path,
    train: list[tuple[int, str]],
    test: list[tuple[int, str]],
    classes: int,
    folders: list[ClassFolder],
    remarks: list[str],
) -> EncodedImageSet:
    both = [
        ImageFiles(
            root,
            [path for _, path in split],
            torch.tensor([label for label, _ in split], dtype=torch.int64),
        )
        for split in (train, test)
    ]
    return EncodedImageSet(both[0], both[1], classes, _digest(folders), remarks)
