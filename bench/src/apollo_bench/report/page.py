"""The files of a report: HTML page, Markdown, CSV and figures."""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from rich.console import Console

from apollo_bench.atomic_write import write_atomically
from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.console_table import ConsoleTable, Table, unbroken
from apollo_bench.optimizers.plot_style import style_of
from apollo_bench.report import curves, figures, narrative, overview, tables
from apollo_bench.report.figure_axes import FigureFile
from apollo_bench.report.overview import Overview
from apollo_bench.report.summary import Row, Summary, collect
from apollo_bench.runs.loading import Run


def write(
    paths: list[Path],
    out: Path,
    target: float | None = None,
    warn: Callable[[str], None] = lambda _: None,
    only: str | None = None,
    refresh: float | None = None,
    with_figures: bool = True,
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
        refresh: seconds after which the page loads itself again; None: never.
        with_figures: whether figures for papers are drawn, which takes seconds.

    Raises:
        ExperimentError: as in ``collect``.
    """
    left_out: list[str] = []
    summaries = collect(paths, target, left_out.append, only)
    for reason in left_out:
        warn(f"{reason}; this run is left out of the report")
    pictures = [figures.draw(summary) if with_figures else [] for summary in summaries]
    first = overview.overview(summaries)
    profiles = overview.draw(summaries) if with_figures else []
    files = {
        "results.csv": tables.as_csv(summaries).encode(),
        "results.md": _markdown(summaries, first, left_out).encode("utf-8", "replace"),
        "report.html": _page(summaries, pictures, first, profiles, left_out, out, refresh).encode(
            "utf-8", "replace"
        ),
    }
    for summary, drawn in zip(summaries, pictures, strict=True):
        for picture in drawn:
            name = f"{_prefix(summary, summaries)}{picture.name}"
            files[f"{name}.png"], files[f"{name}.svg"] = picture.png, picture.svg
    for picture in profiles:
        files[f"{picture.name}.png"], files[f"{picture.name}.svg"] = picture.png, picture.svg
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    return summaries


def _prefix(summary: Summary, summaries: list[Summary]) -> str:
    """Return the beginning of the names of a task's figures."""
    return f"{summary.task}_" if len(summaries) > 1 else ""


def show(summaries: list[Summary], console: Console) -> None:
    """Print the tables and the headline."""
    for summary in summaries:
        if len(summaries) > 1:
            console.print(f"\n[bold]{summary.task}[/bold]")
        for table in tables.tables(summary):
            _print(table, console)
        console.print(narrative.headline(summary), highlight=False, markup=False)
    if (first := overview.overview(summaries)) is not None:
        _print(first.table, console)


def _print(table: Table, console: Console) -> None:
    """Print a table, unless it has only names for the console."""
    if sum(column.on_console for column in table.columns) > 1:
        console.print(ConsoleTable(table))


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
    out: Path,
    refresh: float | None,
) -> str:
    drawn: list[list[curves.Figure]] = []  # the figures of every panel
    described = []
    for summary, files in zip(summaries, pictures, strict=True):
        panels = []
        for section, found in zip(summary.sections, curves.panels(summary), strict=True):
            if found:
                heading = f"Schedule {section.schedule}" if len(summary.sections) > 1 else ""
                unit = f"{section.rows[0].runs[0].spec.train.schedule.unit}s"
                panels.append({"number": len(drawn), "heading": heading, "unit": unit})
                drawn.append(found)
        described.append(
            {
                "name": summary.task,
                "finding": narrative.headline(summary),
                "panels": panels,
                "tables": [_split(table) for table in tables.tables(summary)],
                "notes": narrative.notes(summary),
                "pictures": files,
                "prefix": _prefix(summary, summaries),
                "metric": summary.metric,
                "runs": [(run, *_links(run, out)) for run in summary.runs],
                "settings": [(_label(row), _settings(row)) for row in summary.rows],
            }
        )
    overview_panel = len(drawn) if (profile := overview.panel(summaries)) else None
    drawn.append(profile)
    # a name must not close the script element that holds the JSON
    data = json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _environment()
        .get_template("report.html")
        .render(
            tasks=described,
            overview=first,
            overview_panel=overview_panel,
            profiles=profiles,
            left_out=left_out,
            curves=Markup(data),
            bokeh=Markup(_bokeh()),
            refresh=refresh,
            tensorboard=_tensorboard([run for summary in summaries for run in summary.runs], out),
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "color": lambda name: style_of(name).color,
        "dark_color": lambda name: style_of(name).dark,
        "base64": lambda content: base64.b64encode(content).decode("ascii"),
        "unbroken": _unbroken,
        "execution": narrative.describe_execution,
        "command": lambda run: shlex.join(["apollo-bench", *run.manifest["command"][1:]]),
    }
    return environment


def _bokeh() -> str:
    """Return the JavaScript of Bokeh; with it inside, the page needs no network."""
    from bokeh.resources import Resources  # the import takes half a second

    resources = Resources(mode="inline", components=["bokeh", "bokeh-api"], log_level="warn")
    return "\n".join(resources.js_raw)


def _split(table: Table) -> dict[str, Any]:
    """Return the brief table that the page shows, and the full one that a click opens."""
    brief = table.at_once()
    shown = len(brief.columns)
    return {
        "heading": table.heading,
        "brief": brief if shown > 1 else None,
        "all": table if shown < len(table.columns) else None,
    }


def _unbroken(text: str) -> str:
    """Return a cell's text with a possible line break before an interval only."""
    space = "\N{NO-BREAK SPACE}"
    return unbroken(text).replace(", +", f",{space}+").replace(", -", f",{space}-")


def _links(run: Run, out: Path) -> tuple[str | None, str | None]:
    """Return the addresses of a run's directory and of its events, from the report's folder."""
    return _link(run.path, out), _link(run.path / "tensorboard", out)


def _link(path: Path, out: Path) -> str | None:
    return quote(os.path.relpath(path, out)) if path.is_dir() else None


def _tensorboard(runs: list[Run], out: Path) -> str | None:
    """Return the command that shows all runs, in the report's folder; None without events."""
    folders = [run.path.parent for run in runs if (run.path / "tensorboard").is_dir()]
    if not folders:
        return None
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return shlex.join(["tensorboard", "--logdir", os.path.relpath(common, out)])


def _label(row: Row) -> str:
    point = [] if row.point is None else [str(row.point)]
    return " ".join([row.label, row.schedule, *point])


def _settings(row: Row) -> str:
    optimizer = row.runs[0].spec.optimizer
    settings = optimizer.model_dump(
        exclude={"method"}, exclude_none=isinstance(optimizer, CustomSettings)
    )
    return ", ".join(
        f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}"
        for key, value in settings.items()
    )
