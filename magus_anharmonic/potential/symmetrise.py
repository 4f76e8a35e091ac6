"""Keeping the space group of a structure while it relaxes."""

from __future__ import annotations

import numpy as np
import spglib
from ase import Atoms
from scipy.linalg import sqrtm

from magus_anharmonic.structures import spglib_cell, spglib_or_none


class SymmetryProjector:
    """Projects cell, positions, forces and stress on the space group that a structure has at the start.

    The operations are kept as integer rotations and fractional translations, so that they stay valid while the cell changes.
    """

    def __init__(self, atoms: Atoms, symprec: float = 0.01) -> None:
        found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=symprec)
        identity = {"rotations": np.eye(3, dtype=int)[None], "translations": np.zeros((1, 3))}
        operations = found or identity
        self.rotations = np.asarray(operations["rotations"], dtype=float)
        self.translations = np.asarray(operations["translations"], dtype=float)
        self.images = self._images(atoms)

    def _images(self, atoms: Atoms) -> np.ndarray:
        """(n_operations, N): the atom on which each operation puts atom i."""
        scaled = atoms.get_scaled_positions(wrap=False)
        moved = np.einsum("gab,ib->gia", self.rotations, scaled) + self.translations[:, None]
        difference = moved[:, :, None] - scaled[None, None]
        difference -= np.round(difference)
        distance = np.linalg.norm(difference @ atoms.cell.array, axis=-1)
        distance[:, atoms.numbers[:, None] != atoms.numbers[None]] = np.inf
        return distance.argmin(axis=-1)

    def structure(self, atoms: Atoms) -> Atoms:
        """A copy whose cell and positions have the symmetry exactly."""
        copy = atoms.copy()
        lattice = copy.cell.array
        metric = np.mean(np.swapaxes(self.rotations, 1, 2) @ (lattice @ lattice.T) @ self.rotations, axis=0)
        inverse = np.linalg.inv(lattice)
        stretch = np.real(sqrtm(inverse @ metric @ inverse.T))
        copy.set_cell(lattice @ stretch, scale_atoms=True)
        scaled = copy.get_scaled_positions(wrap=False)
        moved = np.einsum("gab,ib->gia", self.rotations, scaled) + self.translations[:, None]
        shift = np.zeros_like(scaled)
        for image, position in zip(self.images, moved, strict=True):
            difference = position - scaled[image]
            shift[image] += difference - np.round(difference)
        copy.set_scaled_positions(scaled + shift / len(self.rotations))
        return copy

    def _cartesian(self, lattice: np.ndarray) -> np.ndarray:
        return lattice.T @ self.rotations @ np.linalg.inv(lattice.T)

    def forces(self, lattice: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """Forces (N, 3) averaged over the operations."""
        result = np.zeros_like(forces)
        for image, rotation in zip(self.images, self._cartesian(lattice), strict=True):
            result[image] += forces @ rotation.T
        return result / len(self.rotations)

    def stress(self, lattice: np.ndarray, stress: np.ndarray) -> np.ndarray:
        """Stress (3, 3) averaged over the operations."""
        rotations = self._cartesian(lattice)
        return np.mean(rotations @ stress @ np.swapaxes(rotations, 1, 2), axis=0)
