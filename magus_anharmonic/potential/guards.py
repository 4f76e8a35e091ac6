"""Cells that are no cells, and what must not come out of a relaxation: overlapping or lost atoms,
diverging cells."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.data import covalent_radii
from ase.geometry import minkowski_reduce
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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


OVERLAP = 0.4  # of the sum of covalent radii

COINCIDENT = 0.1  # Angstrom

BOND_RANGE = 5.0  # Angstrom; an atom without a neighbour in this range is on its own

APART_AT_START = 4.0  # Angstrom; what is farther from each other at the start may go farther still

MAX_EXPANSION = 4.0  # of the volume at the start

MIN_VOLUME = 0.3  # A^3/atom

MAX_ASPECT = 30.0  # longest by shortest cell vector

MIN_SHAPE = 0.02  # volume by product of the vectors' lengths


def _pairs(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Atoms, distance and cell shift of pairs closer than ``cutoff``.

    vesin searches a little farther, because it divides the cell into boxes of that size.
    """
    from vesin import NeighborList  # it loads torch, which ASE's users of the calculator need not

    cell = search_cell(atoms)
    finder = NeighborList(
        cutoff=max(cutoff, 0.2 * abs(np.linalg.det(cell)) ** (1 / 3)), full_list=True, n_threads=1
    )
    first, second, distance, shift = finder.compute(atoms.positions, cell, atoms.pbc, "ijdS")
    close = distance < cutoff
    return first[close], second[close], distance[close], shift[close]


def why_invalid(atoms: Atoms) -> str:
    """Why a structure cannot be evaluated at all, or an empty string."""
    if len(atoms) == 0:
        return "no atoms"
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return "positions or cell are not finite"
    volume = abs(complete_cell(atoms).volume)
    if atoms.pbc.any() and volume < 1e-3:
        return "the cell is flat"
    if atoms.pbc.all() and volume < MIN_VOLUME * len(atoms):
        return (
            f"the cell is too small: {volume / len(atoms):.2g} A^3/atom, at least {MIN_VOLUME:g}"
            " are needed"
        )
    first, second, distance, _ = _pairs(atoms, COINCIDENT)
    return (
        f"atoms {first[0]} and {second[0]} coincide ({distance[0]:.3f} A)" if len(distance) else ""
    )


def overlap(atoms: Atoms) -> str:
    """Which two atoms are closer than `OVERLAP` of their radii, or an empty string."""
    radii = covalent_radii[atoms.numbers]
    first, second, distance, _ = _pairs(atoms, max(2.0 * OVERLAP * float(radii.max()), COINCIDENT))
    close = np.flatnonzero(distance < OVERLAP * (radii[first] + radii[second]))
    return (
        f"atoms {first[close[0]]} and {second[close[0]]} overlap ({distance[close[0]]:.2f} A)"
        if len(close)
        else ""
    )


def isolated(atoms: Atoms) -> set[int]:
    """Atoms without a neighbour within `BOND_RANGE`."""
    return set(range(len(atoms))) - set(_pairs(atoms, BOND_RANGE)[0].tolist())


def n_pieces(atoms: Atoms, distance: float) -> int:
    """Pieces that are farther from each other than ``distance`` (Angstrom), in the structure
    repeated twice along its periods.

    So layers, chains and molecules of which a cell holds one count as two, four and eight.
    """
    first, second, _, shift = _pairs(atoms, distance)
    corners = np.array(list(np.ndindex(*np.where(atoms.pbc, 2, 1))))
    weights = np.array([4, 2, 1])
    origin = first + len(atoms) * (corners @ weights)[:, None]
    image = second + len(atoms) * ((corners[:, None] + shift) % 2 @ weights)
    size = 8 * len(atoms)
    nodes = (len(atoms) * (corners @ weights)[:, None] + np.arange(len(atoms))).ravel()
    bonds = coo_array(
        (np.ones(origin.size, dtype=np.int8), (origin.ravel(), image.ravel())), shape=(size, size)
    )
    return len(np.unique(connected_components(bonds, directed=False)[1][nodes]))


class CellGuard:
    """Remembers volume and shape of a cell at the start, and tells when it has run away from
    them."""

    def __init__(self, lattice: np.ndarray, n_atoms: int) -> None:
        self.n_atoms = n_atoms
        self.volume, self.aspect, self.shape = _measures(lattice)

    def diverged(self, lattice: np.ndarray) -> str:
        """What is wrong with cell vectors (3, 3), or an empty string."""
        volume, aspect, shape = _measures(lattice)
        if not volume <= MAX_EXPANSION * self.volume:
            return f"diverging cell: the volume grew {volume / self.volume:.1f} times"
        if volume < MIN_VOLUME * self.n_atoms:
            return f"diverging cell: collapsed to {volume / self.n_atoms:.2f} A^3/atom"
        if aspect > max(MAX_ASPECT, 1.5 * self.aspect) or shape < min(MIN_SHAPE, 0.7 * self.shape):
            return f"diverging cell: needle or plate (longest by shortest vector {aspect:.0f})"
        return ""


def _measures(lattice: np.ndarray) -> tuple[float, float, float]:
    """Volume (A^3), longest by shortest vector, and volume by the product of the vectors'
    lengths."""
    lengths = np.sqrt((lattice**2).sum(axis=1))
    volume = abs(float(np.linalg.det(lattice)))
    return (
        volume,
        float(lengths.max() / max(lengths.min(), 1e-9)),
        volume / max(float(lengths.prod()), 1e-9),
    )
