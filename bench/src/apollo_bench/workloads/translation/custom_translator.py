"""The user's network as a translator; each beam recomputes its whole prefix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apollo_bench.errors import ExperimentError


class Prefixes:
    """The sources and the words so far of every beam, in place of a cache of attention."""

    def __init__(self, source: Tensor) -> None:
        self.source = source  # shape=(n, S), dtype=int64
        self.words: Tensor | None = None  # shape=(n, beams, T), dtype=int64

    def reorder(self, beams: Tensor) -> None:
        """Continue these beams, shape (n, beams)."""
        if self.words is not None:
            self.words = self.words.gather(1, beams[..., None].expand_as(self.words))

    def keep(self, rows: Tensor, beam_size: int) -> None:
        """Forget all rows but these."""
        self.source = self.source[rows]
        if self.words is not None:
            self.words = self.words[rows]


class CustomTranslator(nn.Module):
    """A network from a source and the words before to the logits of the next words.

    Args:
        network: ``network(source, before)`` returns logits; source is (n, S) and before (n, T),
            int64, logits are (n, T, vocabulary). A target begins with a begin token.
        vocabulary: number of subwords of both languages.
        padding: id that pads shorter sentences on the right.
        max_length: largest number of subwords per sentence.
    """

    def __init__(self, network: nn.Module, vocabulary: int, padding: int, max_length: int) -> None:
        super().__init__()
        self.network = network
        self.padding, self.max_length = padding, max_length
        self._vocabulary = vocabulary
        if isinstance(own := getattr(network, "output", None), str):
            self.output = f"network.{own}"

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        """Return logits, shape (n, T, vocabulary)."""
        logits = self.network(source, before)
        shape = (*before.shape, self._vocabulary)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ExperimentError(
                f"model.factory: its network must return logits of shape {shape}, got {found}"
            )
        return logits

    def start(self, source: Tensor) -> Prefixes:
        """Return what ``step`` continues."""
        return Prefixes(source)

    def step(self, words: Tensor, cache: Prefixes) -> Tensor:
        """Return the logits of the next word of every beam, shape (n, beams, vocabulary)."""
        added = words[..., None]
        cache.words = added if cache.words is None else torch.cat([cache.words, added], -1)
        n, beams, time = cache.words.shape
        source = cache.source.repeat_interleave(beams, 0)
        logits: Tensor = self(source, cache.words.view(n * beams, time))
        return logits[:, -1].view(n, beams, -1)
