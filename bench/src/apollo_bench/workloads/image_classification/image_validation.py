"""Validation of image files before training.

The file is decoded as a whole; JPEG at an eighth of its size, which reads every coefficient but
computes few pixels. Checksums of PNG are verified. JPEG and PNG files must reach the marker that
ends their format. This finds files that are empty, cut short, of another format or undecodable.
JPEG has no checksum: damage that changes pixels but still decodes is not found.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image

from apollo_bench.errors import first_line
from apollo_bench.regular_files import read_regular
from apollo_bench.workloads.image_classification.image_decoding import (
    opening_error,
    unknown_range,
    unusable,
)

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_START_OF_SCAN = 0xDA


def check_image_file(path: Path) -> tuple[str | None, bytes]:
    """Return what is wrong with an image file, None if nothing is found, and its SHA-256."""
    try:
        content = read_regular(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})", b""
    return image_error(content), hashlib.sha256(content).digest()


def image_error(content: bytes) -> str | None:
    """Return what is wrong with the content of an image file; None if nothing is found."""
    if not content:
        return "empty"
    try:
        with Image.open(io.BytesIO(content)) as image:
            form, problem = image.format or "", unusable(image)
    except Exception as error:  # the decoders raise errors of almost every type
        return opening_error(error)
    if problem:
        return problem
    end = _ENDS.get(form)
    # some cameras write more behind the end
    if end is not None and not content.endswith(end) and end not in content[_scan(content) :]:
        return f"cut short: {len(content)} bytes without the mark that ends its format"
    try:
        if form == "PNG":
            with Image.open(io.BytesIO(content)) as image:
                image.verify()  # the image is of no use afterwards
        with Image.open(io.BytesIO(content)) as image:
            image.draft("L", (1, 1))  # only JPEG does this
            image.load()
            return unknown_range(image, content)
    except Exception as error:
        return f"not a whole image ({first_line(error)})"


def _scan(content: bytes) -> int:
    """Return where a JPEG's pixels begin; a thumbnail before them has its own end marker."""
    if content[:2] != b"\xff\xd8":
        return 0
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1] != _START_OF_SCAN:
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return place if content[place : place + 1] == b"\xff" else len(content)
