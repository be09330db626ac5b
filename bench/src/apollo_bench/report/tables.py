"""The tables of a report as cells, and their form in Markdown and in CSV.

Results per run are a pandas table (``run_table``). The tables of a report are not, because a cell
has emphasis and a color, which only pandas' HTML can show. ``DataFrame.to_markdown`` also pads the
columns, so that a longer number would change every line of a committed table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from apollo_bench.console_table import Cell, Column, Table
from apollo_bench.report.run_table import run_table, sampled_settings
from apollo_bench.report.statistics import Difference, SampleStats, number_text, sample_stats
from apollo_bench.report.summary import Row, ScheduleSection, Summary, best_of, winner_of

NOTHING = "-"


def tables(summary: Summary) -> list[Table]:
    """Return the tables of a summary: one or two per schedule.

    Example:
        >>> from pathlib import Path
        >>> from apollo_bench.report.summary import collect
        >>> [summary] = collect([Path("runs/compare")])
        >>> [table] = tables(summary)
        >>> [column.title for column in table.columns][:4]
        ['optimizer', 'learning rate', 'weight decay', 'test perplexity']
        >>> print(as_markdown(table))
        | optimizer | learning rate | ...
    """
    if summary.sweep == "tuning":
        return [
            make(summary, section) for section in summary.sections for make in (_chosen, _trials)
        ]
    make = _comparison if summary.sweep is None else _sweep
    return [make(summary, section) for section in summary.sections]


def _heading(summary: Summary, section: ScheduleSection) -> str:
    several = len(summary.sections) > 1
    return f"Schedule {section.schedule}, {section.length}" if several else ""


def _decay(row: Row) -> str:
    decay = row.runs[0].spec.optimizer.weight_decay
    return NOTHING if decay is None else f"{decay:g}"


def _spread(value: SampleStats | None, digits: int) -> str:
    return NOTHING if value is None else value.text(digits)


def _comparison(summary: Summary, section: ScheduleSection) -> Table:
    target = section.target

    def difference(row: Row, found: Difference | None, digits: int = 2) -> str:
        """Return a difference, with the number of pairs where a run has none."""
        if found is None:
            return NOTHING
        part = "" if found.pairs >= len(row.runs) else f" ({found.pairs} of {len(row.runs)} pairs)"
        return found.text(digits) + part

    def lead(row: Row) -> str:
        return difference(row, section.lead(row))

    def p(row: Row) -> str:
        found = section.lead(row)
        return NOTHING if found is None or found.p is None else f"{found.p:.2g}"

    def published(row: Row) -> str:
        found = summary.published(row)
        return NOTHING if found is None else SampleStats(found.mean, found.std, 0).text(2)

    def over_rival(row: Row) -> str:
        return (
            difference(row, section.lead_over_best_other(row))
            if len(section.apollo_variants) > 1
            else NOTHING
        )

    def reaching(row: Row, field: Literal["updates", "seconds"], digits: int) -> str:
        when = {} if target is None else row.time_to_target(target)
        found = sample_stats(float(getattr(one, field)) for one in when.values())
        if found is None:
            return NOTHING
        count = sum(one.reached for one in when.values())
        if count == len(row.runs):
            return found.text(digits)
        return f"> {found.text(digits)} ({count} of {len(row.runs)})"

    def saved(row: Row) -> str:
        return (
            difference(row, section.updates_saved(row), 0)
            if len(section.apollo_variants) > 1
            else NOTHING
        )

    rival = section.best_other
    columns: list[tuple[Column, Callable[[Row], str]]] = [
        (Column("optimizer"), lambda row: row.label),
        (Column("learning rate", False, False), lambda row: f"{row.runs[0].spec.optimizer.lr:g}"),
        (Column("weight decay", False, False), _decay),
        (Column(summary.metric.title), lambda row: _spread(row.score, 2)),
        (Column("Apollo's lead [95 % interval]", False), lead),
        (Column("p", False, False), p),
        (
            Column(f"lead over {rival.label if rival else NOTHING} [95 % interval]", False, False),
            over_rival,
        ),
        (Column("in the paper", False, False), published),
        (Column("training loss", at_once=False), lambda row: _spread(row.stats("train_loss"), 4)),
        (
            Column(f"updates to {NOTHING if target is None else f'{target:.2f}'}", False, False),
            lambda row: reaching(row, "updates", 0),
        ),
        (
            Column(f"fewer updates than {rival.label if rival else NOTHING} [95 %]", False, False),
            saved,
        ),
        (
            Column(f"time to {NOTHING if target is None else f'{target:.2f}'} (s)", False, False),
            lambda row: reaching(row, "seconds", 1),
        ),
        (Column("wall time (s)", at_once=False), lambda row: _spread(row.stats("seconds"), 1)),
        (
            Column("optimizer step (ms)", at_once=False),
            lambda row: _spread(row.stats("optimizer_ms"), 2),
        ),
        (
            Column("share of a step (%)", False, False),
            lambda row: _spread(row.stats("optimizer_share"), 1),
        ),
        (Column("search for settings", False), lambda row: row.search_cost or NOTHING),
        (Column("runs"), lambda row: row.remark),
    ]
    shown = [
        (column, texts)
        for column, make in columns
        for texts in [[make(row) for row in section.rows]]
        if column.on_console or any(text != NOTHING for text in texts)
    ]
    rows, winner = [], section.winner
    for index, row in enumerate(section.rows):
        cells = [Cell(texts[index]) for _, texts in shown]
        cells[0] = cells[0]._replace(color=row.name)
        score = [column.title for column, _ in shown].index(summary.metric.title)
        cells[score] = cells[score]._replace(best=row is winner)
        rows.append(cells)
    return Table(_heading(summary, section), [column for column, _ in shown], rows)


def _sweep(summary: Summary, section: ScheduleSection) -> Table:
    factor = summary.sweep == "lr-robustness"
    values = sorted({row.point.value for row in section.rows if row.point is not None})
    at = {(row.name, row.point.value): row for row in section.rows if row.point is not None}
    winners = {
        value: winner_of([row for (_, point), row in at.items() if point == value])
        for value in values
    }
    rows = []
    for name in dict.fromkeys(row.name for row in section.rows):
        own_rows = [at.get((name, value)) for value in values]
        there = [row for row in own_rows if row is not None]
        means = [row.score.mean for row in there if row.score is not None]
        cells = [Cell(there[0].label, color=name)]
        for value, row in zip(values, own_rows, strict=True):
            score = None if row is None else row.score
            text = NOTHING if row is None else _outcome(row)
            cells.append(
                Cell(text, row is not None and score is not None and row is winners[value])
            )
        bad = sum(row.diverged > 0 for row in there)
        span = number_text(max(means) - min(means), 2) if means else NOTHING
        # divergence is worse than any number
        cells.append(Cell("diverged" if bad else span))
        runs = [run for row in there for run in row.runs]
        done = sum(run.finished for run in runs)
        diverged = sum(row.diverged for row in there)
        remark = str(done) if done == len(runs) else f"{done} of {len(runs)} finished"
        cells.append(Cell(f"{remark}, {diverged} diverged" if diverged else remark))
        rows.append(cells)
    columns = [Column(f"lr × {value:g}" if factor else f"decay {value:g}") for value in values]
    ends = [Column("best - worst", False), Column("runs")]
    heading = _heading(summary, section)
    metric = summary.metric.title
    title = f"{metric[0].upper()}{metric[1:]}"
    return Table(
        f"{heading}: {metric}" if heading else title,
        [Column("optimizer"), *columns, *ends],
        rows,
    )


def _chosen(summary: Summary, section: ScheduleSection) -> Table:
    """Return the table of the best trials of a search."""
    rows = []
    for name in dict.fromkeys(row.name for row in section.rows):
        own_rows = [row for row in section.rows if row.name == name]
        best = best_of([row for row in own_rows if not row.diverged])
        diverged = sum(row.diverged > 0 for row in own_rows)
        rows.append(
            [
                Cell(own_rows[0].label, color=name),
                Cell(NOTHING if best is None else sampled_settings(best.runs[0].spec)),
                Cell(NOTHING if best is None else _spread(best.score, 2)),
                Cell(
                    ", ".join(
                        f"{key} {a:g} to {b:g}" for key, (a, b) in _ranges(own_rows[0]).items()
                    )
                ),
                Cell("" if best is None else _at_an_end(best, own_rows)),
                Cell(f"{len(own_rows)}, {diverged} diverged" if diverged else str(len(own_rows))),
            ]
        )
    titles = ("optimizer", "chosen", summary.metric.title, "range", "at an end", "trials")
    heading = _heading(summary, section)
    return Table(
        f"{heading}: chosen" if heading else "Chosen",
        [Column(title, *[title not in ("range", "at an end")] * 2) for title in titles],
        rows,
    )


def _trials(summary: Summary, section: ScheduleSection) -> Table:
    """Return the table of all trials, sorted by the first sampled setting."""
    rows = []
    keys = dict.fromkeys(key for row in section.rows for key in _ranges(row))
    for name in dict.fromkeys(row.name for row in section.rows):
        own_rows = _in_order([row for row in section.rows if row.name == name])
        best = best_of([row for row in own_rows if not row.diverged])
        cells = [
            Cell(
                f"{sampled_settings(row.runs[0].spec, len(keys) == 1)}: {_outcome(row)}",
                row is best,
            )
            for row in own_rows
        ]
        rows.append([Cell(own_rows[0].label, color=name), *cells])
    max_length = max(map(len, rows))
    rows = [[*cells, *[Cell("")] * (max_length - len(cells))] for cells in rows]
    heading = _heading(summary, section)
    title = f"all trials, {', '.join(keys)}: {summary.metric.title}"
    return Table(
        f"{heading}: {title}" if heading else f"{title[0].upper()}{title[1:]}",
        [Column("optimizer"), *(Column(str(i), False, False) for i in range(1, max_length))],
        rows,
    )


def _outcome(row: Row) -> str:
    if row.score is None:
        return "diverged" if row.diverged else NOTHING
    return _spread(row.score, 2) + (f" ({row.diverged} diverged)" if row.diverged else "")


def _ranges(row: Row) -> dict[str, list[float]]:
    return row.runs[0].spec.ranges or {}


def _in_order(rows: list[Row]) -> list[Row]:
    key = next(iter(_ranges(rows[0])), None)
    if key is None:
        return rows
    return sorted(rows, key=lambda row: float(getattr(row.runs[0].spec.optimizer, key)))


def _at_an_end(best: Row, rows: list[Row]) -> str:
    """Return the settings whose best value is the smallest or largest of all trials."""
    found = []
    for key in _ranges(best):
        values = sorted({getattr(row.runs[0].spec.optimizer, key) for row in rows})
        chosen = getattr(best.runs[0].spec.optimizer, key)
        if len(values) > 1 and chosen in (values[0], values[-1]):
            found.append(f"{key}, the {'smallest' if chosen == values[0] else 'largest'}")
    return ", ".join(found)


def as_markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown."""
    lines = [f"**{table.heading}**\n"] if table.heading else []
    lines.append(f"| {' | '.join(column.title for column in table.columns)} |")
    lines.append(f"|{'|'.join('---' for _ in table.columns)}|")
    for row in table.rows:
        cells = [f"**{cell.text}**" if cell.best else cell.text for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_csv(summaries: list[Summary]) -> str:
    """Return one line per run, with all digits."""
    metrics = list(dict.fromkeys(summary.metric.name for summary in summaries))
    table = run_table([run for summary in summaries for run in summary.runs], metrics)
    table["seconds"] = table["seconds"].map(lambda seconds: round(seconds, 3))
    text: str = table.to_csv(index=False, lineterminator="\n")
    return text
