"""Batches by tokens: every pair once, never too many tokens, a pair for every process."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.encoded_pairs import EncodedPairs, TokenizedSentences
from apollo_bench.workloads.translation.subwords import BEGIN, END, PADDING
from apollo_bench.workloads.translation.token_batches import TokenBatches, group, padded

Lengths = list[tuple[int, int]]
lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=120)


def encoded(of: Lengths) -> EncodedPairs:
    sides = []
    for side in (0, 1):
        counts = numpy.array([pair[side] for pair in of], numpy.int64)
        tokens = numpy.arange(counts.sum(), dtype=numpy.int32) + 10
        sides.append(TokenizedSentences.concatenate([(tokens, counts)]))
    return EncodedPairs(*sides)


@given(lengths, st.integers(0, 60))
def test_groups_hold_every_pair_once_within_the_limit(of: Lengths, room: int) -> None:
    source, target = 1 + numpy.array(of, numpy.int64).T
    max_tokens = int(max(source.max(), target.max())) + room
    groups = group(source, target, max_tokens)
    assert sorted(numpy.concatenate(groups).tolist()) == list(range(len(of)))
    for examples in groups:
        for side in (source, target):
            assert side[examples].max() * len(examples) <= max_tokens
    # sorted: no pair of a batch is longer than those of the next batch
    longer = numpy.maximum(source, target)
    for one, following in itertools.pairwise(groups):
        assert longer[one].max() <= longer[following].min()


@given(lengths, st.integers(1, 4), st.integers(0, 60))
def test_every_process_gets_a_pair_of_every_batch(of: Lengths, world: int, room: int) -> None:
    pairs = encoded(of)
    max_length = 1 + max(map(max, of))
    max_tokens = (2 * world - 1) * max_length + room
    if len(of) < world:
        with pytest.raises(ExperimentError, match=f"{len(of)} sentence pairs for {world}"):
            TokenBatches(pairs, max_tokens, world)
        return
    batches = TokenBatches(pairs, max_tokens, world)
    for number in range(len(batches)):
        parts = [batches.part(number, rank).examples for rank in range(world)]
        assert min(map(len, parts)) >= 1
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(numpy.concatenate(parts)) == sorted(batches.examples(number))
    # the batches do not depend on the number of processes
    alone = TokenBatches(pairs, max_tokens)
    assert len(alone) == len(batches)
    for number in range(len(alone)):
        assert numpy.array_equal(alone.examples(number), batches.examples(number))


def test_groups_are_full() -> None:
    # the last batch is balanced with the one before it, as far as that has room
    groups = group(*[numpy.full(101, 10)] * 2, 100)
    assert [len(one) for one in groups] == [10] * 9 + [6, 5]
    groups = group(numpy.array([1] * 11 + [50]), numpy.array([1] * 12), 100)
    assert [len(one) for one in groups] == [10, 2]


def test_too_few_tokens_for_the_processes() -> None:
    pairs = encoded([(9, 4)] * 20)
    TokenBatches(pairs, 30, world=2)
    with pytest.raises(ExperimentError) as caught:
        TokenBatches(pairs, 29, world=2)
    assert "train.batch_size is 29" in str(caught.value)
    assert "sentences of 10 tokens shared by 2 processes it must be at least 30" in str(
        caught.value
    )
    with pytest.raises(ExperimentError, match="by 1 process it must be at least 10"):
        TokenBatches(pairs, 9)


def test_padding_begin_and_end() -> None:
    pairs = encoded([(3, 1), (1, 2), (0, 0)])
    batch = padded(pairs, numpy.array([1, 0, 2]))
    assert batch.source.tolist() == [
        [13, END, PADDING, PADDING],
        [10, 11, 12, END],
        [END, PADDING, PADDING, PADDING],
    ]
    assert batch.target_in.tolist() == [
        [BEGIN, 11, 12],
        [BEGIN, 10, PADDING],
        [BEGIN, PADDING, PADDING],
    ]
    assert batch.target_out.tolist() == [[11, 12, END], [10, END, PADDING], [END, PADDING, PADDING]]
    assert batch.examples.tolist() == [1, 0, 2]
    assert {values.dtype for values in batch[:3]} == {torch.int64}


@given(lengths, st.integers(0, 100))
def test_batches_within_the_limit_when_padded(of: Lengths, room: int) -> None:
    pairs = encoded(of)
    max_tokens = 1 + max(map(max, of)) + room
    batches = TokenBatches(pairs, max_tokens)
    total = 0
    for number in range(len(batches)):
        batch = batches.part(number)
        assert max(values.numel() for values in batch[:3]) <= max_tokens
        assert batches.tokens(number) == int((batch.target_out != PADDING).sum())
        total += batches.tokens(number)
    assert total == sum(target + 1 for _, target in of)


def test_order_is_of_seed_and_epoch() -> None:
    batches = TokenBatches(encoded([(n % 17, n % 13) for n in range(400)]), 60)
    first = batches.order(seed=1, epoch=0)
    assert sorted(first) == list(range(len(batches)))
    assert first == TokenBatches(encoded([(n % 17, n % 13) for n in range(400)]), 60).order(1, 0)
    assert len({tuple(batches.order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
