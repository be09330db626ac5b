"""Tables on a console: no number is cut, whatever the width."""

from __future__ import annotations

import codecs
import io

import pytest
from rich.console import Console

from apollo_bench import entry
from apollo_bench.console_table import Cell, Column, ConsoleTable, Table

TITLES = ("validation perplexity", "training loss", "wall time (s)", "optimizer step (ms)", "runs")
VALUES = ("123456.78 ± 23456.78", "12.3456 ± 1.2345", "36000.0 ± 1200.0", "12.34 ± 1.23", "3")
LONG = "my_module:MyOptimizer, long warmup"


def printed(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(ConsoleTable(table))
    return [line.rstrip() for line in console.export_text().splitlines()]


def table() -> Table:
    columns = [Column("optimizer"), Column("hidden", False), *(Column(title) for title in TITLES)]
    rows = [
        [Cell(name), Cell("hidden"), *(Cell(value) for value in VALUES)] for name in (LONG, "SGD")
    ]
    return Table("Schedule cosine", columns, rows)


@pytest.mark.parametrize("width", [160, 80, 60, 40])
def test_no_number_is_cut(width: int) -> None:
    lines = printed(table(), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")
    assert [text.count(value) for value in VALUES[:4]] == [2] * 4
    assert "hidden" not in text
    assert text.count("Schedule cosine") == 1
    blocks = sum(line.startswith("SGD") for line in lines)
    assert text.count("my_module") == blocks, "each block says which optimizer"
    assert (blocks == 1) == (width == 160)


@pytest.mark.parametrize("width", [160, 80, 60])
def test_a_terminal_of_ascii_has_room_for_two_characters(width: int) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="apollo-bench")
    codecs.register_error("apollo-bench", entry._spell)
    Console(width=width, file=file).print(ConsoleTable(table()))
    file.seek(0)
    lines = file.read().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert [text.count(value.replace("±", "+-")) for value in VALUES[:4]] == [2] * 4
    assert "?" not in text


def test_what_fits_is_one_table() -> None:
    lines = printed(Table("", [Column("optimizer"), Column("a b")], [[Cell("x"), Cell("1")]]), 80)
    assert [line.split() for line in lines if line] == [["optimizer", "a", "b"], ["x", "1"]]
