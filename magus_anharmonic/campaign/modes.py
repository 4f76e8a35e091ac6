"""Steps ``hessian`` (harmonic and SSCHA-Hessian modes at Gamma of chosen phases over pressures,
dispersions: Fig. 4) and ``errors`` (gradient errors, first-order Gibbs correction)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms

from magus_anharmonic.campaign.production import phase_structure
from magus_anharmonic.campaign.steps import (
    Context,
    Outcome,
    Step,
    StructureFile,
    assemble,
    phase_folder,
    structure_file,
    write_part,
)
from magus_anharmonic.campaign.structures import SYMPREC, Phase, phases_of
from magus_anharmonic.errors import DamagedFile, InputError, MagusAnharmonicError, is_machine_error
from magus_anharmonic.evaluator import LabelerEvaluator
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import append_jsonl, read_json, read_jsonl, write_json
from magus_anharmonic.paper.tables import Band, Mode, dispersion_file
from magus_anharmonic.settings.campaign import HessianPhase, HessianSettings
from magus_anharmonic.sscha.gibbs import free_energy
from magus_anharmonic.sscha.hessian import Hessian
from magus_anharmonic.sscha.phonons import (
    Dispersion,
    Level,
    dispersion,
    levels_by_irrep,
    lowest_levels,
)
from magus_anharmonic.sscha.report import HessianReport, hessian_of_run
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.start import (
    CountingEvaluator,
    harmonic_force_constants,
    in_double_precision,
    relaxed_primitive,
)
from magus_anharmonic.sscha.state import SschaState, fourier, root_mass
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
    settings, folder, tally = context.settings.hessian, context.folder(step), Tally()
    assert settings is not None
    phases = {phase.name: phase for phase in phases_of(context.settings.phases)}
    pressures = sorted({*settings.pressures, *settings.dft_harmonic})
    with structure_file(folder) as file:
        for wanted, (number, pressure) in product(settings.phases, enumerate(pressures, start=1)):
            where = f"{wanted.name} at {pressure:g} GPa"
            log.info("hessian: %s, %d of %d pressures", where, number, len(pressures))
            own = folder / phase_folder(wanted.name, pressure)
            try:
                point = Point(context, settings, wanted, phases[wanted.name], pressure, own, tally)
                point.run(folder, file)
            except InputError:
                raise
            except MagusAnharmonicError as error:
                if is_machine_error(error):
                    raise
                log.warning("hessian: %s: %s", where, error)
                tally.failures.append((wanted.name, f"{pressure:g} GPa: {error}"))
    failures, n = tally.failures, len(settings.phases) * len(pressures)
    if not tally.rows:
        reason = failures[0][1] if failures else "nothing was asked for"
        raise MagusAnharmonicError(f"hessian: no modes: {reason}")
    write_part(folder, Mode, tally.rows)
    reason = f"{len(failures)} of {n} points failed" if failures else ""
    spent = len(tally.rows), tally.n_evaluations, tally.n_labels
    return Outcome(*spent, str(len(tally.rows)), reason, failures)


def run_name(cell: Atoms, model_id: str, *settings: Any) -> str:
    """Folder of an SSCHA run: another cell, model or setting is another run, and finds no folder
    that is taken."""
    return f"sscha-{model_id}-{digest(f'{structure_id(cell)} {settings}')[:8]}"


@dataclass
class Point:
    """The modes of one phase at one pressure; ``own``: its folder."""

    context: Context
    settings: HessianSettings
    wanted: HessianPhase
    phase: Phase
    pressure: GPa
    own: Path
    tally: Tally

    def run(self, folder: Path, file: StructureFile) -> None:
        """Everything that is asked for at this pressure; dispersions go to ``folder``."""
        start = phase_structure(self.context, self.phase, self.pressure)
        if start is None:
            raise MagusAnharmonicError(
                f"no structure of {self.phase.name} (space group {self.phase.number}) was found by"
                " the searches"
            )
        cell = symmetric_primitive(start, SYMPREC)
        if self.pressure in self.settings.pressures:
            self.by_model(cell, folder, file)
        if self.pressure in self.settings.dft_harmonic:
            self.harmonic_by_dft(cell)
        if self.pressure in self.settings.dft_sscha:
            self.hessian_by_dft(cell)

    def by_model(self, cell: Atoms, folder: Path, file: StructureFile) -> None:
        """Harmonic levels at the relaxed cell, SSCHA, its Hessian, and the dispersion."""
        model = self.context.final_model
        counting = CountingEvaluator(in_double_precision(model))
        atoms = relaxed_primitive(
            cell, counting, self.pressure, symprec=SYMPREC, variable_cell=True
        )
        levels = harmonic_levels(atoms, counting)
        self.tally.n_evaluations += counting.count
        self.add(levels, "harmonic", "model", atoms, model.model_id)
        file.add(atoms, structure_id(atoms), space_group(atoms), self.pressure, "static")
        run, result = self.run_of_model(cell, self.settings.supercell, "the SSCHA run failed")
        write_json(self.own / RUN_OF_RECORD, {"run": run.name})
        n_configs, seed = self.settings.n_configs, self.context.settings.seed
        report = hessian_of_run(
            run, self.own / "hessian", evaluator=model, n_configs=n_configs, seed=seed
        )
        self.add_hessian(report, "model")
        moving = report.result.centroids
        group = report.result.space_group
        file.add(moving, structure_id(moving), group, self.pressure, "centroids")
        if self.pressure in self.settings.dispersions:
            state: SschaState = report.hessian.state
            symmetry = Symmetry(state.atoms, state.supercell_matrix)
            harmonic = harmonic_force_constants(
                state.atoms, state.supercell_matrix, symmetry, in_double_precision(model)
            )
            tolerance = report.result.symmetry_tolerance or SYMPREC
            rows = dispersion_rows(dispersion(report.hessian, harmonic, tolerance))
            write_part(folder, Band, rows, dispersion_file(self.wanted.name, self.pressure))

    def run_of_model(self, cell: Atoms, supercell: Any, failed: str) -> tuple[Path, SschaResult]:
        """The SSCHA run of the final model in ``supercell``, and its folder."""
        model, settings, seed = self.context.final_model, self.settings, self.context.settings.seed
        state = settings.temperature, supercell
        run = self.own / run_name(cell, model.model_id, *state, settings.n_configs, seed)
        result = free_energy(
            cell,
            model,
            self.pressure,
            settings.temperature,
            supercell=supercell,
            n_configs=settings.n_configs,
            max_populations=settings.max_populations,
            seed=seed,
            directory=run,
        )
        self.tally.n_evaluations += result.n_evaluations
        if result.force_constants is None:
            raise MagusAnharmonicError(f"{failed}: {result.reason}")
        return run, result

    def harmonic_by_dft(self, cell: Atoms) -> None:
        """Harmonic levels by the labeler at its own relaxed cell; the squares are kept in
        ``dft-harmonic.jsonl``."""
        file, irreps = self.own / "dft-harmonic.jsonl", self.wanted.irreps
        with self.context.labeler(self.own) as labeler:
            model_id = f"dft-{labeler.settings_hash}"
            key = f"{structure_id(cell)} {self.pressure} {model_id} {','.join(irreps)}"
            record = next((known for known in read_jsonl(file) if known["key"] == key), None)
            if record is None:
                relaxed = labeler.relax([cell], self.pressure, force_tolerance=0.01)[0]
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
        self.tally.n_labels += int(record["n_labels"])
        levels = [Level(name, float(square), np.zeros((0, 0))) for name, square in record["levels"]]
        self.add(levels, "harmonic", "dft", record["space_group"], model_id)

    def hessian_by_dft(self, cell: Atoms) -> None:
        """SSCHA and Hessian by the labeler, from the model's state and with its cell (Sec. IV B of
        the paper)."""
        settings, seed = self.settings, self.context.settings.seed
        failed = "the SSCHA run of the model failed"
        _, begun = self.run_of_model(cell, settings.dft_supercell, failed)
        with self.context.labeler(self.own) as labeler:
            chosen = settings.temperature, settings.dft_supercell, settings.dft_n_configs, seed
            run = self.own / f"dft-{run_name(begun.centroids, labeler.settings_hash, *chosen)}"
            result = free_energy(
                begun.centroids,
                labeler,
                self.pressure,
                settings.temperature,
                supercell=settings.dft_supercell,
                cell="fixed",
                max_populations=settings.dft_max_populations,
                start=begun,
                directory=run,
                n_configs=settings.dft_n_configs,
                seed=seed,
            )
            self.tally.n_labels += result.n_evaluations
            if result.force_constants is None:
                raise MagusAnharmonicError(f"the SSCHA run by DFT failed: {result.reason}")
        self.add_hessian(hessian_of_run(run, self.own / "hessian-dft"), "dft")

    def add_hessian(self, report: HessianReport, by: Literal["model", "dft"]) -> None:
        """The levels of a Hessian at Gamma, with their errors."""
        found, result = report.hessian, report.result
        levels = levels_by_irrep(gamma_matrix(found), found.state.atoms)
        self.add(levels, "sscha-hessian", by, result.centroids, result.model_id, found)

    def add(
        self,
        levels: Sequence[Level],
        method: Literal["harmonic", "sscha-hessian"],
        by: Literal["model", "dft"],
        where: Atoms | str,
        model_id: str,
        found: Hessian | None = None,
    ) -> None:
        """The lowest levels of the wanted representations; ``where``: the structure, or its space
        group."""
        group = where if isinstance(where, str) else space_group(where, SYMPREC)
        for level in lowest_levels(levels, self.wanted.irreps):
            error = None if found is None else square_error(found, level)
            name = self.phase.name, group, level.irrep
            square = level.square * SQUARE_IN_CM2
            self.tally.rows.append(Mode(*name, self.pressure, method, by, square, error, model_id))
            shown = "" if error is None else f" +- {error:.0f}"
            told = f"{self.phase.name}, {level.irrep} at {self.pressure:g} GPa, {method} by {by}"
            log.info("  %s: %.0f%s cm^-2", told, square, shown)


def harmonic_levels(atoms: Atoms, evaluator: Any) -> list[Level]:
    """Harmonic levels at Gamma (eV/A^2/amu) of a relaxed primitive cell."""
    once = (1, 1, 1)
    compact = harmonic_force_constants(atoms, once, Symmetry(atoms, once), evaluator)
    return levels_by_irrep(
        mass_weighted(compact[0].transpose(0, 2, 1, 3).reshape(3 * len(atoms), -1), atoms), atoms
    )


def mass_weighted(matrix: np.ndarray, atoms: Atoms) -> np.ndarray:
    """Force constants at Gamma (3n, 3n) in eV/A^2 over the roots of the masses, eV/A^2/amu."""
    root = root_mass(atoms)
    return matrix / np.outer(root, root)


def gamma_matrix(found: Hessian) -> np.ndarray:
    """Mass-weighted Hessian at Gamma, (3n, 3n) eV/A^2/amu."""
    state = found.state
    return mass_weighted(
        fourier(found.force_constants, state.supercell_matrix, np.zeros((1, 3)))[0].real,
        state.atoms,
    )


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
    rows = []
    for name, method in (("harmonic", "harmonic"), ("hessian", "sscha-hessian")):
        for distance, values in zip(found.path.distance, found.bands.get(name, ()), strict=False):
            for branch, hbar_omega in enumerate(values, start=1):
                key = round(float(distance), 6), round(float(hbar_omega), 9)
                error = marks.get(key) if name == "hessian" else None
                error = None if error is None else error * EV_IN_CM1
                label = labels.get(round(float(distance), 9), "")
                frequency = float(hbar_omega) * EV_IN_CM1
                rows.append(Band(float(distance), label, branch, frequency, error, method))
    return rows


def errors(context: Context, step: Step) -> Outcome:
    """Errors of forces and free-energy gradients against DFT, and the first-order correction of G,
    in the states of the Hessians.

    The functions of the analysis keep their labels in ``errors/<phase>-<P>GPa/``, and are asked
    again for what is there.
    """
    from magus_anharmonic.paper import ensemble_errors

    settings, folder = context.settings.errors, context.folder(step)
    assert settings is not None
    parts: list[Path] = []
    with context.labeler(folder) as labeler:
        for phase in settings.phases:
            for pressure in settings.pressures:
                run = run_of_record(context.folder("hessian") / phase_folder(phase, pressure))
                own = folder / phase_folder(phase, pressure)
                source = ensemble_errors.source_of_result(SschaResult.read(run), phase)
                log.info(
                    "errors: %s at %g GPa, %d configurations by DFT",
                    phase,
                    pressure,
                    settings.n_configs,
                )
                ensemble_errors.measure_errors(
                    source,
                    context.final_model,
                    labeler,
                    own,
                    n_configs=settings.n_configs,
                    seed=context.settings.seed,
                )
                parts.append(own)
    assemble(folder / "tables", parts, inside=".")
    # the centroids are one configuration more
    n_labels = len(parts) * (settings.n_configs + 1)
    return Outcome(len(parts), 0, n_labels, output=f"{len(parts)} {context.final_model.model_id}")


def run_of_record(folder: Path) -> Path:
    """The SSCHA run behind the modes of a phase at a pressure; raises ``MagusAnharmonicError``
    where there is none or its name is lost."""
    file = folder / RUN_OF_RECORD
    if not file.is_file():
        raise MagusAnharmonicError(
            f"errors: the step hessian has no SSCHA run of {folder.name} (it failed there: see"
            " failures.csv)"
        )
    try:
        name = read_json(file).get("run")
    except DamagedFile as error:
        raise MagusAnharmonicError(f"errors: {error}; `--only hessian` makes it anew") from None
    if not isinstance(name, str) or not name:
        raise MagusAnharmonicError(
            f"errors: {file}: names no SSCHA run; `--only hessian` makes it anew"
        )
    return folder / name
