"""Crops of single photographs."""

from __future__ import annotations

import math
from random import Random

import numpy
import pytest
from PIL import Image

from apollo_bench.workloads.image_classification.cropping import (
    center_crop,
    random_box,
    random_resized_crop,
)
from bench.tests.image_trees import photograph


def test_a_random_box_lies_in_the_image_with_area_and_aspect_as_asked() -> None:
    random = Random(0)
    areas, aspects, left, right = [], [], [], []
    for _ in range(4000):
        box = random_box(500, 400, 0.08, random)
        assert 0 <= box[0] < box[2] <= 500
        assert 0 <= box[1] < box[3] <= 400
        width, height = box[2] - box[0], box[3] - box[1]
        areas.append(width * height / 200_000)
        aspects.append(width / height)
        left.append(box[0])
        right.append(500 - box[2])
    # the bounds 0.08 and 1, less exact because boxes are rounded to pixels
    assert 0.075 <= min(areas) <= 0.1
    assert 0.95 <= max(areas) <= 1.0
    assert 0.74 <= min(aspects) <= 0.77
    assert 1.3 <= max(aspects) <= 1.35
    assert numpy.mean(left) == pytest.approx(numpy.mean(right), rel=0.05)
    # small areas always fit, so that the logarithm of their aspect is uniform
    logs = numpy.log([a for a, area in zip(aspects, areas, strict=True) if area < 0.4])
    assert numpy.mean(logs) == pytest.approx(0, abs=0.02)
    assert numpy.std(logs) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1))],
)
def test_a_long_image_gives_its_middle(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert random_box(*size, 0.5, Random(0)) == expected


def test_a_random_square_is_the_box_resized_perhaps_mirrored() -> None:
    image = photograph(1, 60, 50)
    seen = set()
    for seed in range(8):
        square = random_resized_crop(image, 24, 0.08, True, Random(seed))
        box = random_box(60, 50, 0.08, Random(seed))
        plain = image.crop(box).resize((24, 24), Image.Resampling.BILINEAR)
        both = [numpy.asarray(plain), numpy.asarray(plain)[:, ::-1]]
        matches = [numpy.array_equal(numpy.asarray(square), one) for one in both]
        assert sum(matches) == 1
        seen.add(matches[0])
        unflipped = random_resized_crop(image, 24, 0.08, False, Random(seed))
        assert numpy.array_equal(numpy.asarray(unflipped), both[0])
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("width", "height", "resized", "corner"),
    [
        (80, 40, (64, 32), (20, 4)),
        (40, 80, (32, 64), (4, 20)),
        (20, 20, (32, 32), (4, 4)),
        (50, 33, (48, 32), (12, 4)),
    ],
)
def test_the_centre_square(
    width: int, height: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = photograph(2, width, height)
    square = center_crop(image, 32, 24)
    expected = image.resize(resized, Image.Resampling.BILINEAR)
    left, upper = corner
    expected = expected.crop((left, upper, left + 24, upper + 24))
    assert numpy.array_equal(numpy.asarray(square), numpy.asarray(expected))
