"""The comparison of training lengths: its pieces, and the settings that the searches chose.

``python scripts/lengths.py status`` lists the pieces that are measured and those that are missing.
``python scripts/lengths.py chosen TASK LENGTH`` prints the options that give ``compare`` the best
settings of the search: the better one of each optimizer's two warmups, and its learning rate.
``chosen TASK LENGTH apollo`` prints the options of ``train`` for one optimizer.
"""

from __future__ import annotations

import fractions
import functools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from apollo_bench.config import recipe
from apollo_bench.config.equal_strength import scale_lr
from apollo_bench.config.recipe import Recipe, RunSpec
from apollo_bench.optimizers.plot_style import style_of
from apollo_bench.report.figure_axes import mark_empty
from apollo_bench.report.statistics import Difference, difference, number_text
from apollo_bench.runs import loading
from apollo_bench.runs.archive import RUNS
from apollo_bench.search.best_trials import best_trial, mean_score
from apollo_bench.search.trials import make_trials
from apollo_bench.workloads.tasks import TASKS as FAMILIES
from apollo_bench.workloads.workload import Metric

RESULTS = Path(__file__).resolve().parent.parent / "results"
TASKS = {"multi30k": "Translation", "cifar10": "Images", "wordnet": "Language"}
LENGTHS = {
    "16th": "length 1/16",
    "quarter": "length 1/4",
    "whole": "length 1",
    "lower": "length 1, better of two rates",
    "all": "all images",
}
SEARCHED = {  # length of the search
    "16th": "16th",
    "quarter": "quarter",
    "whole": "quarter",
    "lower": "quarter",
    "all": "quarter",
}
ARCHIVES = {  # the archives of a length
    "16th": ("tuning", "comparison", "curvature"),
    "quarter": ("tuning", "comparison", "curvature", "rates", "still"),
    "whole": ("comparison", "curvature"),
    "lower": ("comparison",),
    "all": ("comparison", "curvature"),
}
STILL = ["schedules.milestone.factor=1e-6"]  # holds the weights still from a milestone on
RECIPES = {"lower": "whole"}  # the recipe of a length, if it is another's
OTHER_WARMUP = "-long-warmup"  # ends the name of the second form of an optimizer
HELD_OUT = 5000  # images, for the search on cifar10
LABELS = {
    "sgd": "SGD, momentum 0.9",
    "adamw": "AdamW",
    "radam": "RAdam",
    "muon": "Muon",
    "apollo": "Apollo",
    "apollow": "ApolloW",
}
OURS = "apollo"


def lengths_of(task: str) -> list[str]:
    """Return the lengths of a task.

    Only images have more data than the whole length uses, and no data that choose between rates.
    """
    other = "lower" if task == "cifar10" else "all"
    return [length for length in LENGTHS if length != other]


def pieces() -> list[str]:
    """Return the names of all archives of the protocol, in the order in which they are shown."""
    return [
        f"{task}/length-{length}-{kind}"
        for task in TASKS
        for length in lengths_of(task)
        for kind in ARCHIVES[length]
    ]


def measured(results: Path = RESULTS) -> list[str]:
    """Return the names of the archives that exist."""
    return [name for name in pieces() if (results / name / RUNS).exists()]


def chosen(task: str, length: str, results: Path = RESULTS, changes: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a length with the best warmup and rate of each optimizer, no others.

    At the length "lower" all rates are divided by the square root of 10, as between two trials.

    Args:
        task: one of TASKS.
        length: one of LENGTHS.
        results: folder of recipes and archives.
        changes: changes of the recipe, as for ``--set``.

    Raises:
        ExperimentError: the search is not finished.
    """
    path = results / task / f"length-{RECIPES.get(length, length)}.toml"
    plan = recipe.load(str(path), list(changes))
    folder = results / task / f"length-{SEARCHED[length]}-tuning"
    runs = loading.load_runs([folder])
    sign = 1 if FAMILIES[task].monitored.higher_is_better else -1
    best: dict[str, tuple[float, str, float]] = {}
    for name in plan.optimizers:
        trials = [run for run in runs if run.spec.name == name]
        if trials and all(run.verdict == "diverged" for run in trials):
            continue  # the other warmup remains
        settings = best_trial(trials, f"{folder}: {name}")
        scores = [mean_score([run]) for run in trials if run.spec.optimizer == settings]
        [score] = [sign * score for score in scores if score is not None]
        method = name.removesuffix(OTHER_WARMUP)
        if method not in best or score > best[method][0]:  # at a tie the short warmup
            best[method] = (score, name, settings.lr)
    optimizers = {}
    for _, name, lr in best.values():
        before = plan.run(name, plan.seeds[0]).optimizer
        assert before.lr is not None, f"{name} has no rate to scale"
        if length == "lower":
            lr = float(f"{lr / 10**0.5:.3g}")
        optimizers[name] = scale_lr(before, lr / before.lr).model_copy(update={"lr": lr})
    return plan.model_copy(update={"optimizers": optimizers})


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


def planned(name: str, results: Path = RESULTS) -> list[RunSpec]:
    """Return the runs that an archive must hold.

    Args:
        name: name of the archive, as ``pieces`` returns it.
        results: folder of recipes and archives.

    Raises:
        ExperimentError: the search that decides the settings is missing or not finished.
    """
    task, piece = name.split("/")
    _, length, kind = piece.split("-")
    if kind == "tuning":
        plan = recipe.load(str(results / task / f"length-{length}.toml"))
        plan = plan.model_copy(update={"data": plan.data.holding_out(HELD_OUT)})
        return make_trials(plan, list(plan.optimizers))
    plan = chosen(task, length, results, STILL if kind == "still" else ())
    if kind == "comparison":
        return plan.runs()
    [ours] = [name for name in plan.optimizers if name.removesuffix(OTHER_WARMUP) == OURS]
    if kind == "rates":
        return plan.sweep("lr-robustness", [ours], seeds=1)
    return [plan.run(ours, plan.seeds[0])]


@functools.cache
def archived(path: Path) -> list[loading.Run]:
    """Return the runs of an archive."""
    return loading.load_runs([path])


def runs_of(task: str, length: str, results: Path = RESULTS) -> dict[str, list[loading.Run]]:
    """Return the runs of a comparison by optimizer.

    At the length "lower" these are the runs with the better of two rates, by validation.
    """
    found = by_method(results / f"{task}/length-{length}-comparison")
    if length != "lower":
        return found
    metric = FAMILIES[task].monitored
    sign = 1 if metric.higher_is_better else -1

    def score(runs: list[loading.Run]) -> float:
        values = scores(runs, metric.name).values()
        return sign * statistics.fmean(values) if len(values) == len(runs) else -math.inf

    tuned = runs_of(task, "whole", results)
    return {name: max(tuned[name], found[name], key=score) for name in tuned}


def by_method(path: Path) -> dict[str, list[loading.Run]]:
    """Return the runs of a comparison by optimizer, whichever warmup was chosen."""
    found: dict[str, list[loading.Run]] = {}
    for run in archived(path):
        found.setdefault(run.spec.name.removesuffix(OTHER_WARMUP), []).append(run)
    return found


def scores(runs: list[loading.Run], metric: str) -> dict[int, float]:
    """Return the metric of the finished runs by seed."""
    values = {run.spec.seed: run.final(metric) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None}


def tables(task: str, results: Path = RESULTS) -> Iterator[str]:
    """Yield the lines of two tables: the metric by length, and Apollo's lead by length.

    Args:
        task: one of TASKS.
        results: folder of the archives.
    """
    metric = FAMILIES[task].final
    comparisons = {length: f"{task}/length-{length}-comparison" for length in lengths_of(task)}
    there = [length for length in comparisons if comparisons[length] in measured(results)]
    missing = [LENGTHS[length] for length in comparisons if length not in there]
    found = {length: runs_of(task, length, results) for length in there}
    if there:
        head = " | ".join(LENGTHS[length] for length in there)
        yield f"| {metric.title} | {head} |"
        yield "|---" * (len(there) + 1) + "|"
        methods = [name for name in LABELS if any(name in runs for runs in found.values())]
        for name in methods:
            cells = [
                _score(
                    found[length].get(name, []),
                    metric.name,
                    tried(task, length, name, results),
                )
                for length in there
            ]
            yield f"| {LABELS[name]} | {' | '.join(cells)} |"
        yield ""
        shown = [metric]
        if FAMILIES[task].monitored.higher_is_better is not metric.higher_is_better:
            shown.append(FAMILIES[task].monitored)  # perplexity says other things than BLEU
        for each in shown:
            yield f"| Apollo's lead in {each.title} over | {head} |"
            yield "|---" * (len(there) + 1) + "|"
            for name in methods:
                if name != OURS:
                    cells = [_lead(lead(task, length, name, each, results)) for length in there]
                    yield f"| {LABELS[name]} | {' | '.join(cells)} |"
            yield ""
    if missing:
        yield f"Not measured yet: {task}, {'; '.join(missing)}."


def tried(task: str, length: str, method: str, results: Path = RESULTS) -> list[float]:
    """Return the rates that were tried for an optimizer at a length, in ascending order."""
    folders = [f"length-{SEARCHED[length]}-tuning"]
    folders += ["length-lower-comparison"] if length == "lower" else []
    found = [by_method(results / task / folder).get(method, []) for folder in folders]
    rates = {run.spec.optimizer.lr for runs in found for run in runs}
    return sorted(lr for lr in rates if lr is not None)


def _score(runs: list[loading.Run], metric: str, rates: list[float]) -> str:
    if not runs:
        return "-"
    values = list(scores(runs, metric).values())
    warmup = "20 %" if runs[0].spec.name.endswith(OTHER_WARMUP) else "2 %"
    lost = sum(run.verdict == "diverged" for run in runs)
    text = f"{statistics.fmean(values):.2f}" if values else "-"
    text += f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    text += f", {lost} of {len(runs)} diverged" if lost else ""
    lr = runs[0].spec.optimizer.lr
    end = ", the smallest tried" if lr in rates[:1] else ""
    end = ", the largest tried" if lr in rates[-1:] else end
    return f"{text} (lr {lr:.3g}{end}, warmup {warmup})"


def lead(
    task: str, length: str, method: str, metric: Metric, results: Path = RESULTS
) -> Difference | None:
    """Return Apollo's lead over a method at a length that is measured; > 0 if Apollo is better."""
    found = runs_of(task, length, results)
    ours, other = (scores(found.get(name, []), metric.name) for name in (OURS, method))
    return difference(ours, other) if metric.higher_is_better else difference(other, ours)


def _lead(found: Difference | None) -> str:
    if found is None or found.low is None or found.high is None:
        return "-"
    verdict = "ahead" if found.is_lead else "behind" if found.high < 0 else "undecided"
    return f"{found.text(2)}, {verdict}"


def _tick(length: str) -> str:
    return length.partition(",")[0].removeprefix("length ").replace(" ", "\n")


def drawn_lengths(task: str, results: Path = RESULTS) -> list[str]:
    """Return the lengths on the figure's axis; the whole one has the better rates if measured."""
    better = f"{task}/length-lower-comparison" in measured(results)
    return [x for x in lengths_of(task) if x != ("whole" if better else "lower")]


def figure(results: Path = RESULTS) -> Figure:
    """Draw Apollo's lead over each other optimizer against the length, one panel per task."""
    drawn = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = drawn.subplots(1, len(TASKS))
    for axes, task in zip(panels, TASKS, strict=True):
        places = drawn_lengths(task, results)
        there = [x for x in places if f"{task}/length-{x}-comparison" in measured(results)]
        metric = FAMILIES[task].final
        others = [name for name in LABELS if name not in (OURS, "apollow")]
        for place, method in enumerate(others):
            found = {length: lead(task, length, method, metric, results) for length in there}
            points = [
                (places.index(length) + 0.1 * (place - 1.5), one.mean, one.low, one.high)
                for length, one in found.items()
                if one is not None and one.low is not None and one.high is not None
            ]
            if points:
                x, mean, low, high = zip(*points, strict=True)
                below = [m - at for m, at in zip(mean, low, strict=True)]
                above = [at - m for m, at in zip(mean, high, strict=True)]
                style = style_of(method)
                axes.errorbar(
                    x, mean, yerr=(below, above), color=style.color, marker=style.marker,
                    markersize=5, linewidth=1.2, capsize=3, label=f"over {LABELS[method]}",
                )  # fmt: skip
        axes.axhline(0.0, color="0.5", linewidth=0.8)
        axes.set_xticks(range(len(places)), [_tick(LENGTHS[x]) for x in places])
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.set_xlabel("length of the training")
        axes.set_ylabel(f"Apollo's lead, {metric.title}")
        axes.set_title(TASKS[task])
        if not axes.containers:
            mark_empty(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, frameon=False, ncols=len(LABELS), loc="outside lower center")
    return drawn


def curvature(results: Path = RESULTS) -> Iterator[str]:
    """Yield the lines of a table of B: Apollo's first run of each comparison."""
    rows = {}
    for name in measured(results):
        if name.endswith("-curvature"):
            task, piece = name.split("/")
            [run] = archived(results / name)
            rows[f"{TASKS[task]}, {LENGTHS[piece.split('-')[1]]}"] = run
    yield from _table_of_curvature(rows)


def rates(results: Path = RESULTS) -> Iterator[str]:
    """Yield the lines of a table of B: Apollo's first run at a quarter, at other rates."""
    rows = {}
    for name in measured(results):
        task = TASKS[name.split("/")[0]]
        if name.endswith("-rates"):
            for run in sorted(archived(results / name), key=lambda run: run.spec.optimizer.lr or 0):
                assert run.spec.sweep is not None
                rows[f"{task}, lr × {run.spec.sweep.value:g}"] = run
        elif name.endswith("-still"):
            [run] = archived(results / name)
            schedule = run.spec.train.schedule
            share = fractions.Fraction(schedule.milestones[0] / schedule.length)
            when = share.limit_denominator(10)
            rows[f"{task}, lr × 1, weights still after {when}"] = run
    yield from _table_of_curvature(rows)


def _table_of_curvature(rows: dict[str, loading.Run]) -> Iterator[str]:
    """Yield the lines of a table: the share of B above sigma at four times, B and the metric."""
    if not rows:
        yield "Not measured yet."
        return
    times = {0.25: "after 1/4", 0.5: "after 1/2", 0.75: "after 3/4", 1.0: "at the end"}
    shares = [f"B above sigma {time} (%)" for time in times.values()]
    ends = ["RMS of B at the end", "mean of B at the end", "B < 0 at the end (%)", "test metric"]
    head = ["run of Apollo", "peak lr", *shares, *ends]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for label, run in rows.items():
        cells = [f"{run.spec.optimizer.lr:.3g}"]
        score = run.final(FAMILIES[run.spec.task].final.name)
        if score is None:
            cells += ["-"] * (len(head) - 3) + [run.verdict]
        else:
            for time in times:
                step = time * run.result["steps"]
                one = min(run.curvature, key=lambda line: abs(line.step - step)).tensors
                cells.append(f"{100 * (1 - one.rectified):.2f}")
            cells += [f"{one.curvature_rms:.2f}", f"{one.curvature_mean:.2f}"]
            cells += [f"{100 * one.negative:.0f}", number_text(score, 2)]
        yield f"| {label} | {' | '.join(cells)} |"


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
