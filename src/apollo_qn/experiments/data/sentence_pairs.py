"""Encoded pairs of sentences, and batches of as many tokens as a step takes.

Batches are made once, of pairs of like length; their composition is a function of the data and of
the batch size, their order one of seed and epoch. So an epoch always has the same number of steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from apollo_qn.experiments.data.subwords import BEGIN, END, PADDING
from apollo_qn.experiments.seeds import derived_seed

Numbers = NDArray[numpy.int32]


class Side(NamedTuple):
    """All sentences of one language, one after another, each with its end."""

    tokens: Numbers
    starts: NDArray[numpy.int64]  # of each sentence, and where the last ends

    @classmethod
    def of(cls, sentences: Iterable[list[int]]) -> Side:
        """Join sentences."""
        tokens, starts = array("i"), array("q", [0])
        for one in sentences:
            tokens.extend(one)
            tokens.append(END)
            starts.append(len(tokens))
        return cls(numpy.frombuffer(tokens, numpy.int32), numpy.frombuffer(starts, numpy.int64))

    def first(self, count: int | None) -> Side:
        """The first so many sentences; None: all."""
        return self if count is None else Side(self.tokens, self.starts[: count + 1])

    @property
    def lengths(self) -> NDArray[numpy.int64]:
        """Of each sentence, its end counted."""
        return numpy.diff(self.starts)

    def padded(self, rows: NDArray[numpy.int64]) -> Tensor:
        """Some sentences filled up to the longest, shape=(rows, time), int64."""
        sentences = [
            torch.from_numpy(self.tokens[self.starts[row] : self.starts[row + 1]]).long()
            for row in rows
        ]
        return torch.nn.utils.rnn.pad_sequence(sentences, True, PADDING)


class EncodedPairs(NamedTuple):
    """Sentences and translations."""

    source: Side
    target: Side

    def __len__(self) -> int:
        return len(self.source.starts) - 1

    def first(self, count: int | None) -> EncodedPairs:
        """The first so many; None: all."""
        return EncodedPairs(self.source.first(count), self.target.first(count))

    def up_to(self, longest: int) -> NDArray[numpy.int64]:
        """The pairs of which neither side has more tokens, its end counted."""
        longer = numpy.maximum(self.source.lengths, self.target.lengths)
        return numpy.flatnonzero(longer <= longest)

    def columns(self, rows: NDArray[numpy.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Source, target after ``BEGIN``, and what is to follow, each shape=(rows, time)."""
        wanted = self.target.padded(rows)
        first = torch.full((len(rows), 1), BEGIN)
        before = torch.cat([first, wanted[:, :-1]], 1)
        before[before == END] = PADDING
        return self.source.padded(rows), before, wanted


def make_batches(
    pairs: EncodedPairs, rows: NDArray[numpy.int64], tokens: int, least: int = 1
) -> list[NDArray[numpy.int64]]:
    """Divide pairs into batches of at most ``tokens`` tokens of either side, padding counted.

    Args:
        pairs: all.
        rows: those that take part; a pair of more than ``tokens`` tokens is a batch by itself.
        tokens: of the source, and of the target.
        least: pairs that a batch must have, one for each process; smaller ones join their
            neighbour.

    Returns:
        The rows of each batch.
    """
    one, other = pairs.source.lengths[rows], pairs.target.lengths[rows]
    order = rows[numpy.lexsort((rows, one, other))]
    batches: list[NDArray[numpy.int64]] = []
    start, widest = 0, 0
    longer = numpy.maximum(pairs.source.lengths, pairs.target.lengths)
    for place, row in enumerate(order):
        wider = max(widest, int(longer[row]))
        if place - start >= least and wider * (place - start + 1) > tokens:
            batches.append(order[start:place])
            start, wider = place, int(longer[row])
        widest = wider
    rest = order[start:]
    if len(rest) < least and batches:
        rest = numpy.concatenate([batches.pop(), rest])
    return [*batches, rest] if len(rest) else batches


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The order of so many batches in an epoch."""
    generator = Generator().manual_seed(derived_seed(seed, epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
