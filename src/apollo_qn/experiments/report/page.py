"""The files of a report: one page, Markdown, CSV and the pictures."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
from rich.console import Console

from apollo_qn.experiments.files import write_atomically
from apollo_qn.experiments.report import figures, tables, words
from apollo_qn.experiments.report.summary import Summary, collect
from apollo_qn.experiments.styles import style


def write(paths: list[Path], out: Path, target: float | None = None) -> Summary:
    """Write report.html, results.md, results.csv and the figures (PNG, SVG) into a folder.

    Args:
        paths: as of ``collect``.
        out: made where it is missing; a report that is there is replaced.
        target: as of ``collect``.

    Raises:
        ExperimentError: as ``collect`` does.
    """
    summary = collect(paths, target)
    pictures = figures.draw(summary)
    files = {
        "results.csv": tables.as_csv(summary).encode(),
        "results.md": _markdown(summary).encode(),
        "report.html": _page(summary, pictures).encode(),
    }
    for picture in pictures:
        files[f"{picture.name}.png"], files[f"{picture.name}.svg"] = picture.png, picture.svg
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    return summary


def show(summary: Summary, console: Console) -> None:
    """Print the tables and the outcome."""
    for table in tables.tables(summary):
        console.print(tables.for_console(table))
    console.print(words.finding(summary), highlight=False)


def _markdown(summary: Summary) -> str:
    parts = [tables.as_markdown(table) for table in tables.tables(summary)]
    return "\n".join([*parts, words.finding(summary), "", *words.notes(summary), ""])


def _page(summary: Summary, pictures: list[figures.Picture]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["color"] = lambda name: style(name).color
    return environment.get_template("report.html").render(
        task=summary.runs[0].spec.task,
        finding=words.finding(summary),
        tables=tables.tables(summary),
        notes=words.notes(summary),
        pictures=[
            {"caption": picture.caption, "data": base64.b64encode(picture.svg).decode("ascii")}
            for picture in pictures
        ],
        metric=summary.metric,
        runs=summary.runs,
        settings=[
            {
                "label": " ".join(
                    [row.label, row.schedule, *([] if row.point is None else [str(row.point)])]
                ),
                "values": row.runs[0].spec.optimizer.model_dump(exclude={"method"}),
            }
            for row in summary.rows
        ],
    )
