"""Open plain or gzipped files; ``gzip.open`` would unpack any size and not say what to do."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.regular_files import open_regular

_GZIP = b"\x1f\x8b"
# A file may unpack to this multiple of its size, or to this many bytes. Text and images stay below
# 20 times their size; the format allows 1000 times.
_MAX_RATIO = 200
_MIN_LIMIT = 1 << 26


class _Bounded(io.RawIOBase):
    """The unpacked content of a file; reading beyond the limit is an error."""

    def __init__(self, packed: BinaryIO) -> None:
        size = packed.seek(0, io.SEEK_END)
        packed.seek(0)
        self._file = gzip.GzipFile(fileobj=packed)
        self._limit = max(_MIN_LIMIT, _MAX_RATIO * size)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._read += count
        if self._read > self._limit:
            raise gzip.BadGzipFile(f"it unpacks to more than {self._limit:,} bytes")
        return count


def unpack(packed: BinaryIO) -> io.BufferedReader:
    """Return a reader of the unpacked content of a gzipped file.

    It raises OSError, EOFError or zlib.error where the content is damaged, cut short or too large.
    """
    return io.BufferedReader(_Bounded(packed), 1 << 16)


@contextmanager
def open_binary(path: Path, remedy: str, plain: bool = True) -> Iterator[IO[bytes]]:
    """Open a gzipped file, whatever its name says, and translate the errors of reading it.

    Args:
        path: the file.
        remedy: what the user should do about a bad file; the message ends with it.
        plain: whether the file may also be uncompressed.

    Raises:
        ExperimentError: the file is missing, damaged, truncated, or unpacks to far too much.
    """
    try:
        with open_regular(path) as file:
            zipped = not plain or file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            yield unpack(file) if zipped else file
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file; {remedy}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ExperimentError(f"{path}: cannot be read whole ({reason}); {remedy}") from None
