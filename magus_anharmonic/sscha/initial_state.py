"""The first state of a run: a harmonic start, or the state of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

from magus_anharmonic.calculator_check import check_calculator
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.gate import check_structure
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.cell import static_response_to_strain
from magus_anharmonic.sscha.qe_files import state_from_dyn
from magus_anharmonic.sscha.reciprocal import interpolated, nearest_images
from magus_anharmonic.sscha.result import SschaResult, final_ensemble
from magus_anharmonic.sscha.start import (
    CountingEvaluator,
    Start,
    floor_modes,
    harmonic_start,
    in_double_precision,
    relaxed_primitive,
)
from magus_anharmonic.sscha.state import SschaState, inverse_fourier
from magus_anharmonic.sscha.supercells import SupercellMatrix, is_diagonal, n_cells, q_points
from magus_anharmonic.sscha.symmetry import Symmetry, choose_supercell_matrix, symmetric_primitive
from magus_anharmonic.sscha.task import Task
from magus_anharmonic.structures import isotopes, kinds, stripped, with_isotopes

log = logging.getLogger(__name__)

SYMMETRY_OF_A_STATE = 1e-3
"""A, tolerance for the symmetry of a structure that is already symmetric."""


def check_crystal(atoms: Atoms, masses: Mapping[str, float] | None) -> None:
    """Raise ``InputError`` for what does not pass the `gate`, and for masses that cannot be
    meant."""
    check_structure(atoms)
    for symbol, mass in (masses or {}).items():
        if symbol not in atoms.get_chemical_symbols():
            raise InputError(f"masses.{symbol}: not in {atoms.get_chemical_formula()}")
        if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass < 500:
            raise InputError(f"masses.{symbol}: {mass!r}: must be a mass in amu")


def with_masses(structure: Atoms, atoms: Atoms, masses: Mapping[str, float] | None) -> Atoms:
    """A copy of ``structure`` with the masses (amu) that ``masses`` gives by symbol, else with
    those of ``atoms``, of the same composition.

    Where ``atoms`` has several isotopes of one element, ``structure`` must have as many of each:
    nothing else says which is where. Raises ``InputError`` where it has not.
    """
    chosen: dict[str, float] = dict(masses or {})
    symbols = np.array(atoms.get_chemical_symbols())
    for symbol in sorted(set(symbols) - set(chosen)):
        found = np.unique(kinds(atoms)[symbols == symbol])
        if len(found) == 1:
            natural = found[0] == atomic_numbers[symbol]
            chosen[symbol] = float(
                atomic_masses[found[0]] if natural else atoms.get_masses()[symbols == symbol][0]
            )
        elif composition(kinds(structure)) != composition(kinds(atoms)):
            raise InputError(
                f"start: has other isotopes of {symbol} than {atoms.get_chemical_formula()}, which"
                f" has several ({isotopes(atoms)}): nothing says which atom is which; start"
                " without it"
            )
    return with_isotopes(structure, chosen)


def read_state(start: Any, temperature: float) -> SschaState:
    """The state behind ``start``: a `SschaResult`, an `SschaState`, the folder of a run, or a
    prefix of dynamical matrices."""
    if isinstance(start, SschaState):
        return start
    if isinstance(start, SschaResult):
        return start.state
    if not isinstance(start, str | Path):
        raise InputError(
            f"start: {type(start).__name__}: must be an SschaResult, the folder of a run, or the"
            " prefix of dynamical matrices"
        )
    if Path(start).is_dir():
        return SschaResult.read(start).state
    return state_from_dyn(start, temperature)


def configurations_of(start: Any, model_id: str) -> np.ndarray | None:
    """Displacements (n, n_supercell, 3) in A that a run of another model than ``model_id`` drew
    from the state it ended in.

    None where ``start`` is no folder of a run, or of the same model (whose energies would only be
    worked out again).
    """
    if not isinstance(start, str | Path) or not Path(start).is_dir():
        return None
    result = SschaResult.read(start)
    if result.model_id == model_id:
        return None
    ensemble = final_ensemble(Path(start), result)
    return None if ensemble is None else ensemble.displacements


def start_run(task: Task, evaluator: Evaluator) -> Start:
    """First state of a run; evaluates forces (and stresses, if the cell may change)."""
    atoms, settings = task.atoms, task.settings
    variable_cell = settings.cell == "variable"
    check_calculator(evaluator, atoms, stress=variable_cell)
    if task.start is not None:
        return continue_from(task.start, task, evaluator)
    reduced = symmetric_primitive(stripped(atoms), settings.symprec)
    supercell_of(reduced, settings)
    counting = CountingEvaluator(in_double_precision(evaluator))
    relaxed = relaxed_primitive(
        reduced, counting, task.pressure, symprec=settings.symprec, variable_cell=variable_cell
    )
    structure = with_masses(relaxed, relaxed, task.masses)
    if heavy := isotopes(structure):
        log.info("%s: masses %s amu", structure.get_chemical_formula(), heavy)
    first = harmonic_start(
        structure,
        counting,
        temperature=task.temperature,
        supercell_matrix=supercell_of(structure, settings),
        variable_cell=variable_cell,
    )
    return replace(first, n_evaluations=counting.count)


def continue_from(start: SschaState, task: Task, evaluator: Evaluator) -> Start:
    """Take cell, centroids and force constants of another run; supercell, masses and temperature
    may change."""
    if composition(start.atoms.numbers) != composition(task.atoms.numbers):
        raise InputError(
            f"start: is {start.atoms.get_chemical_formula()}, the structure is"
            f" {task.atoms.get_chemical_formula()}"
        )
    structure = with_masses(start.atoms, task.atoms, task.masses)
    matrix = supercell_of(structure, task.settings)
    symmetry = Symmetry(structure, matrix, SYMMETRY_OF_A_STATE)
    same = matrix == start.supercell_matrix
    compact = symmetry.force_constants(
        start.force_constants if same else interpolate(start, matrix)
    )
    # As a harmonic start: it may be one, with modes near zero on either side of it, and its sample
    # would be lost.
    state = floor_modes(SschaState(structure, matrix, compact, task.temperature), symmetry)
    if task.settings.cell != "variable":
        return Start(state, None, 0)
    counting = CountingEvaluator(evaluator)
    return Start(state, static_response_to_strain(structure, counting), counting.count)


def supercell_of(atoms: Atoms, settings: SschaSettings) -> SupercellMatrix:
    """The supercell of a primitive cell; raises ``InputError`` for one atom in one cell, and for
    what the engine cannot take."""
    diagonal = settings.engine == "python-sscha"
    supercell_matrix = choose_supercell_matrix(
        atoms, settings.supercell, SYMMETRY_OF_A_STATE, diagonal=diagonal
    )
    if diagonal and not is_diagonal(supercell_matrix):
        raise InputError(
            f"sscha.supercell: {[list(row) for row in supercell_matrix]}: is not diagonal, and"
            " engine: python-sscha only repeats cells; take engine: native, or three repetitions"
        )
    if len(atoms) * n_cells(supercell_matrix) < 2:
        raise InputError(
            f"sscha.supercell: {list(supercell_matrix)}: one atom has no vibrations;"
            " take a larger supercell"
        )
    return supercell_matrix


def composition(kinds_of_atoms: np.ndarray) -> dict[int, float]:
    """Fraction of every kind of atom."""
    found, counts = np.unique(kinds_of_atoms, return_counts=True)
    shares = (counts / len(kinds_of_atoms)).round(6)
    return dict(zip(found.tolist(), shares.tolist(), strict=True))


def interpolate(state: SschaState, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """Compact force constants of another supercell by Fourier interpolation."""
    q = q_points(supercell_matrix)
    return inverse_fourier(interpolated(*nearest_images(state), q), supercell_matrix, q)
