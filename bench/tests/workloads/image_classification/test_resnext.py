"""Size, layers and initialization of ResNeXt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from apollo_bench.workloads.image_classification.resnext import Bottleneck, ResNeXt, resnext


@pytest.fixture(scope="module")
def resnext50() -> ResNeXt:
    torch.manual_seed(0)
    return resnext(50)


def test_parameter_count(resnext50: ResNeXt) -> None:
    # Xie et al. (2017), table 1: 25.0 million
    assert sum(p.numel() for p in resnext50.parameters()) == 25_028_904
    # 53 convolutions, each with a norm (2), and the classifier (2)
    assert len(list(resnext50.parameters())) == 53 * 3 + 2


def test_stem_and_stages_are_those_of_table_1(resnext50: ResNeXt) -> None:
    stem, norm, relu, pool, *blocks = resnext50.features
    assert isinstance(stem, nn.Conv2d)
    assert (stem.out_channels, stem.kernel_size, stem.stride) == (64, (7, 7), (2, 2))
    assert (type(norm), type(relu)) == (nn.BatchNorm2d, nn.ReLU)
    assert isinstance(pool, nn.MaxPool2d)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    seen = []
    for block in blocks:
        assert isinstance(block, Bottleneck)
        assert (block.conv1.kernel_size, block.conv1.stride) == ((1, 1), (1, 1))
        assert (block.conv2.kernel_size, block.conv2.groups) == ((3, 3), 32)
        assert (block.conv3.kernel_size, block.conv3.stride) == ((1, 1), (1, 1))
        inner, outputs = block.conv1.out_channels, block.conv3.out_channels
        seen.append((inner, outputs, block.conv2.stride[0]))
        assert isinstance(block.shortcut, nn.Sequential) == (len(seen) in (1, 4, 8, 14))
    expected = []
    for stage, count in enumerate((3, 4, 6, 3)):
        sizes = (128 << stage, 256 << stage)
        expected += [(*sizes, 2 if stage else 1)] + [(*sizes, 1)] * (count - 1)
    assert seen == expected


def test_shapes_after_every_stage(resnext50: ResNeXt) -> None:
    x = torch.zeros(1, 3, 64, 64)
    shapes = []
    with torch.no_grad():
        resnext50.eval()
        assert resnext50(x).shape == (1, 1000)
        for layer in resnext50.features:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
    # sides of the features of an image of 224: 112, 56, 56, 28, 14, 7
    assert [shapes[i] for i in (0, 3, 6, 10, 16, 19)] == [
        (64, 32, 32),
        (64, 16, 16),
        (256, 16, 16),
        (512, 8, 8),
        (1024, 4, 4),
        (2048, 2, 2),
    ]


def test_a_block_is_norm_after_every_convolution_and_relu_after_the_sum() -> None:
    block = Bottleneck(4, 4, 4, 2, 1).eval()
    x = torch.randn(2, 4, 5, 5)
    y = nn.functional.relu(block.norm1(block.conv1(x)))
    y = nn.functional.relu(block.norm2(block.conv2(y)))
    y = nn.functional.relu(block.norm3(block.conv3(y)) + x)
    assert torch.equal(block(x), y)
    assert bool((y == 0).any())


def test_initialization_of_he(resnext50: ResNeXt) -> None:
    for module in resnext50.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()
    assert not resnext50.classifier.bias.any()


def test_other_sizes() -> None:
    # ResNeXt-101 32x8d: 88.79 million in the published models; meta tensors take no memory
    with torch.device("meta"):
        model = resnext(101, 32, 8)
    assert sum(p.numel() for p in model.parameters()) == 88_791_336
    small = resnext(50, 2, 4, in_channels=1, classes=7)
    assert small(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="depth is 18, allowed are 50, 101"):
        resnext(18)
