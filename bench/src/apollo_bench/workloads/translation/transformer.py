"""Transformer of Vaswani et al. (2017), as fairseq's ``transformer_wmt_en_de``: post-norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

KeyValue = tuple[Tensor, Tensor]


def sinusoids(max_length: int, width: int) -> Tensor:
    """Return position encodings, shape (max_length, width): all sines, then all cosines."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(max_length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class Attention(nn.Module):
    """Multi-head attention.

    Query, key and value have separate matrices, as in fairseq. Apollo's reductions run over whole
    tensors, so that it would train one packed matrix differently.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        for projection in (self.query, self.key, self.value):
            # the bound that one packed matrix would have
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.output.weight)
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(projection.bias)

    def _split(self, x: Tensor) -> Tensor:
        n, time, width = x.shape
        return x.view(n, time, self.heads, width // self.heads).transpose(1, 2)

    def project(self, x: Tensor) -> KeyValue:
        """Return keys and values of x (n, time, width), each (n, heads, time, width / heads)."""
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(
        self, x: Tensor, keys_values: KeyValue, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from x (n, time, width) to the keys that the mask allows; same shape as x."""
        keys, values = keys_values
        attended = functional.scaled_dot_product_attention(
            self._split(self.query(x)), keys, values, mask, is_causal=causal
        )
        y: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, for each position."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)
        for layer in (self.inner, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n, time, width) to the same shape."""
        y: Tensor = self.output(torch.relu(self.inner(x)))
        return y


class Residual(nn.Module):
    """The end of every sublayer: norm(x + dropout(y))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map x and y, each (n, time, width), to the same shape."""
        z: Tensor = self.norm(x + self.dropout(y))
        return z


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, width: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.residual1 = Residual(width, dropout)
        self.feed_forward = FeedForward(width, inner)
        self.residual2 = Residual(width, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map x (n, S, width) to the same shape; mask (n, 1, 1, S) is true at words."""
        x = self.residual1(x, self.attention(x, self.attention.project(x), mask))
        x = self.residual2(x, self.feed_forward(x))
        return x


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, and feed-forward."""

    def __init__(self, width: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.residual1 = Residual(width, dropout)
        self.across = Attention(width, heads)
        self.residual2 = Residual(width, dropout)
        self.feed_forward = FeedForward(width, inner)
        self.residual3 = Residual(width, dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Map x (n, T, width) to the same shape; memory (n, S, width), mask (n, 1, 1, S)."""
        y = self.attention(x, self.attention.project(x), causal=True)
        return self._rest(self.residual1(x, y), self.across.project(memory), mask)

    def step(
        self, x: Tensor, past: KeyValue | None, memory: KeyValue, mask: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """Decode one more word of every beam.

        Args:
            x: (n, beams, width).
            past: keys and values of the previous words, (n * beams, heads, time, width / heads);
                None for the first word.
            memory: keys and values of the source, (n, heads, S, width / heads).
            mask: (n, 1, 1, S).

        Returns:
            Features, (n, beams, width), and the past with this word.
        """
        word = x.flatten(0, 1).unsqueeze(1)
        keys, values = self.attention.project(word)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        y = self.attention(word, (keys, values)).view_as(x)
        return self._rest(self.residual1(x, y), memory, mask), (keys, values)

    def _rest(self, x: Tensor, memory: KeyValue, mask: Tensor) -> Tensor:
        # step has beams in the place of time, because all beams share the source's keys
        x = self.residual2(x, self.across(x, memory, mask))
        x = self.residual3(x, self.feed_forward(x))
        return x


@dataclass
class Cache:
    """Keys and values of every layer, computed while decoding word by word."""

    mask: Tensor  # (n, 1, 1, S), bool, true at the words of the source
    memory: list[KeyValue]  # of the source, (n, heads, S, width / heads)
    past: list[KeyValue | None]  # of the words so far, (n * beams, heads, time, width / heads)
    time: int = 0  # words so far

    def reorder(self, beams: Tensor) -> None:
        """Continue from these beams, (n, beams) int64, numbered within their sentence."""
        first = torch.arange(beams.shape[0], device=beams.device)[:, None] * beams.shape[1]
        self._select_past((first + beams).flatten())

    def keep(self, sentences: Tensor, beams: int) -> None:
        """Continue with these sentences only, shape (kept,) int64, each of ``beams`` beams."""
        self.mask = self.mask[sentences]
        self.memory = [(keys[sentences], values[sentences]) for keys, values in self.memory]
        within = torch.arange(beams, device=sentences.device)
        self._select_past((sentences[:, None] * beams + within).flatten())

    def _select_past(self, rows: Tensor) -> None:
        self.past = [pair and (pair[0][rows], pair[1][rows]) for pair in self.past]


class Transformer(nn.Module):
    """Encoder and decoder that share one matrix of embeddings, also with the output.

    Padding is on the right. Weights are drawn from torch's global generator.

    Args:
        vocabulary: number of words of both languages together.
        width: width of a word vector; even, and a multiple of the heads.
        inner: width of the feed-forward layers.
        heads: heads of every attention.
        layers: layers of the encoder, and as many of the decoder.
        dropout: rate on embeddings with positions, and on the output of every sublayer.
        padding: id of the word that pads shorter sentences.
        max_length: largest number of words per sentence.

    Raises:
        ValueError: a width that the heads do not divide, or padding outside the vocabulary.
    """

    output = "embedding"  # the layer of the logits

    positions: Tensor

    def __init__(
        self,
        vocabulary: int,
        width: int = 512,
        inner: int = 2048,
        heads: int = 8,
        layers: int = 6,
        dropout: float = 0.1,
        *,
        padding: int,
        max_length: int = 1024,
    ) -> None:
        if width % 2 or width % heads:
            raise ValueError(f"width is {width}, allowed are even multiples of the {heads} heads")
        if not 0 <= padding < vocabulary:
            raise ValueError(f"padding is {padding}, allowed are words from 0 to {vocabulary - 1}")
        super().__init__()
        self.padding = padding
        self.max_length = max_length
        self.embedding = nn.Embedding(vocabulary, width, padding)
        with torch.no_grad():
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.embedding.weight[padding].zero_()
        self.register_buffer("positions", sinusoids(max_length, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            EncoderLayer(width, inner, heads, dropout) for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(width, inner, heads, dropout) for _ in range(layers)
        )

    def fsdp_units(self) -> list[nn.Module]:
        """Return the modules that FSDP2 shards as separate units: the layers."""
        return [*self.encoder, *self.decoder]

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Return the logits of the word after each word of the target.

        Args:
            source: (n, S), int64.
            target_in: (n, T), int64, the target with its begin word and without its end.

        Returns:
            Logits, (n, T, vocabulary); those at padding have no meaning.

        Raises:
            ValueError: a sentence is longer than ``max_length``.
        """
        memory, mask = self.encode(source), self.mask(source)
        x = self._embed(target_in, "target")
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return self._logits(x)

    def encode(self, source: Tensor) -> Tensor:
        """Return the memory (n, S, width) of a source (n, S), int64; ValueError if too long."""
        mask = self.mask(source)
        x = self._embed(source, "source")
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def mask(self, source: Tensor) -> Tensor:
        """Return the mask of a source (n, S): (n, 1, 1, S), bool, true at words."""
        return (source != self.padding)[:, None, None]

    def start(self, source: Tensor) -> Cache:
        """Encode the source (n, S), int64, for :meth:`step`; ValueError if it is too long."""
        memory = self.encode(source)
        projected = [layer.across.project(memory) for layer in self._decoder_layers()]
        return Cache(self.mask(source), projected, [None] * len(projected))

    def step(self, words: Tensor, cache: Cache) -> Tensor:
        """Return the logits of the next word of every beam.

        Args:
            words: (n, beams), int64, the last word of every beam.
            cache: cache of all previous words; this word is added.

        Returns:
            Logits, (n, beams, vocabulary).

        Raises:
            ValueError: there are more words than ``max_length``.
        """
        x = self._embed(words[..., None], "target", cache.time).squeeze(-2)
        for i, layer in enumerate(self._decoder_layers()):
            x, cache.past[i] = layer.step(x, cache.past[i], cache.memory[i], cache.mask)
        cache.time += 1
        return self._logits(x)

    def _decoder_layers(self) -> Iterable[DecoderLayer]:
        return cast("Iterable[DecoderLayer]", self.decoder)

    def _embed(self, words: Tensor, name: str, first: int = 0) -> Tensor:
        """Embed words (..., time), whose first position is ``first``, as (..., time, width)."""
        last = first + words.shape[-1]
        if last > self.max_length:
            raise ValueError(f"{name} has {last} words, allowed are {self.max_length} at most")
        x = self.embedding(words) * math.sqrt(self.embedding.embedding_dim)
        y: Tensor = self.dropout(x + self.positions[first:last])
        return y

    def _logits(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.embedding.weight)
