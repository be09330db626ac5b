"""A user's models, for the tests: a test copies this file into its own folder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Pixels(nn.Module):
    """A linear model that views images as rows, which fails for channels-last memory."""

    def __init__(self, in_channels: int, classes: int, size: int = 16, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_channels * size * size, width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.view(len(images), -1))
        return logits


class Words(nn.Module):
    """A language model without a state."""

    def __init__(self, vocabulary: int, width: int = 4, extra: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary + extra)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.layers(tokens)
        return logits


class Recurrent(nn.Module):
    """A language model with a state."""

    def __init__(self, vocabulary: int, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        before = None if state is None else state.transpose(0, 1).contiguous()
        x, after = self.gru(self.embedding(tokens), before)
        return self.output(x), after.transpose(0, 1)


class Translator(nn.Module):
    """A translator that adds the mean of the source to each previous word."""

    def __init__(self, vocabulary: int, padding: int, width: int = 8, max_length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding)
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        mean = self.embedding(source).mean(1, keepdim=True)
        logits: Tensor = self.logits(self.embedding(before) + mean)
        return logits


def make(classes: int, **settings: Any) -> nn.Module:
    return Pixels(3, classes, **settings)


def make_nothing(classes: int) -> None:
    return None


def make_error(classes: int) -> None:
    raise RuntimeError("no such layer")
