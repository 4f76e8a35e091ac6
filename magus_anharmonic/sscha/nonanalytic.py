"""The long-range dipole part of force constants (LO-TO splitting), by phonopy.

Gonze and Lee, PRB 55, 10355 (1997), doi:10.1103/PhysRevB.55.10355: the interaction of the dipoles
Z u, screened by the dielectric tensor, is taken off the force constants at the q points of the
supercell, the rest is interpolated, and the interaction at q is added again. So nothing changes at
the q points of the supercell, where SSCHA measures; between them, and towards q = 0, it does.

Born charges are given for a structure (`settings.born.Born`). A crystal takes those of the given
structure that it differs least from: both reduced to primitive cells at one volume, the lattice
turned and strained by at most `LARGEST_STRAIN`, no atom further than `LARGEST_SHIFT` of the
distance between neighbours. Charges and tensor are turned with it, and kept as they are under the
strain.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.geometry import minkowski_reduce
from scipy.linalg import polar

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.born import SYMPREC, Born, phonopy_cell, symmetrised
from magus_anharmonic.sscha.state import SschaState, atom_order, packing_distance
from magus_anharmonic.sscha.supercells import shape_supercell_matrix
from magus_anharmonic.structures import formula, primitive
from magus_anharmonic.units import COULOMB

if TYPE_CHECKING:
    from phonopy import Phonopy

LARGEST_STRAIN = 0.05
"""Of the lattice, at the same volume."""
LARGEST_SHIFT = 0.1
"""Of an atom, in distances between neighbours (of a close packing)."""


@dataclass(frozen=True)
class NonAnalytic:
    """charges : (n, 3, 3) |e|, of the atoms of a state; dielectric : (3, 3); see `Born`."""

    charges: np.ndarray
    dielectric: np.ndarray


def fitted(atoms: Atoms, given: Sequence[Born] | None) -> NonAnalytic | None:
    """Charges and tensor for ``atoms`` (a cell of any size) from that of the ``given`` structures
    that is nearest; None where none is near."""
    own = primitive(atoms, SYMPREC)
    found = [one for born in given or () if (one := _nearest(own, born)) is not None]
    if not found:
        return None
    _, charges, dielectric = min(found, key=lambda one: one[0])
    return NonAnalytic(*symmetrised(atoms, charges[_sites(atoms, own)], dielectric))


def require_fit(atoms: Atoms, given: Sequence[Born]) -> None:
    """Raise ``InputError`` where the charges are of another structure than ``atoms``."""
    if fitted(atoms, given) is None:
        own, other = primitive(atoms, SYMPREC), primitive(given[0].atoms, SYMPREC)
        raise InputError(
            f"born: are the charges of {formula(other)} ({len(other)} atoms), the structure is"
            f" {formula(own)} ({len(own)} atoms)"
            + (
                f", with the lattice strained by more than {100 * LARGEST_STRAIN:g} % or atoms"
                " elsewhere"
                if len(own) == len(other) and formula(own) == formula(other)
                else ""
            )
        )


def _sites(atoms: Atoms, cell: Atoms) -> np.ndarray:
    """(n,) for every atom of ``atoms`` the nearest atom of the smaller ``cell`` of its lattice."""
    return _apart(atoms, cell, cell.cell.array).argmin(axis=1)


def _apart(atoms: Atoms, other: Atoms, cell: np.ndarray) -> np.ndarray:
    """(n, m) distances of two sets of atoms, A, whole vectors of ``cell`` left out; infinite
    between elements."""
    apart = (atoms.positions[:, None] - other.positions) @ np.linalg.inv(cell)
    distance = np.linalg.norm((apart - np.round(apart)) @ cell, axis=2)
    distance[atoms.numbers[:, None] != other.numbers] = np.inf
    return distance


def _nearest(own: Atoms, born: Born) -> tuple[float, np.ndarray, np.ndarray] | None:
    """How far the crystal of ``born`` is from ``own`` (primitive), and its charges and tensor in
    the frame and order of ``own``; None beyond the limits."""
    whole = born.atoms
    other = primitive(whole, SYMPREC)
    if len(other) != len(own) or Counter(other.numbers) != Counter(own.numbers):
        return None
    charges = np.array(born.charges)[_sites(other, whole)]
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for strain, turned, rotation in _turned(own, other):
        for shifted in _shifted(own, turned):
            distance = _apart(own, shifted, own.cell.array)
            order = distance.argmin(axis=1)
            far = float(distance.min(axis=1).max()) / packing_distance(own)
            if far > LARGEST_SHIFT or len(set(order.tolist())) < len(own):
                continue
            score = round(strain / LARGEST_STRAIN + far / LARGEST_SHIFT, 6)
            if best is None or score < best[0]:
                moved = rotation @ charges[order] @ rotation.T
                best = score, moved, rotation @ np.array(born.dielectric) @ rotation.T
    return best


def _turned(own: Atoms, other: Atoms) -> Iterator[tuple[float, Atoms, np.ndarray]]:
    """Every way to lay the lattice of ``other`` onto that of ``own``: strain, ``other`` laid there,
    and the rotation R of vectors (columns), with or without inversion."""
    target = minkowski_reduce(own.cell.array)[0]
    lattice = minkowski_reduce(other.cell.array)[0]
    lattice *= (own.get_volume() / other.get_volume()) ** (1.0 / 3.0)
    rows = np.array(list(itertools.product(range(-2, 3), repeat=3)))
    lengths, wanted = np.linalg.norm(rows @ lattice, axis=1), np.linalg.norm(target, axis=1)
    near = [rows[np.abs(lengths / one - 1.0) < 2.0 * LARGEST_STRAIN] for one in wanted]
    for chosen in itertools.product(*near):
        if abs(round(np.linalg.det(chosen))) != 1:
            continue
        rotation, stretch = polar((np.linalg.inv(np.array(chosen) @ lattice) @ target).T)
        strain = float(np.abs(stretch - np.eye(3)).max())
        if strain < LARGEST_STRAIN:
            laid = other.copy()
            laid.set_cell(np.linalg.inv(np.array(chosen)) @ target)
            fractional = other.positions @ np.linalg.inv(minkowski_reduce(other.cell.array)[0])
            laid.positions = fractional @ laid.cell.array
            yield strain, laid, rotation


def _shifted(own: Atoms, turned: Atoms) -> Iterator[Atoms]:
    """``turned`` moved so that one of its atoms of the rarest element lies on the first of
    ``own``."""
    counts = Counter(own.numbers.tolist())
    rarest = min(counts, key=lambda number: (counts[number], number))
    first = own.positions[own.numbers == rarest][0]
    for position in turned.positions[turned.numbers == rarest]:
        moved = turned.copy()
        moved.positions += first - position
        yield moved


def phonopy_crystal(state: SschaState, nonanalytic: NonAnalytic | None = None) -> Phonopy:
    """phonopy's object with the force constants of ``state``, and charges where they are given."""
    from phonopy import Phonopy

    matrix = shape_supercell_matrix(state.supercell_matrix).T
    cell = phonopy_cell(state.atoms)
    phonon = Phonopy(cell, supercell_matrix=matrix, primitive_matrix=np.eye(3), is_symmetry=False)
    order = atom_order(state.supercell, phonon.supercell.positions)
    n = len(order)
    full = state.full.reshape(n, 3, n, 3).transpose(0, 2, 1, 3)
    phonon.force_constants = full[np.ix_(order, order)]
    if nonanalytic is not None:
        parameters: Any = {"born": nonanalytic.charges, "dielectric": nonanalytic.dielectric}
        phonon.nac_params = {**parameters, "factor": COULOMB}
    return phonon


def dipole_squares(
    state: SschaState, nonanalytic: NonAnalytic, q: np.ndarray, direction: np.ndarray | None = None
) -> np.ndarray:
    """Eigenvalues (n_q, 3n) of the dynamical matrix at fractional ``q``, ascending, eV/A^2/amu.

    At q = 0 the limit along ``direction`` (fractional); without one the matrix of the supercell,
    in which no field opposes the longitudinal modes.
    """
    phonon = phonopy_crystal(state, nonanalytic)
    phonon.run_qpoints(q, with_dynamical_matrices=True, nac_q_direction=direction)
    return np.linalg.eigvalsh(phonon.get_qpoints_dict()["dynamical_matrices"])
