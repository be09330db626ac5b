"""Decode image files to pixels."""

from __future__ import annotations

import io

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from apollo_bench.errors import ExperimentError, first_line

MAX_PIXELS = 89_478_485  # Pillow's own limit: it warns of larger images, and refuses the double


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
            return _as_rgb(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ExperimentError(f"{where}: {opening_error(error)}") from None
    except ExperimentError:
        raise
    except Exception as error:  # the decoders raise errors of almost every type
        raise ExperimentError(f"{where}: not a whole image ({first_line(error)})") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] != "I":
        return image.convert("RGB")
    # Pillow would turn grey of 16 bits into white. The upper byte is taken, as for color.
    grey = (numpy.asarray(image) >> 8).astype(numpy.uint8)
    return Image.fromarray(grey).convert("RGB")


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
