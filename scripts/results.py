"""Make the tables of results/ and of the pages that show them from the committed metrics.

``python scripts/results.py`` writes the tables. With ``--check`` it names every table that differs
from what the metrics give, and every deviation from the protocol: trials that the recipe does not
ask for, settings that are not those of the best trial, missing seeds, other data.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / "build" / "matplotlib"))

import lengths  # noqa: E402

from apollo_bench.config import recipe  # noqa: E402
from apollo_bench.console_table import Table  # noqa: E402
from apollo_bench.errors import ExperimentError  # noqa: E402
from apollo_bench.report import narrative, page, tables  # noqa: E402
from apollo_bench.report.statistics import SampleStats  # noqa: E402
from apollo_bench.report.summary import ScheduleSection, Summary, collect  # noqa: E402
from apollo_bench.runs.archive import CURVATURE, EVALUATIONS, RUNS  # noqa: E402
from apollo_bench.search import best_trials, trials  # noqa: E402
from apollo_bench.workloads.tasks import TASKS as FAMILIES  # noqa: E402

RESULTS = ROOT / "results"
FIGURES = ROOT / "docs" / "figures"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
TASKS = ("cifar10", "wordnet", "multi30k")
PLANS = {  # the recipes of a task, and the archives of each
    "recipe": ("tuning", "comparison"),
    "forms": ("forms-tuning", "forms-comparison"),
    "warmup": ("warmup-tuning", "warmup-comparison"),
}
SWEEP_SEEDS = 3  # of the sweeps of figures 2 and 4
SINGLE = ("lr-robustness", "weight-decay", "curvature")
ANALYSES = (*PLANS["recipe"], *SINGLE, *PLANS["forms"], *PLANS["warmup"])
KEPT = ("results.md", "results.csv")
SHOWN = {  # the figure of an analysis that the pages show
    "tuning": "tuning",
    "comparison": None,  # the curve of the task's metric
    "forms-tuning": "tuning",
    "forms-comparison": None,
    "warmup-tuning": "tuning",
    "warmup-comparison": None,
    "lr-robustness": "learning_rate",
    "weight-decay": "weight_decay",
    "curvature": "curvature",
    "rates": "curvature",
    "still": "curvature",
}
OMITTED_COLUMNS = (  # by the beginning of their titles
    "weight decay",
    "lead over",
    "fewer updates",
    "in the paper",
    "share of",
    "training",
)
PAPER = {  # the most similar experiment of the paper: recipe, schedule, title
    "cifar10": ("cifar10", "cosine", "CIFAR-10, ResNet-110, 200 epochs: accuracy (%)"),
    "wordnet": ("one-billion-word", "milestone", "One Billion Words, 20 epochs: perplexity"),
    "multi30k": ("wmt14-en-de", "paper", "WMT14, 500,000 updates: BLEU"),
}
OURS = {
    "cifar10": "CIFAR-10 (10,000 images), ResNet-8, 3 epochs: accuracy (%)",
    "wordnet": "WordNet, 400 updates: perplexity",
    "multi30k": "Multi30k, 600 updates: BLEU",
}
ROWS = {  # the names that the recipes give an optimizer
    "SGD, momentum 0.9": ("sgd",),
    "AdamW": ("adam-adj", "adamw"),
    "RAdam": ("radam-adj", "radam"),
    "NAdamW": ("nadamw",),
    "Muon": ("muon",),
    "Apollo": ("apollo",),
    "Apollo, belief": ("apollo-belief",),
    "ApolloW": ("apollow",),
    "ApolloW, belief": ("apollow-belief",),
}
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    errors = [error for name in archives() for error in remake(name, check)]
    for task in TASKS:
        errors += [error for plan in PLANS for error in protocol(task, plan)]
    errors += check_lengths()
    if all((RESULTS / task / "comparison" / RUNS).exists() for task in TASKS):
        errors += [error for path in PAGES for error in blocks(path, check)]
    errors += draw_lengths(check)
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{len(archives())} archives, {'wrong' if errors else 'as the metrics give them'}")
    missing = [name for name in lengths.pieces() if name not in lengths.measured(RESULTS)]
    if missing:
        print(f"not measured yet: {', '.join(missing)}")
    return 1 if errors else 0


def archives() -> list[str]:
    """Return the names of the archives, for example cifar10/tuning."""
    names = [f"{task}/{analysis}" for task in TASKS for analysis in ANALYSES]
    return [name for name in names if (RESULTS / name / RUNS).exists()] + lengths.measured(RESULTS)


def check_lengths() -> Iterator[str]:
    """Yield the errors in the comparison of lengths; missing pieces are no error."""
    data: dict[str, set[str]] = {}
    for name in lengths.measured(RESULTS):
        summary = summary_of(name)
        task = name.split("/")[0]
        try:
            yield from differences(name, summary, lengths.planned(name, RESULTS))
        except ExperimentError as error:
            yield f"{name}: {error}"
        final = FAMILIES[task].final.name
        seen = final != FAMILIES[task].monitored.name and any(
            final in r.result for r in summary.runs
        )
        if name.endswith("-tuning") and seen:
            yield f"{name}: has seen the test data"
        data.setdefault(task, set()).update(
            run.manifest["data"]["fingerprint"] for run in summary.runs
        )
    for task, found in data.items():
        if len(found) > 1:
            yield f"{task}: the lengths were not all trained on the same data"


def draw_lengths(check: bool) -> Iterator[str]:
    """Draw the figure of the leads by length, or yield how its data differ from the committed."""
    data = "\n".join(line for task in lengths.TASKS for line in lengths.tables(task, RESULTS))
    target = FIGURES / "results_lengths.png"
    if not check:
        lengths.figure(RESULTS).savefig(target, metadata={"Software": None}, dpi=150)
    elif not target.exists():
        yield f"{target.relative_to(ROOT)}: missing"
    digest = hashlib.sha256(data.encode()).hexdigest()
    yield from put(RESULTS / "lengths.sha256", f"{digest}  {target.name}\n", check)


@functools.cache
def summary_of(name: str) -> Summary:
    """Return the summary of an archive."""
    [found] = collect([RESULTS / name])
    return found


def remake(name: str, check: bool) -> Iterator[str]:
    """Write the report of an archive, or yield how it differs from the committed one."""
    with tempfile.TemporaryDirectory() as made:
        [summary] = page.write([RESULTS / name], Path(made))
        for file in KEPT:
            content = (Path(made) / file).read_text(encoding="utf-8")
            yield from put(RESULTS / name / file, content, check)
        task, analysis = name.split("/")
        kind = analysis.rpartition("-")[2] if analysis.startswith("length-") else analysis
        source = SHOWN[kind] or summary.curve.label.replace(" ", "_")
        target = FIGURES / f"results_{task}_{analysis}.png"
        # The bytes of a figure depend on the version of matplotlib, so its data are compared.
        drawn = RESULTS / name / "figure.sha256"
        digest = hashlib.sha256((Path(made) / "results.csv").read_bytes())
        for table in (EVALUATIONS, CURVATURE):
            if (RESULTS / name / table).exists():
                digest.update((RESULTS / name / table).read_bytes())
        if f"figures/{target.name}" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8"):
            if not check:
                target.write_bytes((Path(made) / f"{source}.png").read_bytes())
            elif not target.exists():
                yield f"{target.relative_to(ROOT)}: missing"
        yield from put(drawn, f"{digest.hexdigest()}  {target.name}\n", check)


def put(path: Path, content: str, check: bool) -> Iterator[str]:
    """Write a file, or yield how it differs."""
    if not check:
        path.write_text(content, encoding="utf-8")
        return
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if there != content:
        lines = difflib.unified_diff(there.splitlines(), content.splitlines(), lineterm="", n=0)
        message = "\n  ".join([f"{path.relative_to(ROOT)} is not what the metrics give:", *lines])
        yield message


def protocol(task: str, plan: str) -> Iterator[str]:
    """Yield the deviations from the protocol: missing or additional runs, or other data."""
    names = [f"{task}/{analysis}" for analysis in PLANS[plan]]
    there = [(RESULTS / name / RUNS).exists() for name in names]
    if not all(there):
        if any(there) or (RESULTS / task / f"{plan}.toml").exists():
            yield f"results: {' or '.join(names)} is missing"
        return
    search, compared = names
    known = recipe.load(str(RESULTS / task / f"{plan}.toml"))
    searched = summary_of(search)
    size = searched.runs[0].spec.data.held_out
    held_out = known.model_copy(update={"data": known.data.holding_out(size)})
    optimizers = list(known.optimizers)
    yield from differences(search, searched, trials.make_trials(held_out, optimizers))
    final = FAMILIES[task].final.name
    if final != FAMILIES[task].monitored.name and any(final in run.result for run in searched.runs):
        yield f"{search}: has seen the test data"
    made = best_trials.apply_best_settings(known, RESULTS / search, optimizers)
    yield from differences(compared, summary_of(compared), made.runs(optimizers))
    analyses = [*names]
    if plan == "recipe":
        asked = {f"{task}/{kind}": made.sweep(kind, seeds=SWEEP_SEEDS) for kind in made.sweeps}
        asked[f"{task}/curvature"] = [made.run("apollo", made.seeds[0], "cosine")]
        for name, runs in asked.items():
            if (RESULTS / name / RUNS).exists():
                analyses.append(name)
                yield from differences(name, summary_of(name), runs)
            else:
                yield f"results: {name} is missing"
    steps = [run.result["steps"] for run in summary_of(compared).runs]
    every = known.train.evaluate_every
    if every and any(0.75 * count % every for count in steps):
        yield f"{compared}: no evaluation after 75 % of a run, only every {every} updates"
    data = {
        run.manifest["data"]["fingerprint"] for name in analyses for run in summary_of(name).runs
    }
    if len(data) > 1:
        yield f"{', '.join(analyses)}: not all trained on the same data"
    if len(made.seeds) < 5 or known.search is None or known.search.seed in made.seeds:
        yield f"{compared}: needs five seeds that no trial had"


def differences(name: str, summary: Summary, wanted: list[recipe.RunSpec]) -> Iterator[str]:
    """Yield the runs of an archive that are missing, additional or have other settings.

    The interval of evaluations may differ.
    """

    def bare(spec: recipe.RunSpec) -> dict[str, Any]:
        return spec.model_copy(
            update={"train": spec.train.model_copy(update={"evaluate_every": None})}
        ).model_dump()

    there = {run.spec.label: bare(run.spec) for run in summary.runs}
    asked = {spec.label: bare(spec) for spec in wanted}
    for label in asked.keys() | there.keys():
        if label not in there:
            yield f"{name}: {label} is missing"
        elif label not in asked:
            yield f"{name}: {label} is none of the protocol's"
        elif there[label] != asked[label]:
            yield f"{name}: {label} has other settings than the protocol's"


def blocks(path: Path, check: bool) -> Iterator[str]:
    """Write the marked blocks of a page, or yield how they differ."""
    text = path.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        yield f"{path.relative_to(ROOT)}: has no block of results"
    made = _BLOCK.sub(lambda found: f"{found[1]}\n{block(found[2])}\n{found[3]}", text)
    yield from put(path, made, check)


def block(name: str) -> str:
    """Return the text of a marked block."""
    if name == "overview":
        return overview()
    if name == "paper":
        return beside_the_paper()
    if name == "curvature":
        return curvature()
    if name.startswith("lengths/"):
        task = name.removeprefix("lengths/")
        others = {"curvature": lengths.curvature, "rates": lengths.rates}
        lines = others[task](RESULTS) if task in others else lengths.tables(task, RESULTS)
        return "\n".join(lines).rstrip() + "\n"
    if not (RESULTS / name / RUNS).exists():
        return f"(not measured: {name})\n"
    summary = summary_of(name)
    shown = [narrow(table) for table in tables.tables(summary)]
    if summary.sweep == "tuning":
        shown = shown[:1]
    text = "\n".join(tables.as_markdown(table) for table in shown)
    return f"{text}\n{narrative.headline(summary)}\n"


def narrow(table: Table) -> Table:
    """Return a table without the columns that only the full table in results/ has."""
    kept = [
        place
        for place, column in enumerate(table.columns)
        if not column.title.startswith(OMITTED_COLUMNS)
    ]
    columns = [table.columns[place] for place in kept]
    return Table("", columns, [[row[place] for place in kept] for row in table.rows])


def overview() -> str:
    """Return a table with one row per optimizer and one column per task."""
    found = {task: summary_of(f"{task}/comparison") for task in TASKS}
    lines = [f"| | {' | '.join(OURS[task] for task in TASKS)} |", "|---|---|---|---|"]
    for label, names in ROWS.items():
        cells = [score(found[task].sections[0], names) for task in TASKS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def score(section: ScheduleSection, names: tuple[str, ...]) -> str:
    """Return mean and standard deviation; a winner is bold."""
    for row in section.rows:
        if row.name in names:
            if row.score is None:
                return "diverged"
            text = row.score.text(2)
            text += f" ({row.diverged} of {len(row.runs)} diverged)" if row.diverged else ""
            return f"**{text}**" if row is section.winner else text
    # with hardly any weight decay, ApolloW and Apollo are the same
    if names[0].startswith("apollow"):
        return f"as {names[0].replace('apollow', 'Apollo').replace('-', ', ')}"
    return tables.NOTHING


def beside_the_paper() -> str:
    """Return a table of our results and the paper's, task by task."""
    titles = [title for task in TASKS for title in (OURS[task], f"the paper: {PAPER[task][2]}")]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    sections = {task: summary_of(f"{task}/comparison").sections[0] for task in TASKS}
    for label in ("SGD, momentum 0.9", "AdamW", "RAdam", "Apollo"):
        cells = []
        for task in TASKS:
            cells += [score(sections[task], ROWS[label]), published(task, ROWS[label])]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curvature() -> str:
    """Return the table of the share of elements below sigma, where Apollo steps as SGD does.

    It has one row per task, with the share at three times of the first seed's run.
    """
    times = {"after the warmup": 0.1, "half-way": 0.5, "at the end": 1.0}
    titles = [f"elements below sigma {time} (%)" for time in times]
    lines = [f"| | {' | '.join(titles)} | RMS of B at the end | B < 0 at the end (%) |"]
    lines.append("|---" * (len(times) + 3) + "|")
    for task in TASKS:
        name = f"{task}/curvature"
        if not (RESULTS / name / RUNS).exists():
            continue
        [run] = summary_of(name).runs
        steps = run.result["steps"]
        found = [
            min(run.curvature, key=lambda one: abs(one.step - share * steps)).tensors
            for share in times.values()
        ]
        cells = [f"{100 * tensors.rectified:.2f}" for tensors in found]
        cells += [f"{found[-1].curvature_rms:.2f}", f"{100 * found[-1].negative:.0f}"]
        lines.append(f"| {OURS[task].partition(':')[0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def published(task: str, names: tuple[str, ...]) -> str:
    """Return the paper's result for the first of the optimizers that has one, "-" if none."""
    theirs, schedule, _ = PAPER[task]
    numbers = recipe.load(theirs).paper[schedule]
    for name in (*names, "adam" if "adamw" in names else ""):
        if name in numbers:
            return SampleStats(numbers[name].mean, numbers[name].std, 0).text(2)
    return tables.NOTHING


if __name__ == "__main__":
    sys.exit(main())
