"""Beam search: the likeliest translation among many that grow side by side."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from apollo_qn.experiments.models.transformer import KeysValues, Memory


class Translator(Protocol):
    """What the search needs of a model."""

    longest: int

    def encode(self, source: Tensor) -> Memory:
        """Read the source."""

    def decode(
        self, token: Tensor, memory: Memory, past: list[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Logits after one more token."""


@torch.no_grad()
def search(
    model: Translator,
    source: Tensor,
    *,
    begin: int,
    end: int,
    beams: int,
    length_penalty: float,
    longest: int,
) -> list[list[int]]:
    """Translate a batch of sentences.

    A translation's score is its log probability divided by ``length ** length_penalty``, its end
    counted. A sentence is done when ``beams`` translations of it have ended, or none that is still
    growing can be longer; the best of those that ended is taken (as fairseq does).

    Args:
        model: in eval mode.
        source: shape=(batch, time), filled up with the model's padding.
        begin: token that a translation begins with.
        end: token that ends it.
        beams: translations of a sentence that grow at a time.
        length_penalty: above 0 it favours longer ones.
        longest: tokens of a translation, without its end; the model's own limit holds too.

    Returns:
        The tokens of each sentence's translation, without begin and end.
    """
    batch, device = len(source), source.device
    longest = min(longest, model.longest - 1)
    rows = torch.arange(batch, device=device).repeat_interleave(beams)
    memory = model.encode(source).pick(rows)
    past: list[KeysValues] | None = None
    tokens = torch.full((batch * beams, 1), begin, device=device)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams are one at first
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
    for length in range(1, longest + 2):
        logits, past = model.decode(tokens[:, -1], memory, past)
        chances = logits.float().log_softmax(-1)
        words = chances.shape[1]
        if length > longest:  # only the end is left
            only = torch.full_like(chances, -torch.inf)
            only[:, end] = chances[:, end]
            chances = only
        total = (scores.view(-1, 1) + chances).view(batch, -1)
        # of twice as many candidates half can end and as many as there are beams go on
        found, places = total.topk(min(2 * beams, total.shape[1]))
        origins, nexts = places // words, places % words
        going_on = torch.full((batch, beams), -torch.inf, device=device)
        parents = torch.zeros((batch, beams), dtype=torch.int64, device=device)
        follow = torch.full((batch, beams), end, device=device)
        for row in range(batch):
            if len(ended[row]) >= beams:
                continue
            free = 0
            for rank, (score, origin, word) in enumerate(
                zip(found[row].tolist(), origins[row].tolist(), nexts[row].tolist(), strict=True)
            ):
                if score == -torch.inf or free == beams:
                    break
                if word == end:
                    if rank < beams and len(ended[row]) < beams:
                        path = tokens[row * beams + origin, 1:].tolist()
                        ended[row].append((score / length**length_penalty, path))
                    continue
                going_on[row, free], parents[row, free] = found[row, rank], origin
                follow[row, free] = word
                free += 1
        if all(len(one) >= beams for one in ended) or length > longest:
            break
        scores = going_on
        chosen = (parents + beams * torch.arange(batch, device=device)[:, None]).flatten()
        tokens = torch.cat([tokens[chosen], follow.view(-1, 1)], 1)
        past = [(keys[chosen], values[chosen]) for keys, values in past]
    return [max(one, key=lambda pair: pair[0])[1] if one else [] for one in ended]
