"""One structure of a ranking, with everything the table, the fitness and the report say about
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ase import Atoms

from magus_anharmonic.hull import reduced_formula
from magus_anharmonic.structures import formula

Status = Literal[
    "sscha", "unconverged", "eliminated", "estimated", "static", "failed", "saddle", "stable"
]
"""``unconverged``: the populations or the budget ran out before the relaxation came to its end;
``eliminated``: stopped early, because it cannot be among the best. The G of both is an upper bound.
``stable`` and ``saddle``: converged, and the Hessian of the free energy has no negative mode, or
has one, beyond two standard errors (`stability`)."""

CONVERGED: tuple[Status, ...] = ("sscha", "stable", "saddle")
"""States whose relaxation came to its end."""

RANKED: tuple[Status, ...] = ("sscha", "eliminated", "stable")
"""States whose free energy takes part in the ranking. Below a saddle point there is something
lower, and where an unconverged run would have ended nobody knows; an eliminated one is known to end
above the best."""

WITH_ERROR: tuple[Status, ...] = (*RANKED, "saddle", "unconverged")
"""States whose free energy is that of an ensemble of their own and has a standard error."""


@dataclass(frozen=True)
class Candidate:
    """A distinct structure at one pressure and temperature; energies in eV/atom, ``None`` where
    there is no number.

    ``atoms`` is the statically relaxed structure, ``centroids`` the SSCHA-relaxed one. ``members``
    are the positions in the population of all structures that were found to be this one.
    ``same_as`` is the id of the candidate that stands for the quantum phase in which this one ended
    too. ``folder`` is below the run's ``sscha/``. ``difference`` is G minus that of the lowest
    phase with its three errors, ``p_lowest`` the probability by sampling alone, ``p_lowest_total``
    with all three (`probabilities`). ``model_correction`` is G by DFT minus G where labels of the
    ensemble say so (`model_errors.ModelTerm`). ``model_error`` is the expected error of the static
    energy against the model's DFT, ``ensemble_error`` that of the forces in the final ensemble
    (eV/A), ``error_vector`` (eV/atom) what its errors share with those of other phases
    (`model_errors`). ``parent`` is the structure whose saddle point was followed to this one, which
    is no member of the population then. ``pooled`` : folders of the runs of which G is the mean,
    and their weights (`pooling`; empty: of one run); ``duplicate_spread`` : largest distance of G
    of the phase's runs in other supercells. ``hessian_lowest``, ``hessian_error`` (cm^-1) and
    ``p_stable``: see `Record`. ``..._above_hull``, ``p_on_hull...`` : with several compositions
    (`compositions`).
    """

    id: str
    atoms: Atoms
    pressure: float
    temperature: float
    enthalpy: float | None
    model: str
    spg_static: str = ""
    members: tuple[int, ...] = ()
    seed: str = ""
    status: Status = "static"
    reason: str = ""
    gibbs: float | None = None
    gibbs_error: float | None = None
    gibbs_raw: float | None = None
    finite_size: float | None = None
    volume: float | None = None
    spg_quantum: str = ""
    symmetry_tolerance: float = 0.05
    centroids: Atoms | None = None
    model_error: float | None = None
    ensemble_error: float | None = None
    error_vector: tuple[float, ...] | None = None
    n_evaluations: int = 0
    n_supercell: int = 0
    same_as: str = ""
    folder: str = ""
    record: str = ""
    difference: float | None = None
    difference_sampling: float | None = None
    difference_finite_size: float | None = None
    difference_model: float | None = None
    model_correction: float | None = None
    model_correction_error: float | None = None
    p_lowest: float | None = None
    p_lowest_total: float | None = None
    parent: str = ""
    pooled: tuple[tuple[str, float], ...] = ()
    duplicate_spread: float | None = None
    hessian_lowest: float | None = None
    hessian_error: float | None = None
    p_stable: float | None = None
    enthalpy_above_hull: float | None = None
    gibbs_above_hull: float | None = None
    gibbs_above_hull_error: float | None = None
    p_on_hull: float | None = None
    p_on_hull_total: float | None = None
    rank_static: int | None = None
    rank_quantum: int | None = None

    @property
    def ranked(self) -> bool:
        """True with a free energy that counts, also when another candidate stands for the same
        phase."""
        return self.status in RANKED and self.gibbs is not None

    @property
    def formula(self) -> str:
        """Chemical formula with the metals first, e.g. ``'H3S'``; deuterium is D."""
        return formula(self.atoms)

    @property
    def composition(self) -> str:
        """The formula without common divisor: one name for all cells of a composition."""
        return reduced_formula(self.formula)


def by_composition(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates of each composition: those nearest to the hull first, else by formula."""
    blocks: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        blocks.setdefault(candidate.composition, []).append(candidate)
    return [blocks[name] for name in sorted(blocks, key=lambda name: (_lowest(blocks[name]), name))]


def _lowest(block: Sequence[Candidate]) -> tuple[float, float]:
    gibbs = [c.gibbs_above_hull for c in block if c.ranked and c.gibbs_above_hull is not None]
    static = [c.enthalpy_above_hull for c in block if c.enthalpy_above_hull is not None]
    return min(gibbs, default=math.inf), min(static, default=math.inf)


def numbered(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Order for the table, composition by composition, ranks filled in.

    Of a composition first the ranked phases, by G; then those that are the same phase as one of
    them; then saddle points, unconverged, estimated and failed ones by G or its estimate, and those
    without one by enthalpy; last what has none. ``rank_static`` counts all candidates of the
    composition by enthalpy, ``rank_quantum`` the phases of the first kind alone: an estimate is
    never the best.
    """
    return [
        candidate for block in by_composition(candidates) for candidate in _numbered_block(block)
    ]


def _numbered_block(candidates: Sequence[Candidate]) -> list[Candidate]:
    by_enthalpy = sorted(
        (c for c in candidates if c.enthalpy is not None), key=lambda c: (c.enthalpy, c.id)
    )
    static = {c.id: index for index, c in enumerate(by_enthalpy, start=1)}
    phases = sorted(
        (c for c in candidates if c.ranked and not c.same_as), key=lambda c: (c.gibbs, c.id)
    )
    quantum = {c.id: index for index, c in enumerate(phases, start=1)}
    ranked = [
        replace(c, rank_static=static.get(c.id), rank_quantum=quantum.get(c.id)) for c in candidates
    ]
    return sorted(ranked, key=_table_order)


def _table_order(candidate: Candidate) -> tuple[int, float, str]:
    if candidate.ranked:
        return (1 if candidate.same_as else 0, candidate.gibbs or 0.0, candidate.id)
    if candidate.gibbs is not None:
        return (2, candidate.gibbs, candidate.id)
    if candidate.enthalpy is not None:
        return (3, candidate.enthalpy, candidate.id)
    return (4, 0.0, candidate.id)
