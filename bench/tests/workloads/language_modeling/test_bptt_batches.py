"""Parallel streams: the position of every token is a function of the step."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.language_modeling.bptt_batches import (
    IGNORED,
    BPTTBatches,
    InputTargetPair,
    evaluation_batches,
)
from apollo_bench.workloads.language_modeling.token_corpus import TokenStream

END = 7_000


def corpus(count: int) -> TokenStream:
    """Return tokens 0, 1, 2, ..., each equal to its position, in several parts."""
    whole = numpy.arange(count, dtype=numpy.int32)
    return TokenStream([whole[: count // 3], whole[count // 3 : count - 5], whole[count - 5 :]])


def concatenated(pairs: list[InputTargetPair]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*pairs, strict=True)
    return torch.cat(inputs, 1), torch.cat(targets, 1)


def same(one: list[InputTargetPair], other: list[InputTargetPair]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(left, right)
        for pair, twin in zip(one, other, strict=True)
        for left, right in zip(pair, twin, strict=True)
    )


def test_streams_continue_from_batch_to_batch() -> None:
    sequences = BPTTBatches(corpus(100), batch=4, steps=5)
    # 99 tokens have a next one: 24 per stream, which is 4 full pieces of 5
    assert sequences.batches == 4
    pairs = list(sequences.epoch())
    assert len(pairs) == 4
    assert all(
        part.shape == (4, 5) and part.dtype == torch.int64 for pair in pairs for part in pair
    )
    inputs, targets = concatenated(pairs)
    for stream in range(4):
        assert inputs[stream].tolist() == list(range(24 * stream, 24 * stream + 20))
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(("count", "batches"), [(20, 0), (21, 1), (40, 1), (41, 2), (4_001, 200)])
def test_number_of_batches(count: int, batches: int) -> None:
    if not batches:
        with pytest.raises(ExperimentError, match=r"20 tokens do not fill a batch .* 21 do"):
            BPTTBatches(corpus(count), 4, 5)
        return
    sequences = BPTTBatches(corpus(count), 4, 5)
    assert sequences.batches == batches
    assert len(list(sequences.epoch())) == batches
    assert len(list(sequences.epoch(offset=count - 3))) == batches


@pytest.mark.parametrize("offset", [0, 57])
def test_resumed_at_any_step(offset: int) -> None:
    sequences = BPTTBatches(corpus(120), 3, 4)
    whole = list(sequences.epoch(offset=offset))
    for start in range(sequences.batches + 1):
        assert same(list(sequences.epoch(start, offset)), whole[start:])


def test_processes_share_the_streams() -> None:
    sequences = BPTTBatches(corpus(300), 6, 7)
    whole = list(sequences.epoch(2, 11))
    for world in (2, 3, 6):
        parts = [list(sequences.epoch(2, 11, rank, world)) for rank in range(world)]
        together = [
            (torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs]))
            for pairs in zip(*parts, strict=True)
        ]
        assert same(together, whole)
    with pytest.raises(ExperimentError, match=r"train.batch_size is 6, which 4 processes cannot"):
        sequences.epoch(world=4)


def test_the_corpus_is_a_ring() -> None:
    sequences = BPTTBatches(corpus(101), 4, 5)
    for offset in (1, 50, 98, 100):
        inputs, targets = concatenated(list(sequences.epoch(offset=offset)))
        for stream in range(4):
            expected = [(offset + 25 * stream + place) % 101 for place in range(26)]
            assert inputs[stream].tolist() == expected[:-1]
            assert targets[stream].tolist() == expected[1:]


def test_offsets_are_a_function_of_seed_and_epoch() -> None:
    sequences = BPTTBatches(corpus(1_000), 4, 5)
    offsets = [sequences.offset(seed, epoch) for seed in range(4) for epoch in range(10)]
    assert all(0 <= offset < 1_000 for offset in offsets)
    assert len(set(offsets)) > 30
    again = BPTTBatches(corpus(1_000), 8, 3)
    assert offsets == [again.offset(seed, epoch) for seed in range(4) for epoch in range(10)]


def test_batches_are_copies() -> None:
    tokens = corpus(50)
    inputs, targets = next(BPTTBatches(tokens, 2, 5).epoch())
    inputs.zero_()
    assert targets.tolist()[0] == [1, 2, 3, 4, 5]
    assert tokens[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (4, 0), (-1, 5)])
def test_sizes_that_make_no_sense(batch: int, steps: int) -> None:
    with pytest.raises(ValueError, match="both must be 1 at least"):
        BPTTBatches(corpus(50), batch, steps)
    with pytest.raises(ValueError, match="both must be 1 at least"):
        list(evaluation_batches(corpus(50), batch, steps, END))


SIZES = [(10, 1, 3), (10, 3, 3), (10, 3, 4), (10, 3, 99), (12, 4, 3), (13, 4, 2), (7, 9, 2)]


@pytest.mark.parametrize(("count", "batch", "steps"), SIZES)
def test_held_out_tokens_are_targets_once(count: int, batch: int, steps: int) -> None:
    pairs = list(evaluation_batches(corpus(count), batch, steps, END))
    assert max(pair[0].shape[1] for pair in pairs) <= steps
    inputs, targets = concatenated(pairs)
    assert inputs.shape[0] == batch
    real = targets != IGNORED
    assert targets[real].tolist() == list(range(count))
    assert torch.equal(inputs[real], torch.tensor([END, *range(count - 1)]))
    # ignored positions must still be valid tokens for the embedding
    assert ((inputs >= 0) & (inputs <= END)).all()
    # in a stream only ignored targets follow an ignored one
    assert (real.int().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_held_out_tokens(world: int) -> None:
    whole = concatenated(list(evaluation_batches(corpus(40), 4, 3, END)))
    parts = [list(evaluation_batches(corpus(40), 4, 3, END, rank, world)) for rank in range(world)]
    together = [concatenated(part) for part in parts if part]
    for place in range(2):
        assert torch.equal(torch.cat([pair[place] for pair in together]), whole[place])


def test_nothing_held_out() -> None:
    assert list(evaluation_batches(TokenStream([]), 4, 3, END)) == []


def test_more_than_one_epoch_differs_by_its_offset_alone() -> None:
    sequences = BPTTBatches(corpus(200), 4, 5)
    epochs = [list(sequences.epoch(offset=sequences.offset(1, epoch))) for epoch in range(3)]
    for one, other in itertools.pairwise(epochs):
        assert not same(one, other)
    assert same(epochs[1], list(sequences.epoch(offset=sequences.offset(1, 1))))
