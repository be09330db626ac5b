"""A tree of image files with one folder per class, validated before training.

Valid folders are cached, with names, sizes and times of their files, and with the digest of their
contents. A folder is read again only when one of these changes.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.image_classification.encoded_images import EncodedImages
from apollo_bench.workloads.image_classification.image_validation import (
    check_image_file,
    image_error,
)
from apollo_bench.workloads.unused_files import ending, files_below, remarks_on
from apollo_bench.workloads.validation_cache import ValidationCache

_SUFFIXES = (".jpeg", ".jpg", ".png")  # image_validation.py knows the end markers of these formats
_THREADS = 16  # threads wait for the disk, and decoding releases the GIL
_MAX_NAMED = 3  # number of bad files that an error names
_CHUNK = 256  # images per work item of a thread
_LARGE = 10_000  # files; a smaller tree is checked without showing progress


class ClassFolder(NamedTuple):
    """The image files of one class."""

    name: str  # relative to the root, with slashes
    files: tuple[str, ...]  # sorted
    sizes: tuple[int, ...]  # bytes
    digest: str  # of names, sizes and times: changes when a file does
    unused: dict[str, int]  # other files of the folder and below it: their number by kind
    contents: str = ""  # digest of the files' contents


def index_tree(root: Path, splits: tuple[str, ...], cache: Path | None = None) -> list[ClassFolder]:
    """List and validate the images of some splits.

    Args:
        root: folder with one folder per split, each with one folder per class.
        splits: names of the splits.
        cache: folder of the validation cache; None: below the user's cache.

    Returns:
        The folders of the classes, sorted, split by split.

    Raises:
        ExperimentError: a folder or its images are missing, or files are invalid; the message names
            the first.
    """
    root_key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    validated = ValidationCache(f"tree-{root_key}.json", cache)
    names = [name for split in splits for name in _classes(root, split)]
    errors: list[str] = []

    def look(name: str) -> tuple[ClassFolder, list[str]]:
        folder = _list(root, name)
        contents = validated.found(name, folder.digest)
        if contents is not None:
            return folder._replace(contents=contents), []
        bad, digest = [], hashlib.sha256()
        for path in (root / name / file for file in folder.files):
            error, sha256 = check_image_file(path)
            digest.update(sha256)
            if error:
                bad.append(f"{path}: {error}")
        return folder._replace(contents=digest.hexdigest()), bad

    found = []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        waiting: list[Future[tuple[ClassFolder, list[str]]]] = [
            pool.submit(look, name) for name in names
        ]
        with _shown(root, len(names)) as advance:
            for done in as_completed(waiting):
                folder, bad = done.result()
                advance(len(folder.files))
                found.append(folder)
                errors += bad
                if not bad:
                    validated.add_found(folder.name, folder.digest, folder.contents)
    finally:
        pool.shutdown(cancel_futures=True)
        validated.save()
    _raise_damaged(sorted(errors))
    order = {name: index for index, name in enumerate(names)}
    return sorted(found, key=lambda folder: order[folder.name])


def check_images(images: EncodedImages, name: str, digest: str, validated: ValidationCache) -> None:
    """Validate the images of a split that is not a tree of files.

    Args:
        images: the split.
        name: name of the split in the validation cache.
        digest: changes when an image does.
        validated: cache of valid images.

    Raises:
        ExperimentError: images are invalid; the message names the first.
    """
    if validated.contains(name, digest):
        return
    count = len(images.labels)
    errors = []

    def look(rows: range) -> list[str]:
        read = ((row, image_error(images.read(row))) for row in rows)
        return [f"{images.where(row)}: {error}" for row, error in read if error]

    chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool, _shown(name, len(chunks)) as advance:
        for rows, bad in zip(chunks, pool.map(look, chunks), strict=True):
            advance(len(rows))
            errors += bad
    _raise_damaged(errors)
    validated.add(name, digest)
    validated.save()


def _raise_damaged(errors: list[str]) -> None:
    if errors:
        more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
        raise ExperimentError("; ".join(errors[:_MAX_NAMED]) + more)


def _classes(root: Path, split: str) -> list[str]:
    folder = root / split
    try:
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise ExperimentError(f"{folder}: cannot be listed ({error.strerror})") from None
    names = sorted(name for name, is_folder in listed if is_folder and name[0] != ".")
    if not names:
        loose = any(name.lower().endswith(_SUFFIXES) for name, _ in listed)
        what = "images, but no folders of classes" if loose else "no folders of classes"
        raise ExperimentError(f"{folder}: {what}; each image must lie in its class's folder")
    return [f"{split}/{name}" for name in names]


def _list(root: Path, name: str) -> ClassFolder:
    digest = hashlib.sha256()
    files = []
    unused: Counter[str] = Counter()
    try:
        with os.scandir(root / name) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind == "image":
                    status = entry.stat()
                    # a copy may keep the time of modification, but not that of the entry's change
                    times = status.st_mtime_ns, status.st_ctime_ns
                    files.append((entry.name, status.st_size, times))
                elif kind == "folder":
                    unused["in folders below"] += files_below(entry)
                else:
                    unused[kind] += 1
    except FileNotFoundError as error:  # a broken link
        raise ExperimentError(f"{error.filename}: no such file") from None
    except OSError as error:
        where = error.filename or root / name
        raise ExperimentError(f"{where}: cannot be read ({error.strerror})") from None
    if not files:
        raise ExperimentError(f"{root / name}: no images ({', '.join(_SUFFIXES)}) in it")
    files.sort()
    digest.update(repr(files).encode(errors="surrogateescape"))
    listed, sizes, _ = zip(*files, strict=True)
    return ClassFolder(name, listed, sizes, digest.hexdigest(), dict(unused))


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "image", "folder", or what ``unused_files.ending`` returns for another file.

    A file with an image's ending that is no image, for example a pipe, is found when it is read.
    """
    if entry.name[0] == ".":
        return "hidden"  # files of an operating system or an editor
    if entry.name.lower().endswith(_SUFFIXES) and not entry.is_dir():
        return "image"
    return "folder" if entry.is_dir() else ending(entry.name)


def unused_files(root: Path, splits: tuple[str, ...], folders: Iterable[ClassFolder]) -> list[str]:
    """Return a remark on the files that are not used; none if all are."""
    unused: Counter[str] = Counter()
    for folder in folders:
        unused.update(folder.unused)
    for split in splits:
        with os.scandir(root / split) as entries:
            for entry in entries:
                if not entry.is_dir():
                    unused["beside the folders of classes"] += 1
                elif entry.name[0] == ".":
                    unused["in hidden folders"] += files_below(entry)
    if splits != (".",):
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.is_dir():
                    unused["beside the splits"] += 1
                elif entry.name not in splits:
                    unused["in other folders"] += files_below(entry)
    return remarks_on(root, unused, f"{', '.join(_SUFFIXES)} in the folders of the classes")


@contextmanager
def _shown(root: Path | str, folders: int) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error while a large tree is checked."""
    console = Console(stderr=True)
    files = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Checking the images in {root}", total=folders, visible=False)

        def advance(count: int) -> None:
            nonlocal files
            files += count
            progress.update(task, advance=1, visible=files > _LARGE)

        yield advance
    if files > _LARGE and not console.is_terminal:
        print(f"{root}: {files} images checked", file=sys.stderr)
