"""Labeled images as encoded files, read on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy
from numpy.typing import NDArray
from torch import Tensor

from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import read_regular


class EncodedImages(Protocol):
    """One split of encoded images; several processes may read it at the same time."""

    labels: Tensor  # shape=(n,), dtype=int64

    def where(self, index: int) -> str:
        """Return the name of an image in errors."""

    def read(self, index: int) -> bytes:
        """Return the content of an image's file; raise ExperimentError if it cannot be read."""


class EncodedImageSet(NamedTuple):
    """Two splits of encoded images, and the number of classes."""

    train: EncodedImages
    test: EncodedImages
    classes: int
    fingerprint: str  # of the data
    remarks: Sequence[str] = ()  # on the data, for the user and the report
    published: bool = False  # whether these are known to be the published images


class ImageFiles:
    """Images in files below a folder.

    Args:
        folder: folder that the names are relative to.
        names: names of the files in one byte array; strings would be copied into every process.
        labels: labels of the files.
    """

    def __init__(self, folder: Path, names: list[str], labels: Tensor) -> None:
        self.labels = labels
        self._folder = folder
        self._names: NDArray[numpy.bytes_] = numpy.array([os.fsencode(name) for name in names])

    def where(self, index: int) -> str:
        """Return the path of the file."""
        return str(self._path(index))

    def read(self, index: int) -> bytes:
        """Return the content of the file; raise ExperimentError if it cannot be read."""
        try:
            return read_regular(self._path(index))
        except OSError as error:
            raise ExperimentError(
                f"{self.where(index)}: cannot be read ({error.strerror})"
            ) from None

    def _path(self, index: int) -> Path:
        return self._folder / os.fsdecode(self._names[index])


class HubImages:
    """Images in a split of a data set of the hub.

    Args:
        rows: a ``datasets.Dataset`` with an undecoded column of images.
        column: name of the column of images.
        labels: labels of the rows.
        name: name of the split in errors.
    """

    def __init__(self, rows: Any, column: str, labels: Tensor, name: str) -> None:
        self.labels = labels
        self._rows, self._column, self._name = rows, column, name

    def where(self, index: int) -> str:
        """Return the name of the split and the row."""
        return f"{self._name}, row {index}"

    def read(self, index: int) -> bytes:
        """Return the content of the file in a row; raise ExperimentError if there is none."""
        content = (self._rows[index][self._column] or {}).get("bytes")
        if not isinstance(content, bytes):
            raise ExperimentError(f"{self.where(index)}: holds no image")
        return content
