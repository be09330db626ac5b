"""Selection of the best trial per optimizer, and a recipe with its settings."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from apollo_bench.config.equal_strength import coupled_decay
from apollo_bench.config.recipe import Recipe, RunSpec
from apollo_bench.config_section import EqualStrength
from apollo_bench.errors import ExperimentError
from apollo_bench.runs import loading
from apollo_bench.runs.run_directory import Record, differences
from apollo_bench.workloads.tasks import entry_of


def apply_best_settings(
    recipe: Recipe,
    folder: Path,
    names: list[str],
    schedules: list[str] | None = None,
    coupled: bool = False,
) -> Recipe:
    """Return the recipe with the settings of each optimizer's best trial.

    The best trial has the best mean, over the search's seeds, of the metric on held-out data at the
    end of a run. A trial with a diverged run is never the best.

    Example:
        >>> from apollo_bench.config.recipe import load
        >>> best = apply_best_settings(load("recipe.toml"), Path("runs/search"), ["sgd"])
        >>> 0.1 < best.optimizers["sgd"].lr < 100.0
        True

    Args:
        recipe: recipe of the same task, model, training and training examples.
        folder: folder of the finished search, as in ``load_runs``; other tasks and schedules in it
            are ignored.
        names: optimizers whose settings are wanted.
        schedules: schedules that will be trained, exactly one; None: those that the recipe
            compares.
        coupled: whether coupled decay must stay coupled, for a sweep of the decay.

    Raises:
        ExperimentError: the search is of another experiment, is unfinished, lacks an optimizer, or
            every trial of one diverged; or decay was tuned on its own although it must stay
            coupled.
    """
    wanted = schedules or recipe.default_schedules()
    if len(wanted) != 1:
        raise ExperimentError(
            f"a search covers one schedule, {', '.join(wanted)} are asked for; choose one with "
            "--schedules"
        )
    trials = [run for run in _load_trials(folder) if run.spec.task == recipe.task]
    runs = [run for run in trials if run.spec.schedule == wanted[0]]
    if not runs:
        there = ", ".join(dict.fromkeys(f"{r.spec.task} ({r.spec.schedule})" for r in trials))
        raise ExperimentError(
            f"{folder}: no search of {recipe.task} with the schedule {wanted[0]}"
            + (f", only of {there}" if there else "")
        )
    names = list(dict.fromkeys([*names, *_references(recipe, names)]))
    for run in runs:
        if run.spec.name in names:  # the search may cover more optimizers than this recipe
            _check_same(recipe, run.spec, folder)
    chosen = {
        name: best_trial([run for run in runs if run.spec.name == name], f"{folder}: {name}")
        for name in names
    }
    made = _with_settings(recipe, chosen)
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
    """Raise ExperimentError if a search used other data, by task, than these.

    Args:
        folder: folder of a finished search.
        fingerprints: fingerprint of the data of each task.
    """
    for run in _load_trials(folder):
        wanted = fingerprints.get(run.spec.task)
        if wanted not in (None, run.manifest["data"]["fingerprint"]):
            raise ExperimentError(
                f"{folder}: {run.spec.task} was tuned on other data; give the same --data"
            )


def search_costs(folder: Path) -> dict[tuple[str, str, str], Record]:
    """Return the number of trials and their total seconds, by task, schedule and optimizer.

    Raises:
        ExperimentError: the folder holds no search.
    """
    found: dict[tuple[str, str, str], list[loading.Run]] = {}
    for run in _load_trials(folder):
        found.setdefault((run.spec.task, run.spec.schedule, run.spec.name), []).append(run)
    return {
        key: {
            "trials": len({_number(run) for run in runs}),
            "seconds": round(sum(run.seconds for run in runs), 3),
        }
        for key, runs in found.items()
    }


def _load_trials(folder: Path) -> list[loading.Run]:
    runs = [run for run in loading.load_runs([folder]) if run.spec.is_trial]
    if not runs:
        raise ExperimentError(
            f"{folder}: no search in it; `apollo-bench sweep TASK tuning` makes one"
        )
    return runs


def _references(recipe: Recipe, names: list[str]) -> list[str]:
    """Return the optimizers that the decay of others is coupled to."""
    decays = [recipe.optimizers[name].weight_decay for name in names if name in recipe.optimizers]
    return [decay.equal_strength_to for decay in decays if isinstance(decay, EqualStrength)]


def best_trial(runs: list[loading.Run], origin: str) -> Any:
    """Return the settings of the best trial of one optimizer; of equal trials, the first.

    Args:
        runs: trials of one optimizer.
        origin: beginning of the message of an error.

    Raises:
        ExperimentError: there is no trial, one is unfinished, or all diverged.
    """
    by_trial: dict[float, list[loading.Run]] = {}
    for run in sorted(runs, key=_number):
        by_trial.setdefault(_number(run), []).append(run)
    if not by_trial:
        raise ExperimentError(f"{origin} was not tuned")
    if any(run.verdict == "unfinished" for run in runs):
        raise ExperimentError(f"{origin} is not finished; run the same command to continue")
    metric = entry_of(runs[0].spec).monitored
    scores = {number: mean_score(runs_of_trial) for number, runs_of_trial in by_trial.items()}
    known = {number: score for number, score in scores.items() if score is not None}
    if not known:
        raise ExperimentError(f"{origin}: all trials diverged; give it other ranges")
    best = max(known, key=lambda number: known[number] * (1 if metric.higher_is_better else -1))
    return by_trial[best][0].spec.optimizer


def _number(run: loading.Run) -> float:
    assert run.spec.sweep is not None
    return run.spec.sweep.value


def mean_score(runs: list[loading.Run]) -> float | None:
    """Return the mean score of a trial over its seeds, on held-out data; None if a run diverged."""
    values = [run.final(entry_of(run.spec).monitored.name) for run in runs]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _check_same(recipe: Recipe, spec: RunSpec, folder: Path) -> None:
    expected = recipe.run(spec.name, spec.seed, spec.schedule)
    data = expected.data.holding_out(spec.data.held_out)
    there = {
        "task": spec.task,
        "model": spec.model.model_dump(),
        "data": spec.data.model_dump(),
        "train": _train_settings(spec),
    }
    asked = {
        "task": expected.task,
        "model": expected.model.model_dump(),
        "data": data.model_dump(),
        "train": _train_settings(expected),
    }
    if found := differences(there, asked):
        raise ExperimentError(f"{folder}: the search differs in {', '.join(found)}")


def _train_settings(spec: RunSpec) -> dict[str, Any]:
    """Return the settings that the weights depend on; evaluations are not among them."""
    settings = spec.without_others().train.model_dump(exclude={"log_every", "checkpoint_every"})
    if spec.train.average_checkpoints == 1:
        del settings["evaluate_every"]
    return settings


def _with_settings(recipe: Recipe, chosen: dict[str, Any]) -> Recipe:
    """Return the recipe with the chosen settings.

    Coupled decay stays coupled if that gives the value of the trial; a sweep of decay needs it.
    """
    optimizers = {**recipe.optimizers, **chosen}
    for name, settings in chosen.items():
        base_decay = recipe.optimizers[name].weight_decay
        if not isinstance(base_decay, EqualStrength):
            continue
        coupled = {**optimizers, name: settings.model_copy(update={"weight_decay": base_decay})}
        decay = coupled_decay(name, coupled)
        if decay is not None and math.isclose(decay, settings.weight_decay):
            optimizers[name] = coupled[name]
    return recipe.model_copy(update={"optimizers": optimizers})
