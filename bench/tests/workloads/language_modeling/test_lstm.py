"""The language model: size, likelihoods, and the hidden state between pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apollo_bench.workloads.language_modeling.lstm import LanguageModel

VOCABULARY = 20
SOFTMAXES = pytest.mark.parametrize("cutoffs", [[], [5, 12]], ids=["full", "adaptive"])

# one long pass against several pieces: sums in another order, of numbers of order 1
PIECES = 1e-6
# 20 probabilities that add up to 1, each with the rounding of a logarithm of order 3
TOTAL = 1e-5


def small(cutoffs: list[int], dropout: float = 0.0, layers: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(VOCABULARY, 6, 16, layers, dropout, cutoffs, 2.0)


def words(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_count_of_the_papers_model() -> None:
    vocabulary, embedding, hidden = 793_471, 300, 2048
    cutoffs = [60_000, 100_000, 640_000]
    with torch.device("meta"):
        model = LanguageModel(vocabulary, embedding, hidden, 2, 0.1, cutoffs, 4.0)
    # four gates, each with weights of the input and of the state and two biases
    lstm = sum(4 * hidden * (inputs + hidden + 2) for inputs in (embedding, hidden))
    head = hidden * (cutoffs[0] + len(cutoffs))
    tails = sum(
        hidden // 4**i * (hidden + high - low)
        for i, (low, high) in enumerate(zip(cutoffs, [*cutoffs[1:], vocabulary], strict=True), 1)
    )
    assert count(model) == vocabulary * embedding + lstm + head + tails == 509_636_788
    # embedding; four tensors per layer; the head; two per cluster
    assert len(list(model.parameters())) == 1 + 2 * 4 + 1 + 3 * 2


def test_parameter_count_with_a_full_softmax() -> None:
    lstm = 4 * 16 * (6 + 16 + 2) + 4 * 16 * (16 + 16 + 2)
    assert count(small([])) == VOCABULARY * 6 + lstm + 17 * VOCABULARY


@SOFTMAXES
def test_probabilities_of_all_words_add_up_to_1(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens = words(1, 3).expand(VOCABULARY, 3)
    every_word = torch.arange(VOCABULARY)[:, None].expand(VOCABULARY, 3)
    nats, _ = model(tokens, every_word, model.begin(VOCABULARY))
    assert (nats.shape, nats.dtype) == ((VOCABULARY, 3), torch.float32)
    assert torch.exp(-nats).sum(0).tolist() == pytest.approx([1.0] * 3, abs=TOTAL)
    # likelihoods differ by word and by context
    assert nats.std(dim=0).min() > 0.01
    assert nats.std(dim=1).min() > 1e-4


@SOFTMAXES
def test_each_likelihood_has_the_position_of_its_target(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens, targets = words(3, 4), words(3, 4, seed=2)
    nats, _ = model(tokens, targets, model.begin(3))
    changed = targets.clone()
    changed[1, 2] = (changed[1, 2] + 7) % VOCABULARY
    other, _ = model(tokens, changed, model.begin(3))
    differs = torch.zeros(3, 4, dtype=torch.bool)
    differs[1, 2] = True
    assert torch.equal(nats != other, differs)


@SOFTMAXES
def test_nothing_is_known_of_later_tokens(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens, targets = words(2, 5), words(2, 5, seed=2)
    nats, _ = model(tokens, targets, model.begin(2))
    tokens[0, 3] = (tokens[0, 3] + 1) % VOCABULARY
    other, _ = model(tokens, targets, model.begin(2))
    assert torch.equal(nats[0, :3], other[0, :3])
    assert bool((nats[0, 3:] != other[0, 3:]).all())
    assert torch.equal(nats[1], other[1])


@SOFTMAXES
def test_pieces_with_the_hidden_state_equal_one_long_pass(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens, targets = words(3, 12), words(3, 12, seed=2)
    whole, end = model(tokens, targets, model.begin(3))
    state, pieces = model.begin(3), []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        nats, state = model(tokens[:, first:last], targets[:, first:last], state)
        pieces.append(nats)
    assert torch.allclose(torch.cat(pieces, 1), whole, rtol=0, atol=PIECES)
    for ours, theirs in zip(state, end, strict=True):
        assert ours.shape == (2, 3, 16)
        assert torch.allclose(ours, theirs, rtol=0, atol=PIECES)
    # without the state the likelihoods differ
    alone, _ = model(tokens[:, 6:], targets[:, 6:], model.begin(3))
    assert not torch.allclose(alone, whole[:, 6:], rtol=0, atol=100 * PIECES)


def test_the_state_is_cut_off_and_starts_at_zero() -> None:
    model = small([5])
    state = model.begin(3, "cpu")
    assert [part.shape for part in state] == [(2, 3, 16)] * 2
    assert not any(part.any() for part in state)
    nats, state = model(words(3, 4), words(3, 4), state)
    assert nats.requires_grad
    assert not any(part.requires_grad for part in state)
    assert all(part.any() for part in state)


@SOFTMAXES
def test_every_parameter_learns(cutoffs: list[int]) -> None:
    torch.use_deterministic_algorithms(True)
    model = small(cutoffs, dropout=0.1)
    every_word = torch.arange(VOCABULARY)[None]
    nats, _ = model(every_word, every_word, model.begin(1))
    nats.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_of_embeddings_between_layers_and_after(layers: int) -> None:
    model = small([], dropout=0.5, layers=layers)
    assert model.lstm.dropout == (0.5 if layers == 2 else 0.0)
    seen: list[Tensor] = []
    model.lstm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.softmax.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(words(8, 16), words(8, 16), model.begin(8))
    for x in seen:
        assert (x == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    seen.clear()
    model.eval()(words(8, 16), words(8, 16), model.begin(8))
    assert not any((x == 0).any() for x in seen)


@SOFTMAXES
def test_mixed_precision_gives_float32_near_the_same(cutoffs: list[int]) -> None:
    model = small(cutoffs)
    tokens, targets = words(2, 6), words(2, 6, seed=2)
    nats, _ = model(tokens, targets, model.begin(2))
    with torch.autocast("cpu", torch.bfloat16):
        first, state = model(tokens[:, :3], targets[:, :3], model.begin(2))
        second, state = model(tokens[:, 3:], targets[:, 3:], state)
    assert {first.dtype, state[0].dtype, state[1].dtype} == {torch.float32}
    # bfloat16 keeps 8 bits of numbers of order 1
    assert torch.allclose(torch.cat([first, second], 1), nats, rtol=0, atol=0.05)


def test_initialization_of_the_release() -> None:
    torch.manual_seed(0)
    model = LanguageModel(500, 24, 32, 2, 0.0, [], 4.0)
    assert model.embedding.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 24), rel=0.01)
    for name, parameter in model.lstm.named_parameters():
        if name.startswith("weight"):
            bound = math.sqrt(6 / sum(parameter.shape))
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.01)
        else:
            assert parameter.tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 64


@pytest.mark.parametrize("cutoffs", [[0, 5], [5, 5], [7, 5], [5, 20], [-1]])
def test_cutoffs_must_rise_within_the_vocabulary(cutoffs: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cutoffs are \[.*, allowed are words .* from 1 to 19"):
        small(cutoffs)


def test_every_cluster_needs_a_feature() -> None:
    with pytest.raises(ValueError, match=r"hidden is 16, allowed is 64 or more with 3 cut-offs"):
        LanguageModel(VOCABULARY, 6, 16, 1, 0.0, [4, 8, 12], 4.0)


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    model = small([5])
    tokens, state = words(1, 2), model.begin(1)
    with pytest.raises(RuntimeError, match=r"Target values should be in \[0, 19\]"):
        model(tokens, tokens + VOCABULARY, state)
