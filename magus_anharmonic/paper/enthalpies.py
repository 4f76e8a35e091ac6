"""Numbers from ``enthalpies.csv``: ranks of named phases (Fig. 2), relative enthalpies and
transitions (Fig. 5)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal

import numpy as np

from magus_anharmonic.hull import reduced_formula
from magus_anharmonic.paper.tables import Enthalpy
from magus_anharmonic.phase_diagram.boundaries import zero_crossings
from magus_anharmonic.structures import symbol_of
from magus_anharmonic.units import GPa, ev_to_mev

SAME_ENTHALPY = 1e-3
"""eV/atom; with equal space group and nearly equal volume, structures this close count as one in a
rank."""
SAME_VOLUME = 0.02
"""A^3/atom."""

Phases = dict[str, dict[float, Enthalpy]]
"""Name -> pressure -> the lowest row of the phase."""


@dataclass(frozen=True)
class PhaseRank:
    """Where a phase stands among all distinct structures of its composition at one pressure; rank 1
    is the lowest."""

    phase: str
    formula: str
    pressure_GPa: float
    source: str
    rank: int
    n_distinct: int
    above_lowest_meV_per_atom: float
    volume_A3_per_atom: float
    model_id: str


@dataclass(frozen=True)
class RelativeEnthalpy:
    """Enthalpy of a phase minus that of the reference phase at one pressure; ``same_as``: the phase
    that it has transformed into there."""

    phase: str
    reference: str
    pressure_GPa: float
    relative_meV_per_atom: float
    model_id: str
    same_as: str = ""


@dataclass(frozen=True)
class Transition:
    """Where the second of two phases falls below the first in static enthalpy with rising pressure.

    By linear interpolation between two pressures. error_GPa : what a parabola through a third
    pressure would change. slope : of the difference of enthalpies there, eV/atom per GPa. how :
    "continuous" where the first relaxes into the second at the higher pressure: the two pressures
    are then all that is known, and ``pressure_GPa`` is their middle; "below" or "above" where it is
    already, or not yet, lower at all pressures, of which ``pressure_GPa`` is the nearest.
    """

    below: str
    above: str
    pressure_GPa: float
    between_low_GPa: float
    between_high_GPa: float
    how: Literal["crossing", "continuous", "below", "above"] = "crossing"
    error_GPa: float | None = None
    slope: float | None = None

    @property
    def where(self) -> str:
        """``"112 GPa"`` or ``"100 to 150 GPa"``."""
        if self.how == "crossing":
            return f"{self.pressure_GPa:.0f} GPa"
        return f"{self.between_low_GPa:g} to {self.between_high_GPa:g} GPa"


def distinct(rows: Sequence[Enthalpy]) -> list[Enthalpy]:
    """The structures by enthalpy, one for each that was found several times; a named one stands for
    its like."""
    found: list[Enthalpy] = []
    for row in sorted(rows, key=lambda r: (r.enthalpy_eV_per_atom, not r.phase, r.id)):
        near = takewhile(lambda i, row=row: _close(found[i], row), range(len(found) - 1, -1, -1))
        duplicate = next((i for i in near if _same(found[i], row)), None)
        if duplicate is None:
            found.append(row)
        elif row.phase and not found[duplicate].phase:
            found[duplicate] = row
    return found


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


def ranks(rows: Sequence[Enthalpy], phase: str = "") -> list[PhaseRank]:
    """Ranks of every named phase (its lowest row), or of the one ``phase``, which may also be the
    symbol of a space group, by pressure and composition."""
    groups: dict[tuple[float, str], list[Enthalpy]] = {}
    for row in rows:
        groups.setdefault((row.pressure_GPa, reduced_formula(row.formula)), []).append(row)
    found = []
    for (pressure, formula), members in sorted(groups.items()):
        order = distinct(members)
        seen: set[str] = set()
        for rank, row in enumerate(order, start=1):
            names = {row.phase, symbol_of(row.space_group)} if phase else {row.phase}
            name = phase or row.phase
            if not name or name not in names or name in seen:
                continue
            seen.add(name)
            above = ev_to_mev(row.enthalpy_eV_per_atom - order[0].enthalpy_eV_per_atom)
            numbers = rank, len(order), above, row.volume_A3_per_atom
            found.append(PhaseRank(name, formula, pressure, row.source, *numbers, row.model_id))
    return found


def named_phases(
    rows: Sequence[Enthalpy], sources: Sequence[str] = ("relax", "produce")
) -> tuple[Phases, dict[tuple[str, float], str]]:
    """The named phases of the composition that most of their rows have, and (name, pressure) ->
    the other phase, where a structure that was relaxed as one is the other (the one of the two
    that changes its space group)."""
    named = [row for row in rows if row.phase and row.source in sources]
    formulas = [reduced_formula(row.formula) for row in named]
    common = max(sorted(set(formulas)), key=formulas.count, default="")
    phases: Phases = {}
    for row, formula in zip(named, formulas, strict=True):
        if formula == common:
            known = phases.setdefault(row.phase, {}).get(row.pressure_GPa)
            if known is None or row.enthalpy_eV_per_atom < known.enthalpy_eV_per_atom:
                phases[row.phase][row.pressure_GPa] = row
    groups = {name: {row.space_group for row in known.values()} for name, known in phases.items()}
    constant = [name for name in phases if len(groups[name]) == 1]
    transformed = {
        (name, pressure): other
        for name, known in phases.items()
        if name not in constant
        for pressure, row in known.items()
        for other in constant
        if pressure in phases[other] and _one_structure(row, phases[other][pressure])
    }
    return phases, transformed


def relative_enthalpies(
    rows: Sequence[Enthalpy], reference: str = "Im-3m"
) -> list[RelativeEnthalpy]:
    """Every named phase minus the reference (where that is not there, the phase known at most
    pressures), at the pressures where both are known; none without a named phase."""
    phases, transformed = named_phases(rows)
    if not phases:
        return []
    if reference not in phases:
        reference = max(sorted(phases), key=lambda name: len(phases[name]))
    zero = phases[reference]
    return [
        RelativeEnthalpy(
            phase,
            reference,
            p,
            ev_to_mev(row.enthalpy_eV_per_atom - zero[p].enthalpy_eV_per_atom),
            row.model_id,
            transformed.get((phase, p), ""),
        )
        for phase, known in sorted(phases.items())
        for p, row in sorted(known.items())
        if p in zero
    ]


def transition(
    rows: Sequence[Enthalpy], below: str, above: str, sources: Sequence[str] = ("relax", "produce")
) -> Transition | None:
    """The highest pressure where ``above`` falls below ``below``, whatever other phases do; None
    with fewer than two pressures that have both."""
    phases, transformed = named_phases(rows, sources)
    x, y = _difference(phases, transformed, below, above)
    common = sorted(set(phases.get(below, {})) & set(phases.get(above, {})))
    merged = [
        p for p in common if len(x) and p > x[-1] and transformed.get((below, p), "") == above
    ]
    if merged and y[-1] > 0:
        low, high = float(x[-1]), merged[0]
        return Transition(below, above, 0.5 * (low + high), low, high, "continuous")
    if len(x) < 2:
        return None
    falling = [one for one in zero_crossings(x, y) if one.falls]
    if not falling:
        end, how = (x[0], "below") if y[-1] <= 0 else (x[-1], "above")
        return Transition(below, above, float(end), float(x[0]), float(x[-1]), how)  # type: ignore[arg-type]
    return _crossing(below, above, x, y, falling[-1].left, falling[-1].position)


def _difference(
    phases: Phases, transformed: dict[tuple[str, float], str], below: str, above: str
) -> tuple[np.ndarray, np.ndarray]:
    """Pressures (GPa) where two phases are two, and the enthalpy of the second minus that of the
    first (eV/atom) there."""
    first, second = phases.get(below, {}), phases.get(above, {})
    x = [
        p
        for p in sorted(set(first) & set(second))
        if transformed.get((below, p)) != above and transformed.get((above, p)) != below
    ]
    y = [second[p].enthalpy_eV_per_atom - first[p].enthalpy_eV_per_atom for p in x]
    return np.array(x), np.array(y)


def _crossing(
    below: str, above: str, x: np.ndarray, y: np.ndarray, i: int, pressure: GPa
) -> Transition:
    """A crossing between points ``i`` and ``i + 1`` of the difference ``y``. Its error without a
    third point: a tenth of the spacing."""
    slope = abs(float((y[i + 1] - y[i]) / (x[i + 1] - x[i])))
    bends = [0.1 * (x[i + 1] - x[i])]
    others = [k for k in (i - 1, i + 2) if 0 <= k < len(x)]
    if others:
        bends = [_bend(x, y, i, k, pressure) / slope for k in others]
    low, high = float(x[i]), float(x[i + 1])
    return Transition(below, above, pressure, low, high, "crossing", float(max(bends)), slope)


def _bend(x: np.ndarray, y: np.ndarray, i: int, k: int, at: float) -> float:
    """How far the parabola through points i, i + 1, k is off the straight line at ``at``."""
    line = y[i] + (y[i + 1] - y[i]) / (x[i + 1] - x[i]) * (x[k] - x[i])
    return abs((y[k] - line) * (at - x[i]) * (at - x[i + 1]) / ((x[k] - x[i]) * (x[k] - x[i + 1])))


def transitions(
    rows: Sequence[Enthalpy], sources: Sequence[str] = ("relax", "produce")
) -> list[Transition]:
    """Changes of the lowest named phase with rising pressure: between neighbouring pressures, all
    crossings of the lower envelope."""
    every, transformed = named_phases(rows, sources)
    phases = _untransformed(every, transformed)
    found: list[Transition] = []
    for low, high in pairwise(sorted({p for known in phases.values() for p in known})):
        first = _lowest(phases, low)
        if (first, high) in transformed:
            other = transformed[first, high]
            found.append(Transition(first, other, 0.5 * (low + high), low, high, "continuous"))
        else:
            found += _envelope(phases, low, high)
    return found


def _untransformed(phases: Phases, transformed: Container[tuple[str, float]]) -> Phases:
    """Each phase where it is itself."""
    return {
        name: {p: row for p, row in known.items() if (name, p) not in transformed}
        for name, known in phases.items()
    }


def _lowest(phases: Phases, pressure: GPa) -> str:
    there = [name for name, known in phases.items() if pressure in known]
    return min(there, key=lambda name: phases[name][pressure].enthalpy_eV_per_atom)


def _envelope(phases: Phases, low: float, high: float) -> Iterator[Transition]:
    """The crossings of the lowest of the straight lines of all phases between two pressures."""
    there = [name for name, known in phases.items() if low in known and high in known]
    at = low
    current = min(
        there,
        key=lambda name: [phases[name][p].enthalpy_eV_per_atom for p in (low, high)],
        default=None,
    )
    while current is not None:
        crossings = []
        for name in there:
            x, y = _difference(phases, {}, current, name)
            i = int(np.searchsorted(x, low))
            part = zero_crossings(x[i : i + 2], y[i : i + 2])
            crossings += [(one.position, name, x, y, i) for one in part if one.falls]
        later = [one for one in crossings if one[0] >= at]
        if not later:
            return
        at, following, x, y, i = min(later, key=lambda one: one[:2])
        yield _crossing(current, following, x, y, i, at)
        current = following


def stability_sequence(
    rows: Sequence[Enthalpy], sources: Sequence[str] = ("relax", "produce")
) -> tuple[str, ...]:
    """The named phases of lowest static enthalpy with rising pressure, where two or more are
    known."""
    phases, transformed = named_phases(rows, sources)
    pressures = sorted({p for known in phases.values() for p in known})
    two = [p for p in pressures if sum(p in known for known in phases.values()) > 1]
    free = _untransformed(phases, transformed)
    events = [(p, _lowest(free, p)) for p in two]
    events += [(one.pressure_GPa, one.above) for one in transitions(rows, sources)]
    names = [name for _, name in sorted(events, key=lambda event: event[0])]
    return tuple(name for i, name in enumerate(names) if i == 0 or name != names[i - 1])
