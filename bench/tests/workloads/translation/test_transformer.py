"""The Transformer: size, masks, initialization, and decoding word by word."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from apollo_bench.workloads.translation.transformer import (
    Attention,
    DecoderLayer,
    EncoderLayer,
    Transformer,
    sinusoids,
)

PAD, VOCABULARY, WIDTH = 1, 23, 16

# sums in another order, for logits of order 1 after three layers
ROUNDED = 1e-5
# smallest change that counts as a change
SEEN = 1e-3


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(VOCABULARY, WIDTH, 32, 4, 3, padding=PAD, max_length=12).eval()


def words(n: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (n, time), generator=torch.Generator().manual_seed(seed))


def padded(sentences: Tensor, more: int) -> Tensor:
    return functional.pad(sentences, (0, more), value=PAD)


def parameters(vocabulary: int, width: int, inner: int, layers: int) -> int:
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * inner + inner + width
    norm = 2 * width
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    return vocabulary * width + layers * (encoder + decoder)


def test_parameter_count_of_transformer_base() -> None:
    with torch.device("meta"):
        model = Transformer(37_000, padding=1)
    count = sum(p.numel() for p in model.parameters())
    # Vaswani et al. (2017), table 3: 65 million
    assert count == parameters(37_000, 512, 2048, 6) == 63_082_496
    # one matrix of embeddings; 4 projections, 2 layers and the norms, a weight and a bias each
    assert len(list(model.parameters())) == 1 + 2 * 6 * ((4 + 2 + 2) + (8 + 2 + 3))
    assert {p.numel() for name, p in model.named_parameters() if "embed" in name} == {37_000 * 512}


def test_parameter_count_of_another_size(model: Transformer) -> None:
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(VOCABULARY, WIDTH, 32, 3)


def test_positions_are_no_part_of_the_state(model: Transformer) -> None:
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert [name for name, _ in model.named_buffers()] == ["positions"]


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoids(50, 8)
    assert table.shape == (50, 8)
    for position in (0, 1, 49):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, i + 4].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_layers_are_those_of_torch_with_the_norm_last(model: Transformer) -> None:
    # nn.TransformerEncoderLayer and DecoderLayer, written by others, with our weights
    def attend(ours: Attention, theirs: nn.MultiheadAttention) -> None:
        projections = (ours.query, ours.key, ours.value)
        assert theirs.in_proj_weight is not None
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())

    @torch.no_grad()
    def like(
        ours: EncoderLayer | DecoderLayer,
        theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer,
    ) -> None:
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        attend(ours.attention, theirs.self_attn)
        theirs.linear1.load_state_dict(ours.feed_forward.inner.state_dict())
        theirs.linear2.load_state_dict(ours.feed_forward.output.state_dict())
        norms = [ours.residual1.norm, ours.residual2.norm]
        if isinstance(ours, DecoderLayer):
            assert isinstance(theirs, nn.TransformerDecoderLayer)
            attend(ours.across, theirs.multihead_attn)
            norms.append(ours.residual3.norm)
        for i, norm in enumerate(norms, 1):
            theirs.get_submodule(f"norm{i}").load_state_dict(norm.state_dict())

    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
    blank = torch.tensor([[False] * 4, [False, False, True, True]])
    mask = ~blank[:, None, None]

    encoder = model.encoder[0]
    assert isinstance(encoder, EncoderLayer)
    encoder_of_torch = nn.TransformerEncoderLayer(WIDTH, 4, 32, 0.0, batch_first=True)
    like(encoder, encoder_of_torch)
    expected = encoder_of_torch(memory, src_key_padding_mask=blank)
    assert torch.allclose(encoder(memory, mask)[~blank], expected[~blank], rtol=0, atol=ROUNDED)

    decoder = model.decoder[0]
    assert isinstance(decoder, DecoderLayer)
    decoder_of_torch = nn.TransformerDecoderLayer(WIDTH, 4, 32, 0.0, batch_first=True)
    like(decoder, decoder_of_torch)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = decoder_of_torch(x, memory, tgt_mask=later, memory_key_padding_mask=blank)
    assert torch.allclose(decoder(x, memory, mask), expected, rtol=0, atol=ROUNDED)


def test_words_enter_scaled_and_leave_by_the_same_matrix(model: Transformer) -> None:
    entered, left = [], []
    model.encoder[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    model.decoder[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    model.decoder[-1].register_forward_hook(lambda _, __, output: left.append(output))
    source, target = words(2, 5), words(2, 4, seed=2)
    logits = model(source, target)
    assert logits.shape == (2, 4, VOCABULARY)
    matrix = model.embedding.weight
    for x, sentence in zip(entered, (source, target), strict=True):
        expected = matrix[sentence] * 4.0 + sinusoids(sentence.shape[1], WIDTH)
        assert torch.allclose(x, expected, rtol=0, atol=ROUNDED)
    assert torch.allclose(logits, left[0] @ matrix.T, rtol=0, atol=ROUNDED)


def test_a_later_target_changes_no_earlier_logits(model: Transformer) -> None:
    source, target = words(2, 5), words(2, 7, seed=2)
    logits = model(source, target)
    target[:, 4] = 2 + (target[:, 4] - 1) % (VOCABULARY - 2)
    changes = (model(source, target) - logits).abs().amax(-1)
    assert changes[:, :4].max() == 0
    assert changes[:, 4:].min() > SEEN


def test_every_source_word_counts_for_every_target(model: Transformer) -> None:
    source, target = words(1, 5), words(1, 4, seed=2)
    logits = model(source, target)
    for i in range(5):
        other = source.clone()
        other[0, i] = 2 + (other[0, i] - 1) % (VOCABULARY - 2)
        assert (model(other, target) - logits).abs().amax(-1).min() > SEEN


def test_order_of_source_words_counts(model: Transformer) -> None:
    source, target = words(1, 5), words(1, 4, seed=2)
    change = model(source.flip(1), target) - model(source, target)
    assert change.abs().amax(-1).min() > SEEN


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(model: Transformer, training: bool) -> None:
    if training:
        # training changes the row of padding, because the output layer shares the matrix
        with torch.no_grad():
            model.embedding.weight[PAD] = torch.randn(WIDTH)
    source, target = words(2, 4), words(2, 3, seed=2)
    logits, memory = model(source, target), model.encode(source)
    wider = padded(source, 5)
    assert torch.allclose(model.encode(wider)[:, :4], memory, rtol=0, atol=ROUNDED)
    wide = model(wider, padded(target, 2))
    assert torch.allclose(wide[:, :3], logits, rtol=0, atol=ROUNDED)
    assert bool(wide.isfinite().all())
    # without a mask the result would differ
    unmasked = model(torch.where(wider == PAD, 2, wider), target)
    assert (unmasked - logits).abs().amax(-1).min() > SEEN


def test_sentences_of_a_batch_are_independent(model: Transformer) -> None:
    source, target = words(3, 5), words(3, 4, seed=2)
    source[1, 2:] = PAD
    target[1, 3:] = PAD
    batch = model(source, target)
    for i, (left, right) in enumerate(((5, 4), (2, 3), (5, 4))):
        alone = model(source[i : i + 1, :left], target[i : i + 1, :right])
        assert torch.allclose(batch[i, :right], alone[0], rtol=0, atol=ROUNDED)


def test_step_by_step_equals_forward(model: Transformer) -> None:
    # each sentence has four targets, one per beam
    source, targets = words(3, 5), words(12, 6, seed=2)
    source[1, 3:] = PAD
    expected = model(source.repeat_interleave(4, 0), targets)
    cache = model.start(source)
    for i in range(6):
        logits = model.step(targets[:, i].view(3, 4), cache)
        assert logits.shape == (3, 4, VOCABULARY)
        assert torch.allclose(logits.flatten(0, 1), expected[:, i], rtol=0, atol=ROUNDED)
    assert cache.time == 6


def test_reordered_and_kept_caches_continue_their_sentences(model: Transformer) -> None:
    source, targets = words(3, 5), words(12, 6, seed=2).view(3, 4, 6)
    source[1, 3:] = PAD
    cache = model.start(source)
    for i in range(3):
        model.step(targets[:, :, i], cache)
    beams = torch.tensor([[0, 0, 3, 1], [2, 1, 0, 3], [3, 3, 3, 3]])
    cache.reorder(beams)
    chosen = targets.gather(1, beams[..., None].expand_as(targets)).clone()
    chosen[..., 3:] = words(12, 3, seed=3).view(3, 4, 3)
    model.step(chosen[..., 3], cache)
    sentences = torch.tensor([2, 1])
    cache.keep(sentences, 4)
    kept = chosen[sentences]
    expected = model(source[sentences].repeat_interleave(4, 0), kept.flatten(0, 1))
    for i in (4, 5):
        logits = model.step(kept[..., i], cache).flatten(0, 1)
        assert torch.allclose(logits, expected[:, i], rtol=0, atol=ROUNDED)


def test_longest_sentences(model: Transformer) -> None:
    assert model(words(1, 12), words(1, 12)).shape == (1, 12, VOCABULARY)
    with pytest.raises(ValueError, match="source has 13 words, allowed are 12 at most"):
        model(words(1, 13), words(1, 5))
    with pytest.raises(ValueError, match="target has 14 words, allowed are 12 at most"):
        model(words(1, 5), words(1, 14))
    cache = model.start(words(1, 5))
    for _ in range(12):
        model.step(words(1, 2), cache)
    with pytest.raises(ValueError, match="target has 13 words, allowed are 12 at most"):
        model.step(words(1, 2), cache)


def test_initialization_of_fairseq() -> None:
    torch.manual_seed(0)
    model = Transformer(1000, 64, 128, 4, 1, padding=PAD)
    rows = model.embedding.weight
    assert not rows[PAD].any()
    assert rows.std().item() == pytest.approx(64**-0.5, rel=0.02)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = math.sqrt(0.5) if name.endswith(("query", "key", "value")) else 1.0
            bound = gain * math.sqrt(6 / sum(module.weight.shape))
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


def test_dropout_of_embeddings_and_sublayers() -> None:
    torch.manual_seed(0)
    model = Transformer(VOCABULARY, WIDTH, 32, 4, 2, 0.25, padding=PAD)
    shares = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _, __, y: shares.append((y == 0).float().mean().item())
            )
    model(words(8, 10), words(8, 10))
    # dropouts: embeddings of both sides, two sublayers, three sublayers
    assert len(shares) == 2 + 2 * 2 + 2 * 3
    assert shares == pytest.approx([0.25] * len(shares), abs=0.06)


def test_every_parameter_learns(model: Transformer) -> None:
    torch.use_deterministic_algorithms(True)
    source, target = words(4, 6), words(4, 5, seed=2)
    source[0, 4:] = PAD
    logits = model.train()(source, target)
    functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a bias of the keys adds the same to all scores of a query, and softmax ignores it
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="width is 18, allowed are even multiples of the 4 heads"):
        Transformer(VOCABULARY, 18, heads=4, padding=PAD)
    with pytest.raises(ValueError, match="padding is 23, allowed are words from 0 to 22"):
        Transformer(VOCABULARY, WIDTH, padding=VOCABULARY)
