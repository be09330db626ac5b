"""Present the results: a table on a terminal, Markdown and bars."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Group
from rich.text import Text

from apollo_bench.console_table import Cell, Column, ConsoleTable, Table
from apollo_bench.optimizers.plot_style import SETTINGS, style_of
from apollo_bench.steptime.candidates import PEER
from apollo_bench.steptime.measurement import SetResult, Timings

HEADINGS = (
    "optimizer",
    "step, ms",
    "quartiles",
    f"/ {PEER}",
    "speedup over the reference",
    "share of a copy's bandwidth",
    "state, bytes per parameter",
    "growth in a step, MB",
    "rounds",
)


def heading(result: SetResult) -> str:
    """Return a description of the set and of the machine's bandwidth."""
    return (
        f"{_size(result)}, {result.parameters:,} parameters; "
        f"a copy moves {result.copy_bandwidth / 1e9:.1f} GB/s"
    )


def _size(result: SetResult) -> str:
    return f"{result.title}: {result.tensors:,} tensor{'s' * (result.tensors != 1)}"


def cells(result: SetResult, timings: Timings) -> list[str]:
    """Return one row of the table."""
    if timings.unavailable is not None:
        return [
            f"{timings.name}: not available, {timings.unavailable}",
            *[""] * (len(HEADINGS) - 1),
        ]
    low, high = timings.quartiles
    faster = result.speedup_over_reference(timings)
    state, peak = timings.state_bytes, timings.peak_bytes
    return [
        timings.name,
        f"{timings.milliseconds:.2f}",
        f"{low:.2f} - {high:.2f}",
        f"{timings.ratio:.2f}",
        "" if faster is None else f"{faster:.1f}",
        _share_of_a_copy(result, timings),
        "" if state is None else f"{state / result.parameters:.2f}",
        "" if peak is None else f"{peak / 1e6:.1f}",
        str(len(timings.times)),
    ]


def _share_of_a_copy(result: SetResult, timings: Timings) -> str:
    """Return the share of a copy's bandwidth.

    It counts the values that the algorithm moves. Where Apollo reads some twice, a second share
    counts these twice.
    """
    share = f"{result.bandwidth(timings) / result.copy_bandwidth:.0%}"
    if not (result.reads_twice and timings.family == "apollo"):
        return share
    more = result.bandwidth(timings, twice=True) / result.copy_bandwidth
    return f"{share} ({more:.0%} at 10 values per parameter)"


def table(result: SetResult) -> Group:
    """Return the table for a terminal; a line below it for each candidate that is not available."""
    measured = [timings for timings in result.taken if timings.unavailable is None]
    rows = [
        [Cell(text, "Apollo" in timings.name) for text in cells(result, timings)]
        for timings in measured
    ]
    shown = ConsoleTable(Table(heading(result), [Column(title) for title in HEADINGS], rows))
    missing = [timings for timings in result.taken if timings.unavailable is not None]
    return Group(shown, *(Text(cells(result, timings)[0]) for timings in missing))


def markdown(results: list[SetResult], about: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    lines = [f"# Step times\n\n`{about['command']}`, {about['machine']}, torch {about['torch']}.\n"]
    for result in results:
        lines += [f"## {heading(result)}\n", f"| {' | '.join(HEADINGS)} |"]
        lines += ["|---" * len(HEADINGS) + "|"]
        lines += [f"| {' | '.join(cells(result, timings))} |" for timings in result.taken]
        lines += [""]
    return "\n".join(lines)


def draw(results: list[SetResult], about: dict[str, Any], kind: str) -> bytes:
    """Draw bars of the step times relative to the reference, with quartiles; one panel per set.

    Args:
        results: results with the times of at least one candidate.
        about: description of the machine, for the title.
        kind: file type, for example ``"png"``.
    """
    shown = [result for result in results if any(timings.times for timings in result.taken)]
    rows = [[timings for timings in result.taken if timings.times] for result in shown]
    with mpl.rc_context({**SETTINGS, "font.size": 10.0}):
        height = sum(0.28 * len(timings) + 0.9 for timings in rows) + 0.5
        figure = Figure(figsize=(9.0, height))
        axes = figure.subplots(
            len(shown), 1, squeeze=False, height_ratios=[len(timings) + 1 for timings in rows]
        )[:, 0]
        for axis, result, timings in zip(axes, shown, rows, strict=True):
            _panel(axis, result, timings)
        axes[-1].set_xlabel(f"step time / {PEER} (logarithmic; whiskers: quartiles)")
        figure.suptitle(about["machine"], fontsize=9.0)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _panel(axis: Any, result: SetResult, rows: list[Timings]) -> None:
    peer = next(timings for timings in rows if timings.name == PEER).milliseconds
    positions = list(range(len(rows)))
    ratios = [timings.ratio for timings in rows]
    low = [r - min(r, t.quartiles[0] / peer) for r, t in zip(ratios, rows, strict=True)]
    high = [max(r, t.quartiles[1] / peer) - r for r, t in zip(ratios, rows, strict=True)]
    axis.barh(
        positions,
        ratios,
        xerr=[low, high],
        color=[style_of(timings.family).color for timings in rows],
        height=0.7,
        error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": "#444444"},
    )
    for position, timings, above in zip(positions, rows, high, strict=True):
        text = f" {timings.ratio:.2f}  ({timings.milliseconds:.2f} ms)"
        axis.text(
            timings.ratio + above,
            position,
            text,
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axis.set_yticks(positions, [timings.name for timings in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xscale("log")
    smallest, largest = min(ratios), max(ratios)
    axis.set_xlim(min(smallest / 1.5, 0.5), largest * 6)
    axis.axvline(1.0, color="#444444", linewidth=1.0)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(visible=False, axis="y")
    axis.set_title(
        f"{_size(result)}, {result.parameters / 1e6:.2f} M parameters",
        loc="left",
        fontsize=10.0,
    )
