"""Tables, statistics, figures and one page, from finished or running runs."""

from __future__ import annotations

import base64
import csv
import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from apollo_qn.experiments import figures
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.recipe import RunSpec
from apollo_qn.experiments.runs import Record, RunDirectory

LABELS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adam-adj": "Adam-adj",
    "radam": "RAdam",
    "radam-adj": "RAdam-adj",
    "apollo": "Apollo",
}


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    directory: RunDirectory
    spec: RunSpec
    manifest: Record
    verdict: str  # "finished", "diverged" or "unfinished"
    epochs: list[Record]  # the epoch lines of the metrics
    seconds: float  # of training so far

    @property
    def finished(self) -> bool:
        """Trained to its end."""
        return self.verdict == "finished"

    @property
    def optimizer_ms(self) -> float | None:
        """Median over the epochs of the median time of an optimizer step, in milliseconds."""
        times = [line["time"]["optimizer_ms"] for line in self.epochs]
        return statistics.median(times) if times else None

    def final(self, name: str) -> float | None:
        """A metric after the last epoch of a finished run; None: it has none."""
        if not self.finished or not self.epochs:
            return None
        value: float | None = self.epochs[-1].get(name)
        return value


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some values."""

    mean: float
    std: float | None  # of one value there is none
    count: int

    def text(self, digits: int) -> str:
        """As 87.12 ± 0.34."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{digits}f}"


def spread(values: list[float | None]) -> Spread | None:
    """Summarise the values that there are; None: there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), std, len(known))


@dataclass(frozen=True)
class Row:
    """One optimizer, over its seeds."""

    name: str
    runs: list[Run]
    accuracy: Spread | None  # percent
    train_loss: Spread | None
    seconds: Spread | None
    optimizer_ms: Spread | None

    @property
    def label(self) -> str:
        """The optimizer's name as people write it."""
        return LABELS.get(self.name, self.name)

    @property
    def remark(self) -> str:
        """How many runs the numbers stand for, where it is not all of them."""
        parts = []
        for verdict in ("diverged", "unfinished"):
            count = sum(run.verdict == verdict for run in self.runs)
            if count:
                parts.append(f"{count} {verdict}")
        done = sum(run.finished for run in self.runs)
        return ", ".join([f"{done} of {len(self.runs)} finished", *parts] if parts else [str(done)])

    def cells(self) -> list[str]:
        """The row of the table, in the order of ``TITLES``."""
        return [
            self.label,
            f"{self.runs[0].spec.optimizer.lr:g}",
            f"{self.runs[0].spec.optimizer.weight_decay:g}",
            self.accuracy.text(2) if self.accuracy else "-",
            self.train_loss.text(4) if self.train_loss else "-",
            self.seconds.text(1) if self.seconds else "-",
            self.optimizer_ms.text(2) if self.optimizer_ms else "-",
            self.remark,
        ]


TITLES = (
    *("optimizer", "learning rate", "weight decay", "test accuracy (%)", "training loss"),
    *("wall time (s)", "optimizer step (ms)", "runs"),
)
ACCURACY = TITLES.index("test accuracy (%)")


@dataclass(frozen=True)
class Summary:
    """All that a report shows."""

    runs: list[Run]
    rows: list[Row]

    @property
    def evaluated_on(self) -> str:
        """Which images the accuracy was measured on."""
        return "validation" if self.runs[0].spec.data.validation else "test"

    @property
    def best(self) -> Row | None:
        """The optimizer of the highest mean accuracy."""
        rows = [row for row in self.rows if row.accuracy is not None]
        return max(rows, key=lambda row: row.accuracy.mean if row.accuracy else 0.0, default=None)

    def finding(self) -> str:
        """The outcome in words, whoever wins."""
        best = self.best
        if best is None or best.accuracy is None:
            return "No run has finished yet."
        text = f"Highest mean accuracy: {best.label}, {best.accuracy.text(2)} %."
        apollo = next((row for row in self.rows if row.name == "apollo"), None)
        others = [row for row in self.rows if row is not apollo and row.accuracy is not None]
        if apollo is not None and apollo.accuracy is not None and others:
            rival = best
            if best is apollo:
                rival = max(others, key=lambda row: row.accuracy.mean if row.accuracy else 0.0)
            assert rival.accuracy is not None
            gap = apollo.accuracy.mean - rival.accuracy.mean
            side = "above" if gap >= 0 else "below"
            text += f" Apollo is {abs(gap):.2f} points {side} {rival.label}"
            if apollo.accuracy.std is not None and rival.accuracy.std is not None:
                pooled = math.hypot(apollo.accuracy.std, rival.accuracy.std) / math.sqrt(2)
                side = "within" if abs(gap) <= pooled else "more than"
                text += f", {side} the pooled standard deviation over the seeds ({pooled:.2f})"
            text += "."
        if not all(run.finished for run in self.runs):
            text += " Not all runs have finished: see the last column."
        return text


def collect(paths: list[Path]) -> Summary:
    """Read runs.

    Args:
        paths: run directories, or folders with run directories in them or in their ``runs``.

    Raises:
        ExperimentError: there is no run, a run is damaged, or the runs cannot be compared.
    """
    found: dict[Path, RunDirectory] = {}
    for path in paths:
        if not path.is_dir():
            raise ExperimentError(f"{path}: no such folder")
        manifests = [
            manifest
            for pattern in ("run.json", "*/run.json", "runs/*/run.json")
            for manifest in sorted(path.glob(pattern))
        ]
        if not manifests:
            raise ExperimentError(f"{path}: no runs in it; `apollo-qn compare` makes some")
        for manifest in manifests:
            found.setdefault(manifest.parent.resolve(), RunDirectory(manifest.parent))
    runs = [_read(directory) for directory in found.values()]
    _check_comparable(runs)
    known = list(LABELS)
    names = sorted(
        {run.spec.name for run in runs},
        key=lambda name: (known.index(name) if name in known else len(known), name),
    )
    runs.sort(key=lambda run: (names.index(run.spec.name), run.spec.seed))
    rows = []
    for name in names:
        mine = [run for run in runs if run.spec.name == name]
        done = [run for run in mine if run.finished]
        rows.append(
            Row(
                name,
                mine,
                spread([run.final("accuracy") for run in done]),
                spread([run.final("train_loss") for run in done]),
                spread([run.seconds for run in done]),
                spread([run.optimizer_ms for run in done]),
            )
        )
    return Summary(runs, rows)


def _read(directory: RunDirectory) -> Run:
    records = list(directory.records())
    verdict = directory.verdict()
    seconds = records[-1]["time"]["seconds"] if records else 0.0
    return Run(
        directory,
        directory.spec(),
        directory.read(),
        "unfinished" if verdict is None else verdict["verdict"],
        [record for record in records if record["kind"] == "epoch"],
        seconds if verdict is None else verdict["time"]["seconds"],
    )


def _check_comparable(runs: list[Run]) -> None:
    first = runs[0]
    settings: dict[str, Run] = {}
    for run in runs:
        for what in ("task", "model", "data", "train"):
            if getattr(run.spec, what) != getattr(first.spec, what):
                raise ExperimentError(
                    f"{run.directory.path} and {first.directory.path} differ in {what}: "
                    "they cannot stand in one table"
                )
        if run.manifest["data"]["fingerprint"] != first.manifest["data"]["fingerprint"]:
            raise ExperimentError(
                f"{run.directory.path} and {first.directory.path} have seen different data: "
                "they cannot stand in one table"
            )
        same = settings.setdefault(run.spec.name, run)
        if run.spec.optimizer != same.spec.optimizer:
            raise ExperimentError(
                f"{run.directory.path} and {same.directory.path} differ in the settings of "
                f"{run.spec.name}: they cannot stand in one row"
            )


def write(paths: list[Path], out: Path) -> Summary:
    """Write report.html, results.md, results.csv and the figures (PNG) into a folder.

    Args:
        paths: as of ``collect``.
        out: made where it is missing; a report that is there is replaced.

    Raises:
        ExperimentError: as ``collect`` does.
    """
    summary = collect(paths)
    out.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(summary.rows, summary.evaluated_on)
    for picture in pictures:
        (out / f"{picture.name}.png").write_bytes(picture.png)
    (out / "results.csv").write_text(_csv(summary), encoding="utf-8")
    (out / "results.md").write_text(_markdown(summary), encoding="utf-8")
    (out / "report.html").write_text(_page(summary, pictures), encoding="utf-8")
    return summary


def show(summary: Summary, console: Console) -> None:
    """Print the table, as wide as 80 columns take; the highest accuracy is bold."""
    table = Table(pad_edge=False, box=None)
    settings = ("learning rate", "weight decay")  # of these the page tells
    shown = [index for index, title in enumerate(TITLES) if title not in settings]
    for title in (TITLES[index] for index in shown):
        table.add_column(title, justify="left" if title == "optimizer" else "right")
    for row in summary.rows:
        cells = row.cells()
        if row is summary.best:
            cells[ACCURACY] = f"[bold]{cells[ACCURACY]}[/bold]"
        table.add_row(
            *(
                cells[index].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
                for index in shown
            )
        )
    console.print(table)
    console.print(summary.finding(), highlight=False)


def _markdown(summary: Summary) -> str:
    lines = [f"| {' | '.join(TITLES)} |", f"|{'|'.join('---' for _ in TITLES)}|"]
    for row in summary.rows:
        cells = row.cells()
        if row is summary.best:
            cells[ACCURACY] = f"**{cells[ACCURACY]}**"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", summary.finding(), "", *_notes(summary), ""])


def _csv(summary: Summary) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *("optimizer", "seed", "verdict", "epochs"),
            *("accuracy", "train_loss", "seconds", "optimizer_ms"),
        ]
    )
    for run in summary.runs:
        writer.writerow(
            [
                *(run.spec.name, run.spec.seed, run.verdict, len(run.epochs)),
                *(run.final("accuracy"), run.final("train_loss")),
                *(round(run.seconds, 3), run.optimizer_ms),
            ]
        )
    return buffer.getvalue()


def _notes(summary: Summary) -> list[str]:
    """What the numbers stand for."""
    spec = summary.runs[0].spec
    train, data = spec.train, spec.data
    seeds = sorted({run.spec.seed for run in summary.runs})
    examples = f"the first {data.train_examples}" if data.train_examples else "all"
    machines = {run.manifest["machine"]["cpu"]: run.manifest["machine"] for run in summary.runs}
    versions = summary.runs[0].manifest["versions"]
    where = "; ".join(f"{m['cpu']}, {m['cores']} cores" for m in machines.values())
    notes = [
        f"{spec.task}, {examples} training images; {spec.model}; "
        f"{train.epochs} epochs, batch {train.batch_size}, "
        f"{train.schedule.kind} schedule; seeds {', '.join(map(str, seeds))}.",
        f"Mean ± standard deviation over the seeds, after the last epoch, on {summary.evaluated_on}"
        " images. Wall time is that of training and evaluation in one process of several; "
        "optimizer step: the median of optimizer.step() alone.",
        f"Measured on {where}; torch {versions['torch']}, apollo-qn {versions['apollo_qn']}.",
    ]
    if len(machines) > 1:
        notes.append("The runs come from different machines: their times do not compare.")
    return notes


def _page(summary: Summary, pictures: list[figures.Picture]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        task=summary.runs[0].spec.task,
        finding=summary.finding(),
        titles=TITLES,
        rows=[
            {
                "cells": row.cells(),
                "best": row is summary.best,
                "color": figures.style(row.name).color,
            }
            for row in summary.rows
        ],
        accuracy=ACCURACY,
        notes=_notes(summary),
        pictures=[
            {"alt": picture.caption, "data": base64.b64encode(picture.png).decode("ascii")}
            for picture in pictures
        ],
        runs=summary.runs,
        settings={
            row.label: row.runs[0].spec.optimizer.model_dump(exclude={"method"})
            for row in summary.rows
        },
    )
