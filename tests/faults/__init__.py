"""Deliberate faults, each of which a fast test must notice; ``python -m tests.faults`` tries them.

The other modules hold the tables: ``optimizer.py`` and ``back_ends.py`` for the optimizer, the
others for the evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

QN = "src/apollo_qn"
BENCH = "bench/src/apollo_bench"
BENCH_TESTS = "bench/tests"


class Fault(NamedTuple):
    """A change of the sources that makes a result wrong.

    Attributes:
        what: the mistake in a few words.
        where: a source file, or a folder of sources in which one place has ``old``.
        old: the text that is replaced; it must occur exactly once.
        new: the text that stands there instead.
        tests: test files of which a fast test must fail.
    """

    what: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
