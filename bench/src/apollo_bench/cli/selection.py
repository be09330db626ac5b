"""Select recipe, optimizers and schedules from the options of a command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from apollo_bench.cli import runtime
from apollo_bench.config import recipe
from apollo_bench.config.custom_optimizer import CustomSettings, short_names
from apollo_bench.config.optimizer_settings import METHODS
from apollo_bench.config.recipe import Recipe
from apollo_bench.config.schema import Analysis
from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.workload_settings import CUSTOM_KINDS

if TYPE_CHECKING:
    from apollo_bench.runs.baseline import Baseline
    from apollo_bench.runs.run_directory import Record


class Selection(NamedTuple):
    """A recipe with the optimizers and schedules that are to be trained."""

    recipe: Recipe
    optimizers: list[str] | None  # None: those that the recipe selects
    schedules: list[str]
    baseline: Baseline | None = None  # finished runs that these are compared with


def select(
    task: str,
    settings: list[str] | None,
    optimizers: str | None,
    schedules: str | None,
    quick: bool = False,
    analysis: Analysis | None = None,
    tuned: Path | None = None,
    against: Path | None = None,
    data: Path | None = None,
) -> Selection:
    """Load a recipe and apply the options of the command line.

    Args:
        task: name of a recipe, or its file.
        settings: values of ``--set``.
        optimizers: names, separated by commas: those of the recipe, ``"all"`` of them, a class as
            ``my_module:MyOptimizer``, or a short name as ``adagrad``. None: those that the recipe
            selects.
        schedules: names, separated by commas, or ``"all"``; None: those that the recipe selects.
        quick: whether the table [quick] is applied.
        analysis: the analysis of a sweep; None: a comparison or a single run.
        tuned: folder of a finished search, whose best settings are used.
        data: folder or file of local data; the user's own give the task its name.
        against: folder of finished runs; all of their settings are used except the optimizers'.

    Raises:
        ExperimentError: an option has a wrong value, or the search cannot be used.
    """
    loaded = recipe.load(task)
    tables: dict[str, Any] = {"optimizers": {}}
    if data is not None and loaded.task in CUSTOM_KINDS:
        tables["task"] = name_of_data(data, loaded.task)
    baseline = None
    if against is not None:
        from apollo_bench.runs.baseline import Baseline

        baseline = Baseline(against, tables.get("task", loaded.task), _leave_out)
        if optimizers is None or quick:
            wrong = "--quick cannot be used with it" if quick else "it needs --optimizers"
            raise ExperimentError(f"--against is {str(against)!r}; {wrong}")
        tables |= baseline.tables(loaded)
    texts = _split("--optimizers", optimizers, loaded.optimizers)
    names = None if texts is None else _add_named(texts, loaded, tables["optimizers"])
    chosen = _split("--schedules", schedules, tables.get("schedules", loaded.schedules))
    if baseline is not None:
        chosen = chosen or list(tables["schedules"])
    chosen = chosen or loaded.default_schedules(analysis)
    plan = recipe.load(task, settings or (), names, chosen, quick, tables)
    if tuned is None:
        return Selection(plan, names, chosen, baseline)
    if analysis == "tuning":
        raise ExperimentError(f"--tuned is {str(tuned)!r}; it cannot be used with a search")
    from apollo_bench.search import best_trials

    table = plan.compare if analysis is None else plan.sweeps.get(analysis)
    trained = names or (table.optimizers if table else None) or list(plan.optimizers)
    coupled = analysis == "weight-decay"
    plan = best_trials.apply_best_settings(plan, tuned, trained, chosen, coupled)
    return Selection(plan, names, chosen, baseline)


def _leave_out(reason: str) -> None:
    runtime.echo(f"apollo-bench: {reason}; left out of --against", err=True)


def name_of_data(data: Path, kind: str) -> str:
    """Return a task name for the user's data: the name of their folder or file."""
    name = data.resolve().name
    for ending in (".gz", ".txt"):
        name = name.removesuffix(ending)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-._+")[:40]
    # "own-" is part of the names of run directories, and must not change
    return f"own-{name}" if name in recipe.recipe_names() else name or kind


def data_check(tuned: Path) -> Callable[[dict[str, str]], None]:
    """Return a function that raises ExperimentError for data that a search was not run on."""
    from apollo_bench.search import best_trials

    return partial(best_trials.check_data, tuned)


def search_costs(tuned: Path | None) -> dict[tuple[str, str, str], Record]:
    """Return the cost of a search, as in ``best_trials.search_costs``; nothing without one."""
    if tuned is None:
        return {}
    from apollo_bench.search import best_trials

    return best_trials.search_costs(tuned)


def _split(option: str, value: str | None, known: Iterable[str]) -> list[str] | None:
    if value is None:
        return None
    names: list[str] = []
    for name in (part.strip() for part in value.split(",")):
        names += known if name == "all" else [name]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ExperimentError(f"{option} names none; there are {', '.join(known)}")
    return names


def _add_named(texts: list[str], plan: Recipe, tables: dict[str, Any]) -> list[str]:
    """Return the names of optimizers; add tables for those that the recipe does not have.

    A class is called by its name, or by its whole path if the name is taken.
    """
    by_class = {
        settings.class_path: name
        for name, settings in plan.optimizers.items()
        if isinstance(settings, CustomSettings)
    }
    names: list[str] = []
    for text in texts:
        name = by_class.get(text, text)
        known = {*plan.optimizers, *tables}
        if name not in known and ":" in name:
            name = text.rpartition(":")[2]
            if name.lower() in {other.lower() for other in known}:
                name = text.replace(":", ".").replace(".", "-")
            tables[name] = {"class": text}
        elif name not in known and (name in METHODS or name in short_names()):
            tables[name] = {"method": name}
        names.append(name)
    return names
