"""The picture of the hull: formation free energies over composition for two end members, distances above the hull for more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magus_anharmonic.analysis import style
from magus_anharmonic.hull import lower_hull

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from magus_anharmonic.analysis.phase_diagram import HullRow

FORMATION = "formation free energy (meV/atom)"
Place = tuple[float, float]
"""GPa, K."""


def corners(rows: Sequence[HullRow]) -> list[Place]:
    """Lowest and highest pressure at the lowest and the highest temperature, of the points that have a hull."""
    places = sorted({(row.temperature, row.pressure) for row in rows})
    found: list[Place] = []
    for temperature in (places[0][0], places[-1][0]):
        mine = [pressure for t, pressure in places if t == temperature]
        found += [(mine[0], temperature), (mine[-1], temperature)]
    return list(dict.fromkeys(found))


def draw_hull(rows: Sequence[HullRow], end_members: Sequence[str], folder: str | Path, name: str = "hull") -> list[Path]:
    """One panel per corner of the grid (`corners`); ``NAME.svg`` and ``NAME.png`` in ``folder``."""
    places = corners(rows)
    columns = min(2, len(places))
    with style.figure(columns, -(-len(places) // columns)) as (made, panels):
        for axes in panels[len(places) :]:
            axes.set_axis_off()
        for axes, (pressure, temperature) in zip(panels, places, strict=False):
            here = [row for row in rows if (row.pressure, row.temperature) == (pressure, temperature)]
            axes.set_title(f"{pressure:g} GPa, {temperature:g} K")
            for index, isotopes in enumerate(dict.fromkeys(row.isotopes for row in rows)):
                mine = [row for row in here if row.isotopes == isotopes]
                if mine and len(end_members) == 2:
                    _line(axes, mine, index, isotopes)
                elif mine:
                    _bars(axes, mine, index, isotopes)
            if len(end_members) == 2:
                _binary_axes(axes, here, end_members)
            else:
                axes.set_xlabel("free energy above the hull (meV/atom)")
            if len({row.isotopes for row in rows}) > 1:
                style.legend(axes)
        return style.save(made, Path(folder), name)


def _line(axes: Axes, rows: Sequence[HullRow], index: int, label: str) -> None:
    """The hull of one set of masses as a line; filled marks are on it."""
    fractions = np.array([row.entry.fractions for row in rows])
    heights = 1e3 * np.array([row.entry.formation for row in rows])
    grid = np.unique(np.concatenate([fractions[:, 1], [0.0, 1.0]]))
    hull = lower_hull(fractions, heights, np.column_stack([1.0 - grid, grid]))
    axes.plot(grid, hull, "-", color=style.color(index), label=label)
    for row, height in zip(rows, heights, strict=True):
        axes.errorbar(
            row.entry.fractions[1], height, yerr=1e3 * row.entry.formation_error, fmt=style.marker(index), color=style.color(index),
            mfc=style.color(index) if row.entry.distance <= 0 else "white", capsize=3,
        )  # fmt: skip


def _binary_axes(axes: Axes, rows: Sequence[HullRow], end_members: Sequence[str]) -> None:
    """Each phase named once at its lowest mark: below it the lowest of a composition, above it the others and the end members."""
    lowest: dict[str, HullRow] = {}
    for row in rows:
        if row.entry.name not in lowest or row.entry.formation < lowest[row.entry.name].entry.formation:
            lowest[row.entry.name] = row
    named: set[float] = set()
    for row in sorted(lowest.values(), key=lambda row: row.entry.formation):
        x, error = row.entry.fractions[1], row.entry.formation_error
        above = round(x, 6) in named or x < 0.1 or x > 0.9
        named.add(round(x, 6))
        axes.annotate(
            row.entry.name, (x, 1e3 * (row.entry.formation + (error if above else -error))), (0, 6 if above else -6),
            textcoords="offset points", fontsize=8, ha="left" if x < 0.1 else "right" if x > 0.9 else "center",
            va="bottom" if above else "top",
        )  # fmt: skip
    axes.margins(x=0.06, y=0.18)
    axes.set_xlabel(f"atomic fraction of {_subscripts(end_members[1])} in {_subscripts(end_members[0])}")
    axes.set_ylabel(FORMATION)


def _bars(axes: Axes, rows: Sequence[HullRow], index: int, label: str) -> None:
    """Distance above the hull of every phase, nearest first."""
    order = sorted(rows, key=lambda row: row.entry.distance)
    places = np.arange(len(order)) + 0.2 * index
    shown = [1e3 * row.entry.distance for row in order]
    axes.errorbar(
        shown, places, xerr=[1e3 * row.entry.error for row in order], fmt=style.marker(index), color=style.color(index), capsize=3,
        label=label,
    )  # fmt: skip
    if index == 0:
        axes.set_yticks(np.arange(len(order)), [row.entry.name for row in order])
        axes.invert_yaxis()
    axes.axvline(0.0, color=style.GREY, lw=0.8, zorder=0)


def _subscripts(formula: str) -> str:
    return formula.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
