"""A text as token ids, one stream per split."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from apollo_bench.workloads.language_modeling.vocabulary import Vocabulary

TokenIds = NDArray[numpy.int32]


class TokenStream:
    """The tokens of several arrays as one stream; only a slice across arrays is copied.

    Args:
        parts: arrays of shape (any,), int32; memory-mapped ones stay on disk.
    """

    def __init__(self, parts: Sequence[TokenIds]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, wanted: slice) -> TokenIds:
        """Return an array of the slice's length, int32; do not write to it."""
        start, stop, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of tokens have step 1, this one {step}")
        found = []
        first = bisect.bisect_right(self._ends, start)
        for part, end in zip(self._parts[first:], self._ends[first:], strict=True):
            begin = end - len(part)
            if begin >= stop:
                break
            found.append(part[max(0, start - begin) : stop - begin])
        if len(found) == 1:
            return found[0]
        return numpy.concatenate(found) if found else numpy.empty(0, numpy.int32)


class Corpus(NamedTuple):
    """A text in three splits; END ends every sentence, also the last one."""

    train: TokenStream
    valid: TokenStream
    test: TokenStream
    vocabulary: Vocabulary
    fingerprint: str  # of the tokens and the vocabulary
    empty_lines: int = 0  # of the text, skipped
    remarks: Sequence[str] = ()  # on the files, for the user and the report
