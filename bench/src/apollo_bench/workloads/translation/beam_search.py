"""Beam search as in fairseq: the best translations of a batch of sentences."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class BeamModel(Protocol):
    """Interface of a translator for beam search, besides the methods of ``nn.Module``."""

    padding: int
    max_length: int
    training: bool

    def eval(self) -> Any:
        """Switch to evaluation."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or to evaluation."""

    def start(self, source: Tensor) -> Any:
        """Encode sources, and return the cache that ``step`` continues."""

    def step(self, words: Tensor, cache: Any) -> Tensor:
        """Return the logits of the next word of every beam."""


@torch.no_grad()
def beam_search(
    model: BeamModel,
    source: Tensor,
    *,
    begin: int,
    end: int,
    beam_size: int = 5,
    length_penalty: float = 0.6,
    max_length: tuple[float, int] = (1.0, 50),
) -> list[list[int]]:
    """Translate, without dropout, by the hypotheses with the highest score.

    A hypothesis has at least one word, and neither padding nor ``begin``. Its score is its log
    probability, divided by its length (end included) to the power ``length_penalty``. A sentence is
    done when ``beam_size`` hypotheses have ended, which need not be the best. The result of a
    sentence does not depend on the others of its batch.

    Args:
        model: in training mode or not; the mode is restored.
        source: (n, S), int64, padded with the model's padding.
        begin: id of the word that a target begins with.
        end: id of the word that ends a target.
        beam_size: number of hypotheses that are followed.
        length_penalty: 0 ranks by probability; larger values prefer longer hypotheses.
        max_length: (a, b): a translation has at most a S + b words for a source of S words, and
            fits the model. Vaswani et al. (2017), section 6.1, have (1, 50).

    Returns:
        The words of each sentence's best hypothesis, without begin and end; empty if the model's
            logits are not finite.

    Raises:
        ValueError: beam_size or the number of words is less than one, or a source is too long.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size is {beam_size}, allowed are 1 and more")
    factor, more = max_length
    lengths = (source != model.padding).sum(1).tolist()
    limits = [min(int(factor * length + more), model.max_length - 1) for length in lengths]
    if min(limits, default=1) < 1:
        raise ValueError(
            f"longest is {max_length}, which leaves {min(limits)} words to a source of "
            f"{lengths[limits.index(min(limits))]}, allowed are 1 and more"
        )
    training = model.training
    model.eval()
    try:
        ended = _BeamSearch(model, source, limits, begin, end, beam_size, length_penalty).run()
    finally:
        model.train(training)
    # max takes the first of equal hypotheses
    return [max(each, key=lambda pair: pair[0], default=(0.0, []))[1] for each in ended]


class _BeamSearch:
    """Beam search for a batch: n rows, one per unfinished sentence, each with its beams."""

    def __init__(
        self,
        model: BeamModel,
        source: Tensor,
        limits: list[int],
        begin: int,
        end: int,
        beam_size: int,
        length_penalty: float,
    ) -> None:
        self.model, self.beam_size, self.end, self.length_penalty = (
            model,
            beam_size,
            end,
            length_penalty,
        )
        self.never = [word for word in {model.padding, begin} if word != end]
        self.cache = model.start(source)
        n = len(limits)
        self.limits = limits  # of each row: largest number of words, without the end
        self.words = source.new_full((n, beam_size, 1), begin)  # (n, beam_size, 1 + words so far)
        # (n, beams), log probabilities; at first one beam is alive
        self.scores = torch.full((n, beam_size), -math.inf, device=source.device)
        self.scores[:, 0] = 0.0
        self.sentences = list(range(n))  # sentence of each row
        # score and words of the ended hypotheses of each sentence
        self.ended: list[list[tuple[float, list[int]]]] = [[] for _ in limits]

    def run(self) -> list[list[tuple[float, list[int]]]]:
        """Extend the beams until every sentence is done; return the ended hypotheses."""
        while self.sentences:
            scores, beams, words = self._candidates()
            ends = words == self.end
            # an end counts only among the best ``beam_size`` candidates
            self._finish(scores[:, : self.beam_size], beams, ends[:, : self.beam_size])
            # one candidate per beam ends its sentence, so that at least half of them continue it
            continuing = ends.int().argsort(dim=1, stable=True)[:, : self.beam_size]
            self._follow(
                scores.gather(1, continuing),
                beams.gather(1, continuing),
                words.gather(1, continuing),
            )
            self._drop_done()
        return self.ended

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, beams and words of the best continuations, (n, 2 beams) each."""
        logits = self.model.step(self.words[..., -1], self.cache)
        log_probs = logits.float().log_softmax(-1)
        log_probs[..., self.never] = -math.inf
        length = self.words.shape[-1] - 1
        if length == 0:
            log_probs[..., self.end] = -math.inf
        vocabulary = log_probs.shape[-1]
        others = torch.arange(vocabulary, device=log_probs.device) != self.end
        full = torch.tensor([limit <= length for limit in self.limits], device=log_probs.device)
        log_probs.masked_fill_(full[:, None, None] & others, -math.inf)
        scores = self.scores[..., None] + log_probs
        best, index = scores.flatten(1).topk(2 * self.beam_size)
        return best, index // vocabulary, index % vocabulary

    def _finish(self, scores: Tensor, beams: Tensor, ends: Tensor) -> None:
        """Store the hypotheses that end; the arguments are (n, beams) each."""
        rows, columns = (ends & scores.isfinite()).nonzero(as_tuple=True)
        length = self.words.shape[-1]  # counts the end and not the begin
        found = zip(
            rows.tolist(),
            (scores[rows, columns] / length**self.length_penalty).tolist(),
            self.words[rows, beams[rows, columns], 1:].tolist(),
            strict=True,
        )
        for row, score, words in found:
            # There may be more than beam_size of them. Those of one length come in order, so that
            # the surplus never changes the best.
            self.ended[self.sentences[row]].append((score, words))

    def _follow(self, scores: Tensor, beams: Tensor, words: Tensor) -> None:
        """Extend the beams by these continuations, (n, beams) each."""
        self.cache.reorder(beams)
        past = self.words.gather(1, beams[..., None].expand_as(self.words))
        self.words = torch.cat([past, words[..., None]], -1)
        self.scores = scores

    def _drop_done(self) -> None:
        """Remove sentences with ``beam_size`` ended hypotheses or more words than allowed."""
        words = self.words.shape[-1] - 1
        rows = [
            row
            for row, (sentence, limit) in enumerate(zip(self.sentences, self.limits, strict=True))
            if len(self.ended[sentence]) < self.beam_size and words <= limit
        ]
        if len(rows) == len(self.sentences):
            return
        self.sentences = [self.sentences[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]
        kept = torch.tensor(rows, dtype=torch.int64, device=self.scores.device)
        self.words, self.scores = self.words[kept], self.scores[kept]
        self.cache.keep(kept, self.beam_size)
