"""SSCHA free energies of phases on a grid of pressures and temperatures, each point starting from
its neighbour; stored and resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator, as_evaluator
from magus_anharmonic.gate import read_structures
from magus_anharmonic.io.digests import safe_name
from magus_anharmonic.io.files import read_json, readable
from magus_anharmonic.phase_diagram.points import (
    NATURAL,
    GibbsPoint,
    read_points,
    with_same_phase,
    write_points,
)
from magus_anharmonic.runs.record import check_results_version, write_run_record
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings, PhaseSettings
from magus_anharmonic.sscha.ensemble import entropy_with_error
from magus_anharmonic.sscha.result import (
    SschaResult,
    final_ensemble,
    read_start_file,
    reweighted_ensemble,
)
from magus_anharmonic.structures import isotopes as isotopes_of
from magus_anharmonic.structures import space_group, stripped, symbol_of
from magus_anharmonic.units import GPa, ev_per_a3_to_gpa

log = logging.getLogger(__name__)

GridIndex = tuple[str, int, int]
"""Isotopes, number of the pressure, number of the temperature."""
RESPONSE_ERROR = 0.2
"""Relative error of the bulk modulus at the start of a run, with which volumes are brought to the
target pressure."""


def read_phase(name: str, phase: PhaseSettings) -> Atoms:
    """The structure of one phase; raises ``InputError`` that names phase and file."""
    try:
        return stripped(read_structures(phase.structure, index=phase.index)[0])
    except InputError as error:
        raise InputError(*(f"phases.{name}: {problem}" for problem in error.problems)) from None


def point_folder(root: Path, phase: str, isotopes: str, pressure: GPa, temperature: float) -> Path:
    """Where one run is stored."""
    return root / safe_name(phase) / safe_name(isotopes) / f"{pressure:g}GPa-{temperature:g}K"


def run_locked(
    settings: PhaseDiagramSettings, output: Path, evaluator: Any = None
) -> list[GibbsPoint]:
    """Run or resume the grid in ``output``, whose lock the caller holds; ``gibbs.csv`` is up to
    date after every point.

    ``evaluator``: instead of the checkpoint. Raises ``InputError`` for another version's or another
        grid's folder.
    """
    structures = {name: read_phase(name, phase) for name, phase in settings.phases.items()}
    check_results_version(output)
    if evaluator is None:
        from magus_anharmonic.potential import load

        evaluator = load(settings.checkpoint, device=settings.device)
    evaluator = as_evaluator(evaluator, structures.values())
    write_run_record(output, settings, seed=settings.seed, model_id=evaluator.model_id)
    return run_grid(
        settings,
        structures,
        evaluator,
        output / "sscha",
        on_point=lambda points: write_points(output / "gibbs.csv", points),
    )


def run_grid(
    settings: PhaseDiagramSettings,
    structures: Mapping[str, Atoms],
    evaluator: Evaluator,
    root: Path,
    *,
    free_energy: Callable[..., SschaResult] | None = None,
    on_point: Callable[[list[GibbsPoint]], None] = lambda points: None,
) -> list[GibbsPoint]:
    """Every phase, set of isotopes, pressure and temperature; finished runs below ``root`` are
    taken as they are.

    The isotopes after the first start from the folder of those before them, which are reweighted
    where that is enough (`gibbs.reweighted_result`). ``on_point`` gets the points so far after each
    run. Raises ``InputError`` (a folder that holds other runs).
    """
    if free_energy is None:
        from magus_anharmonic.sscha.gibbs import free_energy
    points: list[GibbsPoint] = []
    grid = [
        (isotopes, i, j)
        for isotopes in settings.isotopes
        for i in range(len(settings.pressures))
        for j in range(len(settings.temperatures))
    ]
    for name, atoms in structures.items():
        found: dict[GridIndex, tuple[Path, SschaResult]] = {}
        for isotopes, i, j in grid:
            pressure, temperature = settings.pressures[i], settings.temperatures[j]
            folder = point_folder(root, name, isotopes, pressure, temperature)
            start = _start(found, list(settings.isotopes), (isotopes, i, j))
            result = free_energy(
                atoms,
                evaluator,
                pressure=pressure,
                temperature=temperature,
                seed=settings.seed,
                start=start,
                directory=folder,
                any_start=True,
                masses=_masses(settings.isotopes[isotopes], atoms),
                **settings.sscha.of_a_run(),
            )
            point = point_of(name, isotopes, result, folder, atoms, settings.sscha.symprec)
            points.append(point)
            if point.usable or point.bound:
                found[isotopes, i, j] = folder, result
            _log(point, len(points), len(structures) * len(grid))
            on_point(with_same_phase(points))
    return with_same_phase(points)


def _masses(masses: Mapping[str, float], atoms: Atoms) -> dict[str, float] | None:
    """Those of the elements that are there (pure sulphur has no deuterium)."""
    return {
        symbol: mass for symbol, mass in masses.items() if symbol in atoms.get_chemical_symbols()
    } or None


def _start(
    found: Mapping[GridIndex, tuple[Path, SschaResult]], order: list[str], grid_index: GridIndex
) -> Path | SschaResult | None:
    """Where a run starts: the nearest finished point that is still this phase.

    That of other masses, else of the temperature before, else of the pressure before.
    """
    isotopes, i, j = grid_index
    for name in order[: order.index(isotopes)]:
        if (name, i, j) in found:
            return found[name, i, j][0]
    for other in [(isotopes, i, j - 1), (isotopes, i - 1, j), (isotopes, i - 1, 0)]:
        if other in found:
            return found[other][1]
    return None


def _log(point: GibbsPoint, number: int, total: int) -> None:
    what = (
        f"{point.phase} ({point.isotopes}) at {point.pressure_GPa:g} GPa, {point.temperature_K:g} K"
    )
    if point.status == "failed":
        log.warning("point %d of %d: %s failed: %s", number, total, what, point.reason)
    else:
        log.info(
            "point %d of %d: %s: G = %.5f +- %.5f eV/atom, %s%s",
            number,
            total,
            what,
            point.gibbs,
            point.gibbs_error,
            point.status,
            f" {point.space_group}" if point.status == "transformed" else "",
        )


def point_of(
    phase: str,
    isotopes: str,
    result: SschaResult,
    folder: Path | None,
    atoms: Atoms | None = None,
    symprec: float = 0.05,
) -> GibbsPoint:
    """G, V and S with their errors from one run; V at the target pressure by the bulk modulus, S as
    `entropy_with_error`.

    ``atoms``: the structure of the phase; its space group tells whether the run still is the phase
        (None: that of the run's start).
    """
    own = space_group(atoms, symprec) if atoms is not None else result.space_group_start
    status, reason = result.status, result.reason
    if status != "failed" and result.space_group != own:
        status, reason = (
            "transformed",
            f"the structure was {own} and is {result.space_group}"
            + (f"; {reason}" if reason else ""),
        )
    volume, volume_error = _volume(result, folder)
    s, s_error = _entropy(result, folder)
    left = abs(result.predicted_decrease or 0.0) if status == "unconverged" else 0.0
    energy = replace(
        result.numbers, status=status, reason=reason, volume=volume, predicted_decrease=left
    )
    return GibbsPoint(
        phase,
        isotopes,
        result.centroids.get_chemical_formula(mode="metal", empirical=True),
        result.target_pressure,
        result.temperature,
        energy,
        volume_error,
        s,
        s_error,
        model=result.model_id,
    )


def _volume(result: SschaResult, folder: Path | None) -> tuple[float, float]:
    """Volume per atom at the target pressure and its error (A^3): V (1 + (P - P_target) / B) with B
    of the run's start."""
    bulk = _bulk_modulus(folder)
    known = result.volume is not None and result.pressure is not None
    if bulk is None or not known or not np.isfinite(result.stress).all():
        return math.nan, math.nan
    excess = result.pressure - result.target_pressure
    # the diagonal components taken as wholly correlated: an upper bound
    error = ev_per_a3_to_gpa(float(np.trace(result.stress_error)) / 3.0)
    if not math.isfinite(error):
        return math.nan, math.nan
    return result.volume * (1.0 + excess / bulk), result.volume / bulk * math.hypot(
        error, RESPONSE_ERROR * excess, 1e-3
    )


def _bulk_modulus(folder: Path | None) -> float | None:
    """GPa, from the stress response that the run started with; None with a fixed cell."""
    path = None if folder is None else folder / "start.npz"
    if path is None or not path.is_file():
        return None
    response = read_start_file(path).response
    if response is None:
        return None
    bulk = ev_per_a3_to_gpa(float(response.stress[:3, :3].mean()))
    return bulk if bulk > 1.0 else None


def _entropy(result: SschaResult, folder: Path | None) -> tuple[float, float]:
    """Entropy and error, eV/K per atom; NaN without force constants, and without the configurations
    that give the error."""
    if result.force_constants is None:
        return math.nan, math.nan
    state = result.state
    if state.temperature == 0:
        return 0.0, 0.0
    if folder is not None and (found := reweighted_ensemble(folder)) is not None:
        return entropy_with_error(state, *found)
    ensemble = None if folder is None else final_ensemble(folder, result)
    return (math.nan, math.nan) if ensemble is None else entropy_with_error(state, ensemble)


def collect_runs(root: Path) -> list[GibbsPoint]:
    """Points of ``gibbs.csv`` in ``root``, else from finished runs anywhere below it: phases by the
    space group at the start, isotopes by their masses.

    Raises ``InputError`` when there is no finished run, or when two runs are the same point (two
    models, supercells or seeds).
    """
    if (root / "gibbs.csv").is_file():
        return read_points(root / "gibbs.csv")
    folders = sorted(path.parent for path in root.rglob("result.json"))
    if not folders:
        raise InputError(f"{root}: no finished SSCHA run (result.json) below it")
    found: dict[tuple[str, str, float, float], tuple[Path, GibbsPoint]] = {}
    for folder in folders:
        result = SschaResult.read(folder)
        group = symbol_of(result.space_group_start)
        formula = result.centroids.get_chemical_formula(mode="metal", empirical=True)
        point = point_of(
            f"{formula} {group}", _isotope_name(folder, result.centroids), result, folder
        )
        key = (point.phase, point.isotopes, point.pressure_GPa, point.temperature_K)
        if key in found:
            raise InputError(
                f"{folder}: the same point as {found[key][0]} ({point.phase},"
                f" {point.pressure_GPa:g} GPa, {point.temperature_K:g} K); give a folder that holds"
                " each point once, or a CSV"
            )
        found[key] = (folder, point)
    models = {point.model for _, point in found.values()}
    if len(models) > 1:
        raise InputError(
            f"{root}: runs of several models ({', '.join(sorted(models))}); their free energies"
            " cannot be compared"
        )
    return with_same_phase([point for _, point in found.values()])


def _isotope_name(folder: Path, centroids: Atoms) -> str:
    """``natural``, or the isotopes of the centroids and the masses of ``settings.json`` in words;
    raises ``DamagedFile``."""
    path = folder / "settings.json"
    masses = (read_json(path).get("masses") or {}) if path.is_file() else {}
    with readable(path, "masses"):
        carried = isotopes_of(centroids)
        return (
            " ".join(f"{symbol}={mass:g}" for symbol, mass in sorted({**carried, **masses}.items()))
            or NATURAL
        )
