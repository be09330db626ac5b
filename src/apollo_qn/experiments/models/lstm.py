"""The paper's language model: a stack of LSTMs under an adaptive softmax (section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, Tensor]  # hidden and cell, each shape=(layers, batch, hidden)


class LanguageModel(nn.Module):
    """Predicts each next token of streams of text.

    Args:
        vocabulary: how many tokens there are, the most frequent first.
        embedding: width of a token's vector.
        hidden: width of each LSTM.
        layers: how many LSTMs.
        dropout: probability, on what goes into and comes out of every LSTM.
        cutoffs: where the adaptive softmax (Grave et al., 2017) divides the vocabulary; none: all
            tokens are on equal terms.
        div_value: each division's vectors are narrower than the last one's by this factor.
    """

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
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        inner = dropout if layers > 1 else 0.0  # torch warns of dropout between layers of one
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=inner, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.softmax: nn.AdaptiveLogSoftmaxWithLoss | nn.Linear
        if cutoffs:
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(
                hidden, vocabulary, cutoffs, div_value=div_value
            )
        else:
            self.softmax = nn.Linear(hidden, vocabulary)

    def begin(self, batch: int) -> State:
        """The state before the first token: zeros."""
        like = self.embedding.weight
        shape = (self.lstm.num_layers, batch, self.lstm.hidden_size)
        return like.new_zeros(shape), like.new_zeros(shape)

    def forward(self, tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """How unlikely each target is.

        Args:
            tokens: shape=(batch, time), dtype=int64.
            targets: the tokens after them, likewise.
            state: before the first of ``tokens``.

        Returns:
            Negative log likelihoods in nats, shape=(batch, time), dtype=float32, and the state
            after the last token, apart from the graph.
        """
        inputs = self.dropout(self.embedding(tokens))
        outputs, after = self.lstm(inputs, state)
        flat = self.dropout(outputs).flatten(0, 1)
        if isinstance(self.softmax, nn.Linear):
            losses = functional.cross_entropy(
                self.softmax(flat).float(), targets.flatten(), reduction="none"
            )
        else:
            losses = -self.softmax(flat.float(), targets.flatten()).output
        return losses.view(targets.shape), (after[0].detach(), after[1].detach())
