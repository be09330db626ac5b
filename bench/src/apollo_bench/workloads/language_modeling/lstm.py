"""Language model of Jozefowicz et al. (2016): LSTM layers under an adaptive softmax."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, Tensor]


class FullSoftmax(nn.Module):
    """A softmax over the whole vocabulary."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log likelihood of targets (n,), in nats, float32; x is (n, width)."""
        return functional.cross_entropy(self.logits(x).float(), targets, reduction="none")


class AdaptiveSoftmax(nn.Module):
    """The softmax of Grave et al. (2017): clusters of rarer words have narrower features."""

    def __init__(self, width: int, vocabulary: int, cutoffs: list[int], div_value: float) -> None:
        super().__init__()
        self.clusters = nn.AdaptiveLogSoftmaxWithLoss(width, vocabulary, cutoffs, div_value)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log likelihood of targets (n,), in nats, float32; x is (n, width)."""
        # Mixed precision keeps log_softmax in float32 on a GPU only. On a CPU torch's module would
        # fail for likelihoods of different types.
        device = x.device.type
        mixed = device != "cpu" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=mixed):
            likelihood: Tensor = self.clusters(x.float(), targets).output
        return -likelihood


class LanguageModel(nn.Module):
    """Embedding, LSTM layers and a softmax, drawn from torch's global generator.

    Args:
        vocabulary: number of words; the most frequent have the smallest ids.
        embedding: width of a word vector.
        hidden: width of an LSTM layer.
        layers: number of LSTM layers.
        dropout: rate on the embeddings, between the layers and after them.
        cutoffs: first word of every cluster of the adaptive softmax; empty for a full softmax.
        div_value: factor by which the features of each cluster are narrower than the previous ones.

    Raises:
        ValueError: cut-offs that do not increase from 1 to vocabulary - 1.
    """

    output = "softmax"  # name of the layer that gives the logits

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        layers: int,
        dropout: float,
        cutoffs: list[int],
        div_value: float,
    ) -> None:
        edges = [0, *cutoffs, vocabulary]
        if any(left >= right for left, right in itertools.pairwise(edges)):
            raise ValueError(
                f"cutoffs are {cutoffs}, allowed are words that rise from 1 to {vocabulary - 1}"
            )
        if cutoffs and hidden < div_value ** len(cutoffs):
            raise ValueError(
                f"hidden is {hidden}, allowed is {div_value ** len(cutoffs):g} or more "
                f"with {len(cutoffs)} cut-offs and div_value {div_value:g}"
            )
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        # with one layer torch warns of dropout between layers
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=between, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.softmax: nn.Module
        if cutoffs:
            self.softmax = AdaptiveSoftmax(hidden, vocabulary, cutoffs, div_value)
        else:
            self.softmax = FullSoftmax(hidden, vocabulary)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as in the authors' release; the softmax keeps torch's weights."""
        nn.init.kaiming_uniform_(self.embedding.weight)
        for parameter in self.lstm.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                # gates: input, forget, cell, output; each has two biases, which add up
                nn.init.zeros_(parameter)
                nn.init.ones_(parameter.chunk(4)[1])

    def begin(self, batch: int, device: torch.device | str | None = None) -> State:
        """Return the state before the first token, zeros: hidden, cell, (layers, batch, hidden)."""
        shape = (self.lstm.num_layers, batch, self.lstm.hidden_size)
        return torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    def forward(self, tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """Read a piece of text and predict the token after each of its tokens.

        Args:
            tokens: (batch, time), int64.
            targets: (batch, time), int64, the token after each.
            state: state after the token before the first.

        Returns:
            The negative log likelihood of every target in nats, (batch, time), float32, and the
                detached state after the last token.
        """
        x = self.dropout(self.embedding(tokens))
        with _precision(x):
            x, (hidden, cell) = self.lstm(x, state)
        nats: Tensor = self.softmax(self.dropout(x).flatten(0, 1), targets.flatten())
        # float32 in mixed precision too, so that every piece begins with the same type
        return nats.view_as(targets), (hidden.detach().float(), cell.detach().float())


def _precision(x: Tensor) -> AbstractContextManager[Any]:
    """Return float32 for the LSTM on a CPU without bfloat16, where autocast would fail."""
    mixed = x.is_cpu and torch.is_autocast_enabled("cpu")
    if mixed and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", enabled=False)
    return nullcontext()
