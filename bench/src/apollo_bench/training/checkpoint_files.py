"""Checkpoint files: written atomically, and compared with their checksums when they are read."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError, first_line

# what torch.load, zipfile and the loading of states raise for a damaged checkpoint
UNREADABLE = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(NotImplementedError, pickle.PickleError, zipfile.BadZipFile),
)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; a crash leaves the whole old file or the whole new one.

    Example:
        >>> write_checkpoint(Path("newest.pt"), {"step": 3, "weight": torch.ones(2)})
        >>> read_checkpoint(Path("newest.pt"))["step"]
        3

    Args:
        path: file in an existing folder.
        state: tensors, numbers, texts, and lists and dicts of them.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``write_checkpoint`` wrote, on the CPU.

    ``torch.load`` ignores the checksums of the records, so that damaged weights would be trained
    on.

    Raises:
        ExperimentError: the file is missing or damaged, or holds other objects.
    """
    try:
        # as an open file: torch cannot open a path that is not UTF-8
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as records:
                damaged = records.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not a state")
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise unreadable(path, "it holds other objects than tensors and plain values") from None
    except UNREADABLE as error:
        raise unreadable(path, first_line(error)) from None
    return state


def unreadable(path: Path, reason: str) -> ExperimentError:
    """Return the error for a checkpoint that cannot be used."""
    return ExperimentError(
        f"{path}: the checkpoint cannot be read ({reason}); remove the run's directory to train it "
        "again"
    )
