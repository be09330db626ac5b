"""Batches of parallel streams, for truncated back-propagation through time.

The tokens are cut into as many streams of equal length as a batch has rows. Step t of an epoch
takes the t-th piece of every stream. Row i therefore continues row i of the previous step, and so
does the hidden state.

The paper says that the state is not reset. The code released with it shuffles the shards and the
sentences within each in every epoch, cuts each shard into its own streams, and resets the state
with each shard. Here the whole corpus is cut into streams, in the order of its (shuffled)
sentences. With a seed, each epoch starts at another token and treats the corpus as a ring, so that
streams and pieces are cut elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from apollo_bench.errors import ExperimentError
from apollo_bench.seeds import derived_seed
from apollo_bench.workloads.batch_shares import share_of_batch
from apollo_bench.workloads.language_modeling.token_corpus import TokenStream

IGNORED = -100  # a target that does not count

InputTargetPair = tuple[Tensor, Tensor]  # tokens and targets, both shape (streams, steps), int64
_Rows = NDArray[numpy.int64]


class BPTTBatches:
    """A corpus as ``batch`` parallel streams, read ``steps`` tokens at a time.

    An epoch from the first token leaves out the rest of the corpus, fewer than batch * (steps + 1)
    tokens.

    Args:
        tokens: tokens of the training split.
        batch: number of streams.
        steps: tokens per stream and batch.

    Raises:
        ExperimentError: the tokens do not fill one batch.
    """

    def __init__(self, tokens: TokenStream, batch: int, steps: int) -> None:
        if batch < 1 or steps < 1:
            raise ValueError(f"batch is {batch} and steps is {steps}; both must be 1 at least")
        self._tokens, self._batch, self._steps = tokens, batch, steps
        self._length = (len(tokens) - 1) // batch  # the last token is only a target
        self.batches = self._length // steps  # in an epoch
        if not self.batches:
            raise ExperimentError(
                f"{len(tokens)} tokens do not fill a batch of {batch} streams of {steps} tokens; "
                f"{batch * steps + 1} do; check train.batch_size, data.bptt_steps and "
                "data.train_examples"
            )

    def epoch(
        self, start: int = 0, offset: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[InputTargetPair]:
        """Yield the batches from step ``start`` on: tokens and, shifted by one, targets.

        Args:
            start: number of batches to skip.
            offset: token at which the first stream begins, as from the method ``offset``.
            rank: rank of this process; each process has equally many neighboring streams.
            world: number of processes.

        Raises:
            ExperimentError: the processes cannot share the streams equally.
        """
        return self._pieces(start, offset, share_of_batch(self._batch, rank, world))

    def offset(self, seed: int, epoch: int) -> int:
        """Return the index of the token at which an epoch begins, drawn by seed and epoch."""
        return derived_seed(seed, epoch) % len(self._tokens)

    def _pieces(self, start: int, offset: int, streams: range) -> Iterator[InputTargetPair]:
        for step in range(start, self.batches):
            rows: _Rows = numpy.empty((len(streams), self._steps + 1), numpy.int64)
            for row, stream in zip(rows, streams, strict=True):
                self._read(offset + stream * self._length + step * self._steps, row)
            yield _pair(rows)

    def _read(self, first: int, row: _Rows) -> None:
        """Fill the row with the tokens from ``first`` on; the first token follows the last."""
        first %= len(self._tokens)
        piece = self._tokens[first : first + len(row)]
        row[: len(piece)] = piece
        if len(piece) < len(row):
            row[len(piece) :] = self._tokens[: len(row) - len(piece)]


def evaluation_batches(
    tokens: TokenStream, batch: int, steps: int, end: int, rank: int = 0, world: int = 1
) -> Iterator[InputTargetPair]:
    """Yield every token once as a target, in successive pieces of parallel streams.

    The first token's input is END; that of every other stream is the token before it. The hidden
    state is zero only at the start of a stream, so fewer streams are closer to one pass over the
    text.

    Args:
        tokens: tokens of a held-out split.
        batch: number of streams.
        steps: tokens per stream and piece; the last piece may be shorter.
        end: id of END.
        rank: rank of this process; each has neighboring streams, perhaps none.
        world: number of processes.

    Returns:
        Tokens and targets, both of shape (streams, steps), int64; targets beyond the end are
            IGNORED.
    """
    if batch < 1 or steps < 1:
        raise ValueError(f"batch is {batch} and steps is {steps}; both must be 1 at least")
    length = -(-len(tokens) // batch)
    streams = range(rank * batch // world, (rank + 1) * batch // world)
    for first in range(0, length if streams else 0, steps):
        width = min(steps, length - first)
        rows = numpy.full((len(streams), width + 1), IGNORED, numpy.int64)
        for row, stream in zip(rows, streams, strict=True):
            begin = stream * length + first
            piece = tokens[max(0, begin - 1) : begin + width]
            lead = int(begin == 0)
            row[:lead] = end
            row[lead : lead + len(piece)] = piece
        inputs, targets = _pair(rows)
        yield inputs.masked_fill(inputs == IGNORED, end), targets


def _pair(rows: _Rows) -> InputTargetPair:
    tensor = torch.from_numpy(rows)
    return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()
