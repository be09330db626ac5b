"""The schema of a recipe, and what a recipe says about one run.

A recipe is a TOML file; every number of an experiment stands in one. ``recipes/`` holds ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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


class Model(Section):
    """Which network."""

    family: Literal["resnet"]
    depth: Annotated[int, Field(ge=8)]  # 6n + 2
    width: Count  # channels of the first stage

    @model_validator(mode="after")
    def _depth_is_6n_plus_2(self) -> Model:
        if (self.depth - 2) % 6:
            raise ValueError(f"depth is {self.depth}, allowed are 8, 14, 20, ... (6n + 2)")
        return self


class Data(Section):
    """Which part of the data, and how it is augmented."""

    train_examples: Count | None = None  # the first so many; None: all
    # hold out the last so many training examples and evaluate on them in place of the test set
    validation: Annotated[int, Field(ge=0)] = 0
    crop_padding: Annotated[int, Field(ge=0)] = 4  # pixels
    flip: bool = True


class Schedule(Section):
    """How the learning rate falls after warmup: the factor on it at a step."""

    kind: Literal["cosine", "milestone"]
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = []  # shares of the training
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # at every milestone

    @model_validator(mode="after")
    def _milestones_fit(self) -> Schedule:
        if (self.kind == "milestone") != bool(self.milestones):
            raise ValueError("milestones are needed with kind 'milestone', and only with it")
        return self


class Training(Section):
    """Length, batches and schedule."""

    epochs: Count
    batch_size: Count
    schedule: Schedule
    log_every: Count = 25  # steps
    checkpoint_every: Positive = 20.0  # seconds; the end of an epoch always is one


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
    model: Model
    data: Data
    train: Training
    name: str  # of the optimizer in the recipe
    optimizer: Optimizer
    seed: int


class Recipe(Section):
    """One experiment: a task, and the optimizers and seeds to train it with."""

    task: str
    seeds: Annotated[list[int], Field(min_length=1)]
    model: Model
    data: Data = Data()
    train: Training
    optimizers: Annotated[dict[str, Optimizer], Field(min_length=1)]
    quick: Quick

    @model_validator(mode="after")
    def _decay_can_be_coupled(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: the same seed twice")
        for name in self.optimizers:
            coupled_decay(name, self.optimizers)
        return self

    def run(self, name: str, seed: int) -> RunSpec:
        """Resolve the run of one optimizer and seed.

        Raises:
            ExperimentError: the recipe has no such optimizer.
        """
        if name not in self.optimizers:
            raise ExperimentError(
                f"no optimizer {name!r} in this recipe; there are {', '.join(self.optimizers)}"
            )
        decay = coupled_decay(name, self.optimizers)
        return RunSpec(
            task=self.task,
            model=self.model,
            data=self.data,
            train=self.train,
            name=name,
            optimizer=self.optimizers[name].model_copy(update={"weight_decay": decay}),
            seed=seed,
        )

    def runs(self, names: list[str] | None = None, seeds: int | None = None) -> list[RunSpec]:
        """Resolve optimizers x seeds, seed by seed, so that an early report has every optimizer.

        Args:
            names: optimizers; None: all.
            seeds: how many seeds; beyond the recipe's own they count on from its largest.

        Raises:
            ExperimentError: the recipe has no such optimizer.
        """
        chosen = list(self.seeds if seeds is None else self.seeds[:seeds])
        while seeds is not None and len(chosen) < seeds:
            chosen.append(max(chosen) + 1)
        return [self.run(name, seed) for seed in chosen for name in names or self.optimizers]

    def quickened(self) -> Recipe:
        """Apply the table [quick]."""
        examples = self.quick.train_examples or self.data.train_examples
        return self.model_copy(
            update={
                "seeds": self.seeds[: self.quick.seeds],
                "data": self.data.model_copy(update={"train_examples": examples}),
                "train": self.train.model_copy(update={"epochs": self.quick.epochs}),
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
        location = item["loc"]
        shown = [part for part in location if part not in _TAGS]
        if "optimizers" in shown[:1]:
            del shown[2:3]  # optimizers.<name>.<method>.<key>: the user wrote no method there
        key = ".".join(str(part) for part in shown) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            owner = _section(schema, location[:-1])
            message = "unknown key"
            if owner is not None:
                message += f", allowed are {', '.join(owner.model_fields)}"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] != "value_error" or len(str(item["input"])) < 40:
            message = f"is {item['input']!r}: {message}"
        lines.append(f"{key}: {message}")
    return "; ".join(dict.fromkeys(lines))


_METHODS: dict[str, type[Section]] = {
    "sgd": SGD,
    "adam": Adam,
    "radam": RAdam,
    "apollo": ApolloSettings,
}
# what pydantic adds to a location for the chosen branch of a union
_TAGS = ("EqualStrength", "constrained-float", "float", "int", "none")


def _section(schema: type[Section], location: tuple[int | str, ...]) -> type[Section] | None:
    """The table at a location: of an optimizer, the one that its method names."""
    if location and location[0] == "optimizers":
        # optimizers.<name>.<method>[.<field>.<branch>]
        if "EqualStrength" in location:
            return EqualStrength
        return _METHODS.get(str(location[2])) if len(location) > 2 else None
    for part in location:
        field = schema.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if not inner:
            return None
        schema = inner[0]
    return schema
