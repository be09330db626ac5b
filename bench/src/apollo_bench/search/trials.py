"""The search for each optimizer's settings: what is tried, and what of it is kept.

Every optimizer has the same number of tries, at the same places of its ranges, and is judged on
data that it is not trained on, never on those of a comparison.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from scipy.stats import qmc

from apollo_bench.config.config_errors import describe
from apollo_bench.config.recipe import Recipe, RunSpec, coupled_decay, times_rate
from apollo_bench.config.schema import EqualStrength, Examples, SweepPoint, Tuning
from apollo_bench.errors import ExperimentError
from apollo_bench.runs import loading
from apollo_bench.workloads.tasks import TASKS


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
            if high >= 2 * low:  # three digits are what people write, and distinct enough
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
    try:
        own = type(own).model_validate({**own.model_dump(), **values})
    except ValidationError as error:
        raise ExperimentError(f"tuning.ranges.{name}.{describe(error, type(own))}") from None
    assert recipe.tuning is not None
    return spec.model_copy(
        update={
            "optimizer": own,
            "sweep": SweepPoint(kind="tuning", value=float(number)),
            "ranges": recipe.tuning.ranges[name],
        }
    )


def apply(
    recipe: Recipe,
    folder: Path,
    names: list[str],
    schedules: list[str] | None = None,
    coupled: bool = False,
) -> Recipe:
    """The recipe with the settings of each optimizer's best try.

    The best has the best mean, over the tuning's seeds, of what the task measures on held-out data
    at the end of a run; a try of which a run diverged is never the best.

    Args:
        recipe: of the same task, model, training and training examples.
        folder: of the finished tuning, as of ``reading.find``; other tasks and schedules in it are
            passed over.
        names: optimizers that need one.
        schedules: that will be trained, which must be one; None: those that the recipe compares.
        coupled: decay that is coupled must stay so, for a sweep of it.

    Raises:
        ExperimentError: the tuning is of something else, is not finished, misses an optimizer, or
            every try of one diverged; decay that was tuned by itself where it must stay coupled.
    """
    wanted = schedules or recipe.default_schedules()
    if len(wanted) != 1:
        raise ExperimentError(
            f"a tuning serves one schedule, asked for are {', '.join(wanted)}; choose one with "
            "--schedules"
        )
    tried = [run for run in _tries_in(folder) if run.spec.task == recipe.task]
    runs = [run for run in tried if run.spec.schedule == wanted[0]]
    if not runs:
        there = ", ".join(dict.fromkeys(f"{r.spec.task} ({r.spec.schedule})" for r in tried))
        raise ExperimentError(
            f"{folder}: no tuning of {recipe.task} with the schedule {wanted[0]}"
            + (f", only of {there}" if there else "")
        )
    for run in runs:
        _check_same(recipe, run.spec, folder)
    names = list(dict.fromkeys([*names, *_references(recipe, names)]))
    chosen = {
        name: best_try([run for run in runs if run.spec.name == name], f"{folder}: {name}")
        for name in names
    }
    made = _with(recipe, chosen)
    for name in names:
        if isinstance(made.optimizers[name].weight_decay, EqualStrength) or not coupled:
            continue
        if isinstance(recipe.optimizers[name].weight_decay, EqualStrength):
            raise ExperimentError(
                f"{folder}: the weight decay of {name} was tuned by itself; a sweep of it needs "
                "one that is coupled"
            )
    return made


def check_data(folder: Path, fingerprints: dict[str, str]) -> None:
    """Raise ExperimentError where a tuning was on other data, by task, than these."""
    for run in _tries_in(folder):
        wanted = fingerprints.get(run.spec.task)
        if wanted not in (None, run.manifest["data"]["fingerprint"]):
            raise ExperimentError(
                f"{folder}: {run.spec.task} was tuned on other data; give the same --data"
            )


def _tries_in(folder: Path) -> list[loading.Run]:
    runs = [run for run in loading.find([folder]) if run.spec.is_try]
    if not runs:
        raise ExperimentError(
            f"{folder}: no tuning in it; `apollo-bench sweep TASK tuning` makes one"
        )
    return runs


def _references(recipe: Recipe, names: list[str]) -> list[str]:
    """The optimizers whose decay that of others is coupled to."""
    decays = [recipe.optimizers[name].weight_decay for name in names if name in recipe.optimizers]
    return [decay.equal_strength_to for decay in decays if isinstance(decay, EqualStrength)]


def best_try(runs: list[loading.Run], origin: str) -> Any:
    """The settings of the best of one optimizer's tries; of equals the first.

    Raises:
        ExperimentError: there is none, one is not finished, or all diverged.
    """
    by_try: dict[float, list[loading.Run]] = {}
    for run in sorted(runs, key=_number):
        by_try.setdefault(_number(run), []).append(run)
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


def _number(run: loading.Run) -> float:
    assert run.spec.sweep is not None
    return run.spec.sweep.value


def score_of(runs: list[loading.Run]) -> float | None:
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


def _with(recipe: Recipe, chosen: dict[str, Any]) -> Recipe:
    """Decay that is coupled stays so where that gives what was tried: a sweep of decay needs it."""
    optimizers = {**recipe.optimizers, **chosen}
    for name, settings in chosen.items():
        own = recipe.optimizers[name].weight_decay
        if not isinstance(own, EqualStrength):
            continue
        coupled = {**optimizers, name: settings.model_copy(update={"weight_decay": own})}
        if math.isclose(coupled_decay(name, coupled), settings.weight_decay):
            optimizers[name] = coupled[name]
    return recipe.model_copy(update={"optimizers": optimizers})
