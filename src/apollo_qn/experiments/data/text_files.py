"""Sentences from a text file, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from apollo_qn.experiments.errors import ExperimentError


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, without their ends; a name that ends in ``.gz`` is unpacked.

    Raises:
        ExperimentError: the file is missing, damaged or not UTF-8; it names the line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007  (told below)
                yield line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(
            f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line)"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ExperimentError(f"{path}: damaged or cut short after line {number}") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
