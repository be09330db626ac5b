"""Statistics over seeds: mean, standard deviation, paired differences.

The sums in tables are exact (``statistics``), so that no digit depends on the order of the runs.
Curves come from pandas, whose sums are rounded.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import pandas
from scipy import stats

_LARGE = 1e7  # from here on numbers have an exponent


def number_text(value: float, digits: int) -> str:
    """Return a number with so many digits after the point, or with an exponent if it is large.

    Example:
        >>> number_text(87.1234, 2), number_text(10250186991862601728.0, 2)
        ('87.12', '1.03e+19')
    """
    return f"{value:.{digits}f}" if abs(value) < _LARGE else f"{value:.2e}"


@dataclass(frozen=True)
class SampleStats:
    """Mean and sample standard deviation of some values."""

    mean: float
    std: float | None  # None for one value
    count: int

    def text(self, digits: int) -> str:
        """Return the values as "87.12 ± 0.34"."""
        mean = number_text(self.mean, digits)
        return mean if self.std is None else f"{mean} ± {number_text(self.std, digits)}"


def sample_stats(values: Iterable[float | None]) -> SampleStats | None:
    """Return the statistics of the values that are not None; None if there are none.

    Example:
        >>> sample_stats([1.0, None, 3.0]).text(digits=2)
        '2.00 ± 1.41'
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return SampleStats(statistics.fmean(known), std, len(known))


def stats_over_time(times: Sequence[float], values: Sequence[float]) -> pandas.DataFrame:
    """Return columns ``mean``, ``std`` and ``count`` of the values at each time, in order of time.

    ``std`` is 0 for one value.

    Example:
        >>> stats_over_time([1, 2, 1], [3.0, 5.0, 4.0])["mean"].to_dict()
        {1: 3.5, 2: 5.0}
    """
    by_time = pandas.Series(values, times, dtype=float).groupby(level=0)
    return by_time.agg(["mean", "std", "count"]).fillna({"std": 0.0})


@dataclass(frozen=True)
class Difference:
    """Difference between two optimizers, paired by seed."""

    mean: float
    pairs: int
    low: float | None  # of Student's 95 % interval of the mean; None for one pair
    high: float | None
    p: float | None  # of a two-sided paired t-test; None for one pair or equal differences

    @property
    def is_lead(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low is not None and self.low > 0

    def text(self, digits: int) -> str:
        """Return the values as "+0.34 [-0.10, +0.71]"."""
        mean = f"{self.mean:+.{digits}f}"
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def difference(one: dict[int, float], other: dict[int, float]) -> Difference | None:
    """Return ``one`` minus ``other`` over their common seeds; None if there are none.

    The interval is Student's t interval. It is right for few pairs, where a bootstrap's is too
    narrow.

    Example:
        >>> found = difference({1: 93.0, 2: 94.0, 3: 95.0}, {1: 92.5, 2: 93.0, 3: 93.5})
        >>> found.mean, found.pairs, round(found.p, 3)
        (1.0, 3, 0.074)

    Args:
        one: values by seed.
        other: values by seed.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    values = numpy.array([one[seed] - other[seed] for seed in seeds])
    mean = float(values.mean())
    if len(seeds) == 1:
        return Difference(mean, 1, None, None, None)
    # equal, except for rounding of the subtraction
    if numpy.ptp(values) <= 1e-9 * max(abs(x) for seed in seeds for x in (one[seed], other[seed])):
        return Difference(mean, len(seeds), mean, mean, None)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    return Difference(
        mean, len(seeds), float(interval.low), float(interval.high), float(test.pvalue)
    )
