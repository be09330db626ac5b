"""Open plain or gzipped files; errors name the file and what to do."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from apollo_bench.errors import ExperimentError, first_line

_GZIP = b"\x1f\x8b"


@contextmanager
def open_binary(path: Path, remedy: str, plain: bool = True) -> Iterator[IO[bytes]]:
    """Open a gzipped file, whatever its name says, and translate the errors of reading it.

    Args:
        path: the file.
        remedy: what the user should do about a bad file; the message ends with it.
        plain: whether the file may also be uncompressed.

    Raises:
        ExperimentError: the file is missing, damaged or truncated.
    """
    try:
        with path.open("rb") as start:
            zipped = not plain or start.read(len(_GZIP)) == _GZIP
        with cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file; {remedy}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(
            f"{path}: cannot be read whole ({first_line(error)}); {remedy}"
        ) from None
