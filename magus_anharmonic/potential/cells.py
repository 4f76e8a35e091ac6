"""Cells that are no cells: missing, dependent and very skewed vectors."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.geometry import minkowski_reduce

from magus_anharmonic.errors import InputError

DEPENDENT = 1e-6
"""Of the volume that non-periodic vectors would span at right angles; below, they are no cell."""
SKEWED = 0.02
"""Volume by the product of the vectors' lengths; below, neighbours are searched in the reduced
cell."""


def complete_cell(atoms: Atoms) -> Cell:
    """The cell with unit vectors along missing *non-periodic* directions; missing or dependent
    periodic ones leave it flat.

    Non-periodic vectors that depend on the others mean nothing either and count as missing.
    """
    missing = ~atoms.cell.any(axis=1)
    if atoms.pbc.all() or (missing & atoms.pbc).any():
        return atoms.cell
    completed = _completed(atoms.cell) if missing.any() else atoms.cell
    return (
        completed
        if _spans(completed.array, atoms.pbc)
        else _completed(Cell(atoms.cell.array * atoms.pbc[:, None]))
    )


def _completed(cell: Cell) -> Cell:
    """With unit vectors for the missing ones; the cell itself where those that are there depend on
    each other."""
    return cell.complete() if np.linalg.matrix_rank(cell.array) == cell.any(axis=1).sum() else cell


def _spans(cell: np.ndarray, pbc: np.ndarray) -> bool:
    """Whether the non-periodic vectors leave the space of the periodic ones."""
    periodic = np.linalg.svd(cell[pbc], compute_uv=False).prod()
    return bool(
        abs(np.linalg.det(cell)) > DEPENDENT * periodic * np.linalg.norm(cell[~pbc], axis=1).prod()
    )


def cell_volume(atoms: Atoms) -> float:
    """A^3; infinite where there is no cell, so that the stress is zero."""
    cell = atoms.cell
    if not cell.any(axis=1).all() or not (atoms.pbc.all() or _spans(cell.array, atoms.pbc)):
        return np.inf
    return float(cell.volume)


def search_cell(atoms: Atoms, where: str = "the structure") -> np.ndarray:
    """Vectors (3, 3) of the same lattice in which neighbours are quickly found: those of the cell,
    unless it is very skewed.

    Vectors between atoms and their images do not depend on the choice. Raises InputError, naming
    ``where``, for a cell so skewed that its volume is lost in rounding.
    """
    cell = complete_cell(atoms).array
    if not atoms.pbc.any() or not is_skewed(cell):
        return cell
    refused = InputError(
        f"{where}: the cell is too skewed (volume by product of its vectors' lengths"
        f" {_shape(cell):.0e}); give a reduced one"
    )
    # what is not periodic is no part of the lattice, and a unit vector at right angles is as good
    lattice = cell if atoms.pbc.all() else _completed(Cell(cell * atoms.pbc[:, None])).array
    try:
        reduced = minkowski_reduce(lattice, atoms.pbc)[0]
    except (RuntimeError, ValueError, OverflowError) as error:
        raise refused from error
    same_volume = np.isclose(abs(np.linalg.det(reduced)), abs(np.linalg.det(lattice)), rtol=1e-6)
    if not same_volume or _shape(reduced) < 0.5:
        raise refused
    return reduced


def is_skewed(cell: np.ndarray) -> bool:
    """Whether vectors (3, 3) are so skewed that neither searches nor inverse matrices can be
    trusted with them."""
    return _shape(cell) < SKEWED


def _shape(cell: np.ndarray) -> float:
    """Volume by the product of the vectors' lengths."""
    return float(abs(np.linalg.det(cell)) / max(np.linalg.norm(cell, axis=1).prod(), 1e-300))
