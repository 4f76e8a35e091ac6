"""Random distortions of a relaxed structure, around which the potential has to be right."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.structures import stripped

MAX_TRIES = 100
CLOSEST = 0.6
"""A distortion that brings two atoms nearer than this fraction of the shortest distance before is
drawn again."""

_XX_YY_ZZ_YZ_XZ_XY = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def random_directions(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3) unit vectors, uniform on the sphere."""
    vectors = rng.normal(size=(n, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_strain(limit: float, rng: np.random.Generator) -> np.ndarray:
    """Symmetric (3, 3) strain tensor; xx, yy, zz, yz, xz, xy (tensor, not engineering, shears)
    uniform in [-limit, limit]."""
    strain = np.zeros((3, 3))
    for (row, column), value in zip(_XX_YY_ZZ_YZ_XZ_XY, rng.uniform(-limit, limit, 6), strict=True):
        strain[row, column] = strain[column, row] = value
    return strain


def distort(
    atoms: Atoms, rng: np.random.Generator, *, atom_displacement: float, strain: float
) -> Atoms:
    """A stripped copy with random strain and displacements; the structure given is not changed.

    First the cell and the atoms with it are strained, cell -> cell (1 + strain); then every atom
    moves by exactly ``atom_displacement`` (Angstrom) in a direction of its own. Raises
    ``MagusAnharmonicError`` when every draw makes atoms overlap.
    """
    shortest = shortest_distance(atoms)
    for _ in range(MAX_TRIES):
        distorted = stripped(atoms)
        tensor = random_strain(strain, rng)
        distorted.set_cell(atoms.cell.array @ (np.eye(3) + tensor), scale_atoms=True)
        distorted.positions += atom_displacement * random_directions(len(atoms), rng)
        if shortest_distance(distorted) >= CLOSEST * shortest:
            return distorted
    raise MagusAnharmonicError(
        f"{atoms.get_chemical_formula()}: {MAX_TRIES} random distortions (displacement"
        f" {atom_displacement:g} A, strain {strain:g}) all bring atoms nearer than"
        f" {CLOSEST * shortest:.2f} A; lower learning.atom_displacement or learning.strain"
    )


def shortest_distance(atoms: Atoms) -> float:
    """Shortest distance (Angstrom) between two atoms, periodic images of one atom included."""
    radius = 1.1 * (atoms.get_volume() / len(atoms)) ** (1 / 3)
    while True:
        distances = neighbor_list("d", atoms, radius)
        if len(distances):
            return float(distances.min())
        radius *= 1.5
