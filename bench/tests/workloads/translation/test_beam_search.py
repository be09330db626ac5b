"""Beam search compared with simple searches without optimizations."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from apollo_bench.workloads.translation.beam_search import beam_search
from apollo_bench.workloads.translation.transformer import Cache, Transformer

PAD, BEGIN, END, VOCABULARY = 0, 1, 2, 14
WORDS = range(3, VOCABULARY)
FEW = 6  # a vocabulary for searches of all sentences
search = partial(beam_search, begin=BEGIN, end=END)
PENALTIES = pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])

Hypothesis = tuple[float, list[int]]


def small(seed: int, vocabulary: int = VOCABULARY, max_length: int = 40) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(vocabulary, 16, 32, 4, 2, padding=PAD, max_length=max_length)
    # an untrained model repeats one word; with these weights and positions it varies
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(model.positions, std=2.0)
    return model


def sources(n: int, time: int, seed: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (n, time), generator=generator)


def chances(model: Transformer, source: Tensor, words: list[int]) -> list[list[float]]:
    """Return log probabilities of the next words, by the decoder without a cache."""
    with torch.no_grad():
        logits = model.eval()(source[None], torch.tensor([[BEGIN, *words]]))
    rows: list[list[float]] = logits[0].log_softmax(-1).tolist()
    return rows


def score(model: Transformer, source: Tensor, words: list[int], penalty: float) -> float:
    rows = chances(model, source, words)
    total = sum(row[word] for row, word in zip(rows, [*words, END], strict=True))
    return total / (len(words) + 1) ** penalty


def plain(
    model: Transformer, source: Tensor, beams: int, penalty: float, limit: int
) -> list[Hypothesis]:
    """Beam search of one sentence by its description: all hypotheses that ended, best first."""
    live: list[Hypothesis] = [(0.0, [])]
    ended: list[Hypothesis] = []
    for length in range(limit + 1):
        candidates = []
        for total, words in live:
            row = chances(model, source, words)[-1]
            for word in WORDS if length < limit else ():
                candidates.append((total + row[word], [*words, word]))
            if length > 0:
                candidates.append((total + row[END], [*words, END]))
        candidates.sort(key=lambda pair: -pair[0])
        for total, words in candidates[:beams]:
            if words[-1] == END and len(ended) < beams:
                ended.append((total / len(words) ** penalty, words[:-1]))
        if len(ended) == beams:
            break
        live = [pair for pair in candidates if pair[1][-1] != END][:beams]
    return sorted(ended, key=lambda pair: -pair[0])


@PENALTIES
def test_as_many_beams_as_sentences_find_the_best_of_all(penalty: float) -> None:
    few = range(3, FEW)
    every = [list(words) for n in (1, 2, 3) for words in itertools.product(few, repeat=n)]
    beams = len(every) + 1
    found_by_one_beam = 0
    for seed in range(6):
        model, source = small(seed, FEW), sources(2, 4, seed, FEW)
        best = []
        for row in source:
            scores = [score(model, row, words, penalty) for words in every]
            best.append(every[scores.index(max(scores))])
        found, greedy = (
            search(model, source, beam_size=number, length_penalty=penalty, max_length=(0, 3))
            for number in (beams, 1)
        )
        assert found == best
        found_by_one_beam += sum(a == b for a, b in zip(greedy, best, strict=True))
    # which is no small thing
    assert found_by_one_beam < 12


@PENALTIES
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_it_is_the_search_described(beams: int, penalty: float) -> None:
    lengths = set()
    for seed in range(4):
        model, source = small(seed), sources(3, 5, seed)
        expected = [plain(model, row, beams, penalty, 7)[0][1] for row in source]
        found = search(model, source, beam_size=beams, length_penalty=penalty, max_length=(1, 2))
        assert found == expected
        lengths |= {len(words) for words in found}
    # some ended before the limit
    assert len(lengths) > 1
    assert min(lengths) < 7


def test_one_beam_takes_the_likeliest_word() -> None:
    for seed in range(4):
        model, source = small(seed), sources(3, 4, seed)
        for row, found in zip(source, search(model, source, beam_size=1), strict=True):
            words: list[int] = []
            while len(words) < 39:
                row_of_chances = chances(model, row, words)[-1]
                word = max([*WORDS, END][: None if words else -1], key=row_of_chances.__getitem__)
                if word == END:
                    break
                words.append(word)
            assert found == words


def test_a_batch_of_different_lengths_gives_what_each_gives_alone() -> None:
    model = small(0)
    source = sources(6, 9)
    lengths = [9, 1, 5, 3, 9, 2]
    for row, length in zip(source, lengths, strict=True):
        row[length:] = PAD

    # each sentence has its own limit
    def found_in(some: Tensor) -> list[list[int]]:
        return search(model, some, max_length=(1.5, 1))

    batch = found_in(source)
    for row, length, found in zip(source, lengths, batch, strict=True):
        assert found_in(row[None, :length]) == [found]
        assert 1 <= len(found) <= 1.5 * length + 1
    assert len({len(found) for found in batch}) > 2
    assert found_in(source.flip(0)) == batch[::-1]


def test_padding_changes_nothing() -> None:
    model = small(1)
    source = sources(4, 5)
    wider = torch.nn.functional.pad(source, (0, 6), value=PAD)
    found = search(model, source, max_length=(1, 2))
    assert search(model, wider, max_length=(1, 2)) == found


class Scripted(Transformer):
    """Model whose next word depends on the last word only."""

    def __init__(self, table: dict[int, dict[int, float]], unlikely: float = 1e-9) -> None:
        super().__init__(VOCABULARY, 4, 4, 1, 1, padding=PAD, max_length=40)
        self.table = torch.full((VOCABULARY, VOCABULARY), 1 / VOCABULARY)
        for last, row in table.items():
            self.table[last] = unlikely
            for word, probability in row.items():
                self.table[last, word] = probability
        self.batches: list[int] = []

    def step(self, words: Tensor, cache: Cache) -> Tensor:
        super().step(words, cache)
        self.batches.append(len(words))
        return self.table[words].log()


# 3 is likely at first but leads to many words, each unlikely; 4 ends at once
GARDEN_PATH = {
    BEGIN: {3: 0.6, 4: 0.4},
    3: {5: 0.5, END: 0.25, 3: 0.25},
    4: {END: 0.9, 4: 0.1},
    5: {END: 1.0},
}


def test_more_beams_find_what_the_likeliest_word_misses() -> None:
    model, source = Scripted(GARDEN_PATH), sources(1, 3)
    # 0.6 x 0.5 x 1 against 0.4 x 0.9
    found = [search(model, source, beam_size=beams, length_penalty=0.0) for beams in (1, 2)]
    assert found == [[[3, 5]], [[4]]]


def test_length_penalty_divides_by_the_length_with_the_end() -> None:
    model, source = Scripted(GARDEN_PATH), sources(1, 3)
    # log 0.3 / 3^p against log 0.36 / 2^p: they cross at p = log(1.1785) / log(1.5) = 0.405;
    # without the end they would cross at 0.237
    for penalty, words in ((0.0, [4]), (0.3, [4]), (0.39, [4]), (0.42, [3, 5]), (0.6, [3, 5])):
        found = search(model, source, beam_size=3, length_penalty=penalty, max_length=(0, 2))
        assert found == [words], penalty


def test_a_sentence_is_done_when_as_many_as_the_beams_have_ended() -> None:
    def found(beams: int, table: dict[int, dict[int, float]]) -> tuple[list[list[int]], int]:
        model = Scripted({BEGIN: {3: 0.6, 4: 0.4}, 4: {END: 1.0}, 5: {END: 1.0}, **table})
        best = search(model, sources(1, 3), beam_size=beams, length_penalty=3.0)
        return best, len(model.batches)

    # 4 END 0.4, 3 5 0.33, 3 END 0.27: of two beams one ends, and the other in the third step; the
    # third candidate is past the beams and does not count
    assert found(2, {3: {END: 0.45, 5: 0.55}}) == ([[3, 5]], 3)
    # 3 END 0.48, 4 END 0.4, 3 5 0.12: both beams end; 3 5 would have the best score but is not
    # waited for, except by a third
    assert found(2, {3: {END: 0.8, 5: 0.2}}) == ([[3]], 2)
    assert found(3, {3: {END: 0.8, 5: 0.2}}) == ([[3, 5]], 3)


def test_sentences_that_are_done_leave_the_batch() -> None:
    model = Scripted({BEGIN: {3: 1.0}, 3: {3: 1.0}})
    source = sources(3, 6)
    source[1, 2:] = PAD
    source[2, 4:] = PAD
    found = search(model, source, beam_size=1, max_length=(1, 0))
    assert found == [[3] * 6, [3] * 2, [3] * 4]
    # as many words as allowed, and the end
    assert model.batches == [3, 3, 3, 2, 2, 1, 1]


def test_neither_padding_nor_begin_nor_an_empty_sentence_is_produced() -> None:
    row = {PAD: 0.4, BEGIN: 0.3, END: 0.2, 3: 0.1}
    model = Scripted({word: row for word in range(VOCABULARY)})
    source = sources(2, 3)
    assert search(model, source, beam_size=4, max_length=(0, 5)) == [[3]] * 2
    # as in fairseq one word may be both begin and end; sentences then still end
    assert (
        beam_search(model, source, begin=END, end=END, beam_size=4, max_length=(0, 5))
        == [[BEGIN]] * 2
    )


def test_an_end_of_probability_zero_does_not_count() -> None:
    # after 4 there is no end; were it counted, twelve would have ended long before 15 words
    table = {BEGIN: {3: 1.0}, 3: {4: 0.999, END: 0.001}, 4: {3: 1.0}}
    model = Scripted(table, unlikely=0.0)
    found = search(model, sources(1, 3), beam_size=12, length_penalty=2.0, max_length=(0, 15))
    assert found == [[3, *[4, 3] * 7]]


def test_the_models_longest_is_a_limit() -> None:
    model = Scripted({BEGIN: {3: 1.0}, 3: {3: 1.0}})
    assert search(model, sources(1, 3), beam_size=1) == [[3] * 39]


def test_logits_that_are_no_numbers_give_no_words() -> None:
    model = small(0)
    with torch.no_grad():
        model.embedding.weight[4] = math.nan
    source = torch.tensor([[3, 5], [3, 4]])
    assert search(model, source, max_length=(0, 3)) == [[], []]


def test_no_dropout_no_gradient_and_the_model_as_it_was() -> None:
    model, source = small(0), sources(4, 5)
    assert model.training
    state = torch.get_rng_state()
    found = search(model, source)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert search(model.eval(), source) == found
    assert not model.training
    kept = []
    model.decoder[0].register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
    model.embedding.register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
    search(model, source)
    assert kept
    assert not any(kept)


def test_an_empty_batch() -> None:
    assert search(small(0), sources(0, 3)) == []


def test_arguments_are_checked() -> None:
    model = small(0)
    with pytest.raises(ValueError, match="beam_size is 0, allowed are 1 and more"):
        search(model, sources(1, 3), beam_size=0)
    with pytest.raises(
        ValueError, match=r"longest is \(0.4, 0\), which leaves 0 words to a source of 2"
    ):
        search(model, sources(1, 2), max_length=(0.4, 0))
    with pytest.raises(ValueError, match="source has 41 words, allowed are 40 at most"):
        search(model, sources(1, 41))
    assert model.training
