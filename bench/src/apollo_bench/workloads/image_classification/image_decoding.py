"""Decode image files to pixels."""

from __future__ import annotations

import io

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from apollo_bench.errors import ExperimentError, first_line


def decode(content: bytes, where: str) -> Image.Image:
    """Decode a whole image as RGB.

    Args:
        content: content of a file in any format that Pillow reads.
        where: name of the image in errors.

    Raises:
        ExperimentError: the content is no image, truncated or corrupt.
    """
    if not content:
        raise ExperimentError(f"{where}: empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise ExperimentError(f"{where}: not an image") from None
    except Exception as error:  # the decoders raise errors of almost every type
        raise ExperimentError(f"{where}: not a whole image ({first_line(error)})") from None


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
