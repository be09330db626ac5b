"""The search for each optimizer's settings: what is tried, and what of it is kept.

Every optimizer has the same number of tries, at the same places of its ranges, and is judged on
data that it is not trained on, never on those of a comparison.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import qmc

from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.recipe import Recipe, RunSpec, times_rate
from apollo_qn.experiments.report import reading
from apollo_qn.experiments.schema import EqualStrength, Examples, SweepPoint, Tuning
from apollo_qn.experiments.tasks import TASKS


def tries(
    recipe: Recipe,
    names: list[str] | None = None,
    seeds: int | None = None,
    schedules: list[str] | None = None,
) -> list[RunSpec]:
    """Resolve the runs of a tuning, try by try.

    The tries are points of Halton's sequence, in one dimension van der Corput's: after 1, 3, 7, 15,
    ... tries the logarithms of one setting are evenly spaced, and a longer search goes on where a
    shorter one ended. A learning rate takes the weight decay along, so that their product stays
    (eq. 14), where that has no range of its own.

    Args:
        recipe: with a table [tuning].
        names: optimizers; None: all that have ranges.
        seeds: how many, from ``tuning.seed`` on; None: one.
        schedules: None: the table's.

    Raises:
        ExperimentError: no such table, no range of an optimizer, a range of something that is no
            number of it, a value that it does not allow; images without held-out ones.
    """
    plan = recipe.tuning
    if plan is None:
        raise ExperimentError(
            "no table [tuning] in this recipe; give it tries and ranges, as in "
            "--set tuning.tries=7 --set tuning.ranges.sgd.lr=[0.01, 1]"
        )
    names = list(plan.ranges) if names is None else names
    for name in names:
        if name not in plan.ranges:
            raise ExperimentError(f"tuning.ranges.{name} is missing, as lr = [0.01, 1]")
    if isinstance(recipe.data, Examples) and not recipe.data.validation:
        raise ExperimentError(
            "a tuning is judged on images held out of the training data; say how many, as in "
            "--set data.validation=5000"
        )
    points = {name: _points(recipe, plan, name) for name in names}
    return [
        _try(recipe, name, number, points[name][number - 1], seed, schedule)
        for seed in range(plan.seed, plan.seed + (seeds or 1))
        for schedule in schedules or recipe.default_schedules("tuning")
        for number in range(1, plan.tries + 1)
        for name in names
    ]


def _points(recipe: Recipe, plan: Tuning, name: str) -> list[dict[str, Any]]:
    ranges, own = plan.ranges[name], recipe.optimizers[name]
    for key in ranges:
        there = {k for k, value in own.model_dump().items() if isinstance(value, int | float)}
        there |= {"weight_decay", "warmup_init_lr"} & type(own).model_fields.keys()
        if key not in there:
            raise ExperimentError(
                f"tuning.ranges.{name}.{key}: not a number of this optimizer; there are "
                f"{', '.join(sorted(there))}"
            )
    places = qmc.Halton(len(ranges), scramble=False)
    places.fast_forward(1)  # the first is the corner
    found = []
    for place in places.random(plan.tries):
        values: dict[str, Any] = {}
        for share, (key, (low, high)) in zip(place.tolist(), ranges.items(), strict=True):
            value = math.exp(math.log(low) + share * math.log(high / low))
            # three digits are what people write, and distinct enough
            value = float(f"{value:.3g}")
            values[key] = round(value) if isinstance(getattr(own, key), int) else value
        found.append(values)
    return found


def _try(
    recipe: Recipe, name: str, number: int, values: dict[str, Any], seed: int, schedule: str
) -> RunSpec:
    spec = recipe.run(name, seed, schedule)
    own = spec.optimizer
    if "lr" in values:
        own = times_rate(own, values["lr"] / own.lr)
    changed = {**own.model_dump(), **values}
    try:
        own = type(own).model_validate(changed)
    except ValueError as error:
        told = ", ".join(f"{key} = {value:g}" for key, value in values.items())
        raise ExperimentError(f"tuning.ranges.{name}: {told} is not allowed ({error})") from None
    assert recipe.tuning is not None
    return spec.model_copy(
        update={
            "optimizer": own,
            "sweep": SweepPoint(kind="tuning", value=float(number)),
            "ranges": recipe.tuning.ranges[name],
        }
    )


def apply(
    recipe: Recipe, folder: Path, names: list[str] | None = None, schedules: list[str] | None = None
) -> Recipe:
    """The recipe with the settings of each optimizer's best try.

    The best has the best mean, over the tuning's seeds, of what the task measures on held-out data
    at the end of a run; a try of which a run diverged is never the best.

    Args:
        recipe: of the same task, model, training, schedule and training examples.
        folder: of the finished tuning, as of ``reading.find``.
        names: optimizers that need one; None: those that the recipe compares.
        schedules: that will be trained; there must be one, for which they were tuned.

    Raises:
        ExperimentError: the tuning is of something else, is not finished, misses an optimizer, or
            every try of one diverged.
    """
    runs = [run for run in reading.find([folder]) if run.spec.is_try]
    if not runs:
        raise ExperimentError(f"{folder}: no tuning in it; `apollo-qn sweep TASK tuning` makes one")
    names = names or recipe.compare.optimizers or list(recipe.optimizers)
    wanted = schedules or recipe.default_schedules()
    tuned = list(dict.fromkeys(run.spec.schedule for run in runs))
    if tuned != wanted:
        raise ExperimentError(
            f"{folder}: tuned for the schedule {', '.join(tuned)}, asked for are "
            f"{', '.join(wanted)}; choose one with --schedules"
        )
    _check_same(recipe, runs[0].spec, folder)
    chosen = dict(recipe.optimizers)
    for name in names:
        best = best_try([run for run in runs if run.spec.name == name], f"{folder}: {name}")
        chosen[name] = best
    return _with(recipe, chosen, names, wanted[0])


def best_try(runs: list[reading.Run], origin: str) -> Any:
    """The settings of the best of one optimizer's tries.

    Raises:
        ExperimentError: there is none, one is not finished, or all diverged.
    """
    by_try: dict[float, list[reading.Run]] = {}
    for run in runs:
        assert run.spec.sweep is not None
        by_try.setdefault(run.spec.sweep.value, []).append(run)
    if not by_try:
        raise ExperimentError(f"{origin} was not tuned")
    if any(run.verdict == "unfinished" for run in runs):
        raise ExperimentError(f"{origin} is not finished; the same command goes on with it")
    curve = TASKS[runs[0].spec.task].curve
    scores = {number: score_of(mine) for number, mine in by_try.items()}
    known = {number: score for number, score in scores.items() if score is not None}
    if not known:
        raise ExperimentError(f"{origin}: all tries diverged; give it other ranges")
    best = max(known, key=lambda number: known[number] * (1 if curve.higher_is_better else -1))
    return by_try[best][0].spec.optimizer


def score_of(runs: list[reading.Run]) -> float | None:
    """The mean of a try over its seeds on held-out data; None: a run of it diverged."""
    values = [run.final(TASKS[run.spec.task].curve.name) for run in runs]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _check_same(recipe: Recipe, spec: RunSpec, folder: Path) -> None:
    own = recipe.run(spec.name, spec.seed, spec.schedule)
    held_out = {"validation": getattr(spec.data, "validation", 0)}
    data = own.data.model_copy(update=held_out if isinstance(own.data, Examples) else {})
    for what, one, other in (
        ("task", spec.task, own.task),
        ("model", spec.model, own.model),
        ("data", spec.data, data),
        ("train", _steps(spec), _steps(own)),
    ):
        if one != other:
            raise ExperimentError(f"{folder}: its {what} is another: {one}, asked for is {other}")


def _steps(spec: RunSpec) -> dict[str, Any]:
    """Of its training, what the weights depend on: evaluations are not among it."""
    own = spec.train.model_dump(exclude={"log_every", "checkpoint_every"})
    if spec.train.average_last == 1:
        del own["evaluate_every"]
    return own


def _with(recipe: Recipe, chosen: dict[str, Any], names: list[str], schedule: str) -> Recipe:
    """Decay that is coupled stays so where that gives what was tried: a sweep of decay needs it."""
    coupled = {}
    for name, settings in chosen.items():
        reference = recipe.optimizers[name].weight_decay
        if name in names and isinstance(reference, EqualStrength):
            coupled[name] = settings.model_copy(update={"weight_decay": reference})
        else:
            coupled[name] = settings
    made = recipe.model_copy(update={"optimizers": coupled})
    for name in names:
        tried = chosen[name].weight_decay
        if not math.isclose(float(made.run(name, 0, schedule).optimizer.weight_decay), tried):  # type: ignore[arg-type]
            coupled[name] = chosen[name]
    return recipe.model_copy(update={"optimizers": coupled})
