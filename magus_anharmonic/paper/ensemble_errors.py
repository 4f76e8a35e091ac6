"""The model against DFT in an ensemble.

The state and the configurations in which ``magus-anharmonic errors`` measures, from what the user
names.

What ``magus-anharmonic errors`` does: label an ensemble of an SSCHA state, compare model and
reference, write the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.energy_surface import require_potential, surface_in_use
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.gate import read_structures
from magus_anharmonic.io.digests import finite, versions
from magus_anharmonic.io.files import read_whole, write_json
from magus_anharmonic.labelers.base import Labeler
from magus_anharmonic.paper import gradient_errors as gradients
from magus_anharmonic.paper import script, tables
from magus_anharmonic.paper.ensemble_labels import (
    WHAT,
    Labelled,
    label_locked,
    read_labelled,
    sample_displacements,
)
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.settings import LabelerSettings, Settings
from magus_anharmonic.settings.section import load_yaml, parse
from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.ensemble import pair_means, standard_error
from magus_anharmonic.sscha.gibbs import DEFAULTS
from magus_anharmonic.sscha.qe_files import require_sampled_from
from magus_anharmonic.sscha.result import (
    PROGRESS,
    SschaResult,
    read_population_file,
    read_progress_file,
    read_start_file,
)
from magus_anharmonic.sscha.start import read_state
from magus_anharmonic.sscha.state import SschaState, displaced
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import space_group, symbol_of
from magus_anharmonic.units import GPa, ev_per_a3_to_gpa


def find_source(
    path: Path,
    model: Evaluator,
    run_folder: Path,
    settings: Settings,
    *,
    phase: str = "",
    run: Callable[..., SschaResult],
) -> Source:
    """The state of a finished run (a folder), of dynamical matrices (a prefix), or of a structure
    file, which is ``run`` first (`ranking.jobs.free_energy_on`).

    Raises ``InputError``: nothing there, no pressure given for a structure or matrices, or a run
    that ended without a state.
    """
    if path.is_dir():
        return source_of_run(path, SschaResult.read(path), phase)
    if not path.is_file() and not Path(f"{path}1").is_file():
        raise InputError(
            f"{path}: no such structure file, no folder of an SSCHA run, and no dynamical matrices"
            f" {path}1"
        )
    if "pressure" not in settings.model_fields_set:
        raise InputError(f"--pressure: is needed for {path}: only the folder of a run says it")
    if Path(f"{path}1").is_file():
        temperature = (settings.sscha or DEFAULTS).temperatures[0]
        return source_of_state(read_state(path, temperature), settings.pressure, phase)
    result = run(read_structures(path, index=-1)[0], model, run_folder)
    return source_of_run(run_folder, result, phase)


def given_displacements(state: SschaState, path: Path) -> np.ndarray:
    """Displacements (n, n_supercell, 3) A of the configurations in a file; raises ``InputError``
    when they are not pairs of this state."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".npz":
        sampled_from, ensemble = read_population_file(path)
        structures = displaced(sampled_from, ensemble.displacements)
    else:
        structures = read_structures(path)
    return displacements_of(state, structures, str(path))


FEWEST = 20
"""Labels of a phase before their number is decided by the error."""
BINS = 61
SINGLES = 20
"""Configurations whose gradients by the force constants are in the histogram before averaging."""
MOST_POINTS = 2000
"""Components of one averaged gradient in the parity table, at most."""


@dataclass(frozen=True)
class Source:
    """An SSCHA state to measure in. ``gibbs``, ``gibbs_error`` (eV/atom): the model's free energy
    of it, None where it is not known; ``left`` (eV/atom): what of its relaxation is left; ``cell``:
    how stiff its cell is, None where it is fixed or not known."""

    state: SschaState
    phase: str
    pressure: GPa
    model_id: str = ""
    gibbs: float | None = None
    gibbs_error: float | None = None
    left: float = 0.0
    cell: CellStiffness | None = None


@dataclass(frozen=True)
class ErrorsReport:
    """Everything that was measured; energies in eV/atom, pressures in GPa."""

    source: Source
    errors: gradients.GradientErrors
    correction: gradients.Correction
    pressure_error: tuple[float, float]
    n_failed: int
    folder: Path

    @property
    def corrected_gibbs(self) -> tuple[float, float] | None:
        """G by the reference at its own minimum with its standard error, eV/atom, with the free
        energy of the electrons where it was asked for; None where the model's G is not known."""
        if self.source.gibbs is None:
            return None
        found = self.correction
        errors = self.source.gibbs_error, found.error, found.electronic_error
        error = float(np.linalg.norm([one or 0.0 for one in errors]))
        return self.source.gibbs + found.total + (found.electronic or 0.0), error


def source_of_result(result: SschaResult, phase: str = "") -> Source:
    """The state in which an SSCHA run ended; ``phase``: its name, by default its space group.
    Raises ``InputError`` without a state."""
    name = phase or symbol_of(result.space_group)
    return Source(
        result.state,
        name,
        result.target_pressure,
        result.model_id,
        result.numbers.gibbs,
        result.gibbs_error,
    )


def source_of_run(folder: Path, result: SschaResult, phase: str = "") -> Source:
    """As `source_of_result`, with the stiffness of the cell that the folder of the run knows."""
    source, cell = source_of_result(result, phase), None
    if (start := read_whole(folder / "start.npz", read_start_file)) is not None:
        symmetry = Symmetry(source.state.atoms, source.state.supercell_matrix)
        cell = start.stiffness(symmetry, source.pressure)
    progress = read_whole(folder / PROGRESS, read_progress_file)
    if cell is not None and progress is not None and progress.cell is not None:
        matrix, covariance = (np.array(array) for array in progress.cell)
        cell = replace(cell, matrix=matrix, covariance=covariance)
    return replace(source, left=result.predicted_decrease or 0.0, cell=cell)


def source_of_state(state: SschaState, pressure: GPa, phase: str = "") -> Source:
    """A state without a run, e.g. dynamical matrices of another code."""
    return Source(state, phase or symbol_of(space_group(state.atoms)), pressure)


def displacements_of(state: SschaState, structures: Sequence[Atoms], where: str) -> np.ndarray:
    """Displacements (n, n_supercell, 3) A of given configurations of ``state``, +u/-u next to each
    other.

    Raises ``InputError`` when cell, species, pairs or amplitudes are not those of the state.
    """
    supercell = state.supercell
    found = []
    for number, atoms in enumerate(structures, start=1):
        same_cell = np.allclose(atoms.cell.array, supercell.cell.array, atol=1e-4)
        if (
            len(atoms) != len(supercell)
            or not np.array_equal(atoms.numbers, supercell.numbers)
            or not same_cell
        ):
            raise InputError(
                f"{where}: configuration {number} is not one of the supercell of the state"
                " (species, order and cell)"
            )
        shift = (atoms.positions - supercell.positions) @ np.linalg.inv(supercell.cell.array)
        found.append((shift - np.round(shift)) @ supercell.cell.array)
    u = np.array(found)
    if len(u) < 4 or len(u) % 2 or not np.allclose(u[0::2], -u[1::2], atol=1e-4):
        raise InputError(
            f"{where}: {len(u)} configurations that are not pairs +u, -u next to each other; pairs"
            " are needed, at least two"
        )
    require_sampled_from(state, u, where)
    return u


def load_labeler_settings(path: str | Path) -> LabelerSettings:
    """Settings of the reference from a YAML file: the block ``labeler`` (of a campaign too) or
    ``learning.labeler``, or its keys themselves."""
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such file; needed is a YAML file with labeler: {{calculator: gpaw, ...}}"
        )
    data = load_yaml(path)
    for block in (data, data.get("learning")):
        if isinstance(block, dict) and isinstance(block.get("labeler"), dict):
            data = block["labeler"]
            break
    if "calculator" not in data:
        raise InputError(
            f"{path}: names no labeler: needed is labeler: {{calculator: gpaw | vasp | espresso |"
            " import path, ...}"
        )
    return parse(LabelerSettings, data, "labeler")


def measure_errors(
    source: Source,
    model: Evaluator,
    labeler: Labeler,
    folder: str | Path,
    *,
    n_configs: int = 60,
    seed: int = 0,
    wanted: float | None = None,
    displacements: np.ndarray | None = None,
    electronic: bool = False,
) -> ErrorsReport:
    """Label ``n_configs`` configurations (or those of ``displacements``), and write tables and
    ``errors.json`` to ``folder``; ``wanted``: only as many, from `FEWEST` on, as bring the error of
    the correction below it, eV/atom; ``electronic``: the mean of the labels' F_el - E_0 too, of a
    labeler at the temperature of the state (`labelers.at_electronic_temperature`).

    Labels that are there are not made again. Raises ``InputError`` (another state or other DFT
    settings in the folder, another process that works there, no whole pairs).
    """
    with locked(folder, WHAT):
        return measure_locked(
            source,
            model,
            labeler,
            folder,
            n_configs=n_configs,
            seed=seed,
            wanted=wanted,
            displacements=displacements,
            electronic=electronic,
        )


def measure_locked(
    source: Source,
    model: Evaluator,
    labeler: Labeler,
    folder: str | Path,
    *,
    n_configs: int,
    seed: int,
    wanted: float | None = None,
    displacements: np.ndarray | None = None,
    electronic: bool = False,
) -> ErrorsReport:
    """`measure_errors` for a caller that holds the lock of ``folder``."""
    require_potential(model, "errors")
    if surface_in_use(labeler) is not None:
        raise InputError("labeler: labels of a free energy say nothing of a potential's errors")
    if displacements is not None:
        label_locked(source.state, displacements, labeler, folder)
        return analyse_errors(source, model, displacements, folder, electronic=electronic)
    n = n_configs if wanted is None else min(FEWEST, n_configs)
    while True:
        u = sample_displacements(source.state, n, seed)
        label_locked(source.state, u, labeler, folder)
        report = analyse_errors(source, model, u, folder, electronic=electronic)
        error = report.correction.error
        if n >= n_configs or wanted is None or error <= wanted:
            return report
        more = 1.1 * n * (error / wanted) ** 2 if np.isfinite(error) else 2 * n
        n = 2 * int(np.ceil(np.clip(more, n + 4, n_configs) / 2))


def analyse_errors(
    source: Source,
    model: Evaluator,
    displacements: np.ndarray,
    folder: str | Path,
    *,
    electronic: bool = False,
) -> ErrorsReport:
    """The errors from whatever pairs are labelled in ``folder``; writes tables and ``errors.json``
    there.

    Raises what `read_labelled` raises.
    """
    target = Path(folder)
    labelled = read_labelled(source.state, displacements, model, target, electronic=electronic)
    report = ErrorsReport(
        source,
        gradients.gradient_errors(labelled),
        gradients.gibbs_correction(labelled, source.cell, source.left),
        pressure_error(labelled),
        labelled.n_failed,
        target,
    )
    for table, rows in report_tables(report, labelled).items():
        tables.write(table, target / table.FILE, rows)  # type: ignore[attr-defined]
    write_json(target / "errors.json", summary(report, model.model_id))
    return report


def report_tables(report: ErrorsReport, labelled: Labelled) -> dict[type, list[Any]]:
    """Rows of the campaign's tables, by table."""
    phase, pressure = report.source.phase, report.source.pressure
    temperature = report.source.state.temperature
    bins, parity = distributions(labelled, phase, pressure)
    return {
        tables.GradientError: gradients.rows(report.errors, phase, pressure),
        tables.GibbsCorrection: [gradients.row(report.correction, phase, pressure, temperature)],
        tables.GradientBin: bins,
        tables.GradientParity: parity,
    }


def add_to_tables(report: ErrorsReport, folder: str | Path) -> None:
    """Put the tables of a report into those of a campaign (``campaign/tables``), in place of
    earlier rows of this phase and pressure."""
    for table in (
        tables.GradientError,
        tables.GibbsCorrection,
        tables.GradientBin,
        tables.GradientParity,
    ):
        rows = tables.read(table, report.folder / table.FILE)  # type: ignore[attr-defined]
        known = tables.read_if_there(table, folder)
        kept = [
            row
            for row in known
            if (row.phase, row.pressure_GPa) != (report.source.phase, report.source.pressure)
        ]
        tables.write(table, Path(folder) / table.FILE, [*kept, *rows])  # type: ignore[attr-defined]


def draw_report(report: ErrorsReport) -> tuple[Path, Path]:
    """``gradient_errors.svg`` and ``.png`` beside the tables of a report."""
    parts = (
        tables.read(table, report.folder / table.FILE)  # type: ignore[attr-defined]
        for table in (tables.GradientError, tables.GradientBin, tables.GradientParity)
    )
    drawing = script("figures_sscha").gradient_figure("gradient_errors", *parts)
    return drawing.save(report.folder)


def pressure_error(labelled: Labelled) -> tuple[float, float]:
    """Pressure of the reference minus that of the model in the state, with standard error, GPa
    (virial of the displacements included)."""
    stress = gradients.stress_differences(labelled)
    pressures = pair_means(-np.trace(stress, axis1=1, axis2=2) / 3.0)
    return ev_per_a3_to_gpa(float(pressures.mean())), ev_per_a3_to_gpa(
        float(standard_error(pressures))
    )


def distributions(
    labelled: Labelled, phase: str, pressure: GPa
) -> tuple[list[tables.GradientBin], list[tables.GradientParity]]:
    """Histograms of the errors before and after averaging, and the averaged components by reference
    and model (Figs. 7 and 8)."""
    difference = gradients.force_differences(labelled)
    n_configs = len(difference)
    mean = {name: -ensemble.forces.mean(axis=0).ravel() for name, ensemble in _both(labelled)}
    matrix = {
        name: gradients.mean_force_constant_gradient(labelled, ensemble.forces).ravel()
        for name, ensemble in _both(labelled)
    }
    few = slice(0, min(SINGLES, n_configs))
    weights = (
        labelled.reference.displacements.reshape(n_configs, -1)[few] @ labelled.state.precision
    )
    single = np.einsum("ca,cb->cab", weights, difference.reshape(n_configs, -1)[few]).ravel()
    bins = [
        *_histogram(difference.ravel(), phase, pressure, "force", 0),
        *_histogram(mean["model"] - mean["reference"], phase, pressure, "gradient_centroid", 1),
        *_histogram(single, phase, pressure, "gradient_force_constants", 0),
        *_histogram(
            matrix["model"] - matrix["reference"], phase, pressure, "gradient_force_constants", 1
        ),
    ]
    points = {
        "gradient_centroid": (mean["reference"], mean["model"]),
        "gradient_force_constants": (matrix["reference"], matrix["model"]),
    }
    if labelled.centroid is not None:
        reference, model = (-forces.ravel() for forces in labelled.centroid)
        bins += _histogram(model - reference, phase, pressure, "bo_force_centroid", 1)
        points["bo_force_centroid"] = (reference, model)
    parity = []
    for quantity, (reference, model) in points.items():
        chosen = np.sort(np.random.default_rng(0).permutation(len(reference))[:MOST_POINTS])
        unit = tables.GRADIENT_UNITS[quantity]
        parity += [
            tables.GradientParity(phase, pressure, quantity, unit, float(x), float(y))  # type: ignore[arg-type]
            for x, y in zip(reference[chosen], model[chosen], strict=True)
        ]
    return bins, parity


def _both(labelled: Labelled) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("reference", labelled.reference), ("model", labelled.model)


def _histogram(
    values: np.ndarray, phase: str, pressure: GPa, quantity: Any, averaged: int
) -> list[tables.GradientBin]:
    edge = float(np.quantile(np.abs(values), 0.999)) or 1e-6
    counts, edges = np.histogram(values, bins=BINS, range=(-edge, edge))
    unit = tables.GRADIENT_UNITS[quantity]
    return [
        tables.GradientBin(
            phase, pressure, quantity, averaged, unit, float(low), float(high), int(count)
        )
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def summary(report: ErrorsReport, model_id: str) -> dict[str, Any]:
    """What ``errors.json`` holds."""
    source = report.source
    corrected = report.corrected_gibbs
    return {
        **versions(),
        "phase": source.phase,
        "pressure_GPa": source.pressure,
        "temperature_K": source.state.temperature,
        "supercell_atoms": len(source.state.supercell),
        "model": model_id,
        "model_of_the_state": source.model_id,
        "n_configs": report.errors.n_configs,
        "n_failed": report.n_failed,
        "errors": finite(asdict(report.errors)),
        "correction_eV_per_atom": finite(asdict(report.correction)),
        "pressure_reference_minus_model_GPa": report.pressure_error,
        "gibbs_model_eV_per_atom": source.gibbs,
        "gibbs_reference_eV_per_atom": None if corrected is None else corrected[0],
        "gibbs_reference_error_eV_per_atom": None if corrected is None else corrected[1],
    }
