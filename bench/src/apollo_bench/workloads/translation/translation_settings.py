"""The tables [model] and [data] of translation."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from apollo_bench.config_section import Fraction, NonNegative, PositiveInt
from apollo_bench.workloads.base_settings import DataSettings, ModelSettings

_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@-]{0,31}")


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
    def _check_heads(self) -> TransformerModel:
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
    model_arguments: ClassVar[tuple[str, ...]] = ("vocabulary", "padding")

    kind: Literal["sentence-pairs"]
    subwords: Annotated[int, Field(ge=300)]  # size of the joint vocabulary
    label_smoothing: Fraction = 0.1
    beam_size: PositiveInt = 5
    length_penalty: NonNegative = 0.6
    # A translation of n subwords has at most factor * n + constant subwords.
    length_factor: NonNegative = 1.0  # Vaswani et al. (2017), section 6.1
    length_constant: PositiveInt = 50


def _split_languages(value: Any) -> Any:
    """Return "fr,it" of the command line as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _are_languages(value: list[str]) -> list[str]:
    if value[0] == value[1] or not all(_LANGUAGE.fullmatch(code) for code in value):
        raise ValueError(
            f"languages are {value!r}, allowed are two codes, the endings of the files' names, as "
            "fr,it"
        )
    return value


class AlignedTextData(SentencePairData):
    """Two text files of the user; line n of one translates line n of the other."""

    is_custom: ClassVar[bool] = True

    kind: Literal["aligned-text"]  # type: ignore[assignment]
    languages: (
        Annotated[
            list[str],
            Field(min_length=2, max_length=2),
            BeforeValidator(_split_languages),
            AfterValidator(_are_languages),
        ]
        | None
    ) = None  # source and target
    subwords: Annotated[int, Field(ge=300)] = 2000
    # of the pairs, from the end, for each of validation and test, where there is one pair of files
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    # of sacrebleu; "zh" and "ja-mecab" know where words end, "char" counts characters
    bleu_tokenizer: Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores200"] = (
        "13a"
    )
