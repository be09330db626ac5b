"""Gzip with the same bytes each time, for the scripts that make embedded data."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable


def compress(content: bytes) -> bytes:
    """Return the gzipped content.

    ``gzip.compress`` does not do: its header differs between versions of Python.
    """
    buffer = io.BytesIO()
    # a gzip header holds file name and time: both are fixed
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(content)
    return buffer.getvalue()


def compress_lines(lines: Iterable[str]) -> bytes:
    """Return the gzipped lines, in UTF-8, each with a newline at its end."""
    return compress("".join(f"{line}\n" for line in lines).encode())
