"""What a campaign found, a line each, for the report: the numbers of figures and `validate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from magus_anharmonic.io.tables import rows_of
from magus_anharmonic.paper import script
from magus_anharmonic.paper.enthalpies import transitions
from magus_anharmonic.paper.quantities import (
    critical_pressure,
    gradient_error,
    kept_by_dft,
    series,
    table_one,
)
from magus_anharmonic.paper.tables import (
    Enthalpy,
    GibbsCorrection,
    GradientError,
    Mode,
    ModelError,
    SpaceGroups,
    read_if_there,
)
from magus_anharmonic.units import ev_to_mev, span

BY = {"model": "by the potential", "dft": "by DFT"}


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.1f}" + ("" if error is None else f" ± {error:.1f}")


def stored(folder: Path) -> list[str]:
    """How many structures at which pressures, and which is lowest in static enthalpy; the
    foundation model's are another energy scale."""
    count = 0
    lowest: dict[float, Enthalpy] = {}
    path = folder / Enthalpy.FILE
    for row in rows_of(Enthalpy, path) if path.is_file() else ():
        count += 1
        if row.source != "foundation":
            known = lowest.setdefault(row.pressure_GPa, row)
            lowest[row.pressure_GPa] = min(known, row, key=lambda r: r.enthalpy_eV_per_atom)
    if not lowest:
        return []
    pressures = sorted(lowest)
    where = f"{pressures[0]:g}"
    if len(pressures) > 1:
        where = f"{len(pressures)} pressures from {where} to {pressures[-1]:g}"
    runs: list[tuple[str, list[float]]] = []
    for pressure in pressures:
        name = lowest[pressure].phase or lowest[pressure].space_group
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(pressure)
    told = [f"{name} at {span(found, 'GPa')}" for name, found in runs]
    return [
        f"{count:,} relaxed structures at {where} GPa are stored.",
        f"Lowest in static enthalpy: {', '.join(told)}.",
    ]


def models(folder: Path) -> list[str]:
    """What finetuning did to the errors on the test set (Table I)."""
    test = [one for one in table_one(read_if_there(ModelError, folder)) if one.set == "test"]
    if len(test) != 2:
        return []
    before, after = test
    parts = [
        f"energy {before.energy_meV_per_atom:.3g} to {after.energy_meV_per_atom:.3g} meV/atom",
        f"forces {before.force_meV_per_A:.3g} to {after.force_meV_per_A:.3g} meV/Å",
    ]
    if before.stress_GPa is not None and after.stress_GPa is not None:
        parts.append(f"stress {before.stress_GPa:.3g} to {after.stress_GPa:.3g} GPa")
    return [
        f"Finetuning changed the root-mean-square errors on the {after.n} test labels:"
        f" {', '.join(parts)}."
    ]


def phases(folder: Path) -> list[str]:
    """Transitions between named phases (Fig. 5)."""
    found = []
    for one in transitions(read_if_there(Enthalpy, folder)):
        where = f"at {_with_error(one.pressure_GPa, one.error_GPa)} GPa"
        if one.how == "continuous":
            where = f"between {one.between_low_GPa:g} and {one.between_high_GPa:g} GPa"
        found.append(f"{one.above} follows {one.below} in static enthalpy {where}.")
    return found


def space_groups(folder: Path) -> list[str]:
    """How many candidates that changed with SSCHA are static minima of DFT."""
    kept, checked = kept_by_dft(read_if_there(SpaceGroups, folder))
    if not checked:
        return []
    return [
        f"{kept} of {checked} candidates that SSCHA brings to another space group keep their static"
        " one when DFT relaxes them: real static minima."
    ]


def modes(folder: Path) -> list[str]:
    """Where each mode turns stable: the critical pressures of Fig. 4a."""
    found = []
    for (phase, irrep, method, by), points in series(read_if_there(Mode, folder)).items():
        one = critical_pressure(points)
        head = f"The {irrep} mode of {phase} ({method}, {BY[by]})"
        signs = {p.frequency_squared_cm2 >= 0 for p in points}
        if one.critical_pressure_GPa is not None:
            where = _with_error(one.critical_pressure_GPa, one.error_GPa)
            found.append(f"{head} turns from imaginary to real at {where} GPa.")
        elif len(signs) == 1:
            where = span((one.lowest_GPa, one.highest_GPa), "GPa")
            found.append(f"{head} is {'real' if one.stable else 'imaginary'} at {where}.")
        else:
            found.append(f"{head} changes its sign, never from imaginary to real.")
    return found


def gradients(folder: Path) -> list[str]:
    """What averaging over an ensemble leaves of the error of the forces (Figs. 7 and 8)."""
    rows, found = read_if_there(GradientError, folder), []
    for phase, pressure in dict.fromkeys((row.phase, row.pressure_GPa) for row in rows):
        one, many = (
            gradient_error(rows, phase, pressure, quantity)
            for quantity in ("force", "gradient_centroid")
        )
        if one is None or many is None:
            continue
        floor = (
            "" if many.floor is None else f"; averaging alone leaves {ev_to_mev(many.floor):.2g}"
        )
        found.append(
            f"{phase} at {pressure:g} GPa: averaging over {many.n_configs} configurations leaves"
            f" {ev_to_mev(many.rmse):.3g} of {ev_to_mev(one.rmse):.3g} meV/Å error of the"
            f" forces{floor}."
        )
    return found


def corrections(folder: Path) -> list[str]:
    """What DFT labels in an ensemble add to the free energy."""
    found = []
    for row in read_if_there(GibbsCorrection, folder):
        error = row.correction_error_eV_per_atom
        margin = "" if error is None else f" ± {ev_to_mev(error):.2g}"
        change = f"{ev_to_mev(row.correction_eV_per_atom):.3g}{margin}"
        found.append(
            f"{row.phase} at {row.pressure_GPa:g} GPa: {row.n_labels} DFT labels of its ensemble"
            f" change G by {change} meV/atom."
        )
        if row.electronic_eV_per_atom is not None:
            found.append(
                f"{row.phase} at {row.pressure_GPa:g} GPa: free energy of the electrons at"
                f" {row.electronic_temperature_K:g} K minus their energy:"
                f" {ev_to_mev(row.electronic_eV_per_atom):.3g} meV/atom."
            )
    return found


def validation(folder: Path) -> list[str]:
    """What ``magus-anharmonic validate`` said last, and what disagreed."""
    rows = read_if_there(script("validate").Validated, folder.parent, "validation.csv")
    if not rows:
        return []
    counts = Counter(row.verdict for row in rows)
    return [
        f"Validation: {counts['agrees']} values agree, {counts['disagrees']} disagree,"
        f" {counts['not in this run']} are not in this run.",
        *(" ".join(row.line.split()) + "." for row in rows if row.verdict == "disagrees"),
    ]


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    phases,
    space_groups,
    modes,
    gradients,
    corrections,
    validation,
)
"""Each with the folder of a campaign's tables; raises ``InputError`` for a table that is wrong."""
