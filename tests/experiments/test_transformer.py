"""The Transformer: size, what may see what, and decoding step by step."""

from __future__ import annotations

import pytest
import torch

from apollo_qn.experiments.models.transformer import Transformer

PADDING = 0


def small(dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(11, 16, 32, 4, 2, dropout, PADDING, 20)
    return model.eval()


def sentences(rows: int, time: int) -> torch.Tensor:
    return torch.randint(1, 11, (rows, time), generator=torch.Generator().manual_seed(time))


def test_the_papers_size() -> None:
    """Transformer-base over 37000 joint subwords: 63 M parameters, embeddings shared."""
    with torch.device("meta"):
        model = Transformer(37000, 512, 2048, 8, 6, 0.1, PADDING, 1024)
    width, inner = 512, 2048
    attention = 4 * width * (width + 1)
    feed_forward = 2 * width * inner + inner + width
    norm = 2 * width
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm)
    count = sum(p.numel() for p in model.parameters())
    assert count == 37000 * width + encoder + decoder == 63_082_496
    assert "positions" not in model.state_dict()


def test_no_token_sees_a_later_one() -> None:
    model = small()
    source, target = sentences(1, 5), sentences(1, 7)
    changed = target.clone()
    changed[0, 4] = changed[0, 4] % 10 + 1
    one, other = model(source, target), model(source, changed)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])
    nearer = source.clone()
    nearer[0, 4] = nearer[0, 4] % 10 + 1
    assert not torch.allclose(model(nearer, target)[:, 0], one[:, 0])  # all of the source is seen


def test_padding_changes_nothing() -> None:
    model = small()
    source, target = sentences(2, 5), sentences(2, 4)
    padded = torch.nn.functional.pad(source, (0, 3), value=PADDING)
    torch.testing.assert_close(model(padded, target), model(source, target))


def test_step_by_step_is_all_at_once() -> None:
    model = small()
    source, target = sentences(3, 6), sentences(3, 8)
    source[1, 4:] = PADDING
    whole = model(source, target)
    memory, past = model.encode(source), None
    for place in range(8):
        logits, past = model.decode(target[:, place], memory, past)
        torch.testing.assert_close(logits, whole[:, place])


def test_a_sentence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a sentence has 21 tokens, allowed are 20"):
        small()(sentences(1, 21), sentences(1, 3))


def test_initialisation_and_padding() -> None:
    model = small()
    assert not model.embedding.weight[PADDING].any()
    loss = model(sentences(2, 5), sentences(2, 5)).logsumexp(-1).sum()
    loss.backward()
    big = Transformer(1000, 64, 64, 4, 1, 0.1, PADDING, 20)
    assert big.embedding.weight[1:].std().item() == pytest.approx(1 / 8, rel=0.02)
