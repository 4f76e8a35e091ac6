"""Which phase a run has come to: is the distance of its centroids from a higher symmetry real, or
noise?

A tolerance decides nothing: at 0.1 A everything is cubic. A higher symmetry, found at any tolerance
up to `LOOSEST`, is left alone where the centroids (or the cell) lie beyond `SIGMAS` of their
standard errors from it, the step that they still have to make counted. Else the structure is moved
onto it, and one more population there tells from the curvature of the free energy along the way
back whether it is a minimum.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.ensemble import Averages, Ensemble, curvature_along
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.unstable import TOLERANCES, move_onto
from magus_anharmonic.structures import UNDECIDED, space_group, stripped

log = logging.getLogger(__name__)

SIGMAS = 2.5
"""Standard errors beyond which a distance from a higher symmetry is real, and a curvature has a
sign."""
SURE = 2.0 * SIGMAS
"""A distance this many standard errors long needs no second population to be believed."""
LOOSEST = 0.3
"""Angstrom: symmetries that would move an atom by more are other structures."""
EXACT = 1e-3
"""Angstrom: tolerance for a state that is kept exactly symmetric."""
QUESTIONS = 4
"""Most populations that decide between two phases."""
SAME_CELL = 1e-5
"""Strain that rounding leaves."""


@dataclass(frozen=True)
class Higher:
    """A symmetry above that of a state. atoms : moved onto it; toward : (n, 3) A, the way there;
    sigmas : its length in standard errors."""

    group: str
    atoms: Atoms
    toward: np.ndarray
    sigmas: float
    n_operations: int


def higher_symmetries(
    state: SschaState, averages: Averages, cell: CellStiffness | None
) -> list[Higher]:
    """From the nearest to the furthest; those that a fixed cell, or atoms of the same kind in one
    place, rule out are left out."""
    own = move_onto(state.atoms, EXACT)[0]
    found: list[Higher] = []
    for tolerance in TOLERANCES[TOLERANCES <= LOOSEST]:
        count, toward, strain = move_onto(state.atoms, float(tolerance))
        if count <= max(own, found[-1].n_operations if found else 0):
            continue
        if np.linalg.norm(toward, axis=1).max() > LOOSEST or (cell is None and strain > SAME_CELL):
            continue
        atoms = moved_onto(state.atoms, float(tolerance))
        if atoms is None:
            continue
        sigmas = _distance(toward.ravel(), averages.shift.ravel(), averages.shift_covariance)
        if cell is not None:
            deformation = np.linalg.solve(state.atoms.cell.array, atoms.cell.array) - np.eye(3)
            way = np.einsum("ij,kij->k", 0.5 * (deformation + deformation.T), cell.strains)
            covariance = cell.compliance @ averages.noise @ cell.compliance
            sigmas = max(sigmas, _distance(way, averages.strain, covariance))
        found.append(Higher(space_group(atoms, EXACT), atoms, toward, sigmas, count))
    return found


def moved_onto(atoms: Atoms, tolerance: float) -> Atoms | None:
    """The cell with the symmetry that it has within ``tolerance`` A made exact; None where that
    puts atoms on each other."""
    from ase.spacegroup.symmetrize import refine_symmetry

    copy = stripped(atoms)
    refine_symmetry(copy, symprec=tolerance)
    apart = copy.get_all_distances(mic=True)[np.triu_indices(len(copy), 1)]
    return copy if np.min(apart, initial=np.inf) > LOOSEST else None


def _distance(way: np.ndarray, left: np.ndarray, covariance: np.ndarray) -> float:
    """Length of ``way`` (k,) in standard errors, after the step that is ``left`` (k,) to make;
    ``covariance`` (k, k) of that."""
    length = float(np.linalg.norm(way))
    if length < EXACT:
        return 0.0
    unit = way / length
    error = float(np.sqrt(unit @ covariance @ unit))
    return max(0.0, length - float(unit @ left)) / max(error, 1e-6)


def symmetrised(state: SschaState, higher: Higher) -> tuple[SschaState, Symmetry]:
    """The state on the higher symmetry, its force constants averaged over the new operations."""
    atoms = higher.atoms.copy()
    atoms.set_masses(state.atoms.get_masses())
    symmetry = Symmetry(atoms, state.supercell_matrix, EXACT)
    return replace(
        state, atoms=atoms, force_constants=symmetry.force_constants(state.force_constants)
    ), symmetry


@dataclass(frozen=True)
class Question:
    """A run that was moved from ``lower``, of the group ``group``, against ``toward`` (n, 3) A onto
    a higher symmetry."""

    lower: SschaState
    symmetry: Symmetry
    group: str
    toward: np.ndarray

    def sigmas(self, state: SschaState, ensemble: Ensemble) -> float:
        """Curvature of the free energy of the symmetric ``state`` along the way back, in standard
        errors; above zero: a minimum.

        Infinite where the way is one of the cell alone, whose stiffness is positive.
        """
        length = float(np.linalg.norm(self.toward))
        if length < EXACT:
            return np.inf
        curvature, error = curvature_along(state, ensemble, self.toward / length)
        return curvature / max(error, 1e-12)


@dataclass(frozen=True)
class Answer:
    """What one population of a relaxed run says about its phase.

    group : the space group, once it is decided. Else reason : what is open; both : the two groups,
    in words; step : where the next population is: on a higher symmetry, back from it (`Question`),
    or of the same state (``"once more"``); None: where the minimisation leads.
    """

    group: str = ""
    reason: str = ""
    both: str = ""
    step: Higher | Question | str | None = None


def ask(state: SschaState, averages: Averages, cell: CellStiffness | None, asked: int) -> Answer:
    """Whether a state has a higher symmetry; ``asked``: how often that was asked of the run, this
    time included."""
    mine = space_group(state.atoms, EXACT)
    higher = higher_symmetries(state, averages, cell)
    if near := [one for one in higher if one.sigmas < SIGMAS]:
        group, sigmas = near[-1].group, near[-1].sigmas
        reason = f"{group} is {sigmas:.1f} standard errors away and to be looked at"
        return Answer("", reason, undecided(mine, group, sigmas), near[-1])
    unsure = [one for one in higher if one.sigmas < SURE]
    if unsure and asked == 1:
        group, sigmas = unsure[0].group, unsure[0].sigmas
        reason = f"the distance of {sigmas:.1f} standard errors from {group} is to be seen again"
        return Answer("", reason, undecided(mine, group, sigmas))
    return Answer(mine)


def answer(question: Question, state: SschaState, ensemble: Ensemble, asked: int) -> Answer:
    """Whether the higher symmetry that a run was moved onto is a minimum of the free energy;
    ``asked`` as in `ask`."""
    mine, sigmas = space_group(state.atoms, EXACT), question.sigmas(state, ensemble)
    log.info(
        "%s: curvature towards %s is %.1f standard errors above zero", mine, question.group, sigmas
    )
    both = undecided(question.group, mine, sigmas)
    if sigmas < -SIGMAS:
        reason = f"{mine} is a saddle point, back to {question.group}"
        return Answer("", reason, both, question)
    if abs(sigmas) <= SIGMAS and asked < QUESTIONS:
        reason = f"{question.group} or {mine}: {sigmas:.1f} standard errors"
        return Answer("", reason, both, "once more")
    return Answer(mine if sigmas > SIGMAS else both)


def undecided(lower: str, higher: str, sigmas: float) -> str:
    """The space group of a run whose noise leaves two."""
    return f"{lower} or {higher}: {UNDECIDED}, {abs(sigmas):.1f} sigma"
