"""Differences between optimizers, against numbers that are known."""

from __future__ import annotations

import random
import statistics

import pytest

from apollo_bench.report.statistics import SampleStats, difference, sample_stats


def test_spread() -> None:
    assert sample_stats([]) is None
    assert sample_stats([None, 2.0]) == SampleStats(2.0, None, 1)
    found = sample_stats([1.0, None, 3.0])
    assert found is not None
    assert (found.mean, found.count, found.text(2)) == (2.0, 2, "2.00 ± 1.41")


def test_a_difference_of_seeds_in_common() -> None:
    assert difference({1: 2.0}, {2: 1.0}) is None
    one = difference({1: 2.0, 3: 9.0}, {1: 1.5, 2: 1.0})
    assert one is not None
    assert (one.mean, one.pairs, one.low, one.p) == (0.5, 1, None, None)
    assert one.text(1) == "+0.5"
    same = difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert same is not None
    assert (same.low, same.high, same.p) == (1.0, 1.0, None)
    rounded = difference({1: 80.10, 2: 81.15, 3: 79.95}, {1: 80.0, 2: 81.05, 3: 79.85})
    assert rounded is not None
    assert rounded.p is None, "the rounding of a subtraction is no spread"


def test_p_value_and_interval_are_students() -> None:
    """Student's own example: ten patients' additional sleep, p = 0.00283, 0.70 to 2.46 hours."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    other = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = difference(dict(enumerate(other)), dict(enumerate(one)))
    assert found is not None
    assert found.mean == pytest.approx(1.58)
    assert found.p == pytest.approx(0.00283, abs=1e-5)
    assert (found.low, found.high) == (
        pytest.approx(0.70011, abs=1e-5),
        pytest.approx(2.45989, abs=1e-5),
    )


@pytest.mark.parametrize("pairs", [2, 3, 20])
def test_the_interval_covers_the_truth(pairs: int) -> None:
    """Of 400 samples about 95 % of the intervals hold the true difference, also for few pairs."""
    draw = random.Random(5)
    covered = []
    for _ in range(400):
        one = {seed: draw.gauss(1.0, 1.0) for seed in range(pairs)}
        found = difference(one, dict.fromkeys(one, 0.0))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.92 <= statistics.fmean(covered) <= 0.98
