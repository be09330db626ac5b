"""The language model: size, normalisation, causality and the state that is carried over."""

from __future__ import annotations

import pytest
import torch

from apollo_qn.experiments.models.lstm import LanguageModel


def small(cutoffs: list[int], dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(30, 6, 8, 2, dropout, cutoffs, 2.0)


def test_the_papers_size() -> None:
    """Section 4.2 and appendix B.2: two layers of 2048, 300 dimensions, 793471 words."""
    words, cutoffs = 793471, [60000, 100000, 640000]
    with torch.device("meta"):
        model = LanguageModel(words, 300, 2048, 2, 0.1, cutoffs, 4.0)
    lstm = sum(4 * 2048 * (inputs + 2048 + 2) for inputs in (300, 2048))
    head = 2048 * (cutoffs[0] + 3)
    tails = 0
    for i, (low, high) in enumerate(zip(cutoffs, [*cutoffs[1:], words], strict=True), 1):
        width = 2048 // 4**i
        tails += width * (2048 + high - low)
    expected = words * 300 + lstm + head + tails
    assert sum(p.numel() for p in model.parameters()) == expected == 509_636_788


@pytest.mark.parametrize("cutoffs", [[], [10, 20]])
def test_probabilities_add_up_to_one(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens = torch.randint(30, (1, 4))
    last = []
    for target in range(30):
        targets = torch.full((1, 4), target)
        losses, _ = model(tokens, targets, model.begin(1))
        last.append(losses)
    total = torch.stack(last).neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones(1, 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cutoffs", [[], [10, 20]])
def test_two_halves_are_one_whole(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens, targets = torch.randint(30, (2, 3, 10))
    whole, end = model(tokens, targets, model.begin(3))
    first, state = model(tokens[:, :4], targets[:, :4], model.begin(3))
    second, state = model(tokens[:, 4:], targets[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, end)
    assert not any(x.requires_grad for x in state)
    afresh, _ = model(tokens[:, 4:], targets[:, 4:], model.begin(3))
    assert not torch.allclose(afresh, second)


def test_no_token_sees_a_later_one() -> None:
    model = small([10, 20])
    tokens, targets = torch.randint(30, (2, 1, 8))
    losses, _ = model(tokens, targets, model.begin(1))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 30
    others, _ = model(changed, targets, model.begin(1))
    assert torch.equal(losses[:, :5], others[:, :5])
    assert not torch.allclose(losses[:, 5:], others[:, 5:])


def test_dropout_is_for_training_alone() -> None:
    model = small([], dropout=0.5)
    tokens, targets = torch.randint(30, (2, 2, 5))

    def losses() -> torch.Tensor:
        found: torch.Tensor = model(tokens, targets, model.begin(2))[0]
        return found

    assert not torch.equal(losses(), losses())
    model.eval()
    assert torch.equal(losses(), losses())
