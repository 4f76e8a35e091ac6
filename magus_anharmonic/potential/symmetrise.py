"""Keeping the space group of a structure while it relaxes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import spglib
from ase import Atoms
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree

from magus_anharmonic.errors import InputError
from magus_anharmonic.structures import spglib_cell, spglib_or_none

logger = logging.getLogger(__name__)

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
