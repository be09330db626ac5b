"""The tables of a recipe: which keys there are, and what they may say."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


def _rises(interval: list[float]) -> list[float]:
    low, high = interval
    if low >= high:
        raise ValueError("the first is to be less than the second")
    return interval


Range = Annotated[
    list[Positive], Field(min_length=2, max_length=2), AfterValidator(_rises)
]  # least and greatest value


class Section(BaseModel):
    """A table of a recipe: unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ResNetModel(Section):
    """Residual network for small images."""

    family: Literal["resnet"]
    depth: Annotated[int, Field(ge=8)]  # 6n + 2
    width: Count = 16  # channels of the first stage

    @model_validator(mode="after")
    def _depth_is_6n_plus_2(self) -> ResNetModel:
        if (self.depth - 2) % 6:
            raise ValueError(f"depth is {self.depth}, allowed are 8, 14, 20, ... (6n + 2)")
        return self

    def __str__(self) -> str:
        return f"ResNet-{self.depth}, width {self.width}"


class ResNeXtModel(Section):
    """Residual network of grouped convolutions, for photographs."""

    family: Literal["resnext"]
    depth: Literal[50, 101]
    groups: Count = 32  # of a 3x3 convolution
    group_width: Count = 4  # channels of a group in the first stage

    def __str__(self) -> str:
        return f"ResNeXt-{self.depth} {self.groups}x{self.group_width}d"


class LSTMModel(Section):
    """Stack of LSTMs that predicts each next word."""

    family: Literal["lstm"]
    embedding: Count  # dimensions of a word's vector
    hidden: Count  # units of a layer
    layers: Count = 2
    dropout: Share = 0.0
    cutoffs: list[Count] = []  # of the adaptive softmax; none: a plain one
    div_value: Annotated[float, Field(ge=1)] = 4.0

    @model_validator(mode="after")
    def _clusters_fit(self) -> LSTMModel:
        if any(left >= right for left, right in itertools.pairwise(self.cutoffs)):
            raise ValueError(f"cutoffs are {self.cutoffs}, allowed are numbers that rise")
        if self.cutoffs and self.hidden < self.div_value ** len(self.cutoffs):
            raise ValueError(
                f"hidden is {self.hidden}, allowed is {self.div_value ** len(self.cutoffs):g} or "
                f"more with {len(self.cutoffs)} cut-offs and div_value {self.div_value:g}"
            )
        return self

    def __str__(self) -> str:
        layers = f"{self.layers} LSTM layer{'s' if self.layers > 1 else ''}"
        return f"{layers} of {self.hidden}, words of {self.embedding} dimensions"


class TransformerModel(Section):
    """Encoder and decoder with attention, all embeddings shared."""

    family: Literal["transformer"]
    width: Count  # of a token's vector
    inner: Count  # of the feed-forward parts
    heads: Count
    layers: Count  # of the encoder, and of the decoder
    dropout: Share = 0.1
    longest: Count = 1024  # subwords of a sentence, its end counted

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


class Examples(Section):
    """Which part of the training data is used."""

    train_examples: Count | None = None  # the first so many; None: all
    # hold out the last so many training examples and evaluate on them in place of the test set
    validation: Annotated[int, Field(ge=0)] = 0


class SmallImages(Examples):
    """Images of one size that live decoded in memory."""

    kind: Literal["small-images"] = "small-images"
    crop_padding: Annotated[int, Field(ge=0)] = 4  # pixels
    flip: bool = True


class Photographs(Examples):
    """Images of any size, decoded each time: random crop resized, flip; for tests a centre crop."""

    kind: Literal["photographs"]
    size: Count = 224  # pixels, of what the model sees
    smallest_area: Annotated[float, Field(gt=0, le=1)] = 0.08  # of a random crop, of the image's
    flip: bool = True
    test_resize: Count = 256  # pixels, the shorter side of a test image before its centre crop

    @model_validator(mode="after")
    def _crop_fits(self) -> Photographs:
        if self.test_resize < self.size:
            raise ValueError(f"test_resize is {self.test_resize}, allowed is size or more")
        return self


class Text(Section):
    """One stream of words, cut into parallel streams."""

    kind: Literal["text"]
    train_examples: Count | None = None  # the first so many words; None: all
    steps: Count = 20  # words of truncated back-propagation through time


class Sentences(Section):
    """Pairs of sentences as subwords, in batches of so many tokens."""

    kind: Literal["sentence-pairs"]
    train_examples: Count | None = None  # the first so many pairs; None: all
    subwords: Annotated[int, Field(ge=300)]  # of both languages together
    label_smoothing: Share = 0.1
    beams: Count = 5
    length_penalty: NotNegative = 0.6
    # of the translation of a sentence of n subwords: factor * n + constant
    length_factor: NotNegative = 1.0  # Vaswani et al. (2017), section 6.1
    length_constant: Count = 50


def kind(data: Any) -> Any:
    """What the table [data] describes; small images where it does not say."""
    if isinstance(data, dict):
        return data.get("kind", "small-images")
    return getattr(data, "kind", None)


Data = Annotated[
    Annotated[SmallImages, Tag("small-images")]
    | Annotated[Photographs, Tag("photographs")]
    | Annotated[Text, Tag("text")]
    | Annotated[Sentences, Tag("sentence-pairs")],
    Discriminator(kind),
]


class Shape(Section):
    """How the learning rate falls after the optimizer's own warmup, if it has one."""

    kind: Literal["constant", "cosine", "milestone", "inverse-sqrt"]
    milestones: list[Positive] = []  # in the schedule's unit
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # on the rate at every milestone
    warmup_steps: Count | None = (
        None  # updates in which the rate rises to it, for those without one
    )

    @model_validator(mode="after")
    def _says_what_its_kind_needs(self) -> Shape:
        if (self.kind == "milestone") != bool(self.milestones):
            raise ValueError("milestones are needed with kind 'milestone', and only with it")
        if self.kind == "inverse-sqrt" and self.warmup_steps is None:
            raise ValueError("warmup_steps is needed with kind 'inverse-sqrt'")
        return self

    def _scaled(self, share: float) -> dict[str, Any]:
        return {"milestones": [milestone * share for milestone in self.milestones]}


class Schedule(Shape):
    """How long a training is, in epochs or in updates, and how the learning rate falls."""

    epochs: Count | None = None
    updates: Count | None = None
    instead: dict[str, Shape] = Field(default_factory=dict)  # of these optimizers

    @model_validator(mode="after")
    def _fits_its_length(self) -> Schedule:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("epochs or updates are needed, and not both")
        for shape in (self, *self.instead.values()):
            edges = [0.0, *shape.milestones, float(self.length)]
            if any(left >= right for left, right in itertools.pairwise(edges)):
                raise ValueError(
                    f"milestones are {shape.milestones}, allowed are {self.unit}s that rise, "
                    f"below {self.length}"
                )
        return self

    @property
    def unit(self) -> Literal["epoch", "update"]:
        """Of its length and of the milestones."""
        return "update" if self.epochs is None else "epoch"

    @property
    def length(self) -> int:
        """In its unit."""
        return self.epochs or self.updates or 0

    def __str__(self) -> str:
        return f"{self.length} {self.unit}{'' if self.length == 1 else 's'}"

    def steps(self, per_epoch: int) -> int:
        """Updates in the whole training."""
        return self.length if self.epochs is None else self.length * per_epoch

    def shortened(self, length: int) -> Schedule:
        """The same shape over another length in the same unit."""
        share = length / self.length
        instead = {
            name: shape.model_copy(update=shape._scaled(share))
            for name, shape in self.instead.items()
        }
        update = {f"{self.unit}s": length, "instead": instead, **self._scaled(share)}
        return self.model_copy(update=update)


class Steps(Section):
    """Batches, and how often a run writes."""

    batch_size: Count  # examples in a step, over all processes; of sentence pairs: tokens
    evaluate_every: Count | None = None  # steps; None: an epoch
    log_every: Count = 25  # steps
    checkpoint_every: Positive = 20.0  # seconds; every evaluation is followed by one
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    clip_norm: Positive | None = None  # of the gradient of all parameters; longer ones are cut
    accumulate: Count = 1  # parts in which a process takes its share of a batch, one after another
    compile: bool = False  # the model, by torch.compile
    average_last: Count = 1  # the weights of how many evaluations make the model in the end


class Training(Steps):
    """How one run trains."""

    schedule: Schedule


class EqualStrength(Section):
    """Weight decay coupled to another optimizer's by eq. (14)."""

    equal_strength_to: str


class SGD(Section):
    """Settings of torch.optim.SGD; L2 decay."""

    method: Literal["sgd"]
    lr: Positive
    momentum: Share = 0.0
    weight_decay: NotNegative = 0.0


class Moments(Section):
    """What Adam and its kin have in common; decoupled decay."""

    lr: Positive
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: NotNegative | EqualStrength = 0.0


class Adam(Moments):
    """Settings of torch.optim.AdamW, the paper's Adam."""

    method: Literal["adam"]


class RAdam(Moments):
    """Settings of torch.optim.RAdam."""

    method: Literal["radam"]


class NAdam(Moments):
    """Settings of torch.optim.NAdam with decoupled decay, NAdamW."""

    method: Literal["nadamw"]


class Muon(Moments):
    """Settings of torch.optim.Muon for the matrices within a network, of AdamW for all the rest.

    Both have the same rate and decay: a step of Muon is scaled to the size of one of AdamW.
    """

    method: Literal["muon"]
    momentum: Share = 0.95


class ApolloSettings(Section):
    """Settings of apollo_qn.Apollo (L2 decay, as in the paper) or ApolloW (decoupled)."""

    method: Literal["apollo", "apollow"]
    lr: Positive
    beta: Share = 0.9
    eps: Positive = 1e-4
    sigma: Positive = 1.0
    rebound: Literal["constant", "belief"] = "constant"
    weight_decay: NotNegative | EqualStrength = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_init_lr: NotNegative | None = None


class AveragedSettings(Section):
    """Settings of Apollo with a moving average of B, an experiment; L2 decay."""

    method: Literal["apollo-averaged"]
    lr: Positive
    beta: Share = 0.9
    hessian_beta: Share = 0.9
    eps: Positive = 1e-4
    sigma: Positive = 1.0
    weight_decay: NotNegative | EqualStrength = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_init_lr: NotNegative | None = None


Optimizer = Annotated[
    SGD | Adam | RAdam | NAdam | Muon | ApolloSettings | AveragedSettings,
    Field(discriminator="method"),
]


class Quick(Section):
    """What ``--quick`` changes."""

    epochs: Count | None = None  # or
    updates: Count | None = None
    evaluate_every: Count | None = None
    seeds: Count  # how many of the recipe's seeds
    train_examples: Count | None = None


SweepKind = Literal["lr-robustness", "weight-decay"]
Analysis = Literal["lr-robustness", "weight-decay", "tuning"]


class Sweep(Section):
    """An analysis: the same runs at several values of one setting."""

    values: Annotated[list[Positive], Field(min_length=1)]
    optimizers: list[str] | None = None  # None: all
    schedules: list[str] | None = None  # None: all

    @model_validator(mode="after")
    def _values_rise(self) -> Sweep:
        if any(left >= right for left, right in itertools.pairwise(self.values)):
            raise ValueError(f"values are {self.values}, allowed are values that rise")
        return self


class Tuning(Section):
    """A search for each optimizer's settings on held-out data, with the same number of tries."""

    tries: Count  # of each optimizer
    # of optimizers and their settings: least and greatest value, between them log-uniform
    ranges: Annotated[dict[str, dict[str, Range]], Field(min_length=1)]
    seed: int = 101  # of the first runs; no seed of a comparison
    schedules: list[str] | None = None  # None: all


class Comparison(Section):
    """What a comparison trains where the command line does not say."""

    optimizers: list[str] | None = None  # None: all
    schedules: list[str] | None = None  # None: all


class SweepPoint(Section):
    """Where in a sweep a run stands."""

    kind: Analysis
    value: Positive  # of a tuning: the number of the try

    def __str__(self) -> str:
        prefix = {"lr-robustness": "lr-x", "weight-decay": "decay-", "tuning": "try"}
        return f"{prefix[self.kind]}{self.value:g}"


class Published(Section):
    """A number that the paper gives: the mean over its runs and their standard deviation."""

    mean: float
    std: float | None = None
