"""What can be seen of a damaged image file without decoding it.

It is checked that the file can be opened, that its header is an image's with a size, and that it
goes on to the mark that ends its format (JPEG and PNG; a rarer format is decoded whole). So a file
that is empty, cut short or something else is found. Damage in its middle is not. Where it keeps the
image from being decoded, that will name the file; JPEG has no checksum that would show the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_START_OF_SCAN = 0xDA


def find_fault(path: Path) -> str | None:
    """What is wrong with an image file, as far as its header and its end tell; None: nothing."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return "empty"
            with Image.open(file) as image:
                end = _ENDS.get(image.format or "")
                if end is None:
                    image.load()
                    return None
            file.seek(-len(end), os.SEEK_END)
            if file.read() == end:
                return None
            # some cameras write more behind the end
            file.seek(0)
            content = file.read()
    except Exception as error:  # the decoders raise errors of almost every type
        if isinstance(error, OSError) and error.strerror:
            return f"cannot be read ({error.strerror})"
        return "not an image"
    if end in content[_scan(content) :]:
        return None
    return f"cut short: {len(content)} bytes without the mark that ends its format"


def _scan(content: bytes) -> int:
    """Where the pixels of a JPEG file begin: a thumbnail before them has an end of its own."""
    if content[:2] != b"\xff\xd8":
        return 0
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1] != _START_OF_SCAN:
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return place if content[place : place + 1] == b"\xff" else len(content)
