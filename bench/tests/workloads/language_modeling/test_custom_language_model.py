"""A network of the user as a language model: its state goes from piece to piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apollo_bench.workloads.language_modeling.custom_language_model import CustomLanguageModel

WORDS = 7


class Recurrent(nn.Module):
    """A GRU with a state that is one tensor, or a tuple of one."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(WORDS, 4), nn.GRU(4, 5, batch_first=True)
        self.head, self.in_tuple = nn.Linear(5, WORDS), in_tuple

    def forward(
        self, tokens: Tensor, state: Tensor | tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        before = state[0] if isinstance(state, tuple) else state
        first = None if before is None else before.transpose(0, 1).contiguous()
        x, after = self.rnn(self.embedding(tokens), first)
        after = after.transpose(0, 1)
        return self.head(x), (after,) if self.in_tuple else after


@pytest.mark.parametrize("in_tuple", [False, True], ids=["tensor", "tuple"])
def test_pieces_with_their_state_are_the_whole(in_tuple: bool) -> None:
    torch.manual_seed(0)
    model = CustomLanguageModel(Recurrent(in_tuple), WORDS)
    tokens, targets = torch.randint(WORDS, (2, 3, 10))
    whole, _ = model(tokens, targets)
    state: tuple[Tensor, ...] = ()
    pieces = []
    for place in (slice(0, 4), slice(4, 10)):
        nats, state = model(tokens[:, place], targets[:, place], state)
        pieces.append(nats)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    assert not any(x.requires_grad for x in state)
