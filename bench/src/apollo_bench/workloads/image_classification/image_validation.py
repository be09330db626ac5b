"""What can be seen of a damaged image file before anything is trained.

The file is opened and decoded whole (JPEG at an eighth of its size, which reads every coefficient
but computes few pixels), the checksums of PNG are verified, and it must go on to the mark that ends
its format (JPEG and PNG). So a file that is empty, cut short, something else or not to be decoded
is found. JPEG has no checksum: damage that changes pixels and still decodes cannot be seen.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from apollo_bench.errors import first_line

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_START_OF_SCAN = 0xDA


def image_file_error(path: Path) -> str | None:
    """What is wrong with an image file, in words; None: nothing that can be seen."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return image_error(content)


def image_error(content: bytes) -> str | None:
    """What is wrong with the content of an image file; None: nothing that can be seen."""
    if not content:
        return "empty"
    try:
        with Image.open(io.BytesIO(content)) as image:
            form = image.format or ""
    except Exception:  # the decoders raise errors of almost every type
        return "not an image"
    end = _ENDS.get(form)
    # some cameras write more behind the end
    if end is not None and not content.endswith(end) and end not in content[_scan(content) :]:
        return f"cut short: {len(content)} bytes without the mark that ends its format"
    try:
        if form == "PNG":
            with Image.open(io.BytesIO(content)) as image:
                image.verify()  # the image is of no use afterwards
        with Image.open(io.BytesIO(content)) as image:
            image.draft("L", (1, 1))  # JPEG alone heeds it
            image.load()
    except Exception as error:
        return f"not a whole image ({first_line(error)})"
    return None


def _scan(content: bytes) -> int:
    """Where the pixels of a JPEG file begin: a thumbnail before them has an end of its own."""
    if content[:2] != b"\xff\xd8":
        return 0
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1] != _START_OF_SCAN:
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return place if content[place : place + 1] == b"\xff" else len(content)
