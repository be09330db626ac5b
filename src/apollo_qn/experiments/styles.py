"""How optimizers are written and drawn: the same everywhere."""

from __future__ import annotations

from typing import Any, NamedTuple


class Style(NamedTuple):
    """Name, colour and marker."""

    label: str
    color: str
    marker: str


# Okabe and Ito's palette, which the colour-blind can tell apart; markers for print in grey
STYLES = {
    "sgd": Style("SGD", "#0072B2", "s"),
    "adam": Style("Adam", "#009E73", "^"),
    "radam": Style("RAdam", "#CC79A7", "D"),
    "adam-adj": Style("Adam-adj", "#56B4E9", "v"),
    "radam-adj": Style("RAdam-adj", "#E69F00", "P"),
    "apollo": Style("Apollo", "#D55E00", "o"),
}

# of matplotlib
SETTINGS: Any = {
    "font.size": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12.0,
    "grid.color": "#dddddd",
    "figure.constrained_layout.use": True,
    "figure.dpi": 144.0,
    "svg.hashsalt": "apollo-qn",  # the same runs draw the same bytes
}


def style(name: str) -> Style:
    """Of an optimizer of a recipe; black under its own name, if it is none of the paper's."""
    return STYLES.get(name, Style(name, "#000000", "x"))


def place(name: str) -> tuple[int, str]:
    """Sorts optimizers in the order of the paper's tables, others after them."""
    known = list(STYLES)
    return (known.index(name) if name in known else len(known), name)
