"""The tables of a recipe: their keys, types and ranges."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from apollo_bench.config.schema_types import (
    ConfigSection,
    Fraction,
    Interval,
    NonNegative,
    Positive,
    PositiveInt,
)


class ResNetModel(ConfigSection):
    """Residual network for small images."""

    family: Literal["resnet"]
    depth: Annotated[int, Field(ge=8)]  # 6n + 2
    width: PositiveInt = 16  # channels of the first stage

    @model_validator(mode="after")
    def _depth_is_6n_plus_2(self) -> ResNetModel:
        if (self.depth - 2) % 6:
            raise ValueError(f"depth is {self.depth}, allowed are 8, 14, 20, ... (6n + 2)")
        return self

    def __str__(self) -> str:
        return f"ResNet-{self.depth}, width {self.width}"


class ResNeXtModel(ConfigSection):
    """Residual network of grouped convolutions, for photographs."""

    family: Literal["resnext"]
    depth: Literal[50, 101]
    groups: PositiveInt = 32  # per 3x3 convolution
    group_width: PositiveInt = 4  # channels per group in the first stage

    def __str__(self) -> str:
        return f"ResNeXt-{self.depth} {self.groups}x{self.group_width}d"


class LSTMModel(ConfigSection):
    """Stack of LSTMs that predicts the next word."""

    family: Literal["lstm"]
    embedding: PositiveInt  # dimensions of a word vector
    hidden: PositiveInt  # units per layer
    layers: PositiveInt = 2
    dropout: Fraction = 0.0
    cutoffs: list[PositiveInt] = Field(
        default_factory=list
    )  # of the adaptive softmax; none: a plain one
    div_value: Annotated[float, Field(ge=1)] = 4.0

    @model_validator(mode="after")
    def _clusters_fit(self) -> LSTMModel:
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


class TransformerModel(ConfigSection):
    """Encoder and decoder with attention; all embeddings are shared."""

    renamed_keys: ClassVar[dict[str, str]] = {"longest": "max_length"}

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


Model = ResNetModel | ResNeXtModel | LSTMModel | TransformerModel


class ImageData(ConfigSection):
    """The part of the training images that is used."""

    train_examples: PositiveInt | None = None  # size of the subset, from the start; None: all
    # training examples, from the end, that are held out and evaluated on instead of the test set
    validation: Annotated[int, Field(ge=0)] = 0


class SmallImageData(ImageData):
    """Images of one size, kept decoded in memory."""

    kind: Literal["small-images"] = "small-images"
    crop_padding: Annotated[int, Field(ge=0)] = 4  # pixels
    flip: bool = True


class PhotographData(ImageData):
    """Images of any size, decoded for each use; random resized crops, at test time center crops."""

    renamed_keys: ClassVar[dict[str, str]] = {"smallest_area": "min_area"}

    kind: Literal["photographs"]
    size: PositiveInt = 224  # pixels, of the model's input
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08  # of a random crop, relative to the image
    flip: bool = True
    test_resize: PositiveInt = 256  # pixels, shorter side of a test image before its center crop

    @model_validator(mode="after")
    def _crop_fits(self) -> PhotographData:
        if self.test_resize < self.size:
            raise ValueError(f"test_resize is {self.test_resize}, allowed is size or more")
        return self


class TextData(ConfigSection):
    """One stream of words, cut into parallel streams."""

    renamed_keys: ClassVar[dict[str, str]] = {"steps": "bptt_steps"}

    kind: Literal["text"]
    train_examples: PositiveInt | None = None  # words, from the start; None: all
    bptt_steps: PositiveInt = 20  # steps of truncated back-propagation through time


class SentencePairData(ConfigSection):
    """Pairs of sentences as subwords, in batches by number of tokens."""

    renamed_keys: ClassVar[dict[str, str]] = {"beams": "beam_size"}

    kind: Literal["sentence-pairs"]
    train_examples: PositiveInt | None = None  # pairs, from the start; None: all
    subwords: Annotated[int, Field(ge=300)]  # size of the joint vocabulary
    label_smoothing: Fraction = 0.1
    beam_size: PositiveInt = 5
    length_penalty: NonNegative = 0.6
    # A translation of n subwords has at most factor * n + constant subwords.
    length_factor: NonNegative = 1.0  # Vaswani et al. (2017), section 6.1
    length_constant: PositiveInt = 50


def kind(data: Any) -> Any:
    """Return the kind of the table [data]; its default is small images.

    Messages of pydantic name the discriminator by this function: it is called as the key.
    """
    if isinstance(data, dict):
        return data.get("kind", "small-images")
    return getattr(data, "kind", None)


Data = Annotated[
    Annotated[SmallImageData, Tag("small-images")]
    | Annotated[PhotographData, Tag("photographs")]
    | Annotated[TextData, Tag("text")]
    | Annotated[SentencePairData, Tag("sentence-pairs")],
    Discriminator(kind),
]


class LRShape(ConfigSection):
    """How the learning rate changes after the optimizer's own warmup."""

    kind: Literal["constant", "cosine", "milestone", "inverse-sqrt"]
    milestones: list[Positive] = Field(default_factory=list)  # in the schedule's unit
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # multiplies the rate at every milestone
    warmup_steps: PositiveInt | None = (
        None  # updates in which the rate rises to it, for those without one
    )

    @model_validator(mode="after")
    def _says_what_its_kind_needs(self) -> LRShape:
        if (self.kind == "milestone") != bool(self.milestones):
            raise ValueError("milestones are needed with kind 'milestone', and only with it")
        if self.kind == "inverse-sqrt" and self.warmup_steps is None:
            raise ValueError("warmup_steps is needed with kind 'inverse-sqrt'")
        return self

    def _scaled(self, share: float) -> dict[str, Any]:
        return {"milestones": [milestone * share for milestone in self.milestones]}


class Schedule(LRShape):
    """Length of the training in epochs or updates, and the learning rate over it."""

    renamed_keys: ClassVar[dict[str, str]] = {"instead": "overrides"}

    epochs: PositiveInt | None = None
    updates: PositiveInt | None = None
    overrides: dict[str, LRShape] = Field(default_factory=dict)  # by optimizer

    @model_validator(mode="after")
    def _fits_its_length(self) -> Schedule:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("epochs or updates are needed, and not both")
        for shape in (self, *self.overrides.values()):
            edges = [0.0, *shape.milestones, float(self.length)]
            if any(left >= right for left, right in itertools.pairwise(edges)):
                raise ValueError(
                    f"milestones are {shape.milestones}, allowed are increasing {self.unit}s "
                    f"below {self.length}"
                )
        return self

    @property
    def unit(self) -> Literal["epoch", "update"]:
        """Unit of the length and of the milestones."""
        return "update" if self.epochs is None else "epoch"

    @property
    def length(self) -> int:
        """Length in the schedule's unit."""
        return self.epochs or self.updates or 0

    def __str__(self) -> str:
        return f"{self.length} {self.unit}{'' if self.length == 1 else 's'}"

    def steps(self, per_epoch: int) -> int:
        """Return the number of updates in the whole training."""
        return self.length if self.epochs is None else self.length * per_epoch

    def shortened(self, length: int) -> Schedule:
        """Return the same shape over another length in the same unit."""
        share = length / self.length
        overrides = {
            name: shape.model_copy(update=shape._scaled(share))
            for name, shape in self.overrides.items()
        }
        update = {f"{self.unit}s": length, "overrides": overrides, **self._scaled(share)}
        return self.model_copy(update=update)


class TrainSettings(ConfigSection):
    """Batches, precision, and intervals of records, evaluations and checkpoints."""

    renamed_keys: ClassVar[dict[str, str]] = {"average_last": "average_checkpoints"}

    batch_size: PositiveInt  # examples (sentence pairs: tokens) per step, over all processes
    evaluate_every: PositiveInt | None = None  # steps; None: one epoch
    log_every: PositiveInt = 25  # steps
    checkpoint_every: Positive = 20.0  # seconds; also after every evaluation
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    clip_norm: Positive | None = None  # largest norm of the gradient
    accumulate: PositiveInt = (
        1  # parts in which a process takes its share of a batch, one after another
    )
    compile: bool = False  # whether torch.compile compiles the model
    average_checkpoints: PositiveInt = (
        1  # the weights of how many evaluations make the model in the end
    )


class RunTrainSettings(TrainSettings):
    """How one run is trained."""

    schedule: Schedule


class QuickSettings(ConfigSection):
    """The changes that ``--quick`` makes."""

    epochs: PositiveInt | None = None  # or
    updates: PositiveInt | None = None
    evaluate_every: PositiveInt | None = None
    seeds: PositiveInt  # number of the recipe's seeds
    train_examples: PositiveInt | None = None


SweepKind = Literal["lr-robustness", "weight-decay"]


Analysis = Literal["lr-robustness", "weight-decay", "tuning"]


class SweepSettings(ConfigSection):
    """An analysis: the same runs at several values of one setting."""

    values: Annotated[list[Positive], Field(min_length=1)]
    optimizers: list[str] | None = None  # None: all
    schedules: list[str] | None = None  # None: all

    @model_validator(mode="after")
    def _values_rise(self) -> SweepSettings:
        if any(left >= right for left, right in itertools.pairwise(self.values)):
            raise ValueError(f"values are {self.values}, allowed are increasing values")
        return self


class TuningSettings(ConfigSection):
    """A search for the settings of each optimizer on held-out data, with equally many trials."""

    renamed_keys: ClassVar[dict[str, str]] = {"tries": "trials"}

    trials: PositiveInt  # per optimizer
    # by optimizer and setting: smallest and largest value; sampled log-uniformly
    ranges: Annotated[dict[str, dict[str, Interval]], Field(min_length=1)]
    seed: int = 101  # first seed of the trials; not a seed of a comparison
    schedules: list[str] | None = None  # None: all


class CompareSettings(ConfigSection):
    """The optimizers and schedules of a comparison, unless the command line selects others."""

    optimizers: list[str] | None = None  # None: all
    schedules: list[str] | None = None  # None: all


class SweepPoint(ConfigSection):
    """The place of a run in a sweep."""

    kind: Analysis
    value: Positive  # of a search: the number of the trial

    def __str__(self) -> str:
        prefix = {"lr-robustness": "lr-x", "weight-decay": "decay-", "tuning": "try"}
        return f"{prefix[self.kind]}{self.value:g}"


class PaperResult(ConfigSection):
    """A result in the paper: mean over its runs and standard deviation."""

    mean: float
    std: float | None = None
