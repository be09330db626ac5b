"""Text as one stream of numbers for each split."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from apollo_qn.experiments.data.vocabulary import Vocabulary

Tokens = NDArray[numpy.int32]


class Stream:
    """Tokens of several arrays, one after another, without copying them."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop), as many of them as there are."""
        found = []
        for part in range(bisect.bisect_right(self._ends, start), len(self._parts)):
            first = self._ends[part] - len(self._parts[part])
            if first >= stop:
                break
            found.append(self._parts[part][max(0, start - first) : stop - first])
        return numpy.concatenate(found) if found else numpy.empty(0, numpy.int32)


class Corpus(NamedTuple):
    """A text in three splits; every sentence ends with the vocabulary's ``end``."""

    train: Stream
    valid: Stream
    test: Stream
    vocabulary: Vocabulary
    fingerprint: str
