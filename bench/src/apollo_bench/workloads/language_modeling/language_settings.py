"""The tables [model] and [data] of language modeling."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from apollo_bench.config_section import Fraction, PositiveInt
from apollo_bench.workloads.base_settings import DataSettings, ModelSettings


class LSTMModel(ModelSettings):
    """Stack of LSTMs that predicts the next word."""

    family: Literal["lstm"]
    embedding: PositiveInt  # dimensions of a word vector
    hidden: PositiveInt  # units per layer
    layers: PositiveInt = 2
    dropout: Fraction = 0.0
    # of the adaptive softmax; empty: an ordinary softmax
    cutoffs: list[PositiveInt] = Field(default_factory=list)
    div_value: Annotated[float, Field(ge=1)] = 4.0

    @model_validator(mode="after")
    def _check_clusters(self) -> LSTMModel:
        if any(left >= right for left, right in itertools.pairwise(self.cutoffs)):
            raise ValueError(f"cutoffs are {self.cutoffs}, allowed are increasing numbers")
        if self.cutoffs and self.hidden < self.div_value ** len(self.cutoffs):
            raise ValueError(
                f"hidden is {self.hidden}, allowed is {self.div_value ** len(self.cutoffs):g} or "
                f"more with {len(self.cutoffs)} cut-offs and div_value {self.div_value:g}"
            )
        return self

    def __str__(self) -> str:
        layers = f"{self.layers} LSTM layer{'s' if self.layers > 1 else ''}"
        return f"{layers} of {self.hidden}, words of {self.embedding} dimensions"


class TextData(DataSettings):
    """One stream of words, cut into parallel streams."""

    renamed_keys: ClassVar[dict[str, str]] = {"steps": "bptt_steps"}
    model_arguments: ClassVar[tuple[str, ...]] = ("vocabulary",)

    kind: Literal["text"]
    bptt_steps: PositiveInt = 20  # steps of truncated back-propagation through time


class TextFileData(TextData):
    """A text of the user: one file, or one per split."""

    is_custom: ClassVar[bool] = True

    kind: Literal["text-file"]  # type: ignore[assignment]
    unit: Literal["word", "character"] = "word"
    min_count: PositiveInt = 2  # occurrences in the training text that a word needs to be known
    vocabulary: Annotated[int, Field(ge=3)] | None = None  # largest number of words; None: any
    # of the text, from its end, for each of the validation and the test text, where it is one file
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
