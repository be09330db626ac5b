"""The files of a report: HTML page, Markdown, CSV and figures."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import jinja2
from rich.console import Console

from apollo_bench.atomic_write import write_atomically
from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.optimizers.plot_style import style_of
from apollo_bench.report import figures, narrative, overview, tables
from apollo_bench.report.figure_axes import FigureFile
from apollo_bench.report.overview import Overview
from apollo_bench.report.summary import Row, Summary, collect


def write(
    paths: list[Path],
    out: Path,
    target: float | None = None,
    warn: Callable[[str], None] = lambda _: None,
    only: str | None = None,
) -> list[Summary]:
    """Write report.html, results.md, results.csv and the figures (PNG, SVG) into a folder.

    Example:
        >>> [summary] = write([Path("runs/search")], Path("report"))
        >>> sorted(path.name for path in Path("report").iterdir())
        ['report.html', 'results.csv', 'results.md', 'tuning.png', 'tuning.svg']

    Args:
        paths: as in ``collect``.
        out: folder, created if it is missing; a report that is there is replaced.
        target: as in ``collect``.
        warn: called with a line for each run that is damaged. The report says it too.
        only: as in ``collect``.

    Raises:
        ExperimentError: as in ``collect``.
    """
    left_out: list[str] = []
    summaries = collect(paths, target, left_out.append, only)
    for reason in left_out:
        warn(f"{reason}; this run is left out of the report")
    several = len(summaries) > 1
    pictures = [figures.draw(summary) for summary in summaries]
    first, profiles = overview.overview(summaries), overview.draw(summaries)
    files = {
        "results.csv": tables.as_csv(summaries).encode(),
        "results.md": _markdown(summaries, first, left_out).encode("utf-8", "replace"),
        "report.html": _page(summaries, pictures, first, profiles, left_out).encode(
            "utf-8", "replace"
        ),
    }
    for summary, drawn in zip(summaries, pictures, strict=True):
        for picture in drawn:
            name = f"{summary.task}_{picture.name}" if several else picture.name
            files[f"{name}.png"], files[f"{name}.svg"] = picture.png, picture.svg
    for picture in profiles:
        files[f"{picture.name}.png"], files[f"{picture.name}.svg"] = picture.png, picture.svg
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    return summaries


def show(summaries: list[Summary], console: Console) -> None:
    """Print the tables and the headline."""
    for summary in summaries:
        if len(summaries) > 1:
            console.print(f"\n[bold]{summary.task}[/bold]")
        for table in tables.tables(summary):
            if sum(column.on_console for column in table.columns) > 1:
                console.print(tables.for_console(table))
        console.print(narrative.headline(summary), highlight=False, markup=False)
    if (first := overview.overview(summaries)) is not None:
        console.print(tables.for_console(first.table))


def _markdown(summaries: list[Summary], first: Overview | None, left_out: list[str]) -> str:
    parts = [f"Left out, because it is damaged: {reason}\n" for reason in left_out]
    if first is not None:
        parts += [tables.as_markdown(first.table), *first.notes, ""]
    for summary in summaries:
        if len(summaries) > 1:
            parts.append(f"## {summary.task}\n")
        parts += [tables.as_markdown(table) for table in tables.tables(summary)]
        parts += [narrative.headline(summary), "", *narrative.notes(summary), ""]
    return "\n".join(parts)


def _page(
    summaries: list[Summary],
    pictures: list[list[FigureFile]],
    first: Overview | None,
    profiles: list[FigureFile],
    left_out: list[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["color"] = lambda name: style_of(name).color
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    return environment.get_template("report.html").render(
        tasks=[
            {
                "name": summary.task,
                "finding": narrative.headline(summary),
                "tables": tables.tables(summary),
                "notes": narrative.notes(summary),
                "pictures": drawn,
                "metric": summary.metric,
                "runs": summary.runs,
                "settings": [(_label(row), _settings(row)) for row in summary.rows],
            }
            for summary, drawn in zip(summaries, pictures, strict=True)
        ],
        overview=first,
        profiles=profiles,
        left_out=left_out,
    )


def _label(row: Row) -> str:
    point = [] if row.point is None else [str(row.point)]
    return " ".join([row.label, row.schedule, *point])


def _settings(row: Row) -> str:
    own = row.runs[0].spec.optimizer
    settings = own.model_dump(exclude={"method"}, exclude_none=isinstance(own, CustomSettings))
    return ", ".join(
        f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}"
        for key, value in settings.items()
    )
