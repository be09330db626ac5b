"""Recipes: every number of an experiment, in a TOML file.

``recipes/`` holds ours. ``schema.py`` and ``optimizer_settings.py`` say what a recipe may contain;
[model] and [data] are in the package of each workload.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from apollo_bench.config.config_errors import describe
from apollo_bench.config.custom_optimizer import CustomSettings, apply_defaults
from apollo_bench.config.equal_strength import coupled_decay, scale_lr
from apollo_bench.config.optimizer_settings import OptimizerSettings
from apollo_bench.config.overrides import override
from apollo_bench.config.schema import (
    Analysis,
    CompareSettings,
    LRShape,
    PaperResult,
    QuickSettings,
    RunTrainSettings,
    Schedule,
    SearchSettings,
    SweepKind,
    SweepPoint,
    SweepSettings,
    TrainSettings,
)
from apollo_bench.config_section import ConfigSection, EqualStrength, Name, Seed, check_name
from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import read_regular
from apollo_bench.seeds import MAX_SEED
from apollo_bench.workloads.custom_model import CustomModel, complete_model
from apollo_bench.workloads.workload_settings import CUSTOM_KINDS, DEFAULT_DATA, Data, Model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"


class RunSpec(ConfigSection):
    """The resolved recipe of one run: every number that its result depends on, except the data.

    Example:
        >>> spec = load("wordnet").run("apollo", seed=1)
        >>> spec.label, spec.optimizer.lr, spec.train.batch_size
        ('wordnet-apollo-cosine-seed1', 100.0, 32)
    """

    task: Name
    model: Model
    data: Data
    train: RunTrainSettings
    schedule: Name  # name of the schedule in the recipe
    name: Name  # name of the optimizer in the recipe
    optimizer: OptimizerSettings
    seed: Seed
    sweep: SweepPoint | None = None  # None: the recipe as it stands
    # of a trial: the ranges that its settings were sampled from, as in SearchSettings
    ranges: dict[str, list[float]] | None = None

    @property
    def is_trial(self) -> bool:
        """Whether the run is a trial of a search, which never sees the test data."""
        return self.sweep is not None and self.sweep.kind == "tuning"

    @property
    def label(self) -> str:
        """Name of the run's directory, unique within an experiment."""
        point = "" if self.sweep is None else f"-{self.sweep}"
        return f"{self.task}-{self.name}-{self.schedule}{point}-seed{self.seed}"

    def without_others(self) -> RunSpec:
        """Return the recipe without the schedules of other optimizers."""
        shapes = self.train.schedule.overrides
        return self._with_overrides({k: shape for k, shape in shapes.items() if k == self.name})

    def shared(self) -> dict[str, Any]:
        """Return what runs of different optimizers and seeds have in common in a comparison."""
        kept = {"task", "model", "data", "train"}
        return self._with_overrides({}).model_dump(include=kept)

    def _with_overrides(self, overrides: dict[str, LRShape]) -> RunSpec:
        schedule = self.train.schedule.model_copy(update={"overrides": overrides})
        return self.model_copy(
            update={"train": self.train.model_copy(update={"schedule": schedule})}
        )


class Recipe(ConfigSection):
    """An experiment: a task, and the optimizers, schedules and seeds to train it with.

    ``load`` reads one; its methods resolve the runs of a command.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"tuning": "search"}

    task: Name
    seeds: Annotated[list[Seed], Field(min_length=1)]
    model: Model
    data: Data = DEFAULT_DATA
    train: TrainSettings
    schedules: Annotated[dict[str, Schedule], Field(min_length=1)]
    optimizers: Annotated[dict[str, OptimizerSettings], Field(min_length=1)]
    quick: QuickSettings
    compare: CompareSettings = CompareSettings()
    sweeps: dict[SweepKind, SweepSettings] = Field(default_factory=dict)
    search: SearchSettings | None = None
    # the paper's results on this task, by schedule and optimizer
    paper: dict[str, dict[str, PaperResult]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_safe_names(self) -> Recipe:
        for what, names in (("optimizers", self.optimizers), ("schedules", self.schedules)):
            seen: dict[str, str] = {}
            for name in names:
                check_name(name, what)
                other = seen.setdefault(name.lower(), name)
                if other != name:  # a file system that ignores case would give both one folder
                    raise ValueError(f"{what}: {other!r} and {name!r} differ in case only")
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct, got {self.seeds}")
        if self.search is not None and self.search.seed in self.seeds:
            raise ValueError(
                f"search.seed is {self.search.seed}, allowed are seeds that no comparison has"
            )
        return self

    @model_validator(mode="after")
    def _check_coupled_decay(self) -> Recipe:
        for name in self.optimizers:
            coupled_decay(name, self.optimizers)
        return self

    @model_validator(mode="after")
    def _check_quick_unit(self) -> Recipe:
        for name, schedule in self.schedules.items():
            if getattr(self.quick, f"{schedule.unit}s") is None:
                raise ValueError(
                    f"quick.{schedule.unit}s is missing: schedules.{name} is in {schedule.unit}s"
                )
        return self

    @model_validator(mode="after")
    def _check_references(self) -> Recipe:
        self._check_task()
        choices: dict[str, CompareSettings | SweepSettings] = {"compare": self.compare}
        choices |= {f"sweeps.{kind}": plan for kind, plan in self.sweeps.items()}
        if self.search is not None:
            _check_names("search.ranges", list(self.search.ranges), self.optimizers)
            _check_names("search.schedules", self.search.schedules, self.schedules)
        for key, plan in choices.items():
            _check_names(f"{key}.optimizers", plan.optimizers, self.optimizers)
            _check_names(f"{key}.schedules", plan.schedules, self.schedules)
        for name, schedule in self.schedules.items():
            there = list(schedule.overrides) or None
            _check_names(f"schedules.{name}.overrides", there, self.optimizers)
        _check_names("paper", list(self.paper) or None, self.schedules)
        for name, published in self.paper.items():
            _check_names(f"paper.{name}", list(published), self.optimizers)
        return self

    def _check_task(self) -> None:
        ours = recipe_names()
        if self.data.is_custom:
            if self.task in ours and self.task != self.data.kind:
                raise ValueError(
                    f"task is {self.task!r}: data.kind {self.data.kind!r} is your own data; give "
                    "the task another name"
                )
        elif self.task not in ours or self.task in CUSTOM_KINDS:
            names = ", ".join(name for name in ours if name not in CUSTOM_KINDS)
            raise ValueError(
                f"task is {self.task!r}, allowed are {names}; or any name if data.kind is one of "
                f"{', '.join(CUSTOM_KINDS)}"
            )

    def run(self, name: str, seed: int, schedule: str | None = None) -> RunSpec:
        """Resolve the run of one optimizer, seed and schedule.

        Example:
            >>> load("wordnet").run("apollo", seed=1).train.schedule.length  # updates
            400

        Args:
            name: name of the optimizer.
            seed: seed of the run.
            schedule: name of the schedule; None: the recipe's first.

        Raises:
            ExperimentError: the recipe has no such optimizer or schedule, or a class or factory of
                the user cannot be imported or does not take its settings.
        """
        schedule = next(iter(self.schedules)) if schedule is None else schedule
        for what, asked, there in (
            ("optimizer", name, self.optimizers),
            ("schedule", schedule, self.schedules),
        ):
            if asked not in there:
                more = "; or name a class, as my_module:MyOptimizer" if what == "optimizer" else ""
                raise ExperimentError(
                    f"no {what} {asked!r} in this recipe; there are {', '.join(there)}{more}"
                )
        settings = self.settings(name)
        decay = coupled_decay(name, {**self.optimizers, name: settings})
        model = self.model
        if isinstance(model, CustomModel):
            model = complete_model(model, self.data.model_arguments)
        return RunSpec(
            task=self.task,
            model=model,
            data=self.data,
            train=RunTrainSettings(**self.train.model_dump(), schedule=self.schedules[schedule]),
            schedule=schedule,
            name=name,
            optimizer=settings.model_copy(update={"weight_decay": decay}),
            seed=seed,
        )

    def settings(self, name: str) -> OptimizerSettings:
        """Return the settings of an optimizer; those of a class with the defaults of its signature.

        Raises:
            ExperimentError: the class cannot be imported or does not take the settings.
        """
        settings = self.optimizers[name]
        return (
            apply_defaults(settings, f"optimizers.{name}")
            if isinstance(settings, CustomSettings)
            else settings
        )

    def runs(
        self,
        names: list[str] | None = None,
        seeds: int | None = None,
        schedules: list[str] | None = None,
    ) -> list[RunSpec]:
        """Resolve all runs, sorted by seed, so that an early report has every optimizer.

        Example:
            >>> [spec.label for spec in load("wordnet").runs(["sgd", "apollo"], seeds=1)]
            ['wordnet-sgd-cosine-seed1', 'wordnet-apollo-cosine-seed1']

        Args:
            names: optimizers; None: those of the table [compare].
            seeds: number of seeds; beyond the recipe's own they continue from its largest.
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

        Example:
            >>> plan = load("wordnet")
            >>> [spec.optimizer.lr for spec in plan.sweep("lr-robustness", ["sgd"], seeds=1)]
            [1.0, 5.0, 10.0, 50.0]

        Args:
            kind: ``"lr-robustness"`` (section 4.1, figure 2) multiplies learning rates and divides
                weight decay by the same factor, so that their product is unchanged (eq. 14).
                ``"weight-decay"`` (appendix C.2, figure 4) sets the decay of all optimizers that
                state a number; coupled decay follows.
            names: optimizers; None: those of the table.
            seeds: as in ``runs``.
            schedules: None: those of the table.

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
        """Return the default schedules of an analysis, or of a comparison (None).

        Example:
            >>> load("fashion-mnist").default_schedules()
            ['cosine']
        """
        plan: CompareSettings | SweepSettings | SearchSettings | None
        if kind is None:
            plan = self.compare
        else:
            plan = self.search if kind == "tuning" else self.sweeps.get(kind)
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
            update={"sweep": point, "optimizer": scale_lr(spec.optimizer, point.value)}
        )

    def _chosen_seeds(self, count: int | None) -> list[int]:
        chosen = list(self.seeds if count is None else self.seeds[:count])
        missing = 0 if count is None else count - len(chosen)
        largest = max(chosen)
        if missing > MAX_SEED - largest:
            raise ExperimentError(
                f"--seeds is {count}: {missing} more seeds follow {largest}, the largest of the "
                f"recipe, but seeds end at {MAX_SEED}; give smaller seeds"
            )
        return [*chosen, *range(largest + 1, largest + 1 + missing)]

    def with_quick_settings(self) -> Recipe:
        """Return the recipe with its table [quick] applied."""
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


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package, those for data of the user last."""
    names = (path.stem for path in RECIPES.glob("*.toml"))
    return sorted(names, key=lambda name: (name in CUSTOM_KINDS, name))


def load(
    name: str,
    settings: Sequence[str] = (),
    optimizers: list[str] | None = None,
    schedules: list[str] | None = None,
    quick: bool = False,
    tables: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe by name, or from a path that ends in ``.toml``.

    Example:
        >>> plan = load("wordnet", ["train.batch_size=16", "optimizer.lr=0.1"], ["sgd"])
        >>> plan.train.batch_size, plan.optimizers["sgd"].lr, plan.optimizers["adam"].lr
        (16, 0.1, 0.02)
        >>> load("wordnet", quick=True).schedules["cosine"].length  # updates
        100

    Args:
        name: name of a recipe in the package, or a path.
        settings: overrides, as in ``override``; they are applied after ``quick``.
        optimizers: optimizers that ``optimizer.`` in the settings stands for; None: all.
        schedules: schedules that ``schedule.`` stands for; None: all.
        quick: whether to apply the table [quick].
        tables: tables that replace those of the recipe; optimizers are added to its own.

    Raises:
        ExperimentError: no such recipe, or a key or value that the schema does not allow; the
            message names file, key and what is allowed.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not name.endswith(".toml") and name not in recipe_names():
        raise ExperimentError(
            f"no task {name!r}; there are {', '.join(recipe_names())}, or give a recipe's .toml "
            "file"
        )
    try:
        table = tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not valid TOML: {error}") from None
    recipe = _validated(table, str(path))
    if quick:
        recipe = recipe.with_quick_settings()
    if settings or tables:
        changed = {**recipe.model_dump(), **(tables or {})}
        changed["optimizers"] = {**recipe.model_dump()["optimizers"], **changed["optimizers"]}
        changed = override(changed, settings, optimizers, schedules, Recipe.renamed_keys)
        said = "".join(f" with --set {setting}" for setting in settings)
        recipe = _validated(changed, f"{path}{said}")
    return recipe


def _validated(table: Any, origin: str) -> Recipe:
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise ExperimentError(f"{origin}: {describe(error, Recipe)}") from None
