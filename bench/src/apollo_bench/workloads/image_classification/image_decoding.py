"""Decode image files to pixels."""

from __future__ import annotations

import io

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from apollo_bench.errors import ExperimentError, first_line

MAX_PIXELS = 89_478_485  # Pillow's own limit: it warns above, and refuses above twice as many

_DARK = 16  # of 255: the upper byte of 12-bit pixels in 16 bits stays below
_PNG_DEPTH = 24  # place of a PNG's bits per sample in its file
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF


def unusable(image: Image.Image) -> str | None:
    """Return why the pixels of an opened image cannot be used; None if they can."""
    if image.width * image.height > MAX_PIXELS:
        return _too_large(f"{image.width * image.height:,}")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        return "its pixels have 32 bits and no known range; convert it to 8 bits"
    return None


def opening_error(error: Exception) -> str:
    """Return the reason why Pillow could not open a file, from its error."""
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(f"over {2 * MAX_PIXELS:,}")
    return "not an image"


def _too_large(pixels: str) -> str:
    return f"it has {pixels} pixels, allowed are {MAX_PIXELS:,}; scale it down"


def decode(content: bytes, where: str) -> Image.Image:
    """Decode a whole image as RGB.

    Args:
        content: content of a file in any format that Pillow reads.
        where: name of the image in errors.

    Raises:
        ExperimentError: the content is no image, truncated, corrupt or too large.
    """
    if not content:
        raise ExperimentError(f"{where}: empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if problem := unusable(image):
                raise ExperimentError(f"{where}: {problem}")
            image.load()
            if problem := unknown_range(image, content):
                raise ExperimentError(f"{where}: {problem}")
            return _as_rgb(image, content)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ExperimentError(f"{where}: {opening_error(error)}") from None
    except ExperimentError:
        raise
    except Exception as error:  # the decoders raise errors of almost every type
        raise ExperimentError(f"{where}: not a whole image ({first_line(error)})") from None


def unknown_range(image: Image.Image, content: bytes) -> str | None:
    """Return why the range of a loaded image is unknown; None if it is known.

    Cameras and scanners store 10 or 12 bits in files of 16. Their upper byte is nearly black.

    Args:
        image: a loaded image.
        content: content of its file.
    """
    if image.mode[0] == "I":
        known = _shift(image, content) is not None
    elif image.format == "PNG" and content[_PNG_DEPTH] == 16:  # Pillow has taken the upper bytes
        colors = image.getbands()[:3] if len(image.getbands()) > 2 else image.getbands()[:1]
        known = any(numpy.asarray(image.getchannel(band)).max() >= _DARK for band in colors)
    else:
        known = True
    if known:
        return None
    return (
        "its pixels have 16 bits and use less than a sixteenth of their range, as 12 bits stored "
        "in 16 do; scale them to 16 bits, or convert it to 8 bits"
    )


def _as_rgb(image: Image.Image, content: bytes) -> Image.Image:
    if image.mode[0] != "I":
        return image.convert("RGB")
    # Pillow would turn grey of 16 bits into white. The upper byte is taken, as for color.
    shift = _shift(image, content)
    assert shift is not None  # checked by unknown_range
    grey = (numpy.asarray(image) >> shift).clip(0, 255).astype(numpy.uint8)
    return Image.fromarray(grey).convert("RGB")


def _shift(image: Image.Image, content: bytes) -> int | None:
    """Return the number of bits of grey pixels beyond eight; None if their range is unknown."""
    samples = numpy.asarray(image)
    bits = _stated_bits(image, content)
    if image.format != "PNG" and 8 <= bits < 16:
        return bits - 8
    if image.format == "PNG" and 8 <= bits < 16 and samples.max() < 1 << bits:
        # the standard wants the significant bits above the others; some writers leave them below
        low = 16 - bits
        high = samples >> low
        filled = (high << low) | (high >> (bits - low)), high << low
        if not any((samples == one).all() for one in filled):
            return bits - 8
        return 8
    return None if 0 < samples.max() < _DARK << 8 else 8  # all black is the same in every range


def _stated_bits(image: Image.Image, content: bytes) -> int:
    """Return how many bits of a grey pixel the file says to be significant; 16 by default."""
    if image.format == "PNG":
        place = 8
        while len(content) >= place + 12:
            size, kind = (
                int.from_bytes(content[place : place + 4], "big"),
                content[place + 4 : place + 8],
            )
            if kind == b"sBIT":
                return content[place + 8]
            if kind == b"IDAT":
                break
            place += 12 + size
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return 16
    largest = tags.get(_MAX_SAMPLE_VALUE)
    if largest is not None:
        return int(numpy.max(largest)).bit_length()
    return int(tags.get(_BITS_PER_SAMPLE, (16,))[0])


def decode_equal(contents: list[bytes], size: tuple[int, int], where: str) -> Tensor:
    """Decode images of one size.

    Args:
        contents: contents of the files.
        size: width and height.
        where: name of the images in errors; the row is added.

    Returns:
        A uint8 tensor of shape (n, 3, height, width).

    Raises:
        ExperimentError: an image is corrupt or of another size.
    """
    pixels = numpy.empty((len(contents), size[1], size[0], 3), dtype=numpy.uint8)
    for number, content in enumerate(contents):
        image = decode(content, f"{where}, row {number}")
        if image.size != size:
            raise ExperimentError(
                f"{where}, row {number}: an image of {image.width} x {image.height} pixels, "
                f"not {size[0]} x {size[1]}"
            )
        pixels[number] = numpy.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
