"""Trials: the settings that the search draws from each optimizer's ranges."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError
from scipy.stats import qmc

from apollo_bench.config.config_errors import describe
from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.config.equal_strength import scale_lr
from apollo_bench.config.recipe import Recipe, RunSpec
from apollo_bench.config.schema import SearchSettings, SweepPoint
from apollo_bench.errors import ExperimentError


def make_trials(
    recipe: Recipe,
    names: list[str] | None = None,
    seeds: int | None = None,
    schedules: list[str] | None = None,
) -> list[RunSpec]:
    """Resolve the runs of a search, trial by trial.

    Trials are points of Halton's sequence; in one dimension that is van der Corput's. After 1, 3,
    7, 15, ... trials the logarithms of one setting are evenly spaced, and a longer search continues
    a shorter one. Weight decay without a range of its own follows the learning rate, so that their
    product is unchanged (eq. 14).

    Example:
        >>> from apollo_bench.config import recipe
        >>> ranges = ["search.trials=3", "search.ranges.sgd.lr=[0.1, 10]"]
        >>> [spec.optimizer.lr for spec in make_trials(recipe.load("wordnet", ranges))]
        [1.0, 0.316, 3.16]

    Args:
        recipe: recipe with a table [search].
        names: optimizers; None: all that have ranges.
        seeds: number of seeds, from ``search.seed`` on; None: one.
        schedules: None: those of the table.

    Raises:
        ExperimentError: no such table, no range for an optimizer, a range of a setting that is not
            a number of the optimizer, a value that it does not allow, or images without held-out
            ones.
    """
    plan = recipe.search
    if plan is None:
        raise ExperimentError(
            "no table [search] in this recipe; give it trials and ranges, as in "
            "--set search.trials=7 --set search.ranges.sgd.lr=[0.01, 1]"
        )
    names = list(plan.ranges) if names is None else names
    for name in names:
        if name not in plan.ranges:
            raise ExperimentError(f"search.ranges.{name} is missing, as lr = [0.01, 1]")
    if not (recipe.data.has_validation_split() or recipe.data.held_out):
        raise ExperimentError(
            "a search is judged on images held out of the training data; say how many, as in "
            "--set data.validation=5000"
        )
    points = {name: _sample_settings(recipe, plan, name) for name in names}
    return [
        _make_trial(recipe, name, number, points[name][number - 1], seed, schedule)
        for seed in range(plan.seed, plan.seed + (seeds or 1))
        for schedule in schedules or recipe.default_schedules("tuning")
        for number in range(1, plan.trials + 1)
        for name in names
    ]


def _sample_settings(recipe: Recipe, plan: SearchSettings, name: str) -> list[dict[str, Any]]:
    ranges, settings = plan.ranges[name], recipe.settings(name)
    there = {
        key
        for key, value in settings.model_dump().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if not isinstance(settings, CustomSettings):
        there |= {"weight_decay", "warmup_init_lr"} & type(settings).model_fields.keys()
    elif settings.weight_decay is not None:  # also a coupled one
        there.add("weight_decay")
    for key in ranges:
        if key not in there:
            raise ExperimentError(
                f"search.ranges.{name}.{key}: not a number of this optimizer; there are "
                f"{', '.join(sorted(there))}"
            )
    points = qmc.Halton(len(ranges), scramble=False)
    points.fast_forward(1)  # the first point is the corner
    found = []
    for point in points.random(plan.trials):
        values: dict[str, Any] = {}
        for share, (key, (low, high)) in zip(point.tolist(), ranges.items(), strict=True):
            value = math.exp(math.log(low) + share * math.log(high / low))
            if high >= 2 * low:  # three digits suffice
                value = float(f"{value:.3g}")
            # the default of a class may be 0 where it takes any number
            whole = key in type(settings).model_fields or (
                low == round(low) and high == round(high)
            )
            values[key] = (
                round(value) if isinstance(getattr(settings, key), int) and whole else value
            )
        found.append(values)
    return found


def _make_trial(
    recipe: Recipe, name: str, number: int, values: dict[str, Any], seed: int, schedule: str
) -> RunSpec:
    spec = recipe.run(name, seed, schedule)
    settings = spec.optimizer
    if "lr" in values:
        settings = scale_lr(settings, values["lr"] / settings.lr)
    try:
        settings = type(settings).model_validate({**settings.model_dump(), **values})
    except ValidationError as error:
        raise ExperimentError(f"search.ranges.{name}.{describe(error, type(settings))}") from None
    assert recipe.search is not None
    return spec.model_copy(
        update={
            "optimizer": settings,
            "sweep": SweepPoint(kind="tuning", value=float(number)),
            "ranges": recipe.search.ranges[name],
        }
    )
