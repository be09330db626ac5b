"""Which recipe, optimizers and schedules the options of a command select."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from apollo_bench.config import recipe
from apollo_bench.config.recipe import Recipe
from apollo_bench.config.schema import Analysis
from apollo_bench.errors import ExperimentError


class Selection(NamedTuple):
    """A recipe with the optimizers and schedules that are to be trained."""

    recipe: Recipe
    optimizers: list[str] | None  # None: those that the recipe selects
    schedules: list[str]


def select(
    task: str,
    settings: list[str] | None,
    optimizers: str | None,
    schedules: str | None,
    quick: bool = False,
    analysis: Analysis | None = None,
    tuned: Path | None = None,
) -> Selection:
    """Load a recipe and apply the options of the command line.

    Args:
        task: name of a recipe, or its file.
        settings: values of ``--set``.
        optimizers: names, separated by commas; ``"all"``; None: those that the recipe selects.
        schedules: likewise.
        quick: whether the table [quick] is applied.
        analysis: the analysis of a sweep; None: a comparison or a single run.
        tuned: folder of a finished search, whose best settings are used.

    Raises:
        ExperimentError: an option has a wrong value, or the search cannot be used.
    """
    loaded = recipe.load(task)
    names = _split("--optimizers", optimizers, loaded.optimizers)
    chosen = _split("--schedules", schedules, loaded.schedules)
    chosen = chosen or loaded.default_schedules(analysis)
    plan = recipe.load(task, settings or (), names, chosen, quick)
    if tuned is None:
        return Selection(plan, names, chosen)
    if analysis == "tuning":
        raise ExperimentError(f"--tuned is {str(tuned)!r}; it cannot be used with a search")
    from apollo_bench.search import best_trials

    own = plan.compare if analysis is None else plan.sweeps.get(analysis)
    trained = names or (own.optimizers if own else None) or list(plan.optimizers)
    coupled = analysis == "weight-decay"
    plan = best_trials.apply_best_settings(plan, tuned, trained, chosen, coupled)
    return Selection(plan, names, chosen)


def data_check(tuned: Path | None) -> Callable[[dict[str, str]], None] | None:
    """Return a function that raises ExperimentError for data that a search was not run on."""
    if tuned is None:
        return None
    from apollo_bench.search import best_trials

    return partial(best_trials.check_data, tuned)


def _split(option: str, value: str | None, known: Iterable[str]) -> list[str] | None:
    if value is None:
        return None
    names = list(known) if value == "all" else [name.strip() for name in value.split(",")]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ExperimentError(f"{option} names none; there are {', '.join(known)}")
    return names
