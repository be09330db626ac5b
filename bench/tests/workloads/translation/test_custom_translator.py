"""A network of the user as a translator: beams are continued word by word."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apollo_bench.workloads.translation.custom_translator import CustomTranslator

WORDS = 7


class Summing(nn.Module):
    """Logits from the sums of all words before and of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.before = nn.Embedding(WORDS, 5), nn.Embedding(WORDS, 5)
        self.head = nn.Linear(5, WORDS)

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        read = self.source(source).sum(1, keepdim=True)
        logits: Tensor = self.head(torch.tanh(read + self.before(before).cumsum(1)))
        return logits


def test_steps_are_the_last_words_of_whole_prefixes() -> None:
    torch.manual_seed(0)
    model = CustomTranslator(Summing(), WORDS, padding=0, max_length=9)
    source, prefixes = torch.randint(WORDS, (2, 4)), torch.randint(WORDS, (2, 3, 5))
    cache = model.start(source)
    for time in range(5):
        found = model.step(prefixes[..., time], cache)
        for beam in range(3):
            wanted = model(source, prefixes[:, beam, : time + 1])[:, -1]
            assert torch.allclose(found[:, beam], wanted, atol=1e-6), (time, beam)
    # beams that continue another one, and a sentence that has ended
    cache.reorder(torch.tensor([[1, 1, 0], [2, 0, 0]]))
    cache.keep(torch.tensor([1]), 3)
    found = model.step(torch.tensor([[1, 2, 3]]), cache)
    for beam, (origin, word) in enumerate(((2, 1), (0, 2), (0, 3))):
        prefix = torch.cat([prefixes[1:, origin], torch.tensor([[word]])], 1)
        assert torch.allclose(found[:, beam], model(source[1:], prefix)[:, -1], atol=1e-6)
