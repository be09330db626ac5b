"""Crop a photograph of any size to the square that the network sees."""

from __future__ import annotations

import math
from random import Random

from PIL import Image

# of a random crop, width to height, as in Szegedy et al. (2015), section 6
_ASPECTS = (3 / 4, 4 / 3)
_ATTEMPTS = 10

Box = tuple[int, int, int, int]  # left, upper, right, lower


def random_box(width: int, height: int, min_area: float, random: Random) -> Box:
    """Draw a part of an image: uniform in area and in the logarithm of its aspect ratio.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        min_area: smallest area of the part, relative to the image.
        random: the only source of randomness.
    """
    lowest, highest = (math.log(aspect) for aspect in _ASPECTS)
    for _ in range(_ATTEMPTS):
        area = width * height * random.uniform(min_area, 1.0)
        aspect = math.exp(random.uniform(lowest, highest))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left = int(random.random() * (width - across + 1))
            upper = int(random.random() * (height - down + 1))
            return left, upper, left + across, upper + down
    # a long and narrow image: as much of its middle as the aspects allow
    across = max(1, min(width, round(height * _ASPECTS[1])))
    down = max(1, min(height, round(width / _ASPECTS[0])))
    left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


def random_resized_crop(
    image: Image.Image, size: int, min_area: float, flip: bool, random: Random
) -> Image.Image:
    """Return a random part of an image, resized to a square of ``size``, half of them mirrored."""
    box = random_box(image.width, image.height, min_area, random)
    mirrored = random.random() < 0.5
    # cropped before it is resized: pixels beside the box stay out of it
    square = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    if flip and mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return square


def center_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Return the central square of ``size``, after the shorter side became ``resize``."""
    shorter = min(image.size)
    width, height = (max(resize, side * resize // shorter) for side in image.size)
    left, upper = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, upper, left + size, upper + size))
