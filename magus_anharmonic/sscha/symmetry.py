"""Space-group operations of a primitive cell, applied to forces, stresses and force constants of
its supercell."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import spglib
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.sscha.supercells import (
    SupercellMatrix,
    as_supercell_matrix,
    cell_index,
    cell_offsets,
    compatible,
    containing_mesh,
    is_diagonal,
    smallest_supercell,
    symmetric_supercell,
    three,
)
from magus_anharmonic.structures import primitive, spglib_cell, spglib_or_none

log = logging.getLogger(__name__)

MOST_ATOMS = 10_000
"""Of a supercell that is chosen by its length: a matrix of its force constants has 7 GB."""


class Symmetry:
    """Operations of ``atoms`` (a primitive cell, exactly symmetric) that also leave the supercell
    lattice invariant.

    rotations : (m, 3, 3) Cartesian, fractional : (m, 3, 3) the same in whole numbers; permutations
    : (m, n), operation g takes atom a to permutations[g, a], in the cell shifts[g, a] (m, n, 3)
    when a is in the first. targets : (m, n_cells, n, n), the cell of the block to which operation g
    takes block (R, a, b). movable : whether centroids may move at all; where not, no displacement
    of them keeps the "symmetry".
    """

    def __init__(
        self,
        atoms: Atoms,
        supercell_matrix: SupercellMatrix,
        symprec: float = 1e-3,
        *,
        movable: bool = True,
    ) -> None:
        self.movable = movable
        found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=symprec)
        fractional = found["rotations"] if found else np.eye(3, dtype=int)[None]
        translations = found["translations"] if found else np.zeros((1, 3))
        keep = [compatible(rotation, supercell_matrix) for rotation in fractional]
        cell = atoms.cell.array
        self.supercell_matrix = supercell_matrix
        self.rotations = np.array([cell.T @ w @ np.linalg.inv(cell.T) for w in fractional[keep]])
        operations = zip(fractional[keep], translations[keep], strict=True)
        found = [images(atoms, *operation) for operation in operations]
        self.permutations = np.array([permutation for permutation, _, _ in found])
        self.fractional = fractional[keep]
        self.shifts = np.array([shift for _, shift, _ in found])
        turned = np.einsum("gij,rj->gri", self.fractional, cell_offsets(supercell_matrix))
        between = self.shifts[:, None, None, :] - self.shifts[:, None, :, None]
        self.targets = cell_index(turned[:, :, None, None] + between, supercell_matrix)
        self._opposite = cell_index(-cell_offsets(supercell_matrix), supercell_matrix)

    def __len__(self) -> int:
        return len(self.rotations)

    @cached_property
    def _gather(self) -> np.ndarray:
        """(m, n_cells, n, n) block, counted through (cell, a, b), that operation g brings to block
        (R, a, b)."""
        n = self.permutations.shape[1]
        first, second = self.permutations[:, None, :, None], self.permutations[:, None, None, :]
        return (self.targets * n + first) * n + second

    @cached_property
    def _turn(self) -> np.ndarray:
        """(m, 9, 9) what an operation does to a 3x3 block written as a row."""
        return np.einsum("gji,gkl->gjkil", self.rotations, self.rotations).reshape(-1, 9, 9)

    @cached_property
    def _vector_average(self) -> np.ndarray:
        """(3n, 3n) matrix of `vectors`."""
        n = self.permutations.shape[1]
        average = np.zeros((n, 3, n, 3))
        for rotation, permutation in zip(self.rotations, self.permutations, strict=True):
            average[np.arange(n), :, permutation, :] += rotation.T / len(self)
        average -= average.mean(axis=0)
        return average.reshape(3 * n, 3 * n)

    def vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Average of one vector per atom (..., n, 3) over the operations, without the mean over
        atoms."""
        flat = vectors.reshape(*vectors.shape[:-2], -1)
        return (flat @ self._vector_average.T).reshape(vectors.shape)

    def centroids(self) -> np.ndarray:
        """(3n, k) orthonormal displacements of the centroids that keep the symmetry, translations
        left out; none where they are not `movable`."""
        if not self.movable:
            return np.zeros((3 * self.permutations.shape[1], 0))
        values, vectors = np.linalg.eigh(0.5 * (self._vector_average + self._vector_average.T))
        return vectors[:, values > 0.5]

    def tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Symmetric part of Cartesian tensors (..., 3, 3), averaged over the operations."""
        average = np.einsum(
            "gji,...jk,gkl->...il", self.rotations, tensor, self.rotations, optimize=True
        ) / len(self)
        return 0.5 * (average + average.swapaxes(-1, -2))

    def force_constants(self, compact: np.ndarray) -> np.ndarray:
        """Force constants averaged over the operations, symmetric, and obeying the acoustic sum
        rule."""
        if len(self) == 1:
            return sum_rule_of_compact(compact, self._opposite)
        n_cells, n = compact.shape[:2]
        images = compact.reshape(-1, 9)[self._gather].reshape(len(self), -1, 9)
        average = (images @ self._turn).sum(axis=0).reshape(n_cells, n, n, 3, 3) / len(self)
        return sum_rule_of_compact(average, self._opposite)

    def site(self, atom: int) -> np.ndarray:
        """(k,) the operations that leave an atom where it is."""
        return np.flatnonzero(self.permutations[:, atom] == atom)

    def representatives(self) -> list[int]:
        """One atom of every set of equivalent atoms."""
        return sorted(
            {int(self.permutations[:, atom].min()) for atom in range(self.permutations.shape[1])}
        )


def sum_rule_of_compact(compact: np.ndarray, opposite: np.ndarray) -> np.ndarray:
    """`state.sum_rule` without the supercell: symmetric, and a translation costs nothing;
    ``opposite``: index of cell -R."""
    n_cells, n = compact.shape[:2]
    symmetric = 0.5 * (compact + compact[opposite].transpose(0, 2, 1, 4, 3))
    row = symmetric.sum(axis=(0, 2)) / (n_cells * n)
    column = symmetric.sum(axis=(0, 1)) / (n_cells * n)
    return symmetric - row[:, None] - column[None, :] + column.sum(axis=0) / n


def images(
    atoms: Atoms, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Permutation (n,), lattice shift (n, 3) and what is left (n, 3): in fractions, rotation x_a +
    translation = x_permutation[a] + shift[a] + left[a]."""
    scaled = atoms.get_scaled_positions(wrap=False)
    difference = (scaled @ rotation.T + translation)[:, None] - scaled[None, :]
    shift = np.round(difference)
    distance = np.linalg.norm((difference - shift) @ atoms.cell.array, axis=2)
    distance[atoms.numbers[:, None] != atoms.numbers[None, :]] = np.inf
    chosen = np.arange(len(atoms)), distance.argmin(axis=1)
    return chosen[1], shift[chosen].astype(int), (difference - shift)[chosen]


def symmetric_primitive(atoms: Atoms, symprec: float) -> Atoms:
    """The primitive cell with cell and positions exactly symmetric; the orientation of the input is
    kept."""
    from ase.spacegroup.symmetrize import refine_symmetry

    reduced = primitive(atoms, symprec)
    found = spglib_or_none(spglib.get_symmetry_dataset, spglib_cell(reduced), symprec=symprec)
    if found is not None and found.number > 1:
        refine_symmetry(reduced, symprec=symprec)
    return reduced


def choose_supercell_matrix(
    atoms: Atoms,
    supercell: Iterable[Any] | Mapping[Any, float],
    symprec: float,
    *,
    diagonal: bool = False,
) -> SupercellMatrix:
    """Supercell of the primitive cell for ``supercell``: three repetitions, three rows of whole
    numbers, or ``{"min_length": A}``.

    One that breaks the symmetry of the structure is enlarged to the smallest that does not, and
    that is logged. A length takes the fewest cells that keep every image of an atom so far away,
    with ``diagonal`` by repetitions alone.
    """
    found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=symprec)
    rotations = np.unique(found["rotations"], axis=0) if found else np.eye(3, dtype=int)[None]
    cell = atoms.cell.array
    if isinstance(supercell, Mapping):
        length, heights = supercell["min_length"], 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        repetitions = np.ceil(length / heights - 1e-6)
        if (n_atoms := math.prod(repetitions.tolist()) * len(atoms)) > MOST_ATOMS:
            raise InputError(
                f"sscha.supercell.min_length: {length:g} A: a supercell of"
                f" {atoms.get_chemical_formula()} would have {n_atoms:.3g} atoms;"
                f" give a length for which it has at most {MOST_ATOMS}"
            )
        wanted: SupercellMatrix = three(repetitions)
    else:
        wanted = as_supercell_matrix(supercell)
    supercell_matrix = wanted
    while not all(compatible(rotation, supercell_matrix) for rotation in rotations):
        supercell_matrix = symmetric_supercell(supercell_matrix, rotations, cell)
        if is_diagonal(wanted):  # who asks for repetitions gets repetitions
            supercell_matrix = containing_mesh(supercell_matrix)
    if supercell_matrix != wanted:
        log.info(
            "supercell %s breaks the symmetry of the structure; taking %s", wanted, supercell_matrix
        )
    if isinstance(supercell, Mapping) and not diagonal:
        return smallest_supercell(cell, rotations, length, supercell_matrix)
    return supercell_matrix


def statistical_tolerance(
    position_error: np.ndarray, strain_error: float, cell_length: float
) -> float:
    """Tolerance in A for the space group of SSCHA centroids.

    Three standard errors of the least certain centroid (``position_error`` (n, 3) in A), plus the
    part of a lattice vector left open by the stress criterion, within [0.01, 0.1] A.
    """
    error = 3.0 * float(np.max(position_error, initial=0.0)) + strain_error * cell_length
    return float(np.clip(error, 0.01, 0.1))


EVENNESS = 0.15
"""Of the three directions of space, the least that one may have of what each has of evenly spread
displacements."""
DIRECTIONS = np.array(
    sorted(
        (d for d in itertools.product((0, 1, -1), repeat=3) if next(filter(None, d), 0) > 0),
        key=np.count_nonzero,
        reverse=True,
    ),
    dtype=float,
)
"""(13, 3) space and face diagonals and edges of a cube, each in one sense. The diagonals first:
they ask for all components at once, so that an evaluator which does not quite have the symmetry of
the crystal is averaged over."""


def displacements_of(symmetry: Symmetry, atom: int) -> np.ndarray:
    """(m, 3) unit vectors: the cheapest displacements of an atom from which its force constants
    follow, among those the most evenly spread. Each that no operation of the site turns round is
    followed by its opposite."""
    rotations = symmetry.rotations[symmetry.site(atom)]
    units = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1)[:, None]
    images = np.einsum("gij,dj->dgi", rotations, units)
    spread = np.einsum("dgi,dgj->dij", images, images) / len(rotations)
    turned = (np.linalg.norm(images + units[:, None], axis=2) < 1e-4).any(axis=1)
    cost = np.where(turned, 1, 2)

    def rank(chosen: list[int]) -> tuple[bool, int, float]:
        evenness = 3.0 * float(np.linalg.eigvalsh(spread[chosen].mean(axis=0))[0])
        return evenness < EVENNESS, cost[chosen].sum(), -round(evenness, 6)

    sets = (itertools.combinations(range(len(units)), count) for count in (1, 2, 3))
    chosen = min(map(list, itertools.chain(*sets)), key=rank)
    return np.array([sign * units[k] for k in chosen for sign in (1.0, -1.0)[: cost[k]]])


def image(symmetry: Symmetry, operation: int, atom: int, forces: np.ndarray) -> np.ndarray:
    """What the forces (n_cells, n, 3) of a displaced ``atom`` become for the displacement's image
    under an operation of its site."""
    turned = np.empty_like(forces)
    permutation = symmetry.permutations[operation]
    turned[symmetry.targets[operation][:, atom, :], permutation[None, :]] = (
        forces @ symmetry.rotations[operation].T
    )
    return turned
