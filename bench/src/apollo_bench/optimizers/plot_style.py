"""How optimizers are written and drawn: the same everywhere."""

from __future__ import annotations

import zlib
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
    # not the paper's
    "adamw": Style("AdamW", "#117733", "<"),
    "nadamw": Style("NAdamW", "#332288", "X"),
    "muon": Style("Muon", "#000000", "x"),
    "apollow": Style("ApolloW", "#661100", "d"),
    "apollo-belief": Style("Apollo, belief", "#999933", "h"),
    "apollo-averaged": Style("Apollo, averaged B", "#004488", "4"),
    "apollow-belief": Style("ApolloW, belief", "#AA4499", "*"),
}

# of optimizers that are none of the paper's: of Tol's palettes what the first leaves
_MORE = (
    ("#882255", ">"),
    ("#44AA99", "p"),
    ("#888888", "8"),
    ("#CC6677", "1"),
    ("#6699CC", "2"),
    ("#997700", "3"),
    ("#EE99AA", "H"),
)
_given: dict[str, int] = {}  # which of them a name has in this process

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
    """Of an optimizer of a recipe; one that is none of the paper's is written as it is named.

    A form of a known one, as ``apollo-long-warmup``, is "Apollo, long warmup". The colour is a
    function of the name, or the next one where another name has that.
    """
    if name in STYLES:
        return STYLES[name]
    if name not in _given:
        first = zlib.crc32(name.encode())
        places = [(first + i) % len(_MORE) for i in range(len(_MORE))]
        _given[name] = next((p for p in places if p not in _given.values()), places[0])
    return Style(_label(name), *_MORE[_given[name]])


def _label(name: str) -> str:
    for known in sorted(STYLES, key=len, reverse=True):
        if name.startswith(f"{known}-"):
            form = name.removeprefix(f"{known}-").replace("-", " ")
            return f"{STYLES[known].label}, {form}"
    return name


def place(name: str) -> tuple[int, str]:
    """Sorts optimizers in the order of the paper's tables, others after them."""
    known = list(STYLES)
    return (known.index(name) if name in known else len(known), name)
