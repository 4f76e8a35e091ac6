"""From free energies on a grid to a phase diagram: fits, boundaries, probabilities, hull, isotope
shifts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import HullEntry, choose_end_members, hull_entries
from magus_anharmonic.notebook import Described
from magus_anharmonic.phase_diagram.boundaries import (
    BoundaryPoint,
    IsotopeShift,
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
    """Who is lowest at a point of the grid, the probability of it and the gap to the second: a row
    of ``stability.csv``."""

    isotopes: str
    formula: str
    pressure_GPa: float  # noqa: N815
    temperature_K: float  # noqa: N815
    phase: str
    probability: float
    gap_eV_per_atom: float = math.nan  # noqa: N815
    gap_error_eV_per_atom: float = math.nan  # noqa: N815


@dataclass(frozen=True)
class HullRow:
    """One entry of the hull at one point of the grid."""

    isotopes: str
    pressure_GPa: float  # noqa: N815
    temperature_K: float  # noqa: N815
    entry: HullEntry


@dataclass(frozen=True, repr=False)
class PhaseDiagram(Described):
    """Everything that follows from the points. ``sets``: by (isotopes, formula)."""

    points: tuple[GibbsPoint, ...]
    sets: dict[tuple[str, str], PhaseSet]
    boundaries: tuple[BoundaryPoint, ...]
    checks: tuple[SlopeCheck, ...]
    continuous_transitions: tuple[ContinuousTransition, ...]
    stable: tuple[Stable, ...]
    hull: tuple[HullRow, ...]
    shifts: tuple[IsotopeShift, ...]
    model_error: float
    notes: tuple[str, ...] = ()
    end_members: tuple[str, ...] = ()
    """Formulas against which the formation free energies of ``hull`` count."""

    def described(self) -> dict[str, str]:
        """Its points, and each boundary from its lowest to its highest temperature."""
        ends = {
            f"{line[0].below} | {line[0].above} ({line[0].isotopes})": "; ".join(
                f"{end.pressure_GPa:.1f}"
                + (f" +- {end.error_GPa:.1f} GPa" if np.isfinite(end.error_GPa) else " GPa (open)")
                + f" at {end.temperature_K:g} K"
                for end in dict.fromkeys((line[0], line[-1]))
            )
            for line in lines(self.boundaries)
        }
        usable = sum(point.usable for point in self.points)
        return {"points": f"{usable} of {len(self.points)} usable", **ends}

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
    sets = {
        (isotopes, formula): phase_set(
            [p for p in points if p.formula == formula],
            isotopes,
            n_samples=n_samples,
            seed=seed,
            offset_error=model_error,
        )
        for isotopes, formula in dict.fromkeys((p.isotopes, p.formula) for p in points if p.usable)
    }
    boundaries = [one for phases in sets.values() for one in all_boundaries(phases)]
    checks = [slope_check(points, line, seed=seed) for line in lines(boundaries)]
    corners = _corners(points, sets, end_members)
    hull, notes = _hull(points, sets, corners) if corners else ([], [])
    return PhaseDiagram(
        tuple(points),
        sets,
        tuple(boundaries),
        tuple(check for check in checks if check is not None),
        tuple(_continuous_transitions(points)),
        tuple(_stable(points, sets)),
        tuple(hull),
        tuple(isotope_shifts(boundaries, points[0].isotopes)),
        model_error,
        tuple(notes),
        tuple(corners),
    )


Line = TypeVar("Line", BoundaryPoint, IsotopeShift)


def lines(points: Iterable[Line]) -> list[list[Line]]:
    """The points of each boundary, by isotopes and phases, in the order of the temperature."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for one in points:
        found.setdefault((one.isotopes, one.below, one.above), []).append(one)
    return [sorted(line, key=lambda one: one.temperature_K) for line in found.values()]


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
        one = gone[0] if rising else gone[-1]
        first = one.pressure_GPa
        beside = [p for p in kept if (p < first) == rising]
        last = (max if rising else min)(beside, default=None)
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
        for at in _grid(points):
            probability = lowest_probabilities(phases, *at)
            if not probability:
                continue
            gibbs = {name: float(phases.surfaces[name].gibbs(*at)) for name in probability}
            lowest, *others = sorted(gibbs, key=lambda name: gibbs[name])
            gap = ()
            if others:
                sampled = [phases.samples[name].values(*at)[:, 0] for name in (lowest, others[0])]
                error = float((sampled[1] - sampled[0]).std(ddof=1))
                gap = (gibbs[others[0]] - gibbs[lowest], error)
            found.append(Stable(isotopes, formula, *at, lowest, probability[lowest], *gap))
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
    rows: list[HullRow] = []
    notes: dict[str, str] = {}
    for isotopes in dict.fromkeys(isotopes for isotopes, _ in sets):
        for at in _grid(points):
            here = [
                (name, formula, float(surface.gibbs(*at)), phases.samples[name].values(*at)[:, 0])
                for (other, formula), phases in sets.items()
                for name, surface in phases.surfaces.items()
                if other == isotopes and surface.inside(*at)
            ]
            names, formulas, energies, samples = zip(*here, strict=True) if here else ((),) * 4
            try:
                entries = hull_entries(
                    names, formulas, np.array(energies), np.array(samples).T, corners
                )
            except InputError as error:
                where = f"{at[0]:g} GPa, {at[1]:g} K ({isotopes})"
                notes[f"no hull at {where}: {error}"] = str(error)
                continue
            rows += [HullRow(isotopes, *at, entry) for entry in entries]
    if not rows:
        raise InputError(*dict.fromkeys(notes.values()))
    return rows, list(notes)
