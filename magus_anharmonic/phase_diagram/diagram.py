"""From free energies on a grid to a phase diagram: fits, boundaries, probabilities, hull, isotope
shifts; and what it says, one line per finding, from its numbers alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import ON_HULL, HullEntry, choose_end_members, hull_entries
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
from magus_anharmonic.units import GPa, ev_to_mev


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


# --- in words ---

SURE = 0.95
SHOWN = 5
"""Points of a kind that are named one by one."""


def sentences(diagram: PhaseDiagram) -> list[str]:
    """What the diagram says, what it rests on, and what it does not say: one line per finding."""
    return [
        *_points(diagram),
        *_transition_lines(diagram),
        *_alike(diagram),
        *(line for boundary in lines(diagram.boundaries) for line in _boundary(boundary)),
        *_no_boundary(diagram),
        *_shifts(diagram),
        *_checks(diagram),
        *_fits(diagram),
        *_hull_lines(diagram),
        *diagram.notes,
        _errors(diagram),
    ]


def _where(pressure: GPa, temperature: float) -> str:
    return f"{pressure:g} GPa, {temperature:g} K"


def _at(point: GibbsPoint) -> str:
    return _where(point.pressure_GPa, point.temperature_K)


def _meV(value: float, error: float) -> str:  # noqa: N802
    return f"{ev_to_mev(value):.1f} ± {ev_to_mev(error):.1f}"


def _unique(values: Iterable[str], word: str) -> str:
    return f" {word} ".join(dict.fromkeys(values))


def _points(diagram: PhaseDiagram) -> list[str]:
    usable = [point for point in diagram.points if point.usable]
    pressures = [point.pressure_GPa for point in usable]
    temperatures = [point.temperature_K for point in usable]
    text = [
        f"{len(usable)} of {len(diagram.points)} free energies are used: {min(pressures):g} to"
        f" {max(pressures):g} GPa, {min(temperatures):g} to {max(temperatures):g} K."
    ]
    failed = [_failed(point) for point in diagram.points if point.useless]
    unfinished = [_unfinished(point) for point in diagram.points if point.status == "unconverged"]
    for found in (failed, unfinished):
        text += found[:SHOWN]
        if len(found) > SHOWN:
            text.append(f"{len(found) - SHOWN} more points like these: see gibbs.csv.")
    return text


def _failed(point: GibbsPoint) -> str:
    reason = point.reason or "no reason is known"
    return f"{point.phase} ({point.isotopes}) failed at {_at(point)}: {reason}."


def _unfinished(point: GibbsPoint) -> str:
    bound = f"its {point.gibbs:.4f} eV/atom is an upper bound and " if point.bound else ""
    head = f"{point.phase} ({point.isotopes}) did not converge at {_at(point)}"
    return f"{head} ({point.reason or 'no reason is known'}): {bound}not used."


def _transition_lines(diagram: PhaseDiagram) -> list[str]:
    """Phases that transform continuously into others, one line per isotopes and phase."""
    groups: dict[tuple[str, str], list[ContinuousTransition]] = {}
    for one in sorted(diagram.continuous_transitions, key=lambda one: one.temperature):
        groups.setdefault((one.isotopes, one.phase), []).append(one)
    text = []
    for (isotopes, phase), found in groups.items():
        where = "; ".join(f"{_pressure_range(one)} at {one.temperature:g} K" for one in found)
        targets = _unique((one.other or one.space_group for one in found), "or")
        same = _unique((one.other for one in found if one.other), "and")
        merged = f"; beyond, {phase} and {same} are one and the same phase" if same else ""
        text.append(f"{phase} ({isotopes}) transforms into {targets} {where}{merged}.")
    return text


def _pressure_range(one: ContinuousTransition) -> str:
    if one.last is None:
        return f"from {one.first:g} GPa on" if one.rising else f"up to {one.first:g} GPa"
    return f"between {one.last:g} and {one.first:g} GPa"


def _alike(diagram: PhaseDiagram) -> list[str]:
    """Phases with different space groups that agree in G and in volume somewhere: perhaps one
    phase, its symmetry hidden by noise."""
    text = []
    groups: dict[tuple[str, str, str], list[GibbsPoint]] = {}
    for one in (point for point in diagram.points if point.usable):
        groups.setdefault((one.isotopes, one.formula, _at(one)), []).append(one)
    for (isotopes, _, where), found in groups.items():
        for one, other in itertools.combinations(found, 2):
            gap, error = abs(one.gibbs - other.gibbs), math.hypot(one.error, other.error)
            swelling = abs(one.volume - other.volume)
            volume_error = math.hypot(one.volume_error, other.volume_error)
            if gap <= 2 * error and swelling <= 2 * volume_error:
                text.append(
                    f"At {where} ({isotopes}) {one.phase} and {other.phase} agree in G"
                    f" ({_meV(gap, error)} meV/atom) and in volume: perhaps they are one phase."
                )
    return text


def _ends(line: list[Any]) -> list[Any]:
    """The first and the last point, by temperature."""
    return line[:1] if line[0].temperature_K == line[-1].temperature_K else [line[0], line[-1]]


def _boundary(boundary: list[BoundaryPoint]) -> list[str]:
    first, ends = boundary[0], _ends(boundary)
    kind = "" if any(one.stable for one in boundary) else " (metastable: a third phase is lower)"
    where = " and ".join(
        f"{one.pressure_GPa:.1f} GPa (68 %: {_band(one.lower_68_GPa, one.upper_68_GPa)}, 95 %:"
        f" {_band(one.lower_95_GPa, one.upper_95_GPa)}) at {one.temperature_K:g} K"
        for one in ends
    )
    return [f"{first.below} gives way to {first.above} ({first.isotopes}) at {where}{kind}."] + [
        f"At {one.temperature_K:g} K this boundary lies outside of the grid with a probability of"
        f" {100 * (1 - one.probability_inside):.0f} %."
        for one in ends
        if one.probability_inside < SURE
    ]


def _band(low: float, high: float) -> str:
    ends = (low, "below the grid"), (high, "above the grid")
    return " to ".join(f"{end:.1f}" if math.isfinite(end) else word for end, word in ends)


def _no_boundary(diagram: PhaseDiagram) -> list[str]:
    """Sets of phases without any boundary: who is lowest, how surely."""
    text = []
    crossed = {
        (one.isotopes, name) for one in diagram.boundaries for name in (one.below, one.above)
    }
    for (isotopes, formula), phases in diagram.sets.items():
        if len(phases.surfaces) < 2 or any((isotopes, name) in crossed for name in phases.surfaces):
            continue
        compared = [
            one
            for one in diagram.stable
            if (one.isotopes, one.formula) == (isotopes, formula)
            and math.isfinite(one.gap_eV_per_atom)
        ]
        if not compared:
            text.append(f"{formula} ({isotopes}): no two phases at one pressure and temperature.")
            continue
        closest = min(compared, key=lambda one: one.gap_eV_per_atom)
        lowest = _unique((one.phase for one in compared), "and")
        gap = _meV(closest.gap_eV_per_atom, closest.gap_error_eV_per_atom)
        text.append(
            f"{formula} ({isotopes}): {lowest} is lowest, no boundary crosses the grid; smallest"
            f" gap {gap} meV/atom at {_where(closest.pressure_GPa, closest.temperature_K)}."
        )
    return text


def _shifts(diagram: PhaseDiagram) -> list[str]:
    """The isotope effect on each boundary at its lowest and highest temperature."""
    text = []
    for line in lines(diagram.shifts):
        first, ends = line[0], _ends(line)
        where = " and ".join(
            f"{one.shift_GPa:+.1f} ± "
            + (f"{one.error_GPa:.1f}" if math.isfinite(one.error_GPa) else "unknown")
            + f" GPa at {one.temperature_K:g} K"
            for one in ends
        )
        sure = all(abs(one.shift_GPa) > 2 * one.error_GPa for one in ends)
        tail = "" if sure else " (not more than two standard errors everywhere)"
        text.append(
            f"Going from {first.reference} to {first.isotopes} moves the boundary {first.below} to"
            f" {first.above} by {where}{tail}."
        )
    return text


def _checks(diagram: PhaseDiagram) -> list[str]:
    text = []
    for one in diagram.checks:
        found = f"not checked ({one.reason})"
        if not one.reason:
            by_gibbs = _meV(one.by_gibbs, one.by_gibbs_error)
            other = _meV(one.by_entropy_volume, one.by_entropy_volume_error)
            agree = "agree" if one.deviation <= 2 else "DISAGREE"
            found = (
                f"dP/dT {by_gibbs}, dS/dV {other} MPa/K: they {agree} ({one.deviation:.1f} standard"
                " errors)"
            )
        pair = f"{one.below} to {one.above} ({one.isotopes})"
        text.append(f"Clausius-Clapeyron, {pair} at {one.temperature:.0f} K: {found}.")
    return text


def _fits(diagram: PhaseDiagram) -> list[str]:
    """Fits that leave more than the errors explain."""
    return [
        f"G(P,T) of {name} ({isotopes}): chi^2 = {quality.chi2:.0f} for {quality.dof} degrees of"
        f" freedom, errors multiplied by {math.sqrt(quality.inflation):.1f}."
        for (isotopes, _), phases in diagram.sets.items()
        for name, surface in phases.surfaces.items()
        if (quality := surface.quality).dof > 0 and quality.inflation > 1.5
    ]


def _hull_lines(diagram: PhaseDiagram) -> list[str]:
    """At the lowest and highest pressure of the lowest temperature: who is on the hull."""
    text = []
    against = " and ".join(diagram.end_members)
    for isotopes in dict.fromkeys(row.isotopes for row in diagram.hull):
        rows = [row for row in diagram.hull if row.isotopes == isotopes]
        coldest = min(row.temperature_K for row in rows)
        pressures = [row.pressure_GPa for row in rows if row.temperature_K == coldest]
        for at in dict.fromkeys(((min(pressures), coldest), (max(pressures), coldest))):
            entries = [row.entry for row in rows if (row.pressure_GPa, row.temperature_K) == at]
            found = ", ".join(
                f"{one.name} {_meV(one.distance, one.error)} meV/atom above it"
                if one.distance > ON_HULL
                else f"{one.name} on it (probability {100 * one.p_on_hull:.0f} %)"
                for one in entries
            )
            text.append(f"Hull against {against} at {_where(*at)} ({isotopes}): {found}.")
    return text


def _errors(diagram: PhaseDiagram) -> str:
    model = "but not the error of the potential (key model_error)"
    if diagram.model_error > 0:
        model = f"and {ev_to_mev(diagram.model_error):g} meV/atom for the potential in each phase"
    return f"The bands hold the sampling error of G, V and S and the choice of the fit, {model}."
