"""What a recipe says about its runs.

A recipe is a TOML file; every number of an experiment stands in one. ``recipes/`` holds ours,
``schema.py`` says what may stand there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from apollo_bench.config.config_errors import describe
from apollo_bench.config.overrides import override
from apollo_bench.config.schema import (
    Analysis,
    Comparison,
    Data,
    EqualStrength,
    Model,
    Optimizer,
    Published,
    Quick,
    Schedule,
    Section,
    SmallImages,
    Steps,
    Sweep,
    SweepKind,
    SweepPoint,
    Training,
    Tuning,
)
from apollo_bench.errors import ExperimentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"


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
    sweep: SweepPoint | None = None  # None: the recipe as it stands
    # of a try: what it was drawn from, as in Tuning
    ranges: dict[str, list[float]] | None = None

    @property
    def is_try(self) -> bool:
        """Whether it is one of a tuning, which never sees the test data."""
        return self.sweep is not None and self.sweep.kind == "tuning"

    @property
    def label(self) -> str:
        """Of all runs of an experiment only this one has it: the name of its directory."""
        point = "" if self.sweep is None else f"-{self.sweep}"
        return f"{self.task}-{self.name}-{self.schedule}{point}-seed{self.seed}"


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
    compare: Comparison = Comparison()
    sweeps: dict[SweepKind, Sweep] = Field(default_factory=dict)
    tuning: Tuning | None = None
    # the paper's results on this task, by schedule and optimizer
    paper: dict[str, dict[str, Published]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _decay_can_be_coupled(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: the same seed twice")
        if self.tuning is not None and self.tuning.seed in self.seeds:
            raise ValueError(
                f"tuning.seed is {self.tuning.seed}, allowed are seeds that no comparison has"
            )
        for name in self.optimizers:
            coupled_decay(name, self.optimizers)
        return self

    @model_validator(mode="after")
    def _quick_has_the_schedules_unit(self) -> Recipe:
        for name, schedule in self.schedules.items():
            if getattr(self.quick, f"{schedule.unit}s") is None:
                raise ValueError(
                    f"quick.{schedule.unit}s is missing: schedules.{name} is in {schedule.unit}s"
                )
        return self

    @model_validator(mode="after")
    def _names_are_there(self) -> Recipe:
        if self.task not in available():
            raise ValueError(f"task is {self.task!r}, allowed are {', '.join(available())}")
        choices: dict[str, Comparison | Sweep] = {"compare": self.compare}
        choices |= {f"sweeps.{kind}": plan for kind, plan in self.sweeps.items()}
        if self.tuning is not None:
            _check_names("tuning.ranges", list(self.tuning.ranges), self.optimizers)
            _check_names("tuning.schedules", self.tuning.schedules, self.schedules)
        for key, plan in choices.items():
            _check_names(f"{key}.optimizers", plan.optimizers, self.optimizers)
            _check_names(f"{key}.schedules", plan.schedules, self.schedules)
        for name, schedule in self.schedules.items():
            there = list(schedule.instead) or None
            _check_names(f"schedules.{name}.instead", there, self.optimizers)
        _check_names("paper", list(self.paper) or None, self.schedules)
        for name, published in self.paper.items():
            _check_names(f"paper.{name}", list(published), self.optimizers)
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
            names: optimizers; None: those of the table [compare].
            seeds: how many seeds; beyond the recipe's own they count on from its largest.
            schedules: None: those of the table [compare].

        Raises:
            ExperimentError: the recipe has no such optimizer or schedule.
        """
        return [
            self.run(name, seed, schedule)
            for seed in self._chosen_seeds(seeds)
            for schedule in schedules or self.default_schedules()
            for name in names or self.compare.optimizers or self.optimizers
        ]

    def sweep(
        self,
        kind: SweepKind,
        names: list[str] | None = None,
        seeds: int | None = None,
        schedules: list[str] | None = None,
    ) -> list[RunSpec]:
        """Resolve an analysis of the paper: its values x optimizers x schedules x seeds.

        Args:
            kind: ``"lr-robustness"`` (section 4.1, figure 2) multiplies learning rates, and divides
                weight decay so that their product stays (eq. 14). ``"weight-decay"`` (appendix C.2,
                figure 4) is the decay of all optimizers that state a number; those that are coupled
                follow.
            names: optimizers; None: the table's.
            seeds: as of ``runs``.
            schedules: None: the table's.

        Raises:
            ExperimentError: the recipe has no such analysis, optimizer or schedule.
        """
        if kind not in self.sweeps:
            raise ExperimentError(
                f"no table [sweeps.{kind}] in this recipe; give it values, as in "
                f"--set sweeps.{kind}.values=[{'0.5, 1, 2' if kind == 'lr-robustness' else '1e-4'}]"
            )
        plan = self.sweeps[kind]
        return [
            self._at(SweepPoint(kind=kind, value=value), name, seed, schedule)
            for seed in self._chosen_seeds(seeds)
            for schedule in schedules or self.default_schedules(kind)
            for value in plan.values
            for name in names or plan.optimizers or self.optimizers
        ]

    def default_schedules(self, kind: Analysis | None = None) -> list[str]:
        """Which schedules an analysis trains if it is not told; None: a comparison."""
        plan: Comparison | Sweep | Tuning | None
        if kind is None:
            plan = self.compare
        else:
            plan = self.tuning if kind == "tuning" else self.sweeps.get(kind)
        return list((plan.schedules if plan else None) or self.schedules)

    def _at(self, point: SweepPoint, name: str, seed: int, schedule: str) -> RunSpec:
        if point.kind == "weight-decay":
            changed = {
                other: settings
                if isinstance(settings.weight_decay, EqualStrength)
                else settings.model_copy(update={"weight_decay": point.value})
                for other, settings in self.optimizers.items()
            }
            spec = self.model_copy(update={"optimizers": changed}).run(name, seed, schedule)
            return spec.model_copy(update={"sweep": point})
        spec = self.run(name, seed, schedule)
        return spec.model_copy(
            update={"sweep": point, "optimizer": times_rate(spec.optimizer, point.value)}
        )

    def _chosen_seeds(self, count: int | None) -> list[int]:
        chosen = list(self.seeds if count is None else self.seeds[:count])
        while count is not None and len(chosen) < count:
            chosen.append(max(chosen) + 1)
        return chosen

    def quickened(self) -> Recipe:
        """Apply the table [quick]."""
        quick = self.quick
        examples = quick.train_examples or self.data.train_examples
        every = quick.evaluate_every or self.train.evaluate_every
        return self.model_copy(
            update={
                "seeds": self.seeds[: quick.seeds],
                "data": self.data.model_copy(update={"train_examples": examples}),
                "train": self.train.model_copy(update={"evaluate_every": every}),
                "schedules": {
                    name: schedule.shortened(getattr(quick, f"{schedule.unit}s"))
                    for name, schedule in self.schedules.items()
                },
            }
        )


def _check_names(key: str, names: list[str] | None, there: Iterable[str]) -> None:
    wrong = [name for name in names or [] if name not in there]
    if wrong or names == []:
        raise ValueError(f"{key} is {names!r}, allowed are some of {', '.join(there)}")


def times_rate(settings: Any, factor: float) -> Any:
    """An optimizer at ``factor`` times its learning rate with a decay of equal strength, eq. (14).

    Where Apollo's warmup begins rises with the rate.
    """
    update = {"lr": settings.lr * factor, "weight_decay": settings.weight_decay / factor}
    if getattr(settings, "warmup_init_lr", None) is not None:
        update["warmup_init_lr"] = settings.warmup_init_lr * factor
    return settings.model_copy(update=update)


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


def load(
    name: str,
    settings: Sequence[str] = (),
    optimizers: list[str] | None = None,
    schedules: list[str] | None = None,
    quick: bool = False,
) -> Recipe:
    """Read a recipe by name, or from a path that ends in ``.toml``.

    Args:
        name: of a recipe that comes with the package, or a path.
        settings: other values, as ``override`` takes them; they go before ``quick``.
        optimizers: which ``optimizer.`` in the settings stands for; None: all.
        schedules: likewise.
        quick: apply the table [quick].

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
    recipe = _validated(table, str(path))
    if quick:
        recipe = recipe.quickened()
    if settings:
        changed = override(recipe.model_dump(), settings, optimizers, schedules)
        recipe = _validated(changed, f"{path} with --set {' --set '.join(settings)}")
    return recipe


def _validated(table: Any, origin: str) -> Recipe:
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise ExperimentError(f"{origin}: {describe(error, Recipe)}") from None
