"""Sizes, shapes and initialization of the residual networks."""

from __future__ import annotations

import math

import pytest
import torch

from apollo_bench.workloads.image_classification.resnet import BasicBlock, resnet


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # He et al. (2016), table 6: 0.27 M and 1.7 M; 1x1 shortcuts add 2752 weights and their norms
    [(20, 272_474), (110, 1_730_714)],
)
def test_parameter_count(depth: int, parameters: int) -> None:
    assert sum(p.numel() for p in resnet(depth).parameters()) == parameters


def test_resnet110_has_as_many_tensors_as_the_papers() -> None:
    # 109 convolutions, 2 shortcuts, a norm (2) for each, and the classifier (2)
    assert len(list(resnet(110).parameters())) == 111 * 3 + 2


def test_shapes() -> None:
    model = resnet(8, width=4, in_channels=1, classes=7)
    x = torch.zeros(2, 1, 28, 28)
    assert model.features(x).shape == (2, 16, 7, 7)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (8, 2)])
def test_a_block_adds_its_shortcut_before_the_last_relu(outputs: int, stride: int) -> None:
    block = BasicBlock(4, outputs, stride).eval()
    x = torch.randn(2, 4, 6, 6)
    y = block.norm1(block.conv1(x)).clamp(min=0)
    y = block.norm2(block.conv2(y)) + (x if stride == 1 else block.shortcut(x))
    assert torch.equal(block(x), y.clamp(min=0))


def test_initialization_of_he() -> None:
    torch.manual_seed(0)
    model = resnet(20)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("depth", [2, 7, 9, 109])
def test_depth_must_be_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}, allowed are 8, 14"):
        resnet(depth)
