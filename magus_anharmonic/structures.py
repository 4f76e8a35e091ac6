"""Identity and symmetry of structures."""

from __future__ import annotations

import copy as copies
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.constraints import FixAtoms

from magus_anharmonic.errors import MagusAnharmonicError


def structure_id(atoms: Atoms) -> str:
    """Twelve hex digits that identify species, cell and positions (rounded to 1e-6 Angstrom)."""
    digest = hashlib.sha256()
    digest.update(np.asarray(atoms.numbers, dtype=np.int64).tobytes())
    for array in (atoms.cell.array, atoms.positions):
        digest.update((np.round(np.asarray(array, dtype=float), 6) + 0.0).tobytes())
    return digest.hexdigest()[:12]


def bare(atoms: Atoms, *, constraints: bool = False) -> Atoms:
    """Species, cell, positions and masses (and ``constraints``) alone: no calculator, info or other arrays."""
    copy = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    if atoms.has("masses"):
        copy.set_masses(atoms.get_masses())
    if constraints:
        copy.constraints = copies.deepcopy(atoms.constraints)
    return copy


def held_atoms(atoms: Atoms) -> np.ndarray:
    """(N,) bool: the atoms that ASE's FixAtoms holds; raises MagusAnharmonicError for every other constraint."""
    held = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if type(constraint) is not FixAtoms:
            raise MagusAnharmonicError(f"the constraint {type(constraint).__name__} cannot be kept, only FixAtoms can; take it out")
        held[constraint.index] = True
    return held


def spglib_cell(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (lattice, scaled positions, numbers) triple that spglib takes."""
    return atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers


def spglib_or_none(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call spglib; None where it fails (overlapping atoms, flat cells).

    spglib returns None then, but raises once any package (phonopy, symfc, ASE) has set its ``OLD_ERROR_HANDLING`` to False.
    """
    try:
        return function(*arguments, **options)
    except getattr(spglib, "SpglibError", ()):
        return None


def space_group(atoms: Atoms, symprec: float = 0.05) -> str:
    """International symbol and number, e.g. ``'R3m (160)'``; ``'P1 (1)'`` when spglib finds none."""
    found = spglib_or_none(spglib.get_spacegroup, spglib_cell(atoms), symprec=symprec)
    return found or "P1 (1)"


def primitive(atoms: Atoms, symprec: float = 0.05) -> Atoms:
    """Symmetrised primitive cell in the orientation of the input; the input itself when spglib finds none."""
    found = spglib_or_none(spglib.standardize_cell, spglib_cell(atoms), to_primitive=True, no_idealize=True, symprec=symprec)
    if found is None:
        return bare(atoms)
    lattice, positions, numbers = found
    return Atoms(numbers=numbers, scaled_positions=positions, cell=lattice, pbc=True)
