"""Batches of truncated back-propagation through time: the text as parallel streams.

The training text is cut into as many equal streams as a batch has rows; step after step every row
reads the next tokens of its stream, so that the network's state can be carried over. What does not
fill a step is left out at the streams' ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from apollo_qn.experiments.data.corpus import Stream, Tokens

Pair = tuple[Tensor, Tensor]  # tokens and the tokens after them, each shape=(rows, time), int64


def count_steps(text: Stream, rows: int, time: int) -> int:
    """How many steps of so many rows and tokens a text is long enough for."""
    return (len(text) - 1) // rows // time


def training(text: Stream, rows: int, time: int, start: int, part: slice) -> Iterator[Pair]:
    """The steps from ``start`` on; of each the rows that ``part`` names."""
    length = (len(text) - 1) // rows
    firsts = [row * length for row in range(rows)][part]
    for step in range(start, count_steps(text, rows, time)):
        yield _pair(
            [text.read(first + step * time, first + (step + 1) * time + 1) for first in firsts]
        )


def evaluation(
    text: Stream, before: int, rows: int, time: int, rank: int, world: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every token once, in order along streams, the last of them filled up.

    Args:
        text: of which every token is predicted.
        before: the token before the first.
        rows: streams.
        time: tokens of a stream at a time.
        rank: this process; it takes every ``world``-th stream.
        world: processes.

    Yields:
        Tokens, targets and which targets count, each shape=(streams, time).
    """
    length = -(-len(text) // rows)
    inputs, wanted = [], []
    for row in range(rank, rows, world):
        first = row * length
        words = text.read(first, first + length)
        if len(words):
            previous = text.read(first - 1, first) if first else numpy.array([before])
            inputs.append(numpy.concatenate([previous, words[:-1]]))
            wanted.append(words)
    if not inputs:
        return
    width = -(-length // time) * time

    def filled(rows: list[Tokens]) -> Tensor:
        return torch.from_numpy(
            numpy.stack([numpy.pad(row, (0, width - len(row))) for row in rows])
        ).long()

    tokens, targets = filled(inputs), filled(wanted)
    lengths = torch.tensor([[len(row)] for row in wanted])
    counts = torch.arange(width) < lengths
    for start in range(0, width, time):
        span = slice(start, start + time)
        yield tokens[:, span], targets[:, span], counts[:, span]


def _pair(rows: list[Tokens]) -> Pair:
    tokens = torch.from_numpy(numpy.stack(rows)).long()
    return tokens[:, :-1], tokens[:, 1:]
