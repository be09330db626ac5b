"""Tables of cells, and their form on a console of any width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from rich import table as rich
from rich.console import Console, ConsoleOptions
from rich.text import Text

_GAP = 2  # between columns
_SHORTEST_NAME = 16  # of the first column


class Cell(NamedTuple):
    """Text in a table."""

    text: str
    best: bool = False  # whether it is the best of its column
    color: str | None = None  # color of the key in front of the text


class Column(NamedTuple):
    """Title of a column, and where it is shown; Markdown has all columns."""

    title: str
    on_console: bool = True
    at_once: bool = True  # on the page without a click


class Table(NamedTuple):
    """Rows of cells below titles."""

    heading: str  # "" for a single table
    columns: list[Column]
    rows: list[list[Cell]]

    def at_once(self) -> Table:
        """Return the columns that the page shows without a click."""
        shown = [index for index, column in enumerate(self.columns) if column.at_once]
        return Table(
            self.heading,
            [self.columns[index] for index in shown],
            [[row[index] for index in shown] for row in self.rows],
        )


class ConsoleTable:
    """A table that cuts no number: columns that do not fit stand in another table below.

    Args:
        table: cells, of which the console's columns are shown.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._shown = [index for index, column in enumerate(table.columns) if column.on_console]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[rich.Table]:
        """Yield the tables that fit the width, each with the first column."""
        if options.ascii_only:  # where ± is printed as two characters, which need room
            yield from ConsoleTable(_with_ascii_signs(self._table)).blocks(options.max_width)
        else:
            yield from self.blocks(options.max_width)

    def blocks(self, width: int) -> Iterator[rich.Table]:
        """Yield the tables that fit a width, each with the first column."""
        first, *others = self._shown
        names = min(self._width(first), max(_SHORTEST_NAME, width // 3))
        blocks: list[list[int]] = []
        room = 0
        for index in others:
            needed = self._width(index) + _GAP
            if not blocks or needed > room:
                blocks.append([])
                room = width - names
            blocks[-1].append(index)
            room -= needed
        for number, block in enumerate(blocks or [[]]):
            heading = self._table.heading if number == 0 else ""
            yield self._block([first, *block], heading, names, width)

    def _width(self, index: int) -> int:
        """Return the width of a column, whose title may be broken between words."""
        words = self._table.columns[index].title.split()
        return max(map(len, [*words, *(row[index].text for row in self._table.rows)]))

    def _block(self, indices: list[int], heading: str, names: int, width: int) -> rich.Table:
        made = rich.Table(
            pad_edge=False, box=None, padding=(0, _GAP, 0, 0), title=heading or None,
            title_justify="left",
        )  # fmt: skip
        others = indices[1:]
        widths = {index: min(self._width(index), width - names - _GAP) for index in others}
        spare = width - names - sum(_GAP + own for own in widths.values())
        for index in others:  # titles stay on one line where there is room
            more = max(0, len(self._table.columns[index].title) - widths[index])
            if more <= spare:
                widths[index] += more
                spare -= more
        for index in indices:
            first = index == indices[0]
            room = names if first else widths[index]
            justify: Literal["left", "right"] = "left" if first else "right"
            made.add_column(self._table.columns[index].title, justify=justify, width=room)
        for row in self._table.rows:
            made.add_row(
                *(
                    Text(
                        unbroken(row[index].text),
                        style="bold" if row[index].best else "",
                        overflow="ellipsis" if index == indices[0] else "fold",
                        no_wrap=index == indices[0],
                    )
                    for index in indices
                )
            )
        return made


def _with_ascii_signs(table: Table) -> Table:
    rows = [
        [cell._replace(text=cell.text.replace("±", "+-")) for cell in row] for row in table.rows
    ]
    return table._replace(rows=rows)


def unbroken(text: str) -> str:
    """Return a text that is not broken before or after the sign of its deviation."""
    for sign in ("±", "+-"):
        text = text.replace(f" {sign} ", f"\N{NO-BREAK SPACE}{sign}\N{NO-BREAK SPACE}")
    return text
