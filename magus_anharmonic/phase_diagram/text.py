"""A phase diagram in plain words, from its numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from magus_anharmonic.phase_diagram.boundaries import BoundaryPoint
from magus_anharmonic.phase_diagram.diagram import ContinuousTransition, PhaseDiagram, lines

SURE = 0.95


def sentences(diagram: PhaseDiagram) -> list[str]:
    """What the diagram says, what it rests on, and what it does not say."""
    return [
        *_points(diagram),
        *_continuous_transitions(diagram),
        *_alike(diagram),
        *(line for boundary in lines(diagram.boundaries) for line in _boundary(diagram, boundary)),
        *_no_boundary(diagram),
        *_shifts(diagram),
        *_checks(diagram),
        *_fits(diagram),
        *_hull(diagram),
        *diagram.notes,
        _errors(diagram),
    ]


def _points(diagram: PhaseDiagram) -> list[str]:
    usable = [point for point in diagram.points if point.usable]
    pressures, temperatures = (
        [getattr(point, name) for point in usable] for name in ("pressure_GPa", "temperature_K")
    )
    text = [
        f"{len(usable)} of {len(diagram.points)} free energies are used, {min(pressures):g} to"
        f" {max(pressures):g} GPa and {min(temperatures):g} to {max(temperatures):g} K; nothing is"
        " said outside of them."
    ]
    failed = [point for point in diagram.points if point.useless]
    for point in failed[:5]:
        where = f"{point.pressure_GPa:g} GPa, {point.temperature_K:g} K"
        text.append(
            f"{point.phase} ({point.isotopes}) failed at {where}:"
            f" {point.reason or 'no reason is known'}."
        )
    if len(failed) > 5:
        text.append(f"{len(failed) - 5} more points failed: see gibbs.csv.")
    unfinished = [point for point in diagram.points if point.status == "unconverged"]
    for point in unfinished[:5]:
        where = f"{point.pressure_GPa:g} GPa, {point.temperature_K:g} K"
        value = (
            f"its {point.gibbs_eV_per_atom:.4f} eV/atom is an upper bound and not used"
            if point.bound
            else "not used"
        )
        text.append(
            f"{point.phase} ({point.isotopes}) did not converge at {where}"
            f" ({point.reason or 'no reason is known'}): {value}."
        )
    if len(unfinished) > 5:
        text.append(
            f"{len(unfinished) - 5} more points did not converge and are not used: see gibbs.csv."
        )
    return text


def _continuous_transitions(diagram: PhaseDiagram) -> list[str]:
    """Phases that transform continuously into others, one sentence per isotopes and phase."""
    groups: dict[tuple[str, str], list[ContinuousTransition]] = {}
    for one in diagram.continuous_transitions:
        groups.setdefault((one.isotopes, one.phase), []).append(one)
    text = []
    for (isotopes, phase), found in groups.items():
        where = "; ".join(
            f"{_pressure_range(one)} at {one.temperature:g} K"
            for one in sorted(found, key=lambda one: one.temperature)
        )
        targets = _unique(one.other or one.space_group for one in found)
        same = " and ".join(_unique(one.other for one in found if one.other))
        merged = (
            f" Beyond, {phase} and {same} are one and the same phase: the ions' motion removes the"
            " distortion."
            if same
            else ""
        )
        text.append(f"{phase} ({isotopes}) transforms into {' or '.join(targets)} {where}.{merged}")
    return text


def _alike(diagram: PhaseDiagram) -> list[str]:
    """Phases with different space groups that agree in G and in volume somewhere: perhaps one
    phase, its symmetry hidden by noise."""
    text = []
    usable = [point for point in diagram.points if point.usable]
    for k, one in enumerate(usable):
        for other in usable[k + 1 :]:
            same_point = all(
                getattr(one, name) == getattr(other, name)
                for name in ("isotopes", "formula", "pressure_GPa", "temperature_K")
            )
            if not same_point or one.phase == other.phase:
                continue
            gap, error = (
                one.gibbs_eV_per_atom - other.gibbs_eV_per_atom,
                math.hypot(one.error, other.error),
            )
            swelling = abs(one.volume_A3_per_atom - other.volume_A3_per_atom)
            if abs(gap) <= 2 * error and swelling <= 2 * math.hypot(
                one.volume_error_A3_per_atom, other.volume_error_A3_per_atom
            ):
                text.append(
                    f"At {one.pressure_GPa:g} GPa, {one.temperature_K:g} K ({one.isotopes})"
                    f" {one.phase} and {other.phase} agree in G ({1000 * abs(gap):.1f} +-"
                    f" {1000 * error:.1f} meV/atom apart) and in volume within two standard errors:"
                    " perhaps they are one phase there, and a boundary between them is then a"
                    " continuous transition."
                )
    return text


def _pressure_range(one: ContinuousTransition) -> str:
    if one.last is None:
        return (
            f"at every pressure that was run (from {one.first:g} GPa)"
            if one.rising
            else f"up to {one.first:g} GPa"
        )
    low, high = sorted((one.last, one.first))
    return (
        f"between {low:g} and {high:g} GPa"
        if one.rising
        else f"below {high:g} GPa (it is itself from {high:g}, no longer at {low:g})"
    )


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _boundary(diagram: PhaseDiagram, boundary: Sequence[BoundaryPoint]) -> list[str]:
    first, last = boundary[0], boundary[-1]
    kind = "" if any(one.stable for one in boundary) else " (metastable: a third phase is lower)"
    ends = [first] if first.temperature == last.temperature else [first, last]
    where = " and ".join(
        f"{one.pressure:.1f} GPa {_band(one)} at {one.temperature:g} K" for one in ends
    )
    text = [f"{first.below} gives way to {first.above} ({first.isotopes}) at {where}{kind}."]
    unsure = [one for one in ends if one.inside < SURE]
    for one in unsure:
        text.append(
            f"At {one.temperature:g} K this boundary is not pinned down by the grid: with a"
            f" probability of {1 - one.inside:.0%} the two do not cross between the"
            " pressures that were run."
        )
    return text


def _band(one: BoundaryPoint) -> str:
    if math.isfinite(one.error):
        return (
            f"(+- {one.error:.1f}, 95 %: {_edge(one.lower_95, 'below')} to"
            f" {_edge(one.upper_95, 'above')})"
        )
    return f"(68 %: {_edge(one.lower_68, 'below')} to {_edge(one.upper_68, 'above')})"


def _edge(value: float, side: str) -> str:
    return f"{value:.1f}" if math.isfinite(value) else f"{side} the grid"


def _no_boundary(diagram: PhaseDiagram) -> list[str]:
    """Sets of phases without any boundary: who is lowest, how surely."""
    text = []
    crossed = {
        (one.isotopes, name) for one in diagram.boundaries for name in (one.below, one.above)
    }
    for (isotopes, formula), phases in diagram.sets.items():
        names = list(phases.surfaces)
        if len(names) < 2 or any((isotopes, name) in crossed for name in names):
            continue
        mine = [one for one in diagram.stable if (one.isotopes, one.formula) == (isotopes, formula)]
        compared = [one for one in mine if math.isfinite(one.gap)]
        if not compared:
            text.append(
                f"No two phases of {formula} ({isotopes}) have free energies at the same pressure"
                " and temperature."
            )
            continue
        closest = min(compared, key=lambda one: one.gap)
        lowest = _unique(one.phase for one in compared)
        text.append(
            f"{' and '.join(lowest)} {'is' if len(lowest) == 1 else 'are'} lowest for {formula}"
            f" ({isotopes}) wherever phases can be compared; no boundary crosses the grid. The"
            f" smallest gap is {1000 * closest.gap:.1f} +- {1000 * closest.gap_error:.1f} meV/atom,"
            f" at {closest.pressure:g} GPa and {closest.temperature:g} K."
        )
    return text


def _shifts(diagram: PhaseDiagram) -> list[str]:
    """The isotope effect on each boundary at its lowest and highest temperature, and on continuous
    transitions."""
    groups: dict[tuple[str, str, str], list[dict[str, float | str]]] = {}
    for shift in diagram.shifts:
        groups.setdefault(
            (str(shift["isotopes"]), str(shift["below"]), str(shift["above"])), []
        ).append(shift)
    text = []
    for (isotopes, below, above), found in groups.items():
        ordered = sorted(found, key=lambda shift: float(shift["temperature_K"]))
        ends = ordered[:1] if len(ordered) == 1 else [ordered[0], ordered[-1]]
        where = " and ".join(
            f"{float(s['shift_GPa']):+.1f} GPa {_shift_error(s)} at {float(s['temperature_K']):g} K"
            for s in ends
        )
        sure = all(abs(float(s["shift_GPa"])) > 2 * float(s["error_GPa"]) for s in ends)
        tail = "" if sure else " (not more than two standard errors everywhere)"
        text.append(
            f"Going from {found[0]['reference']} to {isotopes} moves the boundary {below} to"
            f" {above} by {where}{tail}."
        )
    return text


def _shift_error(shift: dict[str, float | str]) -> str:
    error = float(shift["error_GPa"])
    return f"+- {error:.1f}" if math.isfinite(error) else "(error open: a band leaves the grid)"


def _checks(diagram: PhaseDiagram) -> list[str]:
    text = []
    for one in diagram.checks:
        name = (
            f"Clausius-Clapeyron, {one.below} to {one.above} ({one.isotopes}) at"
            f" {one.temperature:.0f} K"
        )
        if one.reason:
            text.append(f"{name}: not checked ({one.reason}).")
            continue
        verdict = "agree" if one.deviation <= 2 else "DISAGREE"
        text.append(
            f"{name}: dP/dT by the free energies alone {1000 * one.by_gibbs:+.1f} +-"
            f" {1000 * one.by_gibbs_error:.1f} MPa/K, dS/dV by the entropies and volumes alone"
            f" {1000 * one.by_entropy_volume:+.1f} +- {1000 * one.by_entropy_volume_error:.1f}"
            f" MPa/K: they {verdict} ({one.deviation:.1f} standard errors)."
        )
    return text


def _fits(diagram: PhaseDiagram) -> list[str]:
    """Fits that leave more than the errors explain."""
    text = []
    for (isotopes, _), phases in diagram.sets.items():
        for name, surface in phases.surfaces.items():
            quality = surface.quality
            if quality.dof > 0 and quality.inflation > 1.5:
                worst = max(quality.rms, key=lambda kind: quality.rms[kind])
                text.append(
                    f"The smooth G(P,T) of {name} ({isotopes}) leaves chi^2 = {quality.chi2:.0f}"
                    f" for {quality.dof} degrees of freedom (mostly {worst},"
                    f" {quality.rms[worst]:.1f} standard errors): its errors were multiplied by"
                    f" {math.sqrt(quality.inflation):.1f}."
                )
    return text


def _hull(diagram: PhaseDiagram) -> list[str]:
    """At the lowest and highest pressure of the lowest temperature: who is on the hull."""
    text = []
    for isotopes in _unique(row.isotopes for row in diagram.hull):
        rows = [row for row in diagram.hull if row.isotopes == isotopes]
        coldest = min(row.temperature for row in rows)
        pressures = sorted({row.pressure for row in rows if row.temperature == coldest})
        for pressure in dict.fromkeys((pressures[0], pressures[-1])):
            here = [
                row.entry for row in rows if (row.pressure, row.temperature) == (pressure, coldest)
            ]
            on = [f"{one.name} ({one.p_on_hull:.0%})" for one in here if one.distance <= 1e-9]
            above = [
                f"{one.name} {1000 * one.distance:.1f} +- {1000 * one.error:.1f}"
                for one in here
                if one.distance > 1e-9
            ]
            against = " and ".join(diagram.end_members)
            line = (
                f"Hull against {against} at {pressure:g} GPa, {coldest:g} K ({isotopes}): on it"
                f" (probabilities) {', '.join(on)}"
            )
            text.append(line + (f"; above it (meV/atom) {', '.join(above)}." if above else "."))
    return text


def _errors(diagram: PhaseDiagram) -> str:
    model = (
        f"and {1000 * diagram.model_error:g} meV/atom for the potential in each phase"
        if diagram.model_error > 0
        else "but not the error of the potential (key model_error)"
    )
    return (
        f"The bands hold the sampling error of G, V and S and the choice of the fit, {model}; "
        "finite size enters through the term in G only."
    )
