"""The schema of a recipe, and what a recipe says about one run.

A recipe is a TOML file; every number of an experiment stands in one. ``recipes/`` holds ours.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from apollo_qn.experiments.errors import ExperimentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


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


Model = ResNetModel | ResNeXtModel


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


def kind(data: Any) -> Any:
    """What the table [data] describes; small images where it does not say."""
    if isinstance(data, dict):
        return data.get("kind", "small-images")
    return getattr(data, "kind", None)


Data = Annotated[
    Annotated[SmallImages, Tag("small-images")] | Annotated[Photographs, Tag("photographs")],
    Discriminator(kind),
]


class Schedule(Section):
    """How long a training is, and how the learning rate falls after warmup."""

    kind: Literal["cosine", "milestone"]
    epochs: Count
    milestones: list[Positive] = []  # at the end of these epochs
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # on the rate at every milestone

    @model_validator(mode="after")
    def _milestones_fit(self) -> Schedule:
        if (self.kind == "milestone") != bool(self.milestones):
            raise ValueError("milestones are needed with kind 'milestone', and only with it")
        edges = [0.0, *self.milestones, float(self.epochs)]
        if any(left >= right for left, right in itertools.pairwise(edges)):
            raise ValueError(
                f"milestones are {self.milestones}, allowed are epochs that rise, "
                f"below {self.epochs}"
            )
        return self

    def shortened(self, epochs: int) -> Schedule:
        """The same shape over another number of epochs."""
        scaled = [milestone * epochs / self.epochs for milestone in self.milestones]
        return self.model_copy(update={"epochs": epochs, "milestones": scaled})


class Steps(Section):
    """Batches, and how often a run writes."""

    batch_size: Count  # examples in a step, over all processes
    log_every: Count = 25  # steps
    checkpoint_every: Positive = 20.0  # seconds; the end of an epoch always is one
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    clip_norm: Positive | None = None  # of the gradient of all parameters; longer ones are cut
    accumulate: Count = 1  # parts in which a process takes its share of a batch, one after another
    compile: bool = False  # the model, by torch.compile


class Training(Steps):
    """How one run trains."""

    schedule: Schedule

    @property
    def epochs(self) -> int:
        """Its length."""
        return self.schedule.epochs


class EqualStrength(Section):
    """Weight decay coupled to another optimizer's by eq. (14)."""

    equal_strength_to: str


class SGD(Section):
    """Settings of torch.optim.SGD; L2 decay."""

    method: Literal["sgd"]
    lr: Positive
    momentum: Share = 0.0
    weight_decay: NotNegative = 0.0


class Adam(Section):
    """Settings of torch.optim.AdamW; decoupled decay, as the paper's Adam."""

    method: Literal["adam"]
    lr: Positive
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: NotNegative | EqualStrength = 0.0


class RAdam(Section):
    """Settings of torch.optim.RAdam; decoupled decay."""

    method: Literal["radam"]
    lr: Positive
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: NotNegative | EqualStrength = 0.0


class ApolloSettings(Section):
    """Settings of apollo_qn.Apollo; L2 decay, as in the paper."""

    method: Literal["apollo"]
    lr: Positive
    beta: Share = 0.9
    eps: Positive = 1e-4
    sigma: Positive = 1.0
    weight_decay: NotNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_init_lr: NotNegative | None = None


Optimizer = Annotated[SGD | Adam | RAdam | ApolloSettings, Field(discriminator="method")]


class Quick(Section):
    """What ``--quick`` changes."""

    epochs: Count
    seeds: Count  # how many of the recipe's seeds
    train_examples: Count | None = None


class RunSpec(Section):
    """A fully resolved recipe of one run: all numbers that its result depends on, but the data."""

    task: str
    model: Annotated[Model, Field(discriminator="family")]
    data: Data
    train: Training
    schedule: str  # its name in the recipe
    name: str  # of the optimizer in the recipe
    optimizer: Optimizer
    seed: int


class Recipe(Section):
    """One experiment: a task, and the optimizers, schedules and seeds to train it with."""

    task: str
    seeds: Annotated[list[int], Field(min_length=1)]
    model: Annotated[Model, Field(discriminator="family")]
    data: Data = SmallImages()
    train: Steps
    schedules: Annotated[dict[str, Schedule], Field(min_length=1)]
    optimizers: Annotated[dict[str, Optimizer], Field(min_length=1)]
    quick: Quick

    @model_validator(mode="after")
    def _decay_can_be_coupled(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: the same seed twice")
        for name in self.optimizers:
            coupled_decay(name, self.optimizers)
        return self

    def run(self, name: str, seed: int, schedule: str | None = None) -> RunSpec:
        """Resolve the run of one optimizer, seed and schedule (None: the recipe's first).

        Raises:
            ExperimentError: the recipe has no such optimizer or schedule.
        """
        schedule = next(iter(self.schedules)) if schedule is None else schedule
        for what, asked, there in (
            ("optimizer", name, self.optimizers),
            ("schedule", schedule, self.schedules),
        ):
            if asked not in there:
                raise ExperimentError(
                    f"no {what} {asked!r} in this recipe; there are {', '.join(there)}"
                )
        decay = coupled_decay(name, self.optimizers)
        return RunSpec(
            task=self.task,
            model=self.model,
            data=self.data,
            train=Training(**self.train.model_dump(), schedule=self.schedules[schedule]),
            schedule=schedule,
            name=name,
            optimizer=self.optimizers[name].model_copy(update={"weight_decay": decay}),
            seed=seed,
        )

    def runs(
        self,
        names: list[str] | None = None,
        seeds: int | None = None,
        schedules: list[str] | None = None,
    ) -> list[RunSpec]:
        """Resolve optimizers x schedules x seeds, seed by seed, so that an early report has all.

        Args:
            names: optimizers; None: all.
            seeds: how many seeds; beyond the recipe's own they count on from its largest.
            schedules: None: the recipe's first.

        Raises:
            ExperimentError: the recipe has no such optimizer or schedule.
        """
        chosen = list(self.seeds if seeds is None else self.seeds[:seeds])
        while seeds is not None and len(chosen) < seeds:
            chosen.append(max(chosen) + 1)
        return [
            self.run(name, seed, schedule)
            for seed in chosen
            for schedule in schedules or list(self.schedules)[:1]
            for name in names or self.optimizers
        ]

    def quickened(self) -> Recipe:
        """Apply the table [quick]."""
        examples = self.quick.train_examples or self.data.train_examples
        return self.model_copy(
            update={
                "seeds": self.seeds[: self.quick.seeds],
                "data": self.data.model_copy(update={"train_examples": examples}),
                "schedules": {
                    name: schedule.shortened(self.quick.epochs)
                    for name, schedule in self.schedules.items()
                },
            }
        )


def coupled_decay(name: str, optimizers: dict[str, Any]) -> float:
    """Weight decay gamma of an optimizer as a number; eq. (14) where it is coupled.

    Decay of equal strength shrinks the weights equally each step: gamma * eta is the same. So
    gamma = gamma_reference * eta_reference / eta. Optimizers that state a number keep it: the
    paper gives SGD and Apollo the same gamma.

    Raises:
        ValueError: the reference is missing, or is itself coupled.
    """
    own = optimizers[name]
    if not isinstance(own.weight_decay, EqualStrength):
        return float(own.weight_decay)
    reference = optimizers.get(own.weight_decay.equal_strength_to)
    if reference is None or isinstance(reference.weight_decay, EqualStrength):
        numbers = [
            other
            for other, settings in optimizers.items()
            if not isinstance(settings.weight_decay, EqualStrength)
        ]
        raise ValueError(
            f"optimizers.{name}.weight_decay.equal_strength_to is "
            f"{own.weight_decay.equal_strength_to!r}, allowed are the optimizers that state a "
            f"number: {', '.join(numbers) or 'none here'}"
        )
    return float(reference.weight_decay * reference.lr / own.lr)


def available() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load(name: str) -> Recipe:
    """Read a recipe by name, or from a path that ends in ``.toml``.

    Raises:
        ExperimentError: no such recipe; a key or value that the schema does not allow, named
            with file, key and what is allowed.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not name.endswith(".toml") and name not in available():
        raise ExperimentError(
            f"no task {name!r}; there are {', '.join(available())}, or give a recipe's .toml file"
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not valid TOML: {error}") from None
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {describe(error, Recipe)}") from None


def describe(error: ValidationError, schema: type[Section]) -> str:
    """One line for all complaints: key, value, and what is allowed."""
    lines = []
    for item in error.errors():
        shown, owner = _locate(schema, item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
            if owner is not None:
                message += f", allowed are {', '.join(owner.model_fields)}"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] == "union_tag_invalid":
            shown.append(item["ctx"]["discriminator"].strip("'()"))
            message = f"is {item['ctx']['tag']!r}, allowed are {item['ctx']['expected_tags']}"
        elif item["type"] == "union_tag_not_found":
            shown.append(item["ctx"]["discriminator"].strip("'()"))
            message = "missing"
        elif item["type"] != "value_error" or len(str(item["input"])) < 40:
            message = f"is {item['input']!r}: {message}"
        lines.append(f"{'.'.join(shown) or 'recipe'}: {message}")
    return "; ".join(dict.fromkeys(lines))


def _locate(
    schema: type[Section], location: tuple[int | str, ...]
) -> tuple[list[str], type[Section] | None]:
    """The keys that the user wrote, and the table that the last of them stands in.

    A location of pydantic's names the chosen branch of every union on its way too.
    """
    shown: list[str] = []
    owner: type[Section] | None = schema
    there: Any = schema
    for part in location:
        while get_origin(there) is Annotated:
            there = get_args(there)[0]
        if get_origin(there) in (Union, UnionType):
            there = next((one for one in get_args(there) if _is_branch(one, part)), None)
            continue
        owner = there if isinstance(there, type) and issubclass(there, Section) else None
        shown.append(str(part))
        if owner is not None:
            field = owner.model_fields.get(str(part))
            there = None if field is None else field.annotation
        else:
            # a key of a dict, or an index of a list
            there = get_args(there)[-1] if get_args(there) else None
    return shown, owner


def _is_branch(member: Any, tag: int | str) -> bool:
    while get_origin(member) is Annotated:
        member = get_args(member)[0]
    if not (isinstance(member, type) and issubclass(member, Section)):
        return False
    literals = [get_args(field.annotation) for field in member.model_fields.values()]
    return member.__name__ == tag or any(tag in values for values in literals)
