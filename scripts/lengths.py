"""The comparison of lengths: which pieces there are, and the settings that a search chose.

``python scripts/lengths.py status`` lists the pieces that are measured and those that are missing.
``python scripts/lengths.py chosen TASK LENGTH`` prints the options that give ``compare`` the best
settings of the search: of the two warmups of each optimizer the better one, and its rate.
``chosen TASK LENGTH apollo`` does so for one optimizer, as options of ``train``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from apollo_bench.config import recipe
from apollo_bench.config.recipe import Recipe, times_rate
from apollo_bench.runs import loading
from apollo_bench.runs.archive import RUNS
from apollo_bench.search.trials import best_try, score_of
from apollo_bench.workloads.tasks import TASKS as FAMILIES

RESULTS = Path(__file__).resolve().parent.parent / "results"
TASKS = ("multi30k", "cifar10", "wordnet")
LENGTHS = {"16th": "1/16", "quarter": "1/4", "whole": "1"}
SEARCHED = {"16th": "16th", "quarter": "quarter", "whole": "quarter"}  # at which length
OTHER_WARMUP = "-long-warmup"  # ends the name of the second form of an optimizer


def pieces() -> list[str]:
    """Return the names of all archives of the protocol, in the order in which they are shown."""
    return [
        f"{task}/length-{length}-{kind}"
        for task in TASKS
        for length in LENGTHS
        for kind in ("tuning", "comparison", "curvature")
        if kind != "tuning" or SEARCHED[length] == length
    ]


def measured(results: Path = RESULTS) -> list[str]:
    """Return the names of the archives that exist."""
    return [name for name in pieces() if (results / name / RUNS).exists()]


def chosen(task: str, length: str, results: Path = RESULTS) -> Recipe:
    """Return the recipe of a length with the settings of the best trials, and those forms alone.

    Args:
        task: one of TASKS.
        length: one of LENGTHS.
        results: folder of recipes and archives.

    Raises:
        ExperimentError: the search is not finished, or every trial of an optimizer diverged.
    """
    plan = recipe.load(str(results / task / f"length-{length}.toml"))
    folder = results / task / f"length-{SEARCHED[length]}-tuning"
    runs = loading.find([folder])
    sign = 1 if FAMILIES[task].curve.higher_is_better else -1
    best: dict[str, tuple[float, str, float]] = {}
    for name in plan.optimizers:
        trials = [run for run in runs if run.spec.name == name]
        settings = best_try(trials, f"{folder}: {name}")
        scores = [score_of([run]) for run in trials if run.spec.optimizer == settings]
        [score] = [sign * score for score in scores if score is not None]
        method = name.removesuffix(OTHER_WARMUP)
        if method not in best or score > best[method][0]:  # of equals the short warmup
            best[method] = (score, name, settings.lr)
    optimizers = {
        name: times_rate(plan.run(name, plan.seeds[0]).optimizer, lr / plan.optimizers[name].lr)
        for _, name, lr in best.values()
    }
    schedules = {
        name: schedule.model_copy(
            update={"instead": {k: v for k, v in schedule.instead.items() if k in optimizers}}
        )
        for name, schedule in plan.schedules.items()
    }
    return plan.model_copy(
        update={"optimizers": optimizers, "schedules": schedules, "tuning": None}
    )


def options(plan: Recipe, method: str | None = None) -> list[str]:
    """Return the command-line options that give the original recipe these settings."""
    names = [
        name
        for name in plan.optimizers
        if method is None or name.removesuffix(OTHER_WARMUP) == method
    ]
    made = ["--optimizers" if method is None else "--optimizer", ",".join(names)]
    for name in names:
        own = plan.optimizers[name]
        for key in ("lr", "weight_decay", "warmup_init_lr"):
            value = getattr(own, key, None)
            if value is not None:
                made += ["--set", f"optimizers.{name}.{key}={float(value)!r}"]
    return made


def main(arguments: list[str]) -> int:
    """Run a command of the module's docstring."""
    match arguments:
        case ["status"]:
            there = measured()
            for name in pieces():
                print(f"{'measured' if name in there else 'missing '}  {name}")
        case ["chosen", task, length] if task in TASKS and length in LENGTHS:
            print("\n".join(options(chosen(task, length))))
        case ["chosen", task, length, method] if task in TASKS and length in LENGTHS:
            print("\n".join(options(chosen(task, length), method)))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
