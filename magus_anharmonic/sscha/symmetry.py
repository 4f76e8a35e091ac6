"""Space-group operations of a primitive cell, applied to forces, stresses and force constants of
its supercell."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import spglib
from ase import Atoms

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


class Symmetry:
    """Operations of ``atoms`` (a primitive cell, exactly symmetric) that also leave the supercell
    lattice invariant.

    rotations : (m, 3, 3) Cartesian, fractional : (m, 3, 3) the same in whole numbers; permutations
    : (m, n), operation g takes atom a to permutations[g, a], in the cell shifts[g, a] (m, n, 3)
    when a is in the first. targets : (m, n_cells, n, n), the cell of the block to which operation g
    takes block (R, a, b).
    """

    def __init__(
        self, atoms: Atoms, supercell_matrix: SupercellMatrix, symprec: float = 1e-3
    ) -> None:
        found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=symprec)
        fractional = found["rotations"] if found else np.eye(3, dtype=int)[None]
        translations = found["translations"] if found else np.zeros((1, 3))
        keep = [compatible(rotation, supercell_matrix) for rotation in fractional]
        cell = atoms.cell.array
        self.supercell_matrix = supercell_matrix
        self.rotations = np.array([cell.T @ w @ np.linalg.inv(cell.T) for w in fractional[keep]])
        scaled = atoms.get_scaled_positions(wrap=False)
        images = []
        for rotation, translation in zip(fractional[keep], translations[keep], strict=True):
            images.append(_images(scaled, atoms.numbers, rotation, translation))
        self.permutations = np.array([permutation for permutation, _ in images])
        self.fractional = fractional[keep]
        self.shifts = np.array([shift for _, shift in images])
        self.targets = self._block_targets(self.fractional, self.shifts)
        self._opposite = cell_index(-cell_offsets(supercell_matrix), supercell_matrix)

    def __len__(self) -> int:
        return len(self.rotations)

    def _block_targets(self, fractional: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        offsets = cell_offsets(self.supercell_matrix)
        turned = np.einsum("gij,rj->gri", fractional, offsets)
        moved = turned[:, :, None, None] + shifts[:, None, None, :] - shifts[:, None, :, None]
        return cell_index(moved, self.supercell_matrix)

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
        left out."""
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


def _images(
    scaled: np.ndarray, numbers: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Permutation (n,) and lattice shift (n, 3): rotation x_a + translation = x_permutation[a] +
    shift[a]."""
    moved = scaled @ rotation.T + translation
    difference = moved[:, None] - scaled[None, :]
    distance = np.abs(difference - np.round(difference)).max(axis=2)
    distance[numbers[:, None] != numbers[None, :]] = np.inf
    permutation = distance.argmin(axis=1)
    shift = np.round(difference[np.arange(len(scaled)), permutation]).astype(int)
    return permutation, shift


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
        heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        wanted: SupercellMatrix = three(
            np.ceil(supercell["min_length"] / height - 1e-6) for height in heights
        )
    else:
        wanted = as_supercell_matrix(
            supercell if isinstance(supercell, np.ndarray) else list(supercell)
        )
    supercell_matrix = wanted
    while not all(compatible(rotation, supercell_matrix) for rotation in rotations):
        supercell_matrix = symmetric_supercell(supercell_matrix, rotations, cell)
        # who asks for repetitions gets repetitions
        supercell_matrix = (
            containing_mesh(supercell_matrix) if is_diagonal(wanted) else supercell_matrix
        )
    if supercell_matrix != wanted:
        log.info(
            "supercell %s breaks the symmetry of the structure; taking %s", wanted, supercell_matrix
        )
    if isinstance(supercell, Mapping) and not diagonal:
        return smallest_supercell(cell, rotations, supercell["min_length"], supercell_matrix)
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
