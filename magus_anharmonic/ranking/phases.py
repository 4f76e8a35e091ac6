"""Which runs are of one phase, and what they say together.

Several runs of one phase: their free energies together where the supercell is the same, else the
spread as a finite-size error.

Runs of one ranking have the same model, pressure, temperature and settings (`store.Key`). Their
free energies G_i are pooled when supercell and masses are the same too:

    G = sum_i w_i G_i,    sum_i w_i = 1,  w_i >= 0,    error^2 = w C w

(the smallest error that such weights allow).

C holds the squares of the errors and the measured covariances of the pairs of configurations that
came from the same random numbers (`CommonNumbers`). Independent runs get the weights 1/error_i^2;
what a run shares with a better one adds nothing, and a weight that would be negative is zero, so
that G lies between the G_i and its error is never above the smallest of theirs. Runs that scatter
more than C says (and than their relaxations may still fall) widen the error by the Birge ratio
(Birge, Phys. Rev. 40, 207 (1932), doi:10.1103/PhysRev.40.207), here the root of the mean of (G_i -
G_j)^2 over its expectation.

A run of the phase in another supercell, or one that ended more than three errors away (in another
minimum of the free energy), is no sample of the same number: it leaves G alone, and its distance is
the spread.

Quantum phases: which SSCHA results are the same phase, and their primitive cells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.matcher import (
    PHASE_TOLERANCE,
    Fingerprint,
    largest_difference,
    pointwise_distances,
    same_phase,
    table_difference,
)
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, Run
from magus_anharmonic.sscha.record import CONVERGED, MINIMA
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import symmetric_primitive
from magus_anharmonic.sscha.unstable import EXACT
from magus_anharmonic.structures import UNDECIDED

log = logging.getLogger(__name__)

Covariance = Callable[[str, str], float]
"""Of the free energies of two runs by their folders, eV^2/atom^2."""
MARKER = 118
"""Atomic number of the atom that marks the lattice of a supercell; in no crystal."""
MASS_TOLERANCE = 1e-3
"""amu."""
ROUNDING = 1e-6
"""Relative: a smaller gain in the square of the error is none."""
SMALLEST = 1e-6
"""eV/atom: no two runs need to agree better."""
AGREEMENT = 3.0
"""Errors of the difference, beyond which two runs did not end in one minimum."""


@dataclass(frozen=True)
class Combination:
    """``weights`` (n,) of the values, their mean and its standard error."""

    weights: np.ndarray
    value: float
    error: float


def combined(
    values: Sequence[float], covariance: np.ndarray, remaining: Sequence[float] | None = None
) -> Combination:
    """The values (n,) with ``covariance`` (n, n) as one, as the module says; ``remaining`` (n,):
    how far each may still fall."""
    found, matrix = np.asarray(values, dtype=float), np.asarray(covariance, dtype=float)
    weights = _weights(matrix)
    error = float(np.sqrt(max(weights @ matrix @ weights, 0.0)))
    used = np.flatnonzero(weights)
    left = np.zeros(len(found)) if remaining is None else np.asarray(remaining, dtype=float)
    return Combination(
        weights,
        float(weights @ found),
        error * max(1.0, _birge(found[used], matrix[np.ix_(used, used)], left[used])),
    )


def _weights(matrix: np.ndarray) -> np.ndarray:
    """Weights of the smallest error, the most negative one taken out until none is."""
    active = list(range(len(matrix)))
    while True:
        part = matrix[np.ix_(active, active)]
        solved = np.linalg.lstsq(part, np.ones(len(active)), rcond=1e-9)[0]
        solved /= solved.sum()
        if solved.min() > -1e-12:
            break
        active.pop(int(np.argmin(solved)))
    weights = np.zeros(len(matrix))
    weights[active] = np.maximum(solved, 0.0)
    variances = np.diag(matrix)
    best = int(np.argmax(variances <= variances.min() * (1.0 + ROUNDING)))
    gained = weights @ matrix @ weights < variances[best] * (1.0 - ROUNDING)
    return weights if gained else np.eye(len(matrix))[best]


def _birge(values: np.ndarray, matrix: np.ndarray, remaining: np.ndarray) -> float:
    first, second = np.triu_indices(len(values), 1)
    return (
        float(np.sqrt(np.mean(_distances(values, matrix, remaining)[first, second] ** 2)))
        if len(first)
        else 1.0
    )


def _distances(values: np.ndarray, matrix: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """(n, n) differences over their expected sizes: the errors, and what each run may still
    fall."""
    variances = np.diag(matrix) + remaining**2
    expected = variances[:, None] + variances[None, :] - 2.0 * matrix
    return np.abs(values[:, None] - values[None, :]) / np.sqrt(np.maximum(expected, SMALLEST**2))


def same_supercell(one: SschaState, other: SschaState) -> bool:
    """Whether two states of one phase have the same supercell: one motion brings crystal onto
    crystal and supercell onto supercell.

    Masses must agree too. The lattice of the supercell is marked by an atom on one site; crystals
    so marked are compared by all their distances (`matcher`), at the same volume, which two
    relaxations at one pressure meet within noise.
    """
    if len(one.supercell) != len(other.supercell) or one.temperature != other.temperature:
        return False
    if not np.allclose(
        sorted(one.atoms.get_masses()),
        sorted(other.atoms.get_masses()),
        atol=MASS_TOLERANCE,
        rtol=0.0,
    ):
        return False
    scale = (one.supercell.get_volume() / other.supercell.get_volume()) ** (1.0 / 3.0)
    reference = _marked(one, 0, 1.0)
    sites = [
        site
        for site in range(len(other.atoms))
        if other.atoms.numbers[site] == one.atoms.numbers[0]
    ]
    return any(
        table_difference(reference, _marked(other, site, scale)) <= PHASE_TOLERANCE
        for site in sites
    )


def _marked(state: SschaState, site: int, scale: float) -> list[tuple[int, np.ndarray]]:
    atoms = Atoms(
        numbers=state.supercell.numbers,
        positions=state.supercell.positions,
        cell=state.supercell.cell.array,
        pbc=True,
    )
    atoms.set_cell(scale * atoms.cell.array, scale_atoms=True)
    atoms.numbers[site] = MARKER
    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    return pointwise_distances(
        atoms, [(int(z), int(count)) for z, count in zip(numbers, counts, strict=True)]
    )


def duplicates(store: FreeEnergyStore, key: Key, names: Iterable[str]) -> list[Run]:
    """Converged runs at ``key`` that are, or led to, the runs ``names`` and ended in the phase of
    the first of them; that one first."""
    first, *others = dict.fromkeys(names)
    leader = store.get(first, key)
    if leader is None or not _usable(leader):
        return []
    found = [
        record
        for record in store.runs(key)
        if _usable(record) and store.final(record).structure in (first, *others)
    ]
    own = _fingerprint(leader)
    return [
        leader,
        *(
            record
            for record in found
            if record.structure != first and one_phase(own, _fingerprint(record))
        ),
    ]


def _usable(record: Run) -> bool:
    converged = record.status in MINIMA
    return (
        converged
        and record.centroids is not None
        and record.gibbs is not None
        and bool(record.gibbs_error)
    )


def _fingerprint(record: Run) -> Fingerprint:
    return primitive_fingerprint(record.phase, record.tolerance)


def merge_duplicates(
    candidates: Sequence[Candidate],
    store: FreeEnergyStore,
    key: Key,
    root: Path,
    covariance: Covariance,
) -> list[Candidate]:
    """The candidates that stand for a phase with the G of all its runs, and with the spread of
    those in other supercells.

    ``root`` holds the folders of the runs. A run whose folder is gone cannot be shown to have the
    same supercell, and counts as one of another.
    """
    members: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.run is not None and candidate.ranked:
            name = candidate.run.structure
            members.setdefault(candidate.same_as or candidate.id, []).append(name)
    merged = []
    for candidate in candidates:
        if candidate.phase_ranked and candidate.status in CONVERGED and candidate.run is not None:
            runs = duplicates(store, key, [candidate.run.structure, *members[candidate.id]])
            candidate = _merged(candidate, runs, root, covariance) if len(runs) > 1 else candidate
        merged.append(candidate)
    return merged


def _merged(
    candidate: Candidate, runs: Sequence[Run], root: Path, covariance: Covariance
) -> Candidate:
    """``runs``: that of the candidate first."""
    gibbs, left = (
        np.array([run.gibbs for run in runs]),
        np.array([run.free_energy.predicted_decrease or 0.0 for run in runs]),
    )
    matrix = np.diag([(run.gibbs_error or 0.0) ** 2 for run in runs])
    for i in range(len(runs)):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = covariance(runs[i].folder, runs[j].folder)
    states = [_state(root / run.folder) for run in runs]
    near = _distances(gibbs, matrix, left)[0] <= AGREEMENT
    alike = [
        index
        for index in range(len(runs))
        if index == 0 or (near[index] and _alike(states[0], states[index]))
    ]
    found = combined(gibbs[alike], matrix[np.ix_(alike, alike)], left[alike])
    shares = [
        (runs[index], float(weight))
        for index, weight in zip(alike, found.weights, strict=True)
        if weight > 0.0
    ]
    apart = np.delete(gibbs, alike) - found.value
    candidate = replace(
        candidate, duplicate_spread=float(np.abs(apart).max()) if len(apart) else None
    )
    if shares == [(runs[0], 1.0)]:
        return candidate
    note = f"G pooled from {len(shares)} runs with the same supercell"
    log.info("%s: %s", candidate.id, note)
    means = {
        name: _mean([(vars(run.free_energy)[name], weight) for run, weight in shares])
        for name in ("gibbs_raw", "finite_size", "nonanalytic")
    }
    candidate = candidate.updated(
        gibbs=found.value,
        gibbs_error=found.error,
        **means,
        reason=f"{candidate.reason}; {note}" if candidate.reason else note,
    )
    pooled = tuple((run.folder, weight) for run, weight in shares)
    return replace(candidate, pooled=pooled, n_pooled=len(pooled))


def _mean(values: Sequence[tuple[float | None, float]]) -> float | None:
    known = [value * weight for value, weight in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _state(folder: Path) -> SschaState | None:
    try:
        return SschaResult.read(folder).state
    except MagusAnharmonicError as error:
        log.debug("%s: supercell unknown: %s", folder, error)
        return None


def _alike(one: SschaState | None, other: SschaState | None) -> bool:
    return one is not None and other is not None and same_supercell(one, other)


def common_error(one: Candidate, other: Candidate, covariance: Covariance) -> float:
    """Covariance of two candidates' G, eV^2/atom^2, each perhaps pooled from several runs."""
    shares = [candidate.pooled or ((candidate.sscha_folder, 1.0),) for candidate in (one, other)]
    return sum(
        a * b * covariance(mine, its)
        for mine, a in shares[0]
        for its, b in shares[1]
        if mine and its
    )


VOLUME_TOLERANCE = 0.02
"""Relative."""
GIBBS_TOLERANCE = 5e-3
"""eV/atom; two runs of one phase may differ by their finite sizes."""


def reduced_centroids(record: Run) -> Atoms | None:
    """The primitive cell of a result whose symmetry made it smaller than the cell that was run,
    else None."""
    smaller = primitive_fingerprint(record.phase, record.tolerance).atoms.copy()
    return smaller if len(smaller) < len(record.phase) else None


def same_primitive(a: Atoms, b: Atoms) -> bool:
    """True when two symmetrised primitive cells are one phase."""
    return same_phase(Fingerprint(a), Fingerprint(b))


def primitive_fingerprint(atoms: Atoms, tolerance: float) -> Fingerprint:
    """Of the primitive cell that ``atoms`` have at the tolerance (A) of their symmetry; worked out
    once, as every table of a ranking asks for those of all its runs."""
    masses = atoms.get_masses() if atoms.has("masses") else np.zeros(0)
    parts = atoms.numbers, atoms.positions, atoms.cell.array, masses
    return _known_fingerprint(tolerance, *(part.tobytes() for part in parts))


@lru_cache(maxsize=1024)
def _known_fingerprint(
    tolerance: float, numbers: bytes, positions: bytes, cell: bytes, masses: bytes
) -> Fingerprint:
    atoms = Atoms(
        numbers=np.frombuffer(numbers, dtype=int),
        positions=np.frombuffer(positions).reshape(-1, 3),
        cell=np.frombuffer(cell).reshape(3, 3),
        pbc=True,
    )
    if masses:
        atoms.set_masses(np.frombuffer(masses))
    return Fingerprint(symmetric_primitive(atoms, tolerance), tolerance)


def one_phase(a: Fingerprint, b: Fingerprint) -> bool:
    """True when two results at one pressure are one phase, nearly equal volumes included."""
    return abs(a.volume - b.volume) <= VOLUME_TOLERANCE * min(a.volume, b.volume) and same_phase(
        a, b
    )


STATE_TOLERANCE = 0.01
"""Angstrom between interatomic distances of two states that are one: a twentieth of what hydrogen
moves by, and less than a minimisation on one population leaves open."""
Alike = Literal["", "state", "end"]
"""Whether two runs are in one state, or sure to come to one phase."""


@dataclass(frozen=True)
class Ending:
    """Where a run is and how far from there it may end: the primitive cell of its centroids at the
    symmetry that it keeps exactly, and A within which each coordinate ends (three standard errors,
    and what the relaxation still has to do). ``settled`` : no question about its symmetry is open.
    """

    fingerprint: Fingerprint
    reach: float
    settled: bool


def ending_of(run: Run) -> Ending:
    """That of a run with centroids, also before it has converged. An SSCHA run keeps its symmetry,
    unless it was moved onto a higher one, which it may still leave (`sscha.unstable`)."""
    found, energy = primitive_fingerprint(run.phase, EXACT), run.free_energy
    kept = energy.converged or found.space_group == energy.space_group_start
    return Ending(found, run.tolerance, kept and UNDECIDED not in energy.space_group)


def alike(a: Ending, b: Ending) -> Alike:
    """What cells and centroids of two runs say, both at the symmetry that they keep.

    "state" : no interatomic distance differs by `STATE_TOLERANCE` now. States are not measured but
    known, and what follows from one follows from the other. "end" : none can differ by more than
    `PHASE_TOLERANCE` at their ends, so that `label_phases` would take them for one phase: the
    largest difference now, and sqrt(2) times both reaches in quadrature (a distance has two ends),
    is below it. Reaches are three standard errors and what is left to relax: two phases that differ
    by more are taken for one with a probability below 0.0014 each time that they are compared.
    """
    if not (a.settled and b.settled and one_phase(a.fingerprint, b.fingerprint)):
        return ""
    apart = largest_difference(a.fingerprint, b.fingerprint)
    doubt = math.sqrt(2.0) * math.hypot(a.reach, b.reach)
    return (
        "end" if apart + doubt <= PHASE_TOLERANCE else "state" if apart <= STATE_TOLERANCE else ""
    )


def label_phases(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fill in ``same_as``: of the candidates that ended in one quantum phase one stands for all.

    That is a converged one if there is any, whose space group is decided (what another of its phase
    could not decide, it did), at the reference supercell (its cell is the phase's primitive one)
    rather than at another, with more rather than fewer atoms in the supercell; among equals the one
    of lowest G, and before those that share its run the one whose own that is.
    """
    prints = {
        c.id: primitive_fingerprint(c.centroids, c.tolerance)
        for c in candidates
        if c.ranked and c.centroids is not None
    }
    order = sorted(
        (c for c in candidates if c.id in prints),
        key=lambda c: _standing(c, len(prints[c.id].atoms)),
    )
    phases: list[tuple[Candidate, Fingerprint]] = []
    same_as: dict[str, str] = {}
    for candidate in order:
        fingerprint = prints[candidate.id]
        duplicate = next(
            (c for c, other in phases if _one_phase(c, other, candidate, fingerprint)), None
        )
        if duplicate is None:
            phases.append((candidate, fingerprint))
        else:
            same_as[candidate.id] = duplicate.id
    if same_as:
        log.info(
            "%d of %d results are quantum phases that others lead to as well",
            len(same_as),
            len(order),
        )
    return [replace(c, same_as=same_as.get(c.id, "")) for c in candidates]


def _standing(
    candidate: Candidate, n_primitive: int
) -> tuple[bool, bool, bool, int, float, bool, str]:
    undecided = UNDECIDED in candidate.free_energy.space_group
    larger = len(candidate.centroids or ()) > n_primitive
    return (
        candidate.status not in CONVERGED,
        undecided,
        larger,
        -(candidate.free_energy.n_atoms_supercell or 0),
        candidate.gibbs or 0.0,
        candidate.run_id != candidate.id,
        candidate.id,
    )


def _one_phase(a: Candidate, print_a: Fingerprint, b: Candidate, print_b: Fingerprint) -> bool:
    if a.sscha_folder == b.sscha_folder:
        return True
    noise = 3.0 * math.hypot(a.gibbs_error or 0.0, b.gibbs_error or 0.0)
    if a.gibbs is None or b.gibbs is None or abs(a.gibbs - b.gibbs) > max(GIBBS_TOLERANCE, noise):
        return False
    return one_phase(print_a, print_b)
