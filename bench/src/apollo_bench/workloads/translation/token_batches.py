"""Batches of similar numbers of tokens: pairs of similar length together, with little padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from apollo_bench.errors import ExperimentError
from apollo_bench.seeds import derived_seed
from apollo_bench.workloads.translation.encoded_pairs import EncodedPairs, TokenizedSentences
from apollo_bench.workloads.translation.subwords import BEGIN, END, PADDING

IndexArray = NDArray[numpy.int64]


class TokenBatch(NamedTuple):
    """Sentence pairs as rows, padded with ``PADDING``; all int64."""

    source: Tensor  # shape=(pairs, longest source + 1): ends with END
    target_in: Tensor  # shape=(pairs, longest target + 1): begins with BEGIN
    target_out: Tensor  # shape of target_in: ends with END; the targets of the loss
    examples: IndexArray  # shape=(pairs,): indices of the pairs in the data


class TokenBatches:
    """Encoded pairs in fixed batches; only the order of the batches changes by epoch.

    Each of ``world`` processes takes every ``world``-th pair of a batch, at least one. So every
    batch needs ``world`` pairs. A batch that is full has at least ``max_tokens // longest`` pairs.
    The last batch may have fewer and is then balanced with the one before it. Two conditions
    suffice: ``(2 * world - 1) * longest <= max_tokens``, and at least ``world`` pairs in all.

    Args:
        pairs: training pairs, none of which is too long for the model.
        max_tokens: largest number of tokens per batch over all processes, padding included, for
            source and target each.
        world: number of processes that share a batch.

    Raises:
        ExperimentError: the conditions are not met.
    """

    def __init__(self, pairs: EncodedPairs, max_tokens: int, world: int = 1) -> None:
        # with the token for begin or end
        source, target = 1 + pairs.source.lengths, 1 + pairs.target.lengths
        if pairs.size < world:
            raise ExperimentError(
                f"{pairs.size} sentence pairs for {world} processes: each needs one at least"
            )
        max_length = int(max(source.max(), target.max()))
        needed = (2 * world - 1) * max_length
        if needed > max_tokens:
            raise ExperimentError(
                f"train.batch_size is {max_tokens}: for sentences of {max_length} tokens shared by "
                f"{world} process{'es' if world > 1 else ''} it must be at least {needed}"
            )
        self._pairs = pairs
        self._world = world
        self._groups = group(source, target, max_tokens)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self._groups)

    def examples(self, number: int) -> IndexArray:
        """Return the indices of the pairs in a batch, shape (pairs,)."""
        return self._groups[number]

    def tokens(self, number: int) -> int:
        """Return the number of target tokens in the loss of a batch, over all processes."""
        examples = self._groups[number]
        return int(self._pairs.target.lengths[examples].sum()) + len(examples)

    def order(self, seed: int, epoch: int) -> list[int]:
        """Return the order of the batches in an epoch: a permutation of their numbers."""
        generator = Generator().manual_seed(derived_seed(seed, epoch))
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        return order

    def part(self, number: int, rank: int = 0) -> TokenBatch:
        """Return the part of a batch for one process."""
        return padded(self._pairs, self._groups[number][rank :: self._world])


def group(source: IndexArray, target: IndexArray, max_tokens: int) -> list[IndexArray]:
    """Divide pairs into batches, which depend only on the arguments.

    Args:
        source, target: lengths of the two sides with begin or end, shape (n,).
        max_tokens: at least the largest length.

    Returns:
        The indices of each batch's pairs, shortest first. Every pair occurs once, and every batch
        has ``pairs * longest <= max_tokens`` on both sides.
    """
    longer = numpy.maximum(source, target)
    ranking = numpy.lexsort((numpy.arange(len(source)), source, target, longer))
    widths = longer[ranking]
    starts = [0]
    for index, width in enumerate(widths.tolist()):
        # sorted by the longer side: the newest pair is the widest
        if width * (index - starts[-1] + 1) > max_tokens:
            starts.append(index)
    if len(starts) > 1:
        before, last = starts[-1] - starts[-2], len(widths) - starts[-1]
        even = min((before + last) // 2, max_tokens // int(widths[-1]))
        starts[-1] = len(widths) - max(last, even)
    return numpy.split(ranking, starts[1:]) if len(widths) else []


def padded(pairs: EncodedPairs, examples: IndexArray) -> TokenBatch:
    """Return these pairs as a batch, in the given order."""
    source = _padded(pairs.source, examples, None, END)
    target_in = _padded(pairs.target, examples, BEGIN, None)
    target_out = _padded(pairs.target, examples, None, END)
    return TokenBatch(source, target_in, target_out, examples)


def _padded(
    sentences: TokenizedSentences, examples: IndexArray, begin: int | None, end: int | None
) -> Tensor:
    chosen = sentences.chosen(examples)
    lengths = chosen.lengths
    shift = 0 if begin is None else 1
    rows = numpy.full((len(examples), 1 + int(lengths.max(initial=0))), PADDING, numpy.int64)
    positions = numpy.arange(rows.shape[1])
    inside = (positions >= shift) & (positions < lengths[:, None] + shift)
    rows[inside] = chosen.tokens
    if begin is not None:
        rows[:, 0] = begin
    if end is not None:
        rows[numpy.arange(len(rows)), lengths] = end
    return torch.from_numpy(rows)
