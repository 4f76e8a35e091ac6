"""One look for all figures: size, fonts, colours that colour-blind readers tell apart, and the
files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magus_anharmonic.io.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, darkest contrasts first."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#7f7f7f"

SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "svg.hashsalt": "magus-anharmonic",
    "svg.fonttype": "path",
    "text.parse_math": False,  # names of phases hold whatever their authors like, dollars too
}
SINGLE = (5.2, 3.9)
"""Inches, one panel."""
PANEL = (3.6, 3.3)
"""Inches, one of several panels."""
DPI = 160


@contextmanager
def figure(
    n_columns: int = 1,
    n_rows: int = 1,
    *,
    title: str = "",
    size: tuple[float, float] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in this style with its panels in reading order; nothing is shown on a screen and no
    global setting changes.

    size : inches. settings : instead of those of the house.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**SETTINGS, **(settings or {})}):
        usual = SINGLE if n_columns * n_rows == 1 else (PANEL[0] * n_columns, PANEL[1] * n_rows)
        made = Figure(figsize=size or usual, layout="constrained")
        FigureCanvasAgg(made)
        panels = made.subplots(n_rows, n_columns, squeeze=False)
        if title:
            made.suptitle(title, fontsize=SETTINGS["axes.titlesize"])
        yield made, list(panels.ravel())


def save(made: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png`` to ``folder``, whole or not at all; call it inside
    `figure`."""
    paths = []
    for suffix, metadata in ((".svg", {"Date": None}), (".png", None)):
        path = folder / f"{name}{suffix}"
        with replacing(path) as temporary:
            made.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=metadata)
        made.set_layout_engine("none")  # as it was laid out for the first file
        paths.append(path)
    return paths


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def say(axes: Axes, text: str) -> None:
    """A sentence in the middle of an empty panel."""
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY, wrap=True
    )


def points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float | None] | None = None,
    *,
    index: int = 0,
    label: str = "",
    **style: Any,
) -> None:
    """Markers, joined when there are several, with bars where there is an error (in the axes'
    units)."""
    bars = (
        None
        if errors is None or all(error is None for error in errors)
        else [0.0 if error is None else error for error in errors]
    )
    options = {
        "color": color(index),
        "marker": marker(index),
        "linestyle": "-" if len(x) > 1 else "none",
        "capsize": 3,
        **style,
    }
    axes.errorbar(x, y, yerr=bars, label=label or None, **options)


def lanes(low: Sequence[float], high: Sequence[float]) -> list[int]:
    """For each bar from ``low`` to ``high`` the first lane in which it meets no other, so that the
    bars of one place stand side by side."""
    ends: list[float] = []
    found = [0] * len(low)
    for i in sorted(range(len(low)), key=lambda i: low[i]):
        lane = next((lane for lane, end in enumerate(ends) if end < low[i]), len(ends))
        ends[lane : lane + 1] = [high[i]]
        found[i] = lane
    return found


def room(axes: Axes, x: Sequence[float]) -> None:
    """Space around a single abscissa, which would else fill the panel."""
    distinct = sorted(set(x))
    if len(distinct) == 1:
        width = 0.1 * abs(distinct[0]) or 1.0
        axes.set_xlim(distinct[0] - width, distinct[0] + width)


def log_scale(axes: Axes) -> None:
    """A logarithmic ordinate with numbers as plain text: matplotlib's own are mathematics, which
    these figures do not read."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def legend(axes: Axes, **options: Any) -> None:
    """A legend when there is something to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)
