"""Beam search against all sequences there are, and against itself in other batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from apollo_qn.experiments.models.beam import search
from apollo_qn.experiments.models.transformer import Transformer

PADDING, BEGIN, END = 0, 1, 2


def model_of(seed: int, words: int = 5, sharpness: float = 3.0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(words, 8, 16, 2, 1, 0.0, PADDING, 12)
    with torch.no_grad():
        model.embedding.weight.mul_(sharpness)  # so that some words are much likelier
    return model.eval()


def score(model: Transformer, source: Tensor, path: list[int], penalty: float) -> float:
    target = torch.tensor([[BEGIN, *path]])
    with torch.no_grad():
        chances = model(source, target).log_softmax(-1)[0]
    wanted = [*path, END]
    total = sum(float(chances[place, word]) for place, word in enumerate(wanted))
    return total / len(wanted) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_of_all(seed: int, penalty: float) -> None:
    model, source = model_of(seed), torch.tensor([[3, 4, 3]])
    longest = 3
    others = [word for word in range(5) if word != END]
    every = [
        list(path)
        for length in range(longest + 1)
        for path in itertools.product(others, repeat=length)
    ]
    best = max(every, key=lambda path: score(model, source, path, penalty))
    [found] = search(
        model, source, begin=BEGIN, end=END, beams=len(every), length_penalty=penalty,
        longest=longest,
    )  # fmt: skip
    assert score(model, source, found, penalty) == pytest.approx(
        score(model, source, best, penalty), rel=1e-5
    )
    assert found == best


def test_one_beam_is_greedy() -> None:
    for seed in range(5):
        model, source = model_of(seed), torch.tensor([[4, 3, 4, 4]])
        path: list[int] = []
        while len(path) < 6:
            with torch.no_grad():
                word = int(model(source, torch.tensor([[BEGIN, *path]]))[0, -1].argmax())
            if word == END:
                break
            path.append(word)
        [found] = search(
            model, source, begin=BEGIN, end=END, beams=1, length_penalty=1.0, longest=6
        )
        assert found == path


def test_a_sentence_is_translated_the_same_in_any_batch() -> None:
    model = model_of(1, words=9, sharpness=1.5)
    batch = torch.tensor([[3, 4, 5, 6, 7], [8, 3, 0, 0, 0], [5, 5, 5, 0, 0]])
    settings = {"begin": BEGIN, "end": END, "beams": 4, "length_penalty": 0.6, "longest": 8}
    together = search(model, batch, **settings)  # type: ignore[arg-type]
    alone = [
        search(model, row[row != PADDING][None], **settings)[0]  # type: ignore[arg-type]
        for row in batch
    ]
    assert together == alone
    assert len({tuple(path) for path in together}) > 1


def test_more_beams_find_no_worse_on_average() -> None:
    gained = 0.0
    for seed in range(6):
        model, source = model_of(seed, words=9), torch.tensor([[3, 4, 5]])
        found = [
            search(model, source, begin=BEGIN, end=END, beams=n, length_penalty=0.0, longest=6)[0]
            for n in (1, 6)
        ]
        gained += score(model, source, found[1], 0.0) - score(model, source, found[0], 0.0)
    assert gained > 0
