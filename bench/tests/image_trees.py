"""Folder trees of small photographs, made with Pillow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02084071")


def photograph(number: int, width: int, height: int) -> Image.Image:
    """Return a smooth image, which JPEG hardly changes, different for every number."""
    random = numpy.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=numpy.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def write_tree(root: Path, train: int = 4, val: int = 2) -> Path:
    """Write images of many sizes, for each class in ``train`` and ``val``."""
    number = 0
    for split, count in (("train", train), ("val", val)):
        for wnid in WNIDS:
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for place in range(count):
                image = photograph(number, 40 + 7 * (number % 5), 40 + 9 * (number % 3))
                (folder / f"{wnid}_{place}.JPEG").write_bytes(jpeg(image))
                number += 1
    return root
