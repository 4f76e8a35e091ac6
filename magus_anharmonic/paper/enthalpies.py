"""Figs. 2 and 5: enthalpy against volume with the rank of named phases, and relative enthalpy
against pressure with transitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from magus_anharmonic.hull import reduced_formula
from magus_anharmonic.paper.tables import Enthalpy
from magus_anharmonic.phase_diagram import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME_ENTHALPY = 1e-3
"""eV/atom; with equal space group and nearly equal volume, structures this close count as one in a
rank."""
SAME_VOLUME = 0.02
"""A^3/atom."""
HIGHEST_SHOWN = 0.5
"""eV/atom above the lowest; the picture ends there."""


@dataclass(frozen=True)
class PhaseRank:
    """Where a named phase stands among all distinct structures of one model and pressure; rank 1 is
    the lowest."""

    phase: str
    formula: str
    pressure_GPa: float
    source: str
    rank: int
    n_distinct: int
    above_lowest_meV_per_atom: float
    volume_A3_per_atom: float
    model_id: str


def distinct(rows: Sequence[Enthalpy]) -> list[Enthalpy]:
    """The structures by enthalpy, one for each that was found several times; a named one stands for
    its like."""
    found: list[Enthalpy] = []
    for row in sorted(rows, key=lambda r: (r.enthalpy_eV_per_atom, not r.phase, r.id)):
        duplicate = _index_of_duplicate(found, row)
        if duplicate is None:
            found.append(row)
        elif row.phase and not found[duplicate].phase:
            found[duplicate] = row
    return found


def _index_of_duplicate(found: Sequence[Enthalpy], row: Enthalpy) -> int | None:
    """Where in ``found``, sorted by enthalpy, the structure ``row`` is already."""
    for position in range(len(found) - 1, -1, -1):
        if not _close(found[position], row):
            return None
        if _same(found[position], row):
            return position
    return None


def _close(a: Enthalpy, b: Enthalpy) -> bool:
    return abs(a.enthalpy_eV_per_atom - b.enthalpy_eV_per_atom) < SAME_ENTHALPY


def _same(a: Enthalpy, b: Enthalpy) -> bool:
    return (a.phase == b.phase or not (a.phase and b.phase)) and _one_structure(a, b)


def _one_structure(a: Enthalpy, b: Enthalpy) -> bool:
    """Whatever their names: equal space group and composition, nearly equal enthalpy and volume."""
    alike = a.space_group == b.space_group and reduced_formula(a.formula) == reduced_formula(
        b.formula
    )
    return _close(a, b) and alike and abs(a.volume_A3_per_atom - b.volume_A3_per_atom) < SAME_VOLUME


def ranks(rows: Sequence[Enthalpy], source: str | None = None) -> list[PhaseRank]:
    """Ranks of every named phase (its lowest row) by source and pressure; ``source``: that one
    alone. Compositions are ranked apart."""
    groups: dict[tuple[str, float, str], list[Enthalpy]] = {}
    for row in rows:
        if source in (None, row.source):
            groups.setdefault(
                (row.source, row.pressure_GPa, reduced_formula(row.formula)), []
            ).append(row)
    found = []
    for (name, pressure, formula), members in sorted(groups.items()):
        order = distinct(members)
        seen: set[str] = set()
        for position, row in enumerate(order, start=1):
            if row.phase and row.phase not in seen:
                seen.add(row.phase)
                above = 1e3 * (row.enthalpy_eV_per_atom - order[0].enthalpy_eV_per_atom)
                found.append(
                    PhaseRank(
                        row.phase,
                        formula,
                        pressure,
                        name,
                        position,
                        len(order),
                        above,
                        row.volume_A3_per_atom,
                        row.model_id,
                    )
                )
    return found


def draw_enthalpy_volume(
    rows: Sequence[Enthalpy], folder: Path, title: str, name: str
) -> list[Path]:
    """Enthalpy above the lowest against volume, all structures grey, named phases marked with their
    rank."""
    lowest = min(row.enthalpy_eV_per_atom for row in rows)
    with style.figure(title=title) as (made, (axes,)):
        x = [row.volume_A3_per_atom for row in rows]
        y = [1e3 * (row.enthalpy_eV_per_atom - lowest) for row in rows]
        axes.plot(
            x,
            y,
            ".",
            color=style.GREY,
            ms=4,
            alpha=0.5,
            rasterized=len(rows) > 500,
            label=f"{len(rows)} structures",
        )
        for index, found in enumerate(ranks(rows)):
            label = (
                f"{found.phase}: {_ordinal(found.rank)} of {found.n_distinct},"
                f" +{found.above_lowest_meV_per_atom:.0f} meV/atom"
            )
            axes.plot(
                [found.volume_A3_per_atom],
                [found.above_lowest_meV_per_atom],
                style.marker(index),
                color=style.color(index),
                ms=8,
                label=label,
            )
        shown = [
            volume for volume, height in zip(x, y, strict=True) if height <= 1e3 * HIGHEST_SHOWN
        ]
        axes.set_ylim(
            -0.03 * min(1e3 * HIGHEST_SHOWN, max(y) or 1.0) - 1.0,
            min(1e3 * HIGHEST_SHOWN, 1.1 * max(y) + 5.0),
        )
        margin = 0.05 * (max(shown) - min(shown)) or 0.2
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
        axes.set_xlabel("volume (Å³/atom)")
        axes.set_ylabel("enthalpy above the lowest (meV/atom)")
        style.legend(axes, loc="upper right", frameon=True)
        return style.save(made, folder, name)


def _ordinal(number: int) -> str:
    ending = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{ending}"


@dataclass(frozen=True)
class RelativeEnthalpy:
    """Enthalpy of a phase minus that of the reference phase at one pressure; ``same_as``: the phase
    that it has turned into there."""

    phase: str
    reference: str
    pressure_GPa: float
    relative_meV_per_atom: float
    model_id: str
    same_as: str = ""


@dataclass(frozen=True)
class Transition:
    """Where the phase of lowest enthalpy changes with rising pressure.

    By linear interpolation between two pressures; ``how`` "continuous": relaxed at the higher one,
    the first is the second, so that the two pressures are all that is known (``pressure_GPa`` is
    their middle).
    """

    below: str
    above: str
    pressure_GPa: float
    between_low_GPa: float
    between_high_GPa: float
    how: Literal["crossing", "continuous"] = "crossing"

    @property
    def where(self) -> str:
        """``"112 GPa"`` or ``"100 to 150 GPa"``."""
        if self.how == "crossing":
            return f"{self.pressure_GPa:.0f} GPa"
        return f"{self.between_low_GPa:g} to {self.between_high_GPa:g} GPa"


Phases = dict[str, dict[float, Enthalpy]]
"""Name -> pressure -> the lowest row of the phase."""


def phase_enthalpies(rows: Sequence[Enthalpy]) -> Phases:
    """Named phases (``foundation`` rows left out) of the composition that most named rows have."""
    named = [row for row in rows if row.phase and row.source != "foundation"]
    formulas = [reduced_formula(row.formula) for row in named]
    common = max(sorted(set(formulas)), key=formulas.count, default="")
    return lowest_of_phases(
        [row for row, formula in zip(named, formulas, strict=True) if formula == common]
    )


def lowest_of_phases(rows: Sequence[Enthalpy]) -> Phases:
    """Every named phase of ``rows``."""
    found: Phases = {}
    for row in rows:
        if not row.phase:
            continue
        known = found.setdefault(row.phase, {}).get(row.pressure_GPa)
        if known is None or row.enthalpy_eV_per_atom < known.enthalpy_eV_per_atom:
            found[row.phase][row.pressure_GPa] = row
    return found


def transformed_into(phases: Phases) -> dict[tuple[str, float], str]:
    """(name, pressure) -> another phase, where a structure that was relaxed as one is the other;
    the one that changes its space group."""
    constant = [
        name
        for name, known in phases.items()
        if len({row.space_group for row in known.values()}) == 1
    ]
    found = {}
    for name, known in phases.items():
        for pressure, row in known.items() if name not in constant else ():
            for other in constant:
                if pressure in phases[other] and _one_structure(row, phases[other][pressure]):
                    found[name, pressure] = other
    return found


def choose_reference(phases: Phases, wanted: str | None = "Im-3m") -> str:
    """``wanted`` if it is there, else the phase known at most pressures."""
    if wanted in phases:
        return str(wanted)
    return max(sorted(phases), key=lambda name: len(phases[name]))


def relative_enthalpies(
    rows: Sequence[Enthalpy], reference: str | None = "Im-3m"
) -> list[RelativeEnthalpy]:
    """Every named phase minus the reference, at the pressures where both are known; none without a
    named phase."""
    phases = phase_enthalpies(rows)
    if not phases:
        return []
    name, gone = choose_reference(phases, reference), transformed_into(phases)
    return [
        RelativeEnthalpy(
            phase,
            name,
            p,
            1e3 * (row.enthalpy_eV_per_atom - phases[name][p].enthalpy_eV_per_atom),
            row.model_id,
            gone.get((phase, p), ""),
        )
        for phase, known in sorted(phases.items())
        for p, row in sorted(known.items())
        if p in phases[name]
    ]


def transitions(rows: Sequence[Enthalpy]) -> list[Transition]:
    """Changes of the lowest named phase with pressure: between neighbouring pressures, all
    crossings of the lower envelope."""
    every = phase_enthalpies(rows)
    gone = transformed_into(every)
    phases = {
        name: {p: row for p, row in known.items() if (name, p) not in gone}
        for name, known in every.items()
    }
    pressures = sorted({p for known in phases.values() for p in known})
    found = []
    for low, high in zip(pressures, pressures[1:], strict=False):
        first = min(
            (n for n in phases if low in phases[n]),
            key=lambda name: phases[name][low].enthalpy_eV_per_atom,
        )
        if (first, high) in gone:
            found.append(
                Transition(first, gone[first, high], 0.5 * (low + high), low, high, "continuous")
            )
            continue
        lines = {
            name: _line(known, low, high)
            for name, known in phases.items()
            if low in known and high in known
        }
        if not lines:
            continue
        at, current = 0.0, min(lines, key=lambda name: lines[name])
        while True:
            crossings = [
                (_crossing(lines[current], line), name)
                for name, line in lines.items()
                if name != current and line[1] < lines[current][1]
            ]
            later = [(where, name) for where, name in crossings if at <= where <= 1.0]
            if not later:
                break
            at, following = min(later)
            found.append(Transition(current, following, low + at * (high - low), low, high))
            current = following
    return found


def _line(known: dict[float, Enthalpy], low: float, high: float) -> tuple[float, float]:
    start = known[low].enthalpy_eV_per_atom
    return start, known[high].enthalpy_eV_per_atom - start


def _crossing(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[0] - a[0]) / (a[1] - b[1])


def draw_relative_enthalpy(
    found: Sequence[RelativeEnthalpy],
    changes: Sequence[Transition],
    folder: Path,
    name: str = "fig_5_relative_enthalpy",
) -> list[Path]:
    """Lines of all phases against pressure; a dotted line and a label above the panel at each
    transition."""
    with style.figure() as (made, (axes,)):
        phases = list(dict.fromkeys(row.phase for row in found))
        for index, phase in enumerate(phases):
            shown = [row for row in found if row.phase == phase]
            style.points(
                axes,
                [r.pressure_GPa for r in shown],
                [r.relative_meV_per_atom for r in shown],
                index=index,
                label=phase,
            )
        pressures = [row.pressure_GPa for row in found]
        style.room(axes, pressures)
        _mark_transitions(axes, changes)
        heights = np.array([row.relative_meV_per_atom for row in found])
        if np.ptp(heights) == 0:
            axes.set_ylim(-10.0, 10.0)
        axes.set_xlabel("pressure (GPa)")
        axes.set_ylabel(f"enthalpy relative to {found[0].reference} (meV/atom)")
        style.legend(
            axes,
            **(
                {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
                if len(phases) > MOST_INSIDE
                else {}
            ),
        )
        return style.save(made, folder, name)


MOST_INSIDE = 4
"""Phases; a longer legend stands beside the panel."""
LABEL_HEIGHT = 11.0
"""Points, of each label above the panel."""


def _mark_transitions(axes: Axes, changes: Sequence[Transition]) -> None:
    """Each label in a row of its own, inwards from its line; the further out the line, the higher
    the row, so that few lines cross text."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    turn = low + 0.65 * (high - low)
    for row, change in enumerate(sorted(changes, key=lambda c: abs(c.pressure_GPa - turn))):
        height = LABEL_HEIGHT * (row + 1)
        axes.axvline(change.pressure_GPa, color=style.GREY, lw=1, ls=":")
        left = change.pressure_GPa <= turn
        position = {
            "xy": (change.pressure_GPa, 1.0),
            "xycoords": ("data", "axes fraction"),
            "textcoords": "offset points",
        }
        line = {
            "arrowstyle": "-",
            "color": style.GREY,
            "lw": 1,
            "ls": ":",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axes.annotate("", xytext=(0, height), **position, arrowprops=line, zorder=2)
        axes.annotate(
            f"{change.below} → {change.above}: {change.where}",
            xytext=(3 if left else -3, height),
            **position,
            fontsize=8,
            ha="left" if left else "right",
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
