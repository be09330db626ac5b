"""The tables [model] and [data] of translation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from apollo_bench.config_section import Fraction, NonNegative, PositiveInt
from apollo_bench.workloads.base_settings import DataSettings, ModelSettings


class TransformerModel(ModelSettings):
    """Encoder and decoder with attention; all embeddings are shared."""

    renamed_keys: ClassVar[dict[str, str]] = {"longest": "max_length"}

    can_be_sharded: ClassVar[bool] = True

    family: Literal["transformer"]
    width: PositiveInt  # dimensions of a token vector
    inner: PositiveInt  # dimensions of the feed-forward layers
    heads: PositiveInt
    layers: PositiveInt  # of the encoder and of the decoder, each
    dropout: Fraction = 0.1
    max_length: PositiveInt = 1024  # subwords per sentence, its end included

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> TransformerModel:
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, allowed are divisors of width, {self.width}")
        return self

    def __str__(self) -> str:
        return (
            f"Transformer {self.width}/{self.inner}, {self.heads} heads, "
            f"{self.layers}+{self.layers} layers"
        )


class SentencePairData(DataSettings):
    """Pairs of sentences as subwords, in batches by number of tokens."""

    renamed_keys: ClassVar[dict[str, str]] = {"beams": "beam_size"}

    kind: Literal["sentence-pairs"]
    subwords: Annotated[int, Field(ge=300)]  # size of the joint vocabulary
    label_smoothing: Fraction = 0.1
    beam_size: PositiveInt = 5
    length_penalty: NonNegative = 0.6
    # A translation of n subwords has at most factor * n + constant subwords.
    length_factor: NonNegative = 1.0  # Vaswani et al. (2017), section 6.1
    length_constant: PositiveInt = 50
