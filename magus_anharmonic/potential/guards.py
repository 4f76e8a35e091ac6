"""Cells that are no cells, what must not come out of a relaxation (overlapping or lost atoms,
diverging cells), and the space group that it keeps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import spglib
from ase import Atoms
from ase.cell import Cell
from ase.data import covalent_radii
from ase.geometry import minkowski_reduce
from scipy.linalg import sqrtm
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from magus_anharmonic.errors import InputError
from magus_anharmonic.structures import spglib_cell, spglib_or_none

logger = logging.getLogger(__name__)

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


def expected_pairs(atoms: Atoms, cutoff: float) -> float:
    """About how many pairs are closer than ``cutoff`` (Angstrom), from the density; all of them
    without periodicity."""
    n_atoms = len(atoms)
    if not atoms.pbc.all():
        return float(n_atoms**2)
    return n_atoms**2 * 4.0 / 3.0 * np.pi * cutoff**3 / abs(atoms.cell.volume)


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


def why_no_structure(atoms: Atoms, least: float) -> str:
    """Why there is nothing to evaluate, or an empty string; ``least``: A^3 per atom."""
    if len(atoms) == 0:
        return "has no atoms"
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return "positions or cell are not finite"
    volume = abs(complete_cell(atoms).volume)
    if atoms.pbc.any() and volume < 1e-3:
        return f"the cell is flat (volume {volume:.1e} A^3) but periodic"
    if atoms.pbc.all() and volume < least * len(atoms):
        per_atom = volume / len(atoms)
        return f"the cell is too small: {per_atom:.2g} A^3/atom, at least {least:g} are needed"
    return ""


def why_invalid(atoms: Atoms) -> str:
    """Why a structure cannot be relaxed at all, or an empty string."""
    if reason := why_no_structure(atoms, MIN_VOLUME):
        return reason
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


NEAREST = 16
"""So many atoms, nearest in fractional coordinates, are compared in Angstrom: a slanted cell
changes the order of a few."""


@dataclass(frozen=True)
class _Operations:
    """n operations: rotations (n, 3, 3) and translations (n, 3), fractional; images (n, N): where
    each of them puts atom i."""

    rotations: np.ndarray
    translations: np.ndarray
    images: np.ndarray

    def positions(self, scaled: np.ndarray) -> np.ndarray:
        """Fractional positions (N, 3) averaged over the operations, each atom near where it was."""
        shift = np.zeros_like(scaled)
        for rotation, translation, image in zip(
            self.rotations, self.translations, self.images, strict=True
        ):
            difference = scaled @ rotation.T + translation - scaled[image]
            shift[image] += difference - np.round(difference)
        return scaled + shift / len(self.rotations)

    def vectors(self, vectors: np.ndarray, cartesian: np.ndarray) -> np.ndarray:
        """Vectors of atoms (N, 3) averaged over the operations, whose Cartesian rotations are given
        (n, 3, 3)."""
        result = np.zeros_like(vectors)
        for image, rotation in zip(self.images, cartesian, strict=True):
            result[image] += vectors @ rotation.T
        return result / len(cartesian)


class SymmetryProjector:
    """Projects cell, positions, forces and stress on the space group that a structure has at the
    start.

    The operations are kept as integer rotations and fractional translations, so that they stay
    valid while the cell changes. A supercell has each rotation with every translation of the
    primitive cell: the average over all of them is that over the pure translations, followed by
    that over one operation for each rotation, which are a few hundred instead of thousands. Raises
    InputError where the operations that spglib finds at ``symprec`` (Angstrom) do not map the atoms
    onto each other.
    """

    def __init__(self, atoms: Atoms, symprec: float = 0.01) -> None:
        found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=symprec)
        if found is None:
            logger.warning(
                "fix_symmetry: spglib finds no space group of %s at %g A; it relaxes without"
                " symmetry",
                atoms.get_chemical_formula(),
                symprec,
            )
            found = {"rotations": np.eye(3, dtype=int)[None], "translations": np.zeros((1, 3))}
        rotations, translations = (
            np.asarray(found["rotations"], dtype=int),
            np.asarray(found["translations"], dtype=float),
        )
        pure, others = _factors(rotations)
        images = _Images(atoms, symprec)
        self.steps = [
            _Operations(
                rotations[part].astype(float),
                translations[part],
                np.array([images(rotations[i], translations[i]) for i in part]),
            )
            for part in (pure, others)
        ]
        self.rotations = self.steps[1].rotations

    def structure(self, atoms: Atoms) -> Atoms:
        """A copy whose cell and positions have the symmetry exactly."""
        copy = atoms.copy()
        lattice = copy.cell.array
        metric = np.mean(
            np.swapaxes(self.rotations, 1, 2) @ (lattice @ lattice.T) @ self.rotations, axis=0
        )
        inverse = np.linalg.inv(lattice)
        stretch = np.real(sqrtm(inverse @ metric @ inverse.T))
        copy.set_cell(lattice @ stretch, scale_atoms=True)
        scaled = copy.get_scaled_positions(wrap=False)
        for operations in self.steps:
            scaled = operations.positions(scaled)
        copy.set_scaled_positions(scaled)
        return copy

    def forces(self, lattice: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """Forces (N, 3) averaged over the operations."""
        for operations in self.steps:
            forces = operations.vectors(forces, _cartesian(lattice, operations.rotations))
        return forces

    def stress(self, lattice: np.ndarray, stress: np.ndarray) -> np.ndarray:
        """Stress (3, 3) averaged over the operations."""
        rotations = _cartesian(lattice, self.rotations)
        return np.mean(rotations @ stress @ np.swapaxes(rotations, 1, 2), axis=0)


def _cartesian(lattice: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    return lattice.T @ rotations @ np.linalg.inv(lattice.T)


def _factors(rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pure translations and of one operation for each rotation; all are products of
    the two.

    Where they are not (spglib counted too few at a coarse tolerance): of the identity, and of all
    operations.
    """
    flat = rotations.reshape(-1, 9)
    pure = np.flatnonzero((flat == np.eye(3, dtype=int).ravel()).all(axis=1))
    _, first, count = np.unique(flat, axis=0, return_index=True, return_counts=True)
    if (count == len(pure)).all():
        return pure, np.sort(first)
    return pure[:1], np.arange(len(rotations))


class _Images:
    """Finds on which atom an operation puts each atom, in memory that grows with the number of
    atoms alone."""

    def __init__(self, atoms: Atoms, symprec: float) -> None:
        self.lattice, self.symprec = atoms.cell.array, symprec
        self.scaled = atoms.get_scaled_positions(wrap=False)
        self.lengths = np.linalg.norm(self.lattice, axis=1)
        self.members = [
            np.flatnonzero(atoms.numbers == number) for number in np.unique(atoms.numbers)
        ]
        self.trees = [
            cKDTree(self._boxed(self.scaled[members]), boxsize=self.lengths)
            for members in self.members
        ]

    def _boxed(self, scaled: np.ndarray) -> np.ndarray:
        """Fractional coordinates times the lengths of the cell vectors, in the box that they
        span."""
        return np.clip(
            (scaled - np.floor(scaled)) * self.lengths, 0.0, np.nextafter(self.lengths, 0.0)
        )

    def __call__(self, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """(N,); raises InputError where two atoms land on one."""
        moved = self.scaled @ rotation.T + translation
        image = np.empty(len(moved), dtype=np.intp)
        for members, tree in zip(self.members, self.trees, strict=True):
            near = members[
                tree.query(self._boxed(moved[members]), k=range(1, min(NEAREST, len(members)) + 1))[
                    1
                ]
            ]
            difference = moved[members][:, None] - self.scaled[near]
            difference -= np.round(difference)
            nearest = np.linalg.norm(difference @ self.lattice, axis=-1).argmin(axis=1)
            image[members] = near[np.arange(len(members)), nearest]
        if not (np.bincount(image, minlength=len(image)) == 1).all():
            raise InputError(
                f"fix_symmetry: an operation found at symprec = {self.symprec:g} A puts two atoms"
                " on one; take a smaller symprec"
            )
        return image
