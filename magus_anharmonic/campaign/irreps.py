"""Modes at Gamma by irreducible representation: which squared frequencies belong to T1u of Im-3m.

Projectors P = d/|G| sum_g chi(g)* D(g) on the mass-weighted displacements of the primitive cell; the characters, under the names of
Mulliken, are phonopy's tables. Projecting the dynamical matrix needs no degenerate levels to be recognised in noisy frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import spglib_cell, spglib_or_none


@dataclass(frozen=True)
class Level:
    """One level of an irreducible representation: squared frequency in the unit of the matrix, and its (3n, d) vectors."""

    irrep: str
    square: float
    vectors: np.ndarray


def levels_by_irrep(matrix: np.ndarray, atoms: Atoms, symprec: float = 1e-3) -> list[Level]:
    """Levels of the mass-weighted matrix (3n, 3n) at Gamma of ``atoms`` (a primitive cell), translations left out, ascending by name.

    The three translations are those of the masses of ``atoms``. Raises ``InputError`` where the point group has no table.
    """
    symmetry = Symmetry(atoms, (1, 1, 1), symprec)
    names, characters, sizes = _characters(atoms, symmetry, symprec)
    still = _translations(atoms)
    free = np.eye(len(matrix)) - still @ still.T
    moving = free @ (0.5 * (matrix + matrix.T)) @ free
    operations = _representation(symmetry)
    found: list[Level] = []
    for name, character, size in zip(names, characters, sizes, strict=True):
        projector = size / len(operations) * np.einsum("g,gij->ij", character, operations)
        projector = free @ (0.5 * (projector + projector.T)) @ free
        weights, basis = np.linalg.eigh(projector)
        basis = basis[:, weights > 0.5]
        if not basis.shape[1]:
            continue
        squares, vectors = np.linalg.eigh(basis.T @ moving @ basis)
        vectors = basis @ vectors
        for first in range(0, len(squares), size):
            part = slice(first, first + size)
            found.append(Level(name, float(squares[part].mean()), vectors[:, part]))
    return found


def _representation(symmetry: Symmetry) -> np.ndarray:
    """(m, 3n, 3n): what every operation does to displacements."""
    n = symmetry.permutations.shape[1]
    matrices = np.zeros((len(symmetry), n, 3, n, 3))
    for g, (rotation, permutation) in enumerate(zip(symmetry.rotations, symmetry.permutations, strict=True)):
        matrices[g, permutation, :, np.arange(n), :] = rotation
    return matrices.reshape(len(symmetry), 3 * n, 3 * n)


def _translations(atoms: Atoms) -> np.ndarray:
    """(3n, 3) orthonormal mass-weighted translations."""
    root = np.sqrt(atoms.get_masses())
    return np.kron((root / np.linalg.norm(root))[:, None], np.eye(3))


def _characters(atoms: Atoms, symmetry: Symmetry, symprec: float) -> tuple[list[str], np.ndarray, list[int]]:
    """Names, characters (irreps, operations) in the order of the operations, and dimensions."""
    from phonopy.phonon.character_table import character_table

    data = spglib_or_none(spglib.get_symmetry_dataset, spglib_cell(atoms), symprec=symprec)
    group = "1" if data is None else str(data.pointgroup)
    change = np.eye(3) if data is None else np.asarray(data.transformation_matrix)
    rotations = [np.rint(change @ w @ np.linalg.inv(change)).astype(int) for w in symmetry.fractional]
    for table in character_table.get(group) or []:
        classes = [_class_of(rotation, table["mapping_table"]) for rotation in rotations]
        if None not in classes:
            order = list(table["rotation_list"])
            names = list(table["character_table"])
            rows = [[table["character_table"][name][order.index(c)] for c in classes] for name in names]
            if np.iscomplexobj(np.array(rows)):
                rows = np.real(rows).tolist()
            return names, np.array(rows, dtype=float), [round(abs(table["character_table"][name][order.index("E")])) for name in names]
    raise InputError(f"hessian: no character table for the point group {group} of {atoms.get_chemical_formula()}")


def _class_of(rotation: np.ndarray, mapping: Any) -> str | None:
    return next((name for name, matrices in mapping.items() if any((np.array(m) == rotation).all() for m in matrices)), None)


def lowest_levels(levels: Sequence[Level], wanted: Sequence[str]) -> list[Level]:
    """The lowest level of every wanted irreducible representation (all of them when none is named).

    Raises ``InputError`` for one that the phase does not have at Gamma.
    """
    present = sorted({level.irrep for level in levels})
    missing = [name for name in wanted if name not in present]
    if missing:
        raise InputError(f"hessian.phases.irreps: {missing[0]}: this phase has no such optical mode at Gamma; it has {', '.join(present)}")
    return [min((level for level in levels if level.irrep == name), key=lambda level: level.square) for name in wanted or present]
