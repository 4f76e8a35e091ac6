"""One look for all figures, and the two small ones.

One look for all figures: size, fonts, colours that colour-blind readers tell apart, and the files.

Learning curves: errors of the models of a search, round by round.

Figs. 7 and 8: how errors of forces shrink when the SSCHA averages them into gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magus_anharmonic.analysis.tables import (
    GradientBin,
    GradientError,
    GradientParity,
    LearningPoint,
)
from magus_anharmonic.files import replacing

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
    n_columns: int = 1, n_rows: int = 1, *, title: str = ""
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in this style with its panels in reading order; nothing is shown on a screen and no
    global setting changes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        size = SINGLE if n_columns * n_rows == 1 else (PANEL[0] * n_columns, PANEL[1] * n_rows)
        made = Figure(figsize=size, layout="constrained")
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


QUANTITIES = (
    ("energy RMSE (meV/atom)", "energy_rmse_eV_per_atom", 1e3),
    ("force RMSE (meV/Å)", "force_rmse_eV_per_A", 1e3),
    ("stress RMSE (GPa)", "stress_rmse_GPa", 1.0),
)


def draw_learning(
    rows: Sequence[LearningPoint], folder: Path, name: str = "learning"
) -> list[Path]:
    """Three panels of errors against the round, one curve per step and set."""
    with figure(3) as (made, panels):
        curves = list(dict.fromkeys((row.step, row.set) for row in rows))
        for axes, (label, field, factor) in zip(panels, QUANTITIES, strict=True):
            for index, (step, name_of_set) in enumerate(curves):
                mine = [
                    row
                    for row in rows
                    if (row.step, row.set) == (step, name_of_set)
                    and getattr(row, field) is not None
                ]
                if mine:
                    heights = [factor * getattr(row, field) for row in mine]
                    points(
                        axes,
                        [row.generation for row in mine],
                        heights,
                        index=index,
                        label=f"{step}, {name_of_set}",
                    )
            axes.set_xlabel("round")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0.0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend(panels[0], fontsize=8)
        return save(made, folder, name)


WORDS = {
    "force": "forces",
    "gradient_centroid": "gradient by centroids",
    "gradient_force_constants": "gradient by force constants",
    "bo_force_centroid": "forces at the centroids",
}


SMALLEST = 0.01
"""meV/A; what is smaller is rounding, and written as such."""


def unit_of(unit: str) -> tuple[float, str]:
    """Factor and unit on the axes: meV instead of eV."""
    return 1e3, f"m{unit}".replace("^2", "²").replace("A", "Å")


def draw_gradient_errors(
    rows: Sequence[GradientError],
    bins: Sequence[GradientBin],
    parity: Sequence[GradientParity],
    folder: Path,
    name: str = "gradient_errors",
) -> list[Path]:
    """Four panels for one phase: RMSEs with their parts, the two distributions, and the parity of
    the averaged gradients."""
    if not rows:
        return []
    title = (
        f"{rows[0].phase} at {rows[0].pressure_GPa:g} GPa, {rows[0].n_configs} configurations:"
        " model against reference"
    )
    with figure(2, 2, title=title) as (made, panels):
        _bars(panels[0], rows)
        _distribution(
            panels[1], bins, (("force", 0), ("gradient_centroid", 1), ("bo_force_centroid", 1))
        )
        _distribution(
            panels[2], bins, (("gradient_force_constants", 0), ("gradient_force_constants", 1))
        )
        _parity(panels[3], parity)
        return save(made, folder, name)


def _bars(axes, rows: Sequence[GradientError]) -> None:  # type: ignore[no-untyped-def]
    """RMSE of each quantity that is a force, the two parts of the averaged one, and the floor."""
    shown = [row for row in rows if row.unit == "eV/A"]
    labels, heights, colors, errors = [], [], [], []
    for row in shown:
        labels.append(WORDS[row.quantity].replace(" ", "\n", 1))
        heights.append(1e3 * row.rmse)
        colors.append(color(0))
        errors.append(0.0)
        if row.systematic is not None:
            labels.append("its systematic\npart")
            heights.append(1e3 * row.systematic)
            errors.append(1e3 * (row.systematic_error or 0.0))
            colors.append(color(1))
        if row.floor is not None:
            axes.axhline(1e3 * row.floor, color=GREY, ls="--", lw=1, label="floor RMSE/√n")
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.bar(range(len(shown := labels)), heights, color=colors, yerr=errors, capsize=3, width=0.65)
    for position, (height, error) in enumerate(zip(heights, errors, strict=True)):
        text = (
            f"{height:.3g}" if height >= SMALLEST or max(heights) < SMALLEST else f"< {SMALLEST:g}"
        )
        axes.annotate(
            text,
            (position, max(height + error, SMALLEST if max(heights) > SMALLEST else 0.0)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(shown)), labels, fontsize=7)
    if any(height > 0 for height in heights):
        log_scale(axes)
        positive = min(height for height in heights if height > 0)
        axes.set_ylim(
            max(SMALLEST, positive / 5) if max(heights) > SMALLEST else positive / 5,
            3 * max(heights),
        )
    axes.set_ylabel("RMSE (meV/Å)")


def _distribution(axes, bins: Sequence[GradientBin], wanted: Sequence[tuple[str, int]]) -> None:  # type: ignore[no-untyped-def]
    for index, (quantity, averaged) in enumerate(wanted):
        found = [row for row in bins if row.quantity == quantity and row.averaged == averaged]
        total = sum(row.count for row in found)
        if not total:
            continue
        factor, unit = unit_of(found[0].unit)
        edges = [factor * row.low for row in found] + [factor * found[-1].high]
        density = [row.count / total / (factor * (row.high - row.low)) for row in found]
        label = (
            WORDS[quantity]
            + ("" if averaged or quantity == "force" else ", one by one")
            + (", averaged" if averaged and len(wanted) == 2 else "")
        )
        axes.stairs(
            density,
            edges,
            color=color(index),
            label=label,
            fill=index == 0,
            alpha=0.45 if index == 0 else 1.0,
        )
        axes.set_xlabel(f"model - reference ({unit})")
    if not axes.get_legend_handles_labels()[0]:
        say(axes, "no distribution was kept")
        return
    log_scale(axes)
    axes.set_ylabel("probability density")
    legend(axes, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.22))


def _parity(axes, parity: Sequence[GradientParity]) -> None:  # type: ignore[no-untyped-def]
    shown = [row for row in parity if row.unit == "eV/A"]
    if not shown:
        say(axes, "no components were kept")
        return
    values = [value for row in shown for value in (row.reference, row.predicted)]
    limits = [min(1e3 * min(values), -1.0), max(1e3 * max(values), 1.0)]
    axes.plot(limits, limits, color=GREY, lw=1)
    for index, quantity in enumerate(("gradient_centroid", "bo_force_centroid")):
        rows = [row for row in shown if row.quantity == quantity]
        if rows:
            x, y = [1e3 * row.reference for row in rows], [1e3 * row.predicted for row in rows]
            axes.plot(
                x, y, marker(index), color=color(index + 1), ms=3, alpha=0.7, label=WORDS[quantity]
            )
    axes.set_xlabel("reference (meV/Å)")
    axes.set_ylabel("model (meV/Å)")
    legend(axes, fontsize=8)
