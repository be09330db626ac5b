"""Plot of B against the diagonal of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from apollo_qn.diagnostics.hessian import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_POINTS = 4000  # largest number of points in a panel, so that points stay distinguishable
_COLOR = "#D55E00"  # Apollo's color in the reports, from the palette of Okabe and Ito


def plot(comparisons: Sequence[Comparison], columns: int = 3) -> Figure:
    """Draw B / lr over the Hessian's diagonal, with one panel per tensor.

    Both are equal on the diagonal line. Grey bars show one standard error of the Hessian's diagonal
    on each side. The axes are linear near 0 and logarithmic beyond the median size, because
    curvatures have both signs and many orders of magnitude. At most 4,000 evenly spaced elements of
    a tensor are drawn.

    Args:
        comparisons: results of :func:`apollo_qn.diagnostics.compare`.
        columns: number of panels side by side, >= 1.

    Returns:
        A matplotlib figure, to be saved with ``savefig``; no window is opened.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``comparisons`` is empty, or ``columns`` is out of its range.

    Example::

        plot(compare(optimizer, diagonal, model.named_parameters())).savefig("curvature.png")
    """
    if not comparisons:
        raise ValueError("comparisons must be at least one, got none")
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns must be a whole number >= 1, got {columns!r}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plot needs the package matplotlib, which is not installed; pip install 'matplotlib'"
        ) from None
    columns = min(columns, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    with mpl.rc_context({"font.size": 9.0, "axes.titlesize": 9.0}):
        figure = Figure(figsize=(3.4 * columns, 3.5 * rows), dpi=144, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, one in zip(panels, comparisons, strict=False):
            _panel(axes, one)
        for axes in panels[len(comparisons) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("B / lr")
        for axes in panels[max(0, len(comparisons) - columns) : len(comparisons)]:
            axes.set_xlabel("diagonal of the Hessian")
    return figure


def _panel(axes: Any, one: Comparison) -> None:
    step = math.ceil(one.B.numel() / _MAX_POINTS)
    x, y, error = (v[::step] for v in (one.hessian, one.B, one.standard_error))
    finite = x.isfinite() & y.isfinite()
    x, y, error = x[finite], y[finite], error[finite].nan_to_num(0)
    sizes = torch.cat([x, y]).abs()
    sizes = sizes[sizes > 0]
    reach = 1.3 * float(sizes.max()) if sizes.numel() else 1.0
    near = float(sizes.median()) if sizes.numel() else 1.0
    # a decade is as wide as the linear range on one side of 0
    scale = {"linthresh": max(near, reach * 1e-6), "linscale": 1.0}
    axes.set_xscale("symlog", **scale)
    axes.set_yscale("symlog", **scale)
    axes.plot([-reach, reach], [-reach, reach], color="#555555", linewidth=1, zorder=3)
    axes.errorbar(
        x.numpy(), y.numpy(), xerr=error.numpy() if bool((error > 0).any()) else None, fmt="o",
        markersize=2.6, markeredgewidth=0, color=_COLOR, alpha=0.45, ecolor="#bbbbbb",
        elinewidth=0.6, zorder=2,
    )  # fmt: skip
    for line in (axes.axhline, axes.axvline):
        line(0, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)
    ticks = _ticks(reach, scale["linthresh"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{t:g}" if t else "0" for t in ticks])
        axis.set_minor_locator(_none())
    axes.set_title(
        f"{one.name} ({one.B.numel():,})\n"
        f"rank correlation {_short(one.spearman)}, equal signs {_percent(one.signs)}"
    )


def _ticks(reach: float, near: float) -> list[float]:
    """Return 0 and at most three powers of ten of each sign."""
    first, last = math.ceil(math.log10(near)), math.floor(math.log10(reach))
    if last < first:
        return [-near, 0.0, near]
    every = math.ceil((last - first + 1) / 3)
    powers = [10.0**e for e in range(last, first - 1, -every)]
    return [*(-x for x in powers), 0.0, *reversed(powers)]


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _short(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{100 * share:.0f} %"
