"""Arrow tables of images, labels or text: parquet files and the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.optional_imports import import_optional
from apollo_bench.regular_files import open_regular
from apollo_bench.workloads.image_classification.image_set import checked_labels

_IMAGES = ("image", "img")
_LABELS = ("label",)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in a folder, or in one below it: all shards, or one file.

    Raises:
        ExperimentError: a shard is missing, or several files could be meant.
    """
    found = [*folder.glob(f"*{split}*.parquet"), *folder.glob(f"*/*{split}*.parquet")]
    found.sort()
    shards = {path: _SHARD.search(path.stem) for path in found}
    numbers = [int(shard[1]) for shard in shards.values() if shard]
    totals = {int(shard[2]) for shard in shards.values() if shard}
    if len(totals) == 1 and len(numbers) == len(found):
        (total,) = totals
        missing = sorted(set(range(total)) - set(numbers))
        if missing:
            first = found[0].with_name(
                _SHARD.sub(f"-{missing[0]:05}-of-{total:05}", found[0].stem) + ".parquet"
            )
            raise ExperimentError(f"{first}: no such file; {len(found)} of {total} are there")
        if len(numbers) == total:
            return found
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
        raise ExperimentError(f"{folder}: several files could hold the split {split}: {names}")
    return found


def read_parquet(path: Path) -> Any:
    """Return one file as a ``pyarrow.Table``; raise ExperimentError if it is damaged."""
    parquet = import_optional("pyarrow.parquet", f"{path}, a parquet file,")
    arrow = import_optional("pyarrow", f"{path}, a parquet file,")
    try:
        # not memory-mapped: a later change of the file must not change the run
        with open_regular(path) as file:
            return parquet.read_table(file)
    except (OSError, arrow.ArrowException) as error:
        raise ExperimentError(f"{path}: not a whole parquet file ({first_line(error)})") from None


def open_hub(name: str, remedy: str) -> Any:
    """Return a data set of the hub, with undecoded images, as a ``datasets.DatasetDict``.

    Args:
        name: name on the hub, or a folder with the layout of the hub.
        remedy: what to do without the hub; the error message ends with it.

    Raises:
        ExperimentError: the library, the network or the data set is missing.
    """
    splits = hub_splits(name, remedy)
    datasets = import_optional("datasets", f"{name} of the Hugging Face hub")
    for split, rows in splits.items():
        column = image_column(rows, f"{name}, split {split}")
        splits[split] = rows.cast_column(column, datasets.Image(decode=False))
    return splits


def hub_splits(name: str, remedy: str, subset: str | None = None) -> Any:
    """Return a data set of the hub, with images as the hub stores them.

    Args:
        name: as in ``open_hub``.
        remedy: as in ``open_hub``.
        subset: configuration of the data set; None: the only one.

    Raises:
        ExperimentError: as in ``open_hub``.
    """
    datasets = import_optional(
        "datasets", f"{name} of the Hugging Face hub", f"; without it {remedy}"
    )
    try:
        return datasets.load_dataset(name, subset)
    except Exception as error:  # errors of the network and of the library are of many types
        raise ExperimentError(
            f"{name}: cannot be loaded from the Hugging Face hub ({first_line(error)}); {remedy}"
        ) from None


def image_bytes(table: Any, where: str) -> list[bytes]:
    """Return the undecoded images of a ``pyarrow.Table``: bytes, or the hub's {bytes, path}.

    Raises:
        ExperimentError: there is no such column, or an image is missing.
    """
    contents: list[bytes] = []
    for number, row in enumerate(table.column(image_column(table, where)).to_pylist()):
        content = row.get("bytes") if isinstance(row, dict) else row
        if not isinstance(content, bytes):
            raise ExperimentError(f"{where}, row {number}: holds no image")
        contents.append(content)
    return contents


def labels(table: Any, classes: int | None, where: str) -> Tensor:
    """Return the labels of a ``pyarrow.Table``, int64; raise ExperimentError for invalid ones."""
    values = table.column(_column(table, _LABELS, where)).to_pylist()
    return checked_labels(values, classes, where)


def image_column(table: Any, where: str) -> str:
    """Return the name of the column of images; raise ExperimentError if there is none."""
    return _column(table, _IMAGES, where)


def _column(table: Any, names: tuple[str, ...], where: str) -> str:
    there: list[str] = table.column_names
    for name in names:
        if name in there:
            return name
    raise ExperimentError(
        f"{where}: no column {' or '.join(names)}, there are {', '.join(there) or 'none'}"
    )
