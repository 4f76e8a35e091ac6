"""Step ``hessian``: harmonic and SSCHA-Hessian modes at Gamma of chosen phases over pressures, and
dispersions (Fig. 4)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms

from magus_anharmonic.campaign.production import phase_structure
from magus_anharmonic.campaign.steps import Context, Outcome, Step, phase_folder, structure_file
from magus_anharmonic.campaign.structures import SYMPREC, Phase, phases_of
from magus_anharmonic.campaign.tables import write_part
from magus_anharmonic.errors import InputError, MagusAnharmonicError, is_machine_error
from magus_anharmonic.evaluator import LabelerEvaluator
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import append_jsonl, read_jsonl, write_json
from magus_anharmonic.paper.tables import Band, Mode, dispersion_file
from magus_anharmonic.settings.campaign_blocks import HessianPhase, HessianSettings
from magus_anharmonic.sscha.gibbs import free_energy
from magus_anharmonic.sscha.hessian import Hessian
from magus_anharmonic.sscha.phonons import (
    Dispersion,
    Level,
    dispersion,
    levels_by_irrep,
    lowest_levels,
)
from magus_anharmonic.sscha.report import hessian_of_run
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.start import (
    CountingEvaluator,
    harmonic_force_constants,
    in_double_precision,
    relaxed_primitive,
)
from magus_anharmonic.sscha.state import SschaState, fourier
from magus_anharmonic.sscha.symmetry import Symmetry, symmetric_primitive
from magus_anharmonic.structures import space_group, structure_id
from magus_anharmonic.units import EV_IN_CM1, HBAR, GPa

log = logging.getLogger(__name__)

RUN_OF_RECORD = "run.json"
"""In the folder of a phase at a pressure: the name of the SSCHA run whose numbers are in the
tables."""

SQUARE_IN_CM2 = (HBAR * EV_IN_CM1) ** 2
"""eV/A^2/amu -> cm^-2."""


@dataclass
class Tally:
    """What the step has spent and could not do."""

    rows: list[Mode] = field(default_factory=list)
    n_evaluations: int = 0
    n_labels: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def hessian(context: Context, step: Step) -> Outcome:
    """``modes.csv`` and one dispersion table per phase and pressure asked for; every finished
    pressure is kept on disk."""
    settings, folder = context.settings.hessian, context.folder(step)
    assert settings is not None
    phases = {phase.name: phase for phase in phases_of(context.settings.phases)}
    tally = Tally()
    pressures = sorted({*settings.pressures, *settings.dft_harmonic})
    with structure_file(folder) as file:
        for wanted in settings.phases:
            for number, pressure in enumerate(pressures, start=1):
                log.info(
                    "hessian: %s at %g GPa, %d of %d pressures",
                    wanted.name,
                    pressure,
                    number,
                    len(pressures),
                )
                try:
                    _one(
                        context,
                        settings,
                        wanted,
                        phases[wanted.name],
                        pressure,
                        folder,
                        tally,
                        file,
                    )
                except InputError:
                    raise
                except MagusAnharmonicError as error:
                    if is_machine_error(error):
                        raise
                    log.warning("hessian: %s at %g GPa: %s", wanted.name, pressure, error)
                    tally.failures.append((wanted.name, f"{pressure:g} GPa: {error}"))
    if not tally.rows:
        raise MagusAnharmonicError(
            "hessian: no modes:"
            f" {tally.failures[0][1] if tally.failures else 'nothing was asked for'}"
        )
    write_part(folder, Mode, tally.rows)
    reason = (
        f"{len(tally.failures)} of {len(settings.phases) * len(pressures)} points failed"
        if tally.failures
        else ""
    )
    return Outcome(
        len(tally.rows),
        tally.n_evaluations,
        tally.n_labels,
        str(len(tally.rows)),
        reason,
        tally.failures,
    )


def run_name(cell: Atoms, model_id: str, *settings: Any) -> str:
    """Folder of an SSCHA run: another cell, model or setting is another run, and finds no folder
    that is taken."""
    return f"sscha-{model_id}-{digest(f'{structure_id(cell)} {settings}')[:8]}"


def _one(
    context: Context,
    settings: HessianSettings,
    wanted: HessianPhase,
    phase: Phase,
    pressure: GPa,
    folder: Path,
    tally: Tally,
    file: Any,
) -> None:
    start = phase_structure(context, phase, pressure)
    if start is None:
        raise MagusAnharmonicError(
            f"no structure of {phase.name} (space group {phase.number}) was found by the searches"
        )
    cell = symmetric_primitive(start, SYMPREC)
    own = folder / phase_folder(wanted.name, pressure)
    if pressure in settings.pressures:
        atoms, levels = _harmonic(context.final_model, cell, pressure, tally)
        _add(
            tally,
            wanted,
            phase,
            pressure,
            "harmonic",
            "model",
            levels,
            atoms,
            context.final_model.model_id,
        )
        file.add(atoms, structure_id(atoms), space_group(atoms), pressure, "static")
        report, harmonic = _sscha_hessian(context, settings, cell, pressure, own, tally)
        centroids = report.result.centroids
        levels = levels_by_irrep(gamma_matrix(report.hessian), report.hessian.state.atoms)
        _add(
            tally,
            wanted,
            phase,
            pressure,
            "sscha-hessian",
            "model",
            levels,
            centroids,
            report.result.model_id,
            report.hessian,
        )
        file.add(
            centroids, structure_id(centroids), report.result.space_group, pressure, "centroids"
        )
        if pressure in settings.dispersions:
            tolerance = report.result.symmetry_tolerance or SYMPREC
            rows = dispersion_rows(dispersion(report.hessian, harmonic, tolerance))
            write_part(folder, Band, rows, dispersion_file(wanted.name, pressure))
    if pressure in settings.dft_harmonic:
        _harmonic_by_dft(context, wanted, phase, cell, pressure, own, tally)
    if pressure in settings.dft_sscha:
        _hessian_by_dft(context, settings, wanted, phase, pressure, own, tally)


def _harmonic(
    evaluator: Any, cell: Atoms, pressure: GPa, tally: Tally
) -> tuple[Atoms, list[Level]]:
    """The cell relaxed in its symmetry, and its harmonic levels at Gamma."""
    counting = CountingEvaluator(in_double_precision(evaluator))
    atoms = relaxed_primitive(cell, counting, pressure, symprec=SYMPREC, variable_cell=True)
    levels = harmonic_levels(atoms, counting)
    tally.n_evaluations += counting.count
    return atoms, levels


def harmonic_levels(atoms: Atoms, evaluator: Any) -> list[Level]:
    """Harmonic levels at Gamma (eV/A^2/amu) of a relaxed primitive cell."""
    once = (1, 1, 1)
    compact = harmonic_force_constants(atoms, once, Symmetry(atoms, once), evaluator)
    return levels_by_irrep(
        mass_weighted(compact[0].transpose(0, 2, 1, 3).reshape(3 * len(atoms), -1), atoms), atoms
    )


def mass_weighted(matrix: np.ndarray, atoms: Atoms) -> np.ndarray:
    """Force constants at Gamma (3n, 3n) in eV/A^2 over the roots of the masses, eV/A^2/amu."""
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    return matrix / np.outer(root, root)


def gamma_matrix(found: Hessian) -> np.ndarray:
    """Mass-weighted Hessian at Gamma, (3n, 3n) eV/A^2/amu."""
    state = found.state
    return mass_weighted(
        fourier(found.force_constants, state.supercell_matrix, np.zeros((1, 3)))[0].real,
        state.atoms,
    )


def _run_of_model(
    context: Context,
    settings: HessianSettings,
    cell: Atoms,
    pressure: GPa,
    supercell: Any,
    own: Path,
    tally: Tally,
) -> tuple[Path, SschaResult]:
    """The SSCHA run of the final model in ``supercell``, and its folder below ``own``."""
    model = context.final_model
    state = settings.temperature, supercell
    run = own / run_name(cell, model.model_id, *state, settings.n_configs, context.settings.seed)
    result = free_energy(
        cell,
        model,
        pressure,
        settings.temperature,
        supercell=supercell,
        n_configs=settings.n_configs,
        max_populations=settings.max_populations,
        seed=context.settings.seed,
        directory=run,
    )
    tally.n_evaluations += result.n_evaluations
    return run, result


def _sscha_hessian(
    context: Context, settings: HessianSettings, cell: Atoms, pressure: GPa, own: Path, tally: Tally
) -> tuple[Any, np.ndarray | None]:
    model = context.final_model
    run, result = _run_of_model(context, settings, cell, pressure, settings.supercell, own, tally)
    if result.force_constants is None:
        raise MagusAnharmonicError(f"the SSCHA run failed: {result.reason}")
    write_json(own / RUN_OF_RECORD, {"run": run.name})
    report = hessian_of_run(
        run,
        own / "hessian",
        evaluator=model,
        n_configs=settings.n_configs,
        seed=context.settings.seed,
    )
    state: SschaState = report.hessian.state
    harmonic = None
    if pressure in settings.dispersions:
        symmetry = Symmetry(state.atoms, state.supercell_matrix)
        harmonic = harmonic_force_constants(
            state.atoms, state.supercell_matrix, symmetry, in_double_precision(model)
        )
    return report, harmonic


def _harmonic_by_dft(
    context: Context,
    wanted: HessianPhase,
    phase: Phase,
    cell: Atoms,
    pressure: GPa,
    own: Path,
    tally: Tally,
) -> None:
    """Harmonic levels by the labeler at its own relaxed cell; the squares are kept in
    ``dft-harmonic.jsonl``."""
    file = own / "dft-harmonic.jsonl"
    with context.labeler(own) as labeler:
        model_id = f"dft-{labeler.settings_hash}"
        key = f"{structure_id(cell)} {pressure} {model_id} {','.join(wanted.irreps)}"
        record = next((known for known in read_jsonl(file) if known["key"] == key), None)
        if record is None:
            relaxed = labeler.relax([cell], pressure, force_tolerance=0.01)[0]
            if relaxed.failed:
                raise MagusAnharmonicError(f"DFT relaxation failed: {relaxed.reason}")
            atoms = symmetric_primitive(relaxed.atoms, SYMPREC)
            counting = CountingEvaluator(LabelerEvaluator(labeler))
            levels = harmonic_levels(atoms, counting)
            record = {
                "key": key,
                "levels": [[level.irrep, level.square] for level in levels],
                "n_labels": counting.count + relaxed.n_steps + 1,
                "space_group": space_group(atoms),
            }
            append_jsonl(file, record)
    tally.n_labels += int(record["n_labels"])
    levels = [Level(name, float(square), np.zeros((0, 0))) for name, square in record["levels"]]
    for level in lowest_levels(levels, wanted.irreps):
        name = phase.name, record["space_group"], level.irrep
        square = level.square * SQUARE_IN_CM2
        tally.rows.append(Mode(*name, pressure, "harmonic", "dft", square, None, model_id))


def _hessian_by_dft(
    context: Context,
    settings: HessianSettings,
    wanted: HessianPhase,
    phase: Phase,
    pressure: GPa,
    own: Path,
    tally: Tally,
) -> None:
    """SSCHA and Hessian by the labeler, from the model's state and with its cell (Sec. IV B of the
    paper)."""
    common = {"n_configs": settings.dft_n_configs, "seed": context.settings.seed}
    found = phase_structure(context, phase, pressure)
    assert found is not None
    cell = symmetric_primitive(found, SYMPREC)
    state = settings.temperature, settings.dft_supercell
    _, begun = _run_of_model(context, settings, cell, pressure, settings.dft_supercell, own, tally)
    if begun.force_constants is None:
        raise MagusAnharmonicError(f"the SSCHA run of the model failed: {begun.reason}")
    with context.labeler(own) as labeler:
        chosen = (*state, settings.dft_n_configs, context.settings.seed)
        run = own / f"dft-{run_name(begun.centroids, labeler.settings_hash, *chosen)}"
        result = free_energy(
            begun.centroids,
            labeler,
            pressure,
            settings.temperature,
            supercell=settings.dft_supercell,
            cell="fixed",
            max_populations=settings.dft_max_populations,
            start=begun,
            directory=run,
            **common,
        )
        tally.n_labels += result.n_evaluations
        if result.force_constants is None:
            raise MagusAnharmonicError(f"the SSCHA run by DFT failed: {result.reason}")
    report = hessian_of_run(run, own / "hessian-dft")
    levels = levels_by_irrep(gamma_matrix(report.hessian), report.hessian.state.atoms)
    _add(
        tally,
        wanted,
        phase,
        pressure,
        "sscha-hessian",
        "dft",
        levels,
        result.centroids,
        result.model_id,
        report.hessian,
    )


def _add(
    tally: Tally,
    wanted: HessianPhase,
    phase: Phase,
    pressure: GPa,
    method: Literal["harmonic", "sscha-hessian"],
    by: Literal["model", "dft"],
    levels: Sequence[Level],
    atoms: Atoms,
    model_id: str,
    found: Hessian | None = None,
) -> None:
    group = space_group(atoms, SYMPREC)
    for level in lowest_levels(levels, wanted.irreps):
        error = None if found is None else square_error(found, level)
        square = level.square * SQUARE_IN_CM2
        name = phase.name, group, level.irrep
        tally.rows.append(Mode(*name, pressure, method, by, square, error, model_id))
        shown = "" if error is None else f" +- {error:.0f}"
        where = f"{phase.name}, {level.irrep} at {pressure:g} GPa, {method} by {by}"
        log.info("  %s: %.0f%s cm^-2", where, square, shown)


def square_error(found: Hessian, level: Level) -> float | None:
    """Standard error (cm^-2) of a level at Gamma: root mean square over its share in the
    eigenvectors of the Hessian."""
    if found.errors is None:
        return None
    share = np.sum(np.abs(found.vectors[0].conj().T @ level.vectors) ** 2, axis=1)
    return float(np.sqrt(share @ found.errors[0] ** 2 / share.sum())) * EV_IN_CM1**2


def dispersion_rows(found: Dispersion) -> list[Band]:
    """Rows of ``dispersion-<phase>-<P>GPa.csv``: every point of the path; errors where it meets a q
    point of the supercell."""
    labels = {round(where, 9): label for where, label in found.path.ticks}
    marks = {
        (round(where, 6), round(hbar_omega, 9)): error for where, hbar_omega, error in found.marks
    }
    rows: list[Band] = []
    methods = {"harmonic": "harmonic", "hessian": "sscha-hessian"}
    for name, method in methods.items():
        if name not in found.bands:
            continue
        for distance, values in zip(found.path.distance, found.bands[name], strict=True):
            for branch, hbar_omega in enumerate(values):
                error = (
                    marks.get((round(float(distance), 6), round(float(hbar_omega), 9)))
                    if name == "hessian"
                    else None
                )
                error = None if error is None else error * EV_IN_CM1
                rows.append(
                    Band(
                        float(distance),
                        labels.get(round(float(distance), 9), ""),
                        branch + 1,
                        float(hbar_omega) * EV_IN_CM1,
                        error,
                        method,
                    )
                )
    return rows
