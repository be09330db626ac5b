"""Sentence pairs as flat arrays of subword ids: four bytes per token, sixteen per pair."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.parallel_text import (
    FAIRSEQ,
    FilterCounts,
    LengthLimits,
    TextPairs,
    passes_filter,
)
from apollo_bench.workloads.translation.subwords import Subwords

TokenArray = NDArray[numpy.int32]
LengthArray = NDArray[numpy.int64]
_CHUNK = 20_000  # sentences per call of the tokenizer


class TokenizedSentences(NamedTuple):
    """Encoded sentences of one language, without begin and end."""

    tokens: TokenArray  # shape=(tokens,): all sentences, concatenated
    offsets: LengthArray  # shape=(n + 1,): sentence i is tokens[offsets[i]:offsets[i + 1]]

    @classmethod
    def concatenate(cls, parts: Iterable[tuple[TokenArray, LengthArray]]) -> TokenizedSentences:
        """Return the sentences of several parts of tokens, with their lengths."""
        tokens, lengths = [numpy.zeros(0, numpy.int32)], [numpy.zeros(1, numpy.int64)]
        for part_tokens, part_lengths in parts:
            tokens.append(part_tokens)
            lengths.append(part_lengths)
        return cls(numpy.concatenate(tokens), numpy.cumsum(numpy.concatenate(lengths)))

    @property
    def lengths(self) -> LengthArray:
        """Length of each sentence, shape (n,)."""
        return numpy.diff(self.offsets)

    def sentence(self, number: int) -> TokenArray:
        """Return the tokens of one sentence, as a view."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def chosen(self, numbers: LengthArray) -> TokenizedSentences:
        """Return a copy of some sentences, in the given order."""
        lengths = self.lengths[numbers]
        offsets = numpy.concatenate([numpy.zeros(1, numpy.int64), numpy.cumsum(lengths)])
        indices = numpy.arange(offsets[-1])
        indices += numpy.repeat(self.offsets[:-1][numbers] - offsets[:-1], lengths)
        return TokenizedSentences(self.tokens[indices], offsets)


class EncodedPairs(NamedTuple):
    """Encoded sentence pairs."""

    source: TokenizedSentences
    target: TokenizedSentences

    @classmethod
    def of(cls, pairs: TextPairs, subwords: Subwords) -> EncodedPairs:
        """Encode all pairs."""
        return cls(*(TokenizedSentences.concatenate(_encoded(side, subwords)) for side in pairs))

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.source.offsets) - 1

    def chosen(self, numbers: LengthArray) -> EncodedPairs:
        """Return a copy of some pairs, in the given order."""
        return EncodedPairs(self.source.chosen(numbers), self.target.chosen(numbers))

    def cleaned(self, limits: LengthLimits = FAIRSEQ) -> tuple[EncodedPairs, FilterCounts]:
        """Return the training pairs within limits, counted in subwords as in fairseq's script."""
        kept, counts = passes_filter(self.source.lengths, self.target.lengths, limits)
        return (self if kept.all() else self.chosen(numpy.flatnonzero(kept))), counts

    def fitting(self, max_length: int) -> tuple[EncodedPairs, int]:
        """Return the training pairs that fit the model, and the number of the others.

        Args:
            max_length: longest sequence of the model, with the token for begin or end.
        """
        fits = self._padded() <= max_length
        skipped = self.size - int(fits.sum())
        return (self.chosen(numpy.flatnonzero(fits)) if skipped else self), skipped

    def check_fitting(self, max_length: int, where: str) -> None:
        """Check that all held-out pairs fit the model.

        Args:
            max_length: longest sequence of the model, with the token for begin or end.
            where: name of the pairs, for the error, which adds the number of the line.

        Raises:
            ExperimentError: a pair is too long.
        """
        wanted = self._padded()
        for number in numpy.flatnonzero(wanted > max_length)[:1].tolist():
            raise ExperimentError(
                f"model.max_length is {max_length}, but line {number + 1} of {where} has "
                f"{wanted[number]} subwords with its end; every held-out pair must fit, so set it "
                f"to {wanted.max()} or more"
            )

    def _padded(self) -> LengthArray:
        return 1 + numpy.maximum(self.source.lengths, self.target.lengths)


def _encoded(side: list[str], subwords: Subwords) -> Iterable[tuple[TokenArray, LengthArray]]:
    for start in range(0, len(side), _CHUNK):
        yield subwords.encode_all(side[start : start + _CHUNK])
