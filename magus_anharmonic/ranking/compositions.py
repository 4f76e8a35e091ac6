"""Rankings of several compositions: free energies above the hull of all, beside the order inside each.

G per atom of two compositions cannot be compared; its distance above the lower convex hull can. The hull is that of the candidates
themselves, so that the extreme compositions are on it. Only computed free energies make it; estimates are measured against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from ase import Atoms

from magus_anharmonic.hull import above_hull, hull_odds, lower_hull, pool_fractions, reduced_formula
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.structures import formula

DRAWS = 400
"""Hulls drawn for the error bars: odds to about 0.02."""
_SEED = 108


def composition(atoms: Atoms) -> str:
    """Reduced formula with the metals first, e.g. ``'H3S'`` (``'D3S'`` with deuterium): one name for all cells of a composition."""
    return reduced_formula(formula(atoms))


def with_heights(candidates: Sequence[Candidate], model_error: float | None) -> list[Candidate]:
    """Fill in the distances above the hulls of H and of G, with errors and odds; nothing where all are of one composition.

    ``p_on_hull`` is by sampling alone, ``p_on_hull_total`` with the expected error of each static energy (else ``model_error``,
    eV/atom), taken as independent: between compositions little cancels. Both are None where a phase has no such number.
    """
    if len({c.composition for c in candidates}) < 2:
        return list(candidates)
    return _with_gibbs_heights(_with_static_heights(candidates), model_error)


def _with_static_heights(candidates: Sequence[Candidate]) -> list[Candidate]:
    known = [c for c in candidates if c.enthalpy is not None]
    if not known:
        return list(candidates)
    heights = above_hull([c.composition for c in known], np.array([c.enthalpy for c in known]))
    filled = {c.id: replace(c, enthalpy_above_hull=float(height)) for c, height in zip(known, heights, strict=True)}
    return [filled.get(c.id, c) for c in candidates]


def _with_gibbs_heights(candidates: Sequence[Candidate], model_error: float | None) -> list[Candidate]:
    phases = [c for c in candidates if c.ranked and not c.same_as]
    if not phases:
        return list(candidates)
    fractions = pool_fractions([c.composition for c in (*phases, *candidates)])
    corners, everywhere = fractions[: len(phases)], fractions[len(phases) :]
    gibbs, sampling = np.array([c.gibbs for c in phases]), np.array([c.gibbs_error or 0.0 for c in phases])
    noise = np.random.default_rng(_SEED).normal(size=(DRAWS, len(phases)))
    found = hull_odds(corners, gibbs, gibbs + noise * sampling)
    model = [model_error if c.model_error is None else c.model_error for c in phases]
    known = [value for value in model if value is not None]
    total = hull_odds(corners, gibbs, gibbs + noise * np.hypot(sampling, known)).p_on_hull if len(known) == len(phases) else None
    filled = {
        c.id: {
            "gibbs_above_hull_error": float(found.error[k]),
            "p_on_hull": float(found.p_on_hull[k]),
            "p_on_hull_total": None if total is None else float(total[k]),
        }
        for k, c in enumerate(phases)
    }
    hull = lower_hull(corners, gibbs, everywhere)
    return [
        replace(c, gibbs_above_hull=_above(c, float(height)), **filled.get(c.id, {}))
        for c, height in zip(candidates, hull, strict=True)
    ]  # fmt: skip


def _above(candidate: Candidate, hull: float) -> float | None:
    """Computed free energies cannot be below the hull of which they are part; None for failures and beyond the hull's ends."""
    if candidate.gibbs is None or candidate.status == "failed" or not np.isfinite(hull):
        return None
    return max(0.0, candidate.gibbs - hull) if candidate.ranked and not candidate.same_as else candidate.gibbs - hull
