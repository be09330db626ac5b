"""The Transformer of Vaswani et al. (2017) for translation, normalised after each part as there.

Sizes, sharing of embeddings and initialisation are those of fairseq's ``transformer_wmt_en_de``,
which the paper trains (section 4.3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

KeysValues = tuple[Tensor, Tensor]  # each shape=(batch, heads, time, width / heads)


class Memory(NamedTuple):
    """What the decoder reads of the source, layer by layer."""

    layers: list[KeysValues]
    seen: Tensor  # shape=(batch, 1, 1, time), dtype=bool: False at padding

    def pick(self, rows: Tensor) -> Memory:
        """These rows of the batch."""
        return Memory([(k[rows], v[rows]) for k, v in self.layers], self.seen[rows])


class Transformer(nn.Module):
    """Encoder and decoder; source, target and output share one table of embeddings.

    Args:
        vocabulary: tokens of both languages.
        width: of a token's vector.
        inner: of the feed-forward parts.
        heads: of attention; they divide ``width``.
        layers: of the encoder, and of the decoder.
        dropout: probability, on embeddings and on what every part adds.
        padding: the token that fills sentences up.
        longest: tokens of a sentence at the most.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        inner: int,
        heads: int,
        layers: int,
        dropout: float,
        padding: int,
        longest: int,
    ) -> None:
        super().__init__()
        self.padding, self.longest = padding, longest
        self.scale = math.sqrt(width)
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.encoder = nn.ModuleList(
            _EncoderLayer(width, inner, heads, dropout) for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            _DecoderLayer(width, inner, heads, dropout) for _ in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.positions: Tensor
        self.register_buffer("positions", _sinusoids(longest, width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.embedding.weight[padding].zero_()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the token after each of ``target``, shape=(batch, time, vocabulary).

        Args:
            source: sentences filled up with padding, shape=(batch, time), dtype=int64.
            target: the translations so far, likewise.

        Raises:
            ValueError: a sentence is longer than ``longest``.
        """
        memory = self.encode(source)
        hidden = self._embed(target, 0)
        causal = torch.ones(2 * (target.shape[1],), dtype=torch.bool, device=target.device).tril()
        for layer, read in zip(self.decoder, memory.layers, strict=True):
            hidden, _ = layer(hidden, read, memory.seen, causal, None)
        return functional.linear(hidden, self.embedding.weight)

    def encode(self, source: Tensor) -> Memory:
        """Read the source; shape and errors as of ``forward``."""
        seen = (source != self.padding)[:, None, None, :]
        hidden = self._embed(source, 0)
        for layer in self.encoder:
            hidden = layer(hidden, seen)
        return Memory([layer.reading.keys_values(hidden) for layer in self.decoder], seen)  # type: ignore[union-attr, operator]

    def decode(
        self, token: Tensor, memory: Memory, past: list[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """One more token of each translation.

        Args:
            token: the newest, shape=(batch,).
            memory: of the source, with as many rows.
            past: what the last call returned; None: there was none.

        Returns:
            Logits of the next token, shape=(batch, vocabulary), and what the next call needs.
        """
        place = 0 if past is None else past[0][0].shape[2]
        hidden = self._embed(token[:, None], place)
        now = []
        for i, (layer, read) in enumerate(zip(self.decoder, memory.layers, strict=True)):
            hidden, kept = layer(hidden, read, memory.seen, None, None if past is None else past[i])
            now.append(kept)
        return functional.linear(hidden[:, 0], self.embedding.weight), now

    def _embed(self, tokens: Tensor, place: int) -> Tensor:
        time = place + tokens.shape[1]
        if time > self.longest:
            raise ValueError(f"a sentence has {time} tokens, allowed are {self.longest}")
        vectors = self.scale * self.embedding(tokens) + self.positions[place:time]
        return self.dropout(vectors)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def keys_values(self, x: Tensor) -> KeysValues:
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(self, x: Tensor, read: KeysValues, mask: Tensor | None) -> Tensor:
        found = functional.scaled_dot_product_attention(
            self._split(self.query(x)), *read, attn_mask=mask
        )
        joined: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return joined

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class _Part(nn.Module):
    """Adds what a part makes of its input to it, then normalises."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        result: Tensor = self.norm(x + self.dropout(added))
        return result


def _feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = _Attention(width, heads)
        self.feed_forward = _feed_forward(width, inner)
        self.after_attention, self.after_feed_forward = (_Part(width, dropout) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.after_attention(x, self.attention(x, self.attention.keys_values(x), seen))
        result: Tensor = self.after_feed_forward(x, self.feed_forward(x))
        return result


class _DecoderLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.reading = (_Attention(width, heads) for _ in range(2))
        self.feed_forward = _feed_forward(width, inner)
        self.after_attention, self.after_reading, self.after_feed_forward = (
            _Part(width, dropout) for _ in range(3)
        )

    def forward(
        self,
        x: Tensor,
        read: KeysValues,
        seen: Tensor,
        mask: Tensor | None,
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        own = self.attention.keys_values(x)
        if past is not None:
            own = torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2)
        x = self.after_attention(x, self.attention(x, own, mask))
        x = self.after_reading(x, self.reading(x, read, seen))
        return self.after_feed_forward(x, self.feed_forward(x)), own


def _sinusoids(count: int, width: int) -> Tensor:
    """Section 3.5 of Vaswani et al.; sines in the first half of a vector, cosines in the second."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10000.0) / max(1, width // 2 - 1)))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
