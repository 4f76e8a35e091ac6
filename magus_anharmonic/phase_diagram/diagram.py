"""From free energies on a grid to a phase diagram: fits, boundaries, probabilities, hull, isotope
shifts, tables, picture, plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import HullEntry, choose_end_members, hull_entries
from magus_anharmonic.phase_diagram.boundaries import (
    BoundaryPoint,
    PhaseSet,
    SlopeCheck,
    all_boundaries,
    isotope_shifts,
    lowest_probabilities,
    phase_set,
    slope_check,
)
from magus_anharmonic.phase_diagram.points import GibbsPoint


@dataclass(frozen=True)
class ContinuousTransition:
    """``phase`` transforms continuously into another one (``space_group``, ``other`` when it is a
    phase of the diagram) between two pressures, at T.

    GPa and K. last : the highest pressure below at which it is itself (None: nowhere), first : the
    lowest at which it is not. With ``rising`` False the other way round.
    """

    isotopes: str
    phase: str
    other: str
    space_group: str
    temperature: float
    last: float | None
    first: float
    rising: bool


@dataclass(frozen=True)
class Stable:
    """Who is lowest at a point of the grid, and the probability of it."""

    isotopes: str
    formula: str
    pressure: float
    temperature: float
    phase: str
    probability: float
    gap: float
    """eV/atom to the second."""
    gap_error: float


@dataclass(frozen=True)
class HullRow:
    """One entry of the hull at one point of the grid."""

    isotopes: str
    pressure: float
    temperature: float
    entry: HullEntry


@dataclass(frozen=True)
class PhaseDiagram:
    """Everything that follows from the points. ``sets``: by (isotopes, formula)."""

    points: tuple[GibbsPoint, ...]
    sets: dict[tuple[str, str], PhaseSet]
    boundaries: tuple[BoundaryPoint, ...]
    checks: tuple[SlopeCheck, ...]
    continuous_transitions: tuple[ContinuousTransition, ...]
    stable: tuple[Stable, ...]
    hull: tuple[HullRow, ...]
    shifts: tuple[dict[str, float | str], ...]
    model_error: float
    notes: tuple[str, ...] = ()
    end_members: tuple[str, ...] = ()
    """Formulas against which the formation free energies of ``hull`` count."""

    @property
    def isotopes(self) -> list[str]:
        return list(dict.fromkeys(point.isotopes for point in self.points))


def phase_diagram(
    points: Sequence[GibbsPoint],
    *,
    end_members: Sequence[str] = (),
    model_error: float = 0.0,
    n_samples: int = 1000,
    seed: int = 0,
) -> PhaseDiagram:
    """Fit, cross and sample; pure. ``model_error``: eV/atom of G of a phase as a whole.

    Raises ``InputError`` when no point is usable, when points are of several models, or when the
    end members do not fit.
    """
    if not any(point.usable for point in points):
        reasons = sorted({point.reason for point in points if point.reason}) or [
            "none has a free energy"
        ]
        raise InputError(f"no point of the phase diagram can be used: {'; '.join(reasons[:5])}")
    models = sorted({point.model for point in points if point.usable and point.model})
    if len(models) > 1:
        raise InputError(
            f"free energies of several models ({', '.join(models)}) cannot be compared; take the"
            " points of one"
        )
    sets = {}
    for isotopes, formula in dict.fromkeys((p.isotopes, p.formula) for p in points if p.usable):
        mine = [p for p in points if p.formula == formula]
        sets[isotopes, formula] = phase_set(
            mine, isotopes, n_samples=n_samples, seed=seed, offset_error=model_error
        )
    boundaries = [one for phases in sets.values() for one in all_boundaries(phases)]
    checks = [
        check
        for line in lines(boundaries)
        if (check := slope_check(points, line, seed=seed)) is not None
    ]
    corners = _corners(points, sets, end_members)
    hull, notes = _hull(points, sets, corners) if corners else ([], [])
    reference = points[0].isotopes
    return PhaseDiagram(
        tuple(points),
        sets,
        tuple(boundaries),
        tuple(checks),
        tuple(_continuous_transitions(points)),
        tuple(_stable(points, sets)),
        tuple(hull),
        tuple(isotope_shifts(boundaries, reference)),
        model_error,
        tuple(notes),
        tuple(corners),
    )


def lines(boundaries: Sequence[BoundaryPoint]) -> list[list[BoundaryPoint]]:
    """The points of each boundary, by isotopes and phases, in the order of the temperature."""
    found: dict[tuple[str, str, str], list[BoundaryPoint]] = {}
    for one in boundaries:
        found.setdefault((one.isotopes, one.below, one.above), []).append(one)
    return [
        sorted(line, key=lambda one: (one.temperature, one.pressure)) for line in found.values()
    ]


def _continuous_transitions(points: Sequence[GibbsPoint]) -> list[ContinuousTransition]:
    """Where along the pressure a phase stops being itself, per isotopes and temperature."""
    found = []
    rows: dict[tuple[str, str, float], list[GibbsPoint]] = {}
    for point in points:
        if point.usable or point.status == "transformed":
            rows.setdefault((point.isotopes, point.phase, point.temperature_K), []).append(point)
    for (isotopes, phase, temperature), row in rows.items():
        row.sort(key=lambda point: point.pressure_GPa)
        gone = [point for point in row if point.status == "transformed"]
        kept = [point.pressure_GPa for point in row if point.usable]
        if not gone:
            continue
        rising = not kept or kept[0] < gone[0].pressure_GPa
        first = gone[0].pressure_GPa if rising else gone[-1].pressure_GPa
        beside = [p for p in kept if (p < first) == rising]
        last = None if not beside else max(beside) if rising else min(beside)
        one = next(point for point in gone if point.pressure_GPa == first)
        found.append(
            ContinuousTransition(
                isotopes, phase, one.same_as, one.space_group, temperature, last, first, rising
            )
        )
    return found


def _grid(points: Sequence[GibbsPoint]) -> list[tuple[float, float]]:
    return sorted({(point.pressure_GPa, point.temperature_K) for point in points})


def _stable(points: Sequence[GibbsPoint], sets: dict[tuple[str, str], PhaseSet]) -> list[Stable]:
    found = []
    for (isotopes, formula), phases in sets.items():
        for pressure, temperature in _grid(points):
            probability = lowest_probabilities(phases, pressure, temperature)
            if not probability:
                continue
            order = sorted(
                probability,
                key=lambda name: float(phases.surfaces[name].gibbs(pressure, temperature)),
            )
            gap, error = math.nan, math.nan
            if len(order) > 1:
                sampled = [
                    phases.samples[name].values(pressure, temperature)[:, 0] for name in order[:2]
                ]
                gap = float(
                    phases.surfaces[order[1]].gibbs(pressure, temperature)
                    - phases.surfaces[order[0]].gibbs(pressure, temperature)
                )
                error = float((sampled[1] - sampled[0]).std(ddof=1))
            found.append(
                Stable(
                    isotopes,
                    formula,
                    pressure,
                    temperature,
                    order[0],
                    probability[order[0]],
                    gap,
                    error,
                )
            )
    return found


def _corners(
    points: Sequence[GibbsPoint], sets: dict[tuple[str, str], PhaseSet], end_members: Sequence[str]
) -> list[str]:
    """The formulas against which the hull counts, from names of phases or formulas; none where
    there is nothing to make a hull of."""
    formulas = sorted({formula for _, formula in sets})
    by_phase = {point.phase: point.formula for point in points}
    wanted = [by_phase.get(name, name) for name in end_members]
    return choose_end_members(formulas, wanted) if len(formulas) > 1 or wanted else []


def _hull(
    points: Sequence[GibbsPoint], sets: dict[tuple[str, str], PhaseSet], corners: Sequence[str]
) -> tuple[list[HullRow], list[str]]:
    """Hulls at every point of the grid where the end members have a free energy; where they have
    none it is said."""
    rows, notes = [], []
    for isotopes in dict.fromkeys(isotopes for isotopes, _ in sets):
        for pressure, temperature in _grid(points):
            names, formulas, energies, samples = [], [], [], []
            for (other, formula), phases in sets.items():
                for name, surface in phases.surfaces.items() if other == isotopes else ():
                    if bool(surface.inside(pressure, temperature)):
                        names.append(name)
                        formulas.append(formula)
                        energies.append(float(surface.gibbs(pressure, temperature)))
                        samples.append(phases.samples[name].values(pressure, temperature)[:, 0])
            try:
                entries = hull_entries(
                    names, formulas, np.array(energies), np.array(samples).T, corners
                )
            except InputError as error:
                notes.append(
                    f"no hull at {pressure:g} GPa, {temperature:g} K ({isotopes}): {error}"
                )
                continue
            rows += [HullRow(isotopes, pressure, temperature, entry) for entry in entries]
    if not rows:
        raise InputError(*dict.fromkeys(note.split(": ", 1)[1] for note in notes))
    return rows, notes
