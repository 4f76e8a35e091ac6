"""The first state of a run: a harmonic start, or the state of another run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator, check_calculator
from magus_anharmonic.gate import check_structure
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.cell import static_response_to_strain
from magus_anharmonic.sscha.qe_files import state_from_dyn
from magus_anharmonic.sscha.reciprocal import nearest_images
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
from magus_anharmonic.sscha.state import same_gaussian as same_gaussian
from magus_anharmonic.sscha.supercells import SupercellMatrix, is_diagonal, n_cells, q_points
from magus_anharmonic.sscha.symmetry import Symmetry, choose_supercell_matrix, symmetric_primitive
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
        elif composition(structure, kinds) != composition(atoms, kinds):
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


def state_digest(state: SschaState) -> str:
    """Twelve hex digits that identify a state."""
    digest = hashlib.sha256()
    for array in (state.atoms.cell.array, state.atoms.positions, state.force_constants):
        digest.update((np.round(array, 6) + 0.0).tobytes())
    return digest.hexdigest()[:12]


def start_run(
    atoms: Atoms,
    evaluator: Evaluator,
    settings: SschaSettings,
    *,
    pressure: float,
    temperature: float,
    masses: Mapping[str, float] | None,
    start: SschaState | None,
) -> Start:
    """First state of a run; evaluates forces (and stresses, if the cell may change)."""
    check_calculator(evaluator, atoms, stress=settings.cell == "variable")
    if start is not None:
        return continue_from(
            start, atoms, evaluator, settings, temperature=temperature, masses=masses
        )
    variable_cell = settings.cell == "variable"
    reduced = symmetric_primitive(stripped(atoms), settings.symprec)
    supercell_of(reduced, settings)
    counting = CountingEvaluator(in_double_precision(evaluator))
    relaxed = relaxed_primitive(
        reduced, counting, pressure, symprec=settings.symprec, variable_cell=variable_cell
    )
    structure = with_masses(relaxed, relaxed, masses)
    if heavy := isotopes(structure):
        log.info("%s: masses %s amu", structure.get_chemical_formula(), heavy)
    supercell_matrix = supercell_of(structure, settings)
    first = harmonic_start(
        structure,
        counting,
        temperature=temperature,
        supercell_matrix=supercell_matrix,
        variable_cell=variable_cell,
    )
    return replace(first, n_evaluations=counting.count)


def continue_from(
    start: SschaState,
    atoms: Atoms,
    evaluator: Evaluator,
    settings: SschaSettings,
    *,
    temperature: float,
    masses: Mapping[str, float] | None,
) -> Start:
    """Take cell, centroids and force constants of another run; supercell, masses and temperature
    may change."""
    if composition(start.atoms, numbers_of) != composition(atoms, numbers_of):
        raise InputError(
            f"start: is {start.atoms.get_chemical_formula()}, the structure is"
            f" {atoms.get_chemical_formula()}"
        )
    structure = with_masses(start.atoms, atoms, masses)
    supercell_matrix = supercell_of(structure, settings)
    symmetry = Symmetry(structure, supercell_matrix, SYMMETRY_OF_A_STATE)
    compact = (
        start.force_constants
        if supercell_matrix == start.supercell_matrix
        else interpolate(start, supercell_matrix)
    )
    state = SschaState(structure, supercell_matrix, symmetry.force_constants(compact), temperature)
    # As a harmonic start: it may be one, with modes near zero on either side of it, and its sample
    # would be lost.
    state = floor_modes(state, symmetry)
    counting = CountingEvaluator(evaluator)
    response = (
        static_response_to_strain(structure, counting) if settings.cell == "variable" else None
    )
    return Start(state, response, counting.count)


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


def numbers_of(atoms: Atoms) -> np.ndarray:
    """(n,) atomic numbers, as `kinds` without the isotopes."""
    return atoms.numbers


def composition(atoms: Atoms, of: Callable[[Atoms], np.ndarray]) -> dict[int, float]:
    """Fraction of every kind of atom."""
    found, counts = np.unique(of(atoms), return_counts=True)
    return {
        int(kind): round(count / len(atoms), 6) for kind, count in zip(found, counts, strict=True)
    }


def interpolate(state: SschaState, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """Compact force constants of another supercell by Fourier interpolation."""
    vectors, blocks = nearest_images(state)
    q = q_points(supercell_matrix)
    size = 3 * len(state.atoms)
    flat = blocks.transpose(0, 1, 3, 2, 4).reshape(len(vectors), -1)
    matrices = (np.exp(2j * np.pi * q @ vectors.T) @ flat).reshape(-1, size, size)
    return inverse_fourier(matrices, supercell_matrix, q)
