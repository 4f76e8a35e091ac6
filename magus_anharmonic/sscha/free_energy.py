"""``free_energy``: SSCHA relaxation of centroids, force constants and cell of one structure; F, V, stress, G = (F + PV)/N.

The loop draws its own ensembles, so that every population is a fresh ensemble of the state it was drawn from: what is
reported is the last population, which no minimisation has seen.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, MagusAnharmonicError, SschaError
from magus_anharmonic.evaluator import Evaluator, as_evaluator
from magus_anharmonic.settings import SschaSettings, check_pressure, parse
from magus_anharmonic.sscha.averages import Averages, Ensemble, average
from magus_anharmonic.sscha.begin import begin_run, check_structure, read_state, state_digest
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.run_folder import RunFolder
from magus_anharmonic.sscha.start import (
    LARGEST_AMPLITUDE_LATER,
    VOIGT,
    CountingEvaluator,
    Start,
    floor_modes,
    nearest_neighbour,
    strain_towards,
)
from magus_anharmonic.sscha.state import SschaState, sample
from magus_anharmonic.sscha.summary import failed_result, finished_result, gibbs_energy
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import EV_PER_A3_IN_GPA

log = logging.getLogger(__name__)

SAMPLING_TAG = 7319
"""Separates the random numbers of the ensembles from those of other purposes with the same seed."""
VOLUME_LIMITS = (0.5, 2.0)
"""Volume over that of the start, outside of which a run has failed."""
NEIGHBOUR_LIMITS = (0.55, 1.6)
"""Nearest-neighbour distance of an atom over that at the start, outside of which a run has failed."""


@dataclass(frozen=True)
class Task:
    """What to compute: a validated, immutable request."""

    atoms: Atoms
    pressure: float
    temperature: float
    settings: SschaSettings
    seed: int
    masses: Mapping[str, float] | None
    start: SschaState | None
    model_id: str

    def identity(self) -> dict[str, Any]:
        """Everything on which the numbers depend; two runs with the same identity are the same run."""
        ignored = {"temperature", "when", "max_candidates", "window", "seed_back", "max_populations"}
        return {
            "structure": structure_id(self.atoms),
            "formula": self.atoms.get_chemical_formula(),
            "model": self.model_id,
            "pressure": self.pressure,
            "temperature": self.temperature,
            "seed": self.seed,
            "masses": dict(self.masses or {}),
            "start": None if self.start is None else state_digest(self.start),
            "sscha": self.settings.model_dump(mode="json", exclude=ignored),
        }


@dataclass
class Progress:
    """Mutable record of a run: the table of ``convergence.csv``, and the free energies so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    gibbs: list[tuple[float, float]] = field(default_factory=list)
    n_evaluations: int = 0


def free_energy(
    atoms: Atoms,
    evaluator: Any,
    pressure: float = 0.0,
    temperature: float = 0.0,
    supercell: Any = (2, 2, 2),
    cell: str = "variable",
    n_configs: int = 1000,
    max_populations: int = 30,
    engine: str = "python-sscha",
    seed: int = 0,
    masses: Mapping[str, float] | None = None,
    start: Any = None,
    directory: str | Path | None = None,
    **tolerances: float,
) -> SschaResult:
    """SSCHA free energy of ``atoms`` at ``pressure`` (GPa) and ``temperature`` (K).

    Parameters
    ----------
    evaluator
        Our ``Potential``, any ASE calculator, or a labeler.
    supercell
        Three repetitions of the primitive cell, or ``{"min_length": Angstrom}``.
    cell
        ``"variable"`` relaxes the cell at the pressure, ``"fixed"`` keeps it.
    n_configs, max_populations
        Configurations per ensemble (even: +u/-u pairs), and most ensembles.
    masses
        Isotopes, amu by symbol, e.g. ``{"H": 2.014}``.
    start
        Cell, centroids and force constants to start from instead of harmonic ones: an `SschaResult`, the folder of a
        finished run, or the prefix of Quantum ESPRESSO dynamical matrices (``.../dyn_pop5_``).
    directory
        Where the files of the run go; the same run started again there continues. None: nothing is kept.
    tolerances
        ``pressure_tolerance`` (GPa), ``free_energy_tolerance`` (eV/atom), ``min_effective_sample``, ``symprec`` (A),
        ``reference_spacing`` (2 pi / A); defaults and meaning as in the block ``sscha`` of the input.

    Returns
    -------
    SschaResult
        Also for runs that fail or do not converge: see its ``status`` and ``reason``.

    Raises
    ------
    InputError
        A wrong argument, or a folder that holds another run.
    """
    settings = parse(
        SschaSettings,
        dict(supercell=supercell, cell=cell, n_configs=n_configs, max_populations=max_populations, engine=engine, **tolerances),
        "sscha",
    )
    check_structure(atoms, masses)
    try:
        pressure = check_pressure(pressure)
        source = as_evaluator(evaluator)
    except (ValueError, TypeError) as error:
        raise InputError(f"pressure: {error}" if isinstance(error, ValueError) else f"evaluator: {error}") from None
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < np.inf:
        raise InputError(f"sscha.temperature: {temperature!r}: must be one number in K, not below 0")
    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        folder = Path(directory) if directory is not None else Path(scratch)
        state = None if start is None else read_state(start, float(temperature), Path(scratch) / "sscha.log")
        task = Task(atoms, pressure, float(temperature), settings, int(seed), masses, state, source.model_id)
        run = RunFolder(folder, task.identity())
        return run.finished(settings.max_populations) or _guarded(task, source, run)


def _guarded(task: Task, evaluator: Evaluator, run: RunFolder) -> SschaResult:
    """Run; a failure becomes a result with its reason. Only physics is final: a broken evaluator may be repaired."""
    began = time.perf_counter()
    progress = Progress()
    try:
        result = _relax(task, evaluator, run, progress, began)
    except InputError:
        raise
    except SschaError as error:
        result = failed_result(task, str(error), progress, began)
        result.write(run.directory)
    except (MagusAnharmonicError, RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        result = failed_result(task, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", progress, began)
    if result.status == "failed":
        log.warning("%s at %g GPa: SSCHA failed: %s", task.atoms.get_chemical_formula(), task.pressure, result.reason)
    return result


def _relax(task: Task, evaluator: Evaluator, run: RunFolder, progress: Progress, began: float) -> SschaResult:
    from magus_anharmonic.sscha.python_sscha import minimise

    begin = _begin(task, evaluator, run)
    progress.n_evaluations = begin.n_evaluations
    state, response = begin.state, begin.stress_response
    symmetry = Symmetry(state.atoms, state.repeats)
    predicted = None
    for number in range(1, task.settings.max_populations + 1):
        state, ensemble = _population(number, state, task, evaluator, run)
        progress.n_evaluations += task.settings.n_configs
        averages = average(state, ensemble, symmetry)
        progress.gibbs.append(gibbs_energy(state, averages, task.pressure))
        _require_crystal(state, begin.state)
        reason = _unconverged(state, averages, progress, task)
        if response is not None and predicted is not None:
            response = _learn_response(response, averages, *predicted)
        if not reason or number == task.settings.max_populations:
            _record(run, progress, _row(number, state, averages, progress, None), task)
            result = finished_result(task, state, averages, progress, begin, reason, began)
            result.write(run.directory)
            return result
        minimised = minimise(state, ensemble, symmetry, min_effective_sample=task.settings.min_effective_sample, log=run.log)
        _record(run, progress, _row(number, state, averages, progress, minimised), task)
        state = floor_modes(minimised.state, symmetry, LARGEST_AMPLITUDE_LATER)
        if response is not None:
            strain = strain_towards(minimised.stress, task.pressure, response, symmetry)
            predicted = (minimised.stress, strain)
            state = state.strained(strain)
    raise SschaError("no population was allowed")


def _begin(task: Task, evaluator: Evaluator, run: RunFolder) -> Start:
    begin = run.read_start()
    if begin is None:
        begin = begin_run(
            task.atoms,
            evaluator,
            task.settings,
            pressure=task.pressure,
            temperature=task.temperature,
            masses=task.masses,
            start=task.start,
        )
        run.write_start(begin)
    return begin


def _population(number: int, state: SschaState, task: Task, evaluator: Evaluator, run: RunFolder) -> tuple[SschaState, Ensemble]:
    """The ensemble of one population: from the folder if it is there, else drawn and evaluated in one call."""
    stored = run.read_population(number, state)
    if stored is not None:
        return stored
    rng = np.random.default_rng([task.seed, number, SAMPLING_TAG])
    displacements = sample(state, task.settings.n_configs, rng)
    structures = []
    for displacement in displacements:
        structure = state.supercell.copy()
        structure.positions += displacement
        structures.append(structure)
    try:
        found = CountingEvaluator(evaluator).evaluate(structures)
    except InputError as error:
        raise SschaError(f"population {number}: a sampled configuration cannot be evaluated: {error}") from error
    ensemble = Ensemble(
        displacements,
        np.asarray(found.energy, dtype=float),
        np.array(found.forces, dtype=float),
        np.array(found.stress, dtype=float).reshape(-1, 3, 3),
    )
    run.write_population(number, state, ensemble)
    return state, ensemble


def _require_crystal(state: SschaState, begin: SschaState) -> None:
    """Raise ``SschaError`` when the crystal has come apart."""
    ratio = state.atoms.get_volume() / begin.atoms.get_volume()
    if not VOLUME_LIMITS[0] < ratio < VOLUME_LIMITS[1]:
        raise SschaError(f"dissociated: the volume is {ratio:.2f} times that of the start")
    neighbours = nearest_neighbour(state.atoms) / nearest_neighbour(begin.atoms)
    worst = int(np.argmax(np.abs(np.log(neighbours))))
    if not NEIGHBOUR_LIMITS[0] < neighbours[worst] < NEIGHBOUR_LIMITS[1]:
        raise SschaError(
            f"dissociated: the nearest neighbour of atom {worst + 1} ({state.atoms.symbols[worst]}) "
            f"is at {neighbours[worst]:.2f} times its distance at the start"
        )


def _unconverged(state: SschaState, averages: Averages, progress: Progress, task: Task) -> str:
    """Why the run has to go on; empty when it has converged."""
    settings, n = task.settings, len(state.atoms)
    gibbs, error = progress.gibbs[-1]
    open_issues = []
    if settings.cell == "variable":
        deviation = np.abs(averages.stress * EV_PER_A3_IN_GPA + np.eye(3) * task.pressure).max()
        if deviation >= settings.pressure_tolerance:
            open_issues.append(f"stress {deviation:.2f} GPa off the target")
    if averages.decrease / n >= max(settings.free_energy_tolerance, error):
        open_issues.append(f"G may still fall by {averages.decrease / n * 1e3:.2f} meV/atom")
    if len(progress.gibbs) < 2:
        open_issues.append("one population")
    else:
        before, error_before = progress.gibbs[-2]
        if abs(gibbs - before) > 2.0 * np.hypot(error, error_before) + 1e-6:
            open_issues.append(f"G changed by {(gibbs - before) * 1e3:.2f} meV/atom in the last population")
    return "; ".join(open_issues)


def _learn_response(response: np.ndarray, averages: Averages, stress: np.ndarray, strain: np.ndarray) -> np.ndarray:
    """Broyden's rank-one update of d(stress)/d(strain), where the change of stress stands clear of its noise."""
    step = np.array([strain[row, column] * (1.0 if row == column else 2.0) for row, column in VOIGT])
    change = np.array([(averages.stress - stress)[row, column] for row, column in VOIGT])
    expected = response @ step
    noise = np.linalg.norm([averages.stress_error[row, column] for row, column in VOIGT])
    if np.linalg.norm(expected) < 10.0 * noise or not step @ step > 0:
        return response
    return response + np.outer(change - expected, step) / (step @ step)


def _row(number: int, state: SschaState, averages: Averages, progress: Progress, minimised: Any) -> dict[str, Any]:
    """One line of ``convergence.csv``; the last four columns belong to the minimisation on this population, if any."""
    n = len(state.atoms)
    gibbs, error = progress.gibbs[-1]
    return {
        "population": number,
        "free_energy_eV_per_atom": averages.helmholtz / n,
        "gibbs_eV_per_atom": gibbs,
        "error_eV_per_atom": error,
        "pressure_GPa": -np.trace(averages.stress) / 3.0 * EV_PER_A3_IN_GPA,
        "volume_A3_per_atom": state.atoms.get_volume() / n,
        "predicted_decrease_eV_per_atom": averages.decrease / n,
        "centroid_force_eV_per_A": float(np.abs(averages.force).max()),
        "effective_sample": 1.0 if minimised is None else minimised.effective_sample,
        "fc_gradient_eV_per_A2": None if minimised is None else minimised.fc_gradient,
        "centroid_gradient_A": None if minimised is None else minimised.centroid_gradient,
        "n_steps": 0 if minimised is None else minimised.n_steps,
    }


def _record(run: RunFolder, progress: Progress, row: dict[str, Any], task: Task) -> None:
    progress.rows.append(row)
    run.write_convergence(progress.rows)
    log.info(
        "population %d of at most %d: G = %.5f +- %.5f eV/atom, pressure %.2f GPa, ESS %.2f",
        row["population"], task.settings.max_populations, row["gibbs_eV_per_atom"], row["error_eV_per_atom"],
        row["pressure_GPa"], row["effective_sample"],
    )  # fmt: skip
