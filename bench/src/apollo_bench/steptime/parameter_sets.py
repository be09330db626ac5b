"""The parameter sets of the benchmark: shapes of real models, and two extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.image_classification.resnet import resnet

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ModelFamily:
    """A model in one size, or in several scales; ``scaled`` names what the scale divides."""

    title: str
    shapes: Callable[[int], list[Shape]]
    scaled: str = ""
    default_scale: int = 1
    largest_scale: int = 4096  # with it every tensor still has elements


@dataclass(frozen=True)
class ParameterSet:
    """Named shapes; ``name`` makes the same set again."""

    family: str
    scale: int = 1

    @property
    def name(self) -> str:
        """Name as ``--sets`` takes it."""
        return f"{self.family}/{self.scale}" if FAMILIES[self.family].scaled else self.family

    @property
    def title(self) -> str:
        """Title with the scale, as tables show it."""
        family = FAMILIES[self.family]
        return family.title if self.scale == 1 else f"{family.title}, {self.remark}"

    @property
    def remark(self) -> str:
        """Effect of the scale, for example "1/8 of the vocabulary"; "" for the scale 1."""
        return "" if self.scale == 1 else f"1/{self.scale} of the {FAMILIES[self.family].scaled}"

    def shapes(self) -> list[Shape]:
        """Return the shape of each tensor."""
        return FAMILIES[self.family].shapes(self.scale)

    def smaller(self) -> ParameterSet | None:
        """Return the set at half the size; None if there is no smaller one."""
        if not FAMILIES[self.family].scaled:
            return None
        half = ParameterSet(self.family, 2 * self.scale)
        return half if half.scale <= FAMILIES[self.family].largest_scale else None


def numel(shapes: Iterable[Shape]) -> int:
    """Return the number of elements in all tensors."""
    return sum(map(math.prod, shapes))


def choose_sets(names: list[str] | None, device: str = "cpu") -> list[ParameterSet]:
    """Return the named sets; None: the default sets of the type of device.

    Args:
        names: families, each followed by ``/8`` for an eighth of it if the family has scales.
        device: type of the device.

    Raises:
        ExperimentError: unknown name, or an invalid scale.
    """
    chosen = [_set(name) for name in (_DEFAULT[device] if names is None else names)]
    return list(dict.fromkeys(chosen))


def _set(name: str) -> ParameterSet:
    family, slash, scale = name.partition("/")
    if family not in FAMILIES:
        raise ExperimentError(f"no parameter set {name!r}; there are {', '.join(FAMILIES)}")
    if not slash:
        return ParameterSet(family, FAMILIES[family].default_scale)
    if not FAMILIES[family].scaled:
        raise ExperimentError(f"parameter set {name!r}: {family} has one size only")
    largest = FAMILIES[family].largest_scale
    if not (scale.isdecimal() and 1 <= int(scale) <= largest):
        raise ExperimentError(
            f"parameter set {name!r}: the scale must be a whole number from 1 to {largest}, "
            f"as in {family}/8"
        )
    return ParameterSet(family, int(scale))


def _of(module: nn.Module) -> list[Shape]:
    return [tuple(p.shape) for p in module.parameters()]


def _resnet110(scale: int) -> list[Shape]:
    with torch.device("meta"):
        return _of(resnet(110))


def _resnext50(scale: int) -> list[Shape]:
    """Return the shapes of ResNeXt-50 32x4d (Xie et al., 2017, table 1)."""

    def norm(channels: int) -> list[Shape]:
        return [(channels,), (channels,)]

    shapes: list[Shape] = [(64, 3, 7, 7), *norm(64)]
    before = 64
    for width, blocks in ((128, 3), (256, 4), (512, 6), (1024, 3)):
        after = 2 * width
        for block in range(blocks):
            shapes += [(width, before, 1, 1), *norm(width)]
            shapes += [(width, width // 32, 3, 3), *norm(width)]
            shapes += [(after, width, 1, 1), *norm(after)]
            if block == 0:
                shapes += [(after, before, 1, 1), *norm(after)]
            before = after
    return [*shapes, (1000, before), (1000,)]


def _one_billion_word(scale: int) -> list[Shape]:
    """Return the shapes of the paper's language model: embedding, LSTM, adaptive softmax."""
    vocabulary, cutoffs = 793_471 // scale, [60_000, 100_000, 640_000]
    with torch.device("meta"):
        return [
            *_of(nn.Embedding(vocabulary, 300)),
            *_of(nn.LSTM(300, 2048, num_layers=2)),
            *_of(
                nn.AdaptiveLogSoftmaxWithLoss(
                    2048, vocabulary, [cutoff // scale for cutoff in cutoffs], div_value=4.0
                )
            ),
        ]


def _transformer_base(scale: int) -> list[Shape]:
    """Return the shapes of Transformer-base (Vaswani et al., 2017).

    One embedding of 37,000 tokens is shared; q, k and v are separate matrices.
    """
    attention: list[Shape] = [(512, 512), (512,)] * 4
    feed_forward: list[Shape] = [(2048, 512), (2048,), (512, 2048), (512,)]
    encoder = [*attention, *feed_forward, *[(512,)] * 4]
    decoder = [*attention * 2, *feed_forward, *[(512,)] * 6]
    return [(37_000, 512), *encoder * 6, *decoder * 6]


def _decoder(scale: int) -> list[Shape]:
    """Return the shapes of a decoder like LLaMA (Touvron et al., 2023).

    It has SwiGLU and no biases; the output shares the embedding.
    """
    width, hidden = 2048, 5504
    attention: list[Shape] = [(width, width)] * 4
    layer = [*attention, *[(hidden, width)] * 2, (width, hidden), *[(width,)] * 2]
    return [(50_304 // scale, width), *layer * (24 // scale), (width,)]


FAMILIES = {
    "resnet-110": ModelFamily("ResNet-110", _resnet110),
    "resnext-50": ModelFamily("ResNeXt-50 32x4d", _resnext50),
    # at full size it takes 2 GB, and 8 GB with AdamW's state: too much for a default run
    "one-billion-word": ModelFamily("One Billion Words LSTM", _one_billion_word, "vocabulary", 8),
    "transformer-base": ModelFamily("Transformer-base", _transformer_base),
    "decoder-1.3b": ModelFamily(
        "Decoder of 1.3 B", _decoder, "layers and the vocabulary", largest_scale=8
    ),
    "one-tensor": ModelFamily(
        "One tensor of 64 M", lambda scale: [(64_000_000 // scale,)], "elements"
    ),
    "many-tensors": ModelFamily(
        "10,000 tensors of 64", lambda scale: [(64,)] * (10_000 // scale), "tensors"
    ),
}
# The sets of a run that names none.
_DEFAULT = {
    "cpu": [name for name in FAMILIES if name != "decoder-1.3b"],
    "cuda": ["resnet-110", "resnext-50", "transformer-base", "decoder-1.3b"],
}
