"""Space groups of SSCHA centroids, which phase a run has come to, the way down an unstable mode.

A tolerance alone decides no space group: at 0.1 A everything is cubic. For every group that spglib
finds at some tolerance, the structure is moved onto that symmetry; a group is supported when no
atom has to move by more than three of its standard errors, and the cell by no more than its own.

Of a run that has relaxed, a higher symmetry, found at any tolerance up to `LOOSEST`, is left alone
where the centroids (or the cell) lie beyond `REAL` of their standard errors from it, the step that
they still have to make counted. Else the structure is moved onto it, and one more population there
tells from the curvature of the free energy along the way back whether it is a minimum.

From a saddle point of the free energy the centroids are displaced along the unstable mode; its wave
vector becomes a reciprocal lattice vector of the new primitive cell. Where the mode is degenerate,
the direction is the one of lowest static energy among the simple ones, and of those the most
symmetric. The run in the subgroup starts harmonic, as any other. From the force constants of the
saddle it would go back: at fixed force constants the free energy of SSCHA is convex in the
centroids, and the saddle's wide Gaussian hides the well that a narrow one falls into.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import spglib
from ase import Atoms

from magus_anharmonic.errors import SschaError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.ensemble import Averages, Ensemble, curvature_along
from magus_anharmonic.sscha.hessian import Hessian, levels
from magus_anharmonic.sscha.state import (
    SschaState,
    fourier,
    nearest_neighbour,
    repeated,
    root_mass,
    variance,
)
from magus_anharmonic.sscha.supercells import SupercellMatrix, cell_offsets, commensurate, n_cells
from magus_anharmonic.sscha.symmetry import Symmetry, images
from magus_anharmonic.structures import (
    UNDECIDED,
    space_group,
    spglib_cell,
    spglib_or_none,
    stripped,
)
from magus_anharmonic.units import HBAR

log = logging.getLogger(__name__)

SIGMAS = 3.0
"""Standard errors by which an atom may have to move."""
EXACT = 1e-3
"""A, tolerance for structures that are symmetric to rounding."""
TOLERANCES = np.geomspace(1e-3, 0.5, 55)
"""Angstrom."""
STRAIN_ERROR = 1e-3
"""Standard error of the cell where none is known: 0.5 GPa over the bulk modulus of a crystal at
high pressure."""


@dataclass(frozen=True)
class GroupStep:
    """One space group and the tolerances (A) at which it is found.

    shift : largest move of an atom onto the symmetry, A; pull : the same in standard errors; strain
    : largest component of the strain onto the symmetry; n_operations : of the cell as given.
    """

    group: str
    first: float
    last: float
    n_operations: int
    shift: float
    pull: float
    strain: float
    supported: bool


@dataclass(frozen=True)
class SupportedGroup:
    """group : the highest supported one, at ``tolerance`` A; steps : from the finest to the
    coarsest tolerance."""

    group: str
    tolerance: float
    steps: tuple[GroupStep, ...]


def supported_group(
    atoms: Atoms, position_error: np.ndarray | float, strain_error: float = STRAIN_ERROR
) -> SupportedGroup:
    """The group that the errors of the centroids support.

    position_error : standard error of each coordinate in A, (n, 3), (n, 1) or one number;
    strain_error : of the cell.
    """
    error = np.broadcast_to(
        np.maximum(np.asarray(position_error, dtype=float), 1e-6), (len(atoms), 3)
    )
    steps: list[GroupStep] = []
    for tolerance in TOLERANCES:
        group = space_group(atoms, float(tolerance))
        if steps and steps[-1].group == group:
            steps[-1] = replace(steps[-1], last=float(tolerance))
            continue
        count, shifts, strain = move_onto(atoms, float(tolerance))
        pull = float((np.abs(shifts) / error).max())
        steps.append(
            GroupStep(
                group=group,
                first=float(tolerance),
                last=float(tolerance),
                n_operations=count,
                shift=float(np.abs(shifts).max()),
                pull=pull,
                strain=strain,
                supported=pull <= SIGMAS and strain <= SIGMAS * strain_error + 1e-6,
            )
        )
    best = max(
        (step for step in steps if step.supported),
        key=lambda step: step.n_operations,
        default=steps[0],
    )
    return SupportedGroup(best.group, best.first, tuple(steps))


def move_onto(atoms: Atoms, tolerance: float, above: int = 0) -> tuple[int, np.ndarray, float]:
    """Number of operations at ``tolerance``, moves (n, 3) in A of the atoms onto that symmetry, and
    the largest strain of the cell; both nothing where there are not more than ``above``.

    A shift of the whole crystal is no move: the mean over the atoms is taken out operation by
    operation.
    """
    found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=tolerance)
    count = len(found["rotations"]) if found else 1
    if not found or count <= above:
        return count, np.zeros((len(atoms), 3)), 0.0
    cell = atoms.cell.array
    moves, average = np.zeros((len(atoms), 3)), np.zeros((3, 3))
    for rotation, translation in zip(found["rotations"], found["translations"], strict=True):
        target, _, off = images(atoms, rotation, translation)
        moves[target] += off - off.mean(axis=0)
        average += rotation.T @ cell @ cell.T @ rotation
    inverse = np.linalg.inv(cell)
    strain = 0.5 * (inverse @ (average / count) @ inverse.T - np.eye(3))
    return count, moves / count @ cell, float(np.abs(strain).max())


REAL = 2.5
"""Standard errors beyond which a distance from a higher symmetry is real, and a curvature has a
sign."""
SURE = 2.0 * REAL
"""A distance this many standard errors long needs no second population to be believed."""
LOOSEST = 0.3
"""Angstrom: symmetries that would move an atom by more are other structures."""
QUESTIONS = 4
"""Most populations that decide between two phases."""
SAME_CELL = 1e-5
"""Strain that rounding leaves."""
MOST_ROTATIONS = 48
"""Of any crystal: those of m-3m. Translations within a cell divide the number of atoms of each
element."""


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
    n_translations = np.gcd.reduce(np.unique(state.atoms.numbers, return_counts=True)[1])
    if own == MOST_ROTATIONS * n_translations:
        return []
    found: list[Higher] = []
    for tolerance in TOLERANCES[TOLERANCES <= LOOSEST]:
        known = max(own, found[-1].n_operations if found else 0)
        count, toward, strain = move_onto(state.atoms, float(tolerance), known)
        if count <= known:
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
    if near := [one for one in higher if one.sigmas < REAL]:
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
    if sigmas < -REAL:
        reason = f"{mine} is a saddle point, back to {question.group}"
        return Answer("", reason, both, question)
    if abs(sigmas) <= REAL and asked < QUESTIONS:
        reason = f"{question.group} or {mine}: {sigmas:.1f} standard errors"
        return Answer("", reason, both, "once more")
    return Answer(mine if sigmas > REAL else both)


def undecided(lower: str, higher: str, sigmas: float) -> str:
    """The space group of a run whose noise leaves two."""
    return f"{lower} or {higher}: {UNDECIDED}, {abs(sigmas):.1f} sigma"


LARGEST_SHIFT = 0.15
"""Of the nearest-neighbour distance: the largest displacement of an atom."""
TIE = 1e-4
"""eV/atom between directions that count as equal; then symmetry decides."""


def down_the_mode(hessian: Hessian, evaluator: Evaluator, symprec: float) -> Atoms:
    """The centroids of a saddle displaced along its most surely negative mode, in the primitive
    cell that the mode leaves.

    The amplitude is the mode's root mean square in the auxiliary state, no atom further than 0.15
    of the nearest-neighbour distance; more only where a search for symmetry with ``symprec`` (A)
    would not see it. Raises ``SschaError`` where it never does.
    """
    state = hessian.state
    q, mode = hessian.deciding
    point = hessian.points[q]
    matrix = commensurate(point[None], state.atoms.cell.array)
    cell = repeated(state.atoms, matrix)
    level = next(level for level in levels(hessian.squares[q]) if mode in level)
    patterns = real_patterns(hessian.vectors[q][:, level], point, matrix)
    limit = LARGEST_SHIFT * nearest_neighbour(state.atoms).min()
    rms = np.sqrt(_variance(hessian, q, hessian.vectors[q][:, mode]) * n_cells(matrix))
    displaced = []
    for direction in simple_directions(patterns):
        shift = rms * direction / np.sqrt(cell.get_masses())[:, None]
        shift *= min(1.0, limit / np.linalg.norm(shift, axis=1).max())
        moved = _visible(cell, shift, symprec)
        if moved is not None:
            displaced.append(moved)
    if not displaced:
        raise SschaError(
            "the displacements along the unstable mode are not told from noise at symprec"
            f" {symprec:g} A"
        )
    return _best(displaced, evaluator)


def _visible(cell: Atoms, shift: np.ndarray, symprec: float) -> Atoms | None:
    """``cell`` displaced by ``shift``, or by up to twice that, so that its symmetry is the same at
    ``symprec`` as exactly."""
    for factor in (1.0, 1.25, 1.5, 2.0):
        moved = cell.copy()
        moved.positions += factor * shift
        if _kind(moved, symprec) == _kind(moved, EXACT):
            return moved
    return None


def _kind(atoms: Atoms, symprec: float) -> tuple[str, int]:
    found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=symprec)
    return space_group(atoms, symprec), len(found["rotations"]) if found else 1


def _variance(hessian: Hessian, q: int, vector: np.ndarray) -> float:
    """<|Q|^2> in A^2 amu of a mode in the auxiliary state, as if all q points had its frequency."""
    state = hessian.state
    root = root_mass(state.atoms)
    matrix = fourier(state.force_constants, state.supercell_matrix, hessian.points[q][None])[0]
    square = float((vector.conj() @ (matrix / np.outer(root, root)) @ vector).real)
    return float(variance(np.array([HBAR * np.sqrt(square)]), state.temperature)[0])


def real_patterns(
    vectors: np.ndarray, point: np.ndarray, supercell_matrix: SupercellMatrix
) -> np.ndarray:
    """Orthonormal mass-weighted displacement patterns (m, n_new, 3) in the supercell that the modes
    (3n, k) at fractional q span."""
    phases = np.exp(2j * np.pi * cell_offsets(supercell_matrix) @ point)
    waves = (phases[:, None, None] * vectors[None]).reshape(-1, vectors.shape[1])
    left, sizes, _ = np.linalg.svd(
        np.concatenate([waves.real, waves.imag], axis=1), full_matrices=False
    )
    kept = left[:, sizes > 1e-6 * sizes.max()]
    return kept.T.reshape(kept.shape[1], -1, 3)


def simple_directions(patterns: np.ndarray) -> list[np.ndarray]:
    """Unit patterns (n, 3): the projections of Cartesian moves of each atom, and their sums and
    differences."""
    flat = patterns.reshape(len(patterns), -1)
    found: list[np.ndarray] = []
    for atom in range(patterns.shape[1]):
        axes = flat[:, 3 * atom : 3 * atom + 3].T @ flat
        for signs in product((-1, 0, 1), repeat=3):
            direction = np.array(signs) @ axes
            size = np.linalg.norm(direction)
            if size > 1e-3 and all(abs(direction @ other) < (1.0 - 1e-6) * size for other in found):
                found.append(direction / size)
    return [direction.reshape(-1, 3) for direction in found]


def _best(displaced: list[Atoms], evaluator: Evaluator) -> Atoms:
    """One of every space group is evaluated; the lowest, and among equals the most symmetric, is
    taken."""
    kinds: dict[tuple[str, int], Atoms] = {}
    for atoms in displaced:
        kinds.setdefault(_kind(atoms, EXACT), atoms)
    if len(kinds) == 1:
        return displaced[0]
    energies = np.asarray(evaluator.evaluate(list(kinds.values())).energy, dtype=float) / len(
        displaced[0]
    )
    equal = [
        kind for kind, energy in zip(kinds, energies, strict=True) if energy <= energies.min() + TIE
    ]
    return kinds[max(equal, key=lambda kind: kind[1])]
