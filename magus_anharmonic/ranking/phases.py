"""Quantum phases: which SSCHA results are the same phase, and their primitive cells."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from ase import Atoms

from magus_anharmonic.ranking.candidate import CONVERGED, Candidate
from magus_anharmonic.ranking.matcher import Fingerprint, same_phase
from magus_anharmonic.ranking.store import Record
from magus_anharmonic.sscha.symmetry import symmetric_primitive
from magus_anharmonic.structures import UNDECIDED

log = logging.getLogger(__name__)

VOLUME_TOLERANCE = 0.02
"""Relative."""
GIBBS_TOLERANCE = 5e-3
"""eV/atom; two runs of one phase may differ by their finite sizes."""


def reduced_centroids(record: Record) -> Atoms | None:
    """The primitive cell of a result whose symmetry made it smaller than the cell that was run, else None."""
    smaller = symmetric_primitive(record.phase, record.symmetry_tolerance)
    return smaller if len(smaller) < len(record.phase) else None


def same_records(a: Atoms, b: Atoms) -> bool:
    """True when two symmetrised primitive cells are one phase."""
    return same_phase(Fingerprint(a), Fingerprint(b))


def primitive_fingerprint(atoms: Atoms, tolerance: float) -> Fingerprint:
    """Of the primitive cell that ``atoms`` have at the tolerance (A) of their symmetry."""
    return Fingerprint(symmetric_primitive(atoms, tolerance), tolerance)


def one_phase(a: Fingerprint, b: Fingerprint) -> bool:
    """True when two results at one pressure are one phase, nearly equal volumes included."""
    return abs(a.volume - b.volume) <= VOLUME_TOLERANCE * min(a.volume, b.volume) and same_phase(a, b)


def label_phases(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fill in ``same_as``: of the candidates that ended in one quantum phase one stands for all.

    That is a converged one if there is any, whose space group is decided (what another of its phase could not decide, it did), at
    the reference supercell (its cell is the phase's primitive one) rather than at another, with more rather than fewer atoms in
    the supercell; among equals the one of lowest G.
    """
    prints = {c.id: primitive_fingerprint(c.centroids, c.symmetry_tolerance) for c in candidates if c.ranked and c.centroids is not None}
    order = sorted((c for c in candidates if c.id in prints), key=lambda c: _standing(c, len(prints[c.id].atoms)))
    phases: list[tuple[Candidate, Fingerprint]] = []
    twins: dict[str, str] = {}
    for candidate in order:
        fingerprint = prints[candidate.id]
        twin = next((c for c, other in phases if _one_phase(c, other, candidate, fingerprint)), None)
        if twin is None:
            phases.append((candidate, fingerprint))
        else:
            twins[candidate.id] = twin.id
    if twins:
        log.info("%d of %d results are quantum phases that others lead to as well", len(twins), len(order))
    return [replace(c, same_as=twins.get(c.id, "")) for c in candidates]


def _standing(candidate: Candidate, n_primitive: int) -> tuple[bool, bool, bool, int, float, str]:
    undecided = UNDECIDED in candidate.spg_quantum
    larger = len(candidate.centroids or ()) > n_primitive
    return candidate.status not in CONVERGED, undecided, larger, -candidate.n_supercell, candidate.gibbs or 0.0, candidate.id


def _one_phase(a: Candidate, print_a: Fingerprint, b: Candidate, print_b: Fingerprint) -> bool:
    if a.record == b.record:
        return True
    noise = 3.0 * math.hypot(a.gibbs_error or 0.0, b.gibbs_error or 0.0)
    if a.gibbs is None or b.gibbs is None or abs(a.gibbs - b.gibbs) > max(GIBBS_TOLERANCE, noise):
        return False
    return one_phase(print_a, print_b)
