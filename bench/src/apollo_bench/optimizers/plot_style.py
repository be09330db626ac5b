"""Labels, colors and markers of optimizers, the same in every table and figure."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple


class Style(NamedTuple):
    """Label, colors and marker."""

    label: str
    color: str
    marker: str
    dark: str  # color on a dark page, chosen to be as unlike the others as possible


# Palette of Okabe and Ito, which color-blind readers can tell apart; markers for gray print.
STYLES = {
    "sgd": Style("SGD", "#0072B2", "s", "#0F90FA"),
    "adam": Style("Adam", "#009E73", "^", "#21FAAE"),
    "radam": Style("RAdam", "#CC79A7", "D", "#FA57E9"),
    "adam-adj": Style("Adam-adj", "#56B4E9", "v", "#56B4E9"),
    "radam-adj": Style("RAdam-adj", "#E69F00", "P", "#E69F00"),
    "apollo": Style("Apollo", "#D55E00", "o", "#FA5512"),
    # not in the paper
    "nesterov": Style("SGD, Nesterov", "#3ABE15", "+", "#3ABE15"),
    "adamw": Style("AdamW", "#117733", "<", "#699A46"),
    "nadamw": Style("NAdamW", "#332288", "X", "#AB81FE"),
    "muon": Style("Muon", "#000000", "x", "#F3F3F3"),
    "apollow": Style("ApolloW", "#661100", "d", "#BC9762"),
    "apollo-belief": Style("Apollo, belief", "#999933", "h", "#CEE300"),
    "apollo-averaged": Style("Apollo, averaged B", "#004488", "4", "#9084BD"),
    "apollow-belief": Style("ApolloW, belief", "#AA4499", "*", "#F9429D"),
}

# short names of classes, as their authors write them
_LABELS = {
    "adabelief": "AdaBelief",
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adamax": "Adamax",
    "asgd": "ASGD",
    "lion": "Lion",
    "nadam": "NAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "soap": "SOAP",
    "sophia": "Sophia",
}

# color, marker and color on a dark page of other optimizers; most colors are from Tol's palettes
_MORE = (
    ("#882255", ">", "#F697E8"),
    ("#44AA99", "p", "#44AA99"),
    ("#888888", "8", "#979797"),
    ("#CC6677", "1", "#FE4666"),
    ("#FE004A", "2", "#DB6D4A"),
    ("#997700", "3", "#ECED8C"),
    ("#EE99AA", "H", "#EE99AA"),
)
_given: dict[str, int] = {}  # index of the color that a name has in this process

# settings of matplotlib
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
    "svg.hashsalt": "apollo-qn",  # the same runs give the same bytes; the value must not change
}


def style_of(name: str) -> Style:
    """Return the style of an optimizer of a recipe.

    A variant such as ``apollo-long-warmup`` is labeled "Apollo, long warmup". An optimizer that is
    not in the paper keeps its name as label. Its color is a function of the name, or the next free
    one.

    Example:
        >>> style_of("apollo-long-warmup").label, style_of("apollo").color
        ('Apollo, long warmup', '#D55E00')
    """
    if name in STYLES:
        return STYLES[name]
    if name not in _given:
        first = zlib.crc32(name.encode())
        candidates = [(first + i) % len(_MORE) for i in range(len(_MORE))]
        _given[name] = next((p for p in candidates if p not in _given.values()), candidates[0])
    return Style(_label(name), *_MORE[_given[name]])


def _label(name: str) -> str:
    for known in sorted(STYLES, key=len, reverse=True):
        if name.startswith(f"{known}-"):
            form = name.removeprefix(f"{known}-").replace("-", " ")
            return f"{STYLES[known].label}, {form}"
    return _LABELS.get(name, name)


def sort_key(name: str) -> tuple[int, str]:
    """Return a key that sorts optimizers as the paper's tables do, with others after them.

    Example:
        >>> sorted(["apollo", "mine", "sgd"], key=sort_key)
        ['sgd', 'apollo', 'mine']
    """
    known = list(STYLES)
    return (known.index(name) if name in known else len(known), name)
