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
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.sscha.start import DISPLACEMENT
from magus_anharmonic.sscha.symmetry import Symmetry, symmetric_primitive
from magus_anharmonic.structures import bare, spglib_cell, spglib_or_none


@dataclass(frozen=True)
class Level:
    """One level of an irreducible representation: squared frequency in the unit of the matrix, and its (3n, d) vectors."""

    irrep: str
    square: float
    vectors: np.ndarray


@dataclass(frozen=True)
class Space:
    """The optical displacements of one irreducible representation: basis (3n, m d), mass weighted; dimension d."""

    irrep: str
    dimension: int
    basis: np.ndarray

    def levels(self, inside: np.ndarray) -> list[Level]:
        """Levels of a matrix given in this basis, ascending."""
        squares, vectors = np.linalg.eigh(0.5 * (inside + inside.T))
        vectors = self.basis @ vectors
        parts = [slice(first, first + self.dimension) for first in range(0, len(squares), self.dimension)]
        return [Level(self.irrep, float(squares[part].mean()), vectors[:, part]) for part in parts]


def spaces(atoms: Atoms, symprec: float = 1e-3) -> tuple[list[Space], np.ndarray]:
    """The spaces of all representations that ``atoms`` (a primitive cell) has at Gamma, and the operations (m, 3n, 3n).

    Raises ``InputError`` where the point group has no table.
    """
    symmetry = Symmetry(atoms, (1, 1, 1), symprec)
    names, characters, sizes = _characters(atoms, symmetry, symprec)
    still = _translations(atoms)
    free = np.eye(3 * len(atoms)) - still @ still.T
    operations = _representation(symmetry)
    found = []
    for name, character, size in zip(names, characters, sizes, strict=True):
        projector = size / len(operations) * np.einsum("g,gij->ij", character, operations)
        projector = free @ (0.5 * (projector + projector.T)) @ free
        weights, basis = np.linalg.eigh(projector)
        if (weights > 0.5).any():
            found.append(Space(name, size, basis[:, weights > 0.5]))
    return found, operations


def levels_by_irrep(matrix: np.ndarray, atoms: Atoms, symprec: float = 1e-3) -> list[Level]:
    """Levels of the mass-weighted matrix (3n, 3n) at Gamma of ``atoms`` (a primitive cell), translations left out."""
    return [level for space in spaces(atoms, symprec)[0] for level in space.levels(space.basis.T @ matrix @ space.basis)]


def levels_by_displacing(atoms: Atoms, evaluator: Evaluator, wanted: Sequence[str], symprec: float = 1e-3) -> list[Level]:
    """Levels (eV/A^2/amu) of the wanted representations from as few evaluations as their symmetry allows.

    D commutes with the operations: D (g w) = g (D w). A displacement w in general position within the space of a representation that occurs
    m times with dimension d has images that span d of its m copies, so that m/d of them, rounded up, each with both signs, are enough (T1u
    of Im-3m H3S: two evaluations instead of the twelve of all force constants). Raises ``InputError`` for a representation that is absent.
    """
    present, operations = spaces(atoms, symprec)
    lowest_levels([Level(space.irrep, 0.0, space.basis) for space in present], wanted)
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    chosen = [space for space in present if space.irrep in wanted]
    directions = [_in_general_position(space, operations) for space in chosen]
    moved, lengths = [], []
    for direction in (column for found in directions for column in found.T):
        length = DISPLACEMENT / np.abs(direction / root).max()
        lengths.append(length)
        for sign in (1, -1):
            structure = bare(atoms)
            structure.positions += sign * length * (direction / root).reshape(-1, 3)
            moved.append(structure)
    forces = np.array(evaluator.evaluate(moved).forces, dtype=float).reshape(len(moved), -1)
    responses = -(forces[0::2] - forces[1::2]) / (2 * np.array(lengths)[:, None]) / root
    levels: list[Level] = []
    for space, found in zip(chosen, directions, strict=True):
        mine, responses = responses[: found.shape[1]], responses[found.shape[1] :]
        inside = [space.basis.T @ np.einsum("gij,jk->igk", operations, columns).reshape(len(root), -1) for columns in (found, mine.T)]
        levels += space.levels(inside[1] @ np.linalg.pinv(inside[0]))
    return levels


def _in_general_position(space: Space, operations: np.ndarray) -> np.ndarray:
    """(3n, k) displacements whose images span the space: the best conditioned of some drawn at random."""
    size = space.basis.shape[1]
    n = -(-size // space.dimension**2)
    rng, best, found = np.random.default_rng(0), 0.0, space.basis[:, :n]
    for _ in range(50):
        drawn = space.basis @ rng.normal(size=(size, n))
        drawn /= np.linalg.norm(drawn, axis=0)
        images = space.basis.T @ np.einsum("gij,jk->igk", operations, drawn).reshape(len(drawn), -1)
        weakest = np.linalg.svd(images, compute_uv=False)[-1]
        if weakest > best:
            best, found = float(weakest), drawn
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


def check_irreps(atoms: Atoms | None, wanted: Sequence[str], symprec: float = 0.05) -> None:
    """Raise ``InputError`` for a representation that ``atoms`` does not have; a structure that is not known yet passes."""
    if atoms is None or not wanted:
        return
    present, _ = spaces(symmetric_primitive(atoms, symprec))
    lowest_levels([Level(space.irrep, 0.0, space.basis) for space in present], wanted)
