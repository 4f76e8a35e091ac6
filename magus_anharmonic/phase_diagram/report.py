"""What a phase diagram says, from its numbers alone: one line per finding, its tables, its
pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magus_anharmonic.hull import ON_HULL
from magus_anharmonic.io.digests import finite
from magus_anharmonic.io.files import write_json
from magus_anharmonic.io.tables import write
from magus_anharmonic.phase_diagram.boundaries import BoundaryPoint
from magus_anharmonic.phase_diagram.diagram import (
    ContinuousTransition,
    HullRow,
    PhaseDiagram,
    Stable,
    lines,
)
from magus_anharmonic.phase_diagram.figures import draw, draw_hull
from magus_anharmonic.phase_diagram.points import GibbsPoint, write_points
from magus_anharmonic.units import GPa, ev_to_mev

SURE = 0.95
SHOWN = 5
"""Points of a kind that are named one by one."""


def sentences(diagram: PhaseDiagram) -> list[str]:
    """What the diagram says, what it rests on, and what it does not say: one line per finding."""
    return [
        *_points(diagram),
        *_continuous_transitions(diagram),
        *_alike(diagram),
        *(line for boundary in lines(diagram.boundaries) for line in _boundary(boundary)),
        *_no_boundary(diagram),
        *_shifts(diagram),
        *_checks(diagram),
        *_fits(diagram),
        *_hull(diagram),
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


def _continuous_transitions(diagram: PhaseDiagram) -> list[str]:
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


def _hull(diagram: PhaseDiagram) -> list[str]:
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


def write_diagram(diagram: PhaseDiagram, folder: str | Path) -> dict[str, Path]:
    """``gibbs.csv``, ``boundaries.csv``, ``stability.csv``, ``summary.json`` and the picture as SVG
    and PNG; with a hull that too.

    Returns the pictures: ``png``, ``svg`` and, with a hull, ``hull`` (PNG; ``hull.svg`` lies beside
    it).
    """
    target = Path(folder)
    write_points(target / "gibbs.csv", diagram.points)
    write(BoundaryPoint, target / "boundaries.csv", diagram.boundaries)
    write(Stable, target / "stability.csv", diagram.stable)
    svg, png = draw(diagram, target)
    pictures = {"png": png, "svg": svg}
    if diagram.hull:
        write(HullRow, target / "hull.csv", diagram.hull)
        pictures["hull"] = draw_hull(diagram.hull, diagram.end_members, target)[1]
    write_json(target / "summary.json", summary(diagram))
    return pictures


def summary(diagram: PhaseDiagram) -> dict[str, Any]:
    """Everything in one dictionary ready for JSON: words, boundaries, quality of the fits, checks;
    infinite numbers as null."""
    fits = [
        {
            "isotopes": isotopes,
            "formula": formula,
            "phase": name,
            "chi2": surface.quality.chi2,
            "degrees_of_freedom": surface.quality.dof,
            "covariance_inflation": surface.quality.inflation,
            "n": surface.quality.n,
            "rms_of_residuals_over_errors": surface.quality.rms,
            "terms": [
                {
                    "weight": m.weight,
                    "powers_of_P": m.basis.cold,
                    "powers_of_P_thermal": m.basis.thermal,
                    "einstein_K": list(m.basis.thetas),
                }
                for m in surface.models
            ],
        }
        for (isotopes, formula), phases in diagram.sets.items()
        for name, surface in phases.surfaces.items()
    ]
    return finite(
        {
            "sentences": sentences(diagram),
            "n_points": len(diagram.points),
            "n_usable": sum(point.usable for point in diagram.points),
            "models": sorted({point.model for point in diagram.points if point.model}),
            "model_error_eV_per_atom": diagram.model_error,
            "boundaries": [asdict(one) for one in diagram.boundaries],
            "continuous_transitions": [asdict(one) for one in diagram.continuous_transitions],
            "clausius_clapeyron": [
                {**asdict(one), "deviation": None if one.reason else one.deviation}
                for one in diagram.checks
            ],
            "isotope_shifts": [asdict(one) for one in diagram.shifts],
            "fits": fits,
            "notes": list(diagram.notes),
        }
    )
