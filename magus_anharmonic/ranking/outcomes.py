"""From what an SSCHA run returned to the record of the store, to the candidate of the table, and to the flat ``info`` keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.ranking.candidate import CONVERGED, Candidate
from magus_anharmonic.ranking.elimination import Standing, Stop
from magus_anharmonic.ranking.jobs import Job, Outcome
from magus_anharmonic.ranking.store import Key, Record
from magus_anharmonic.ranking.trust import EnsembleTrust
from magus_anharmonic.sscha.melting import melting_warning
from magus_anharmonic.sscha.rotations import rotation_warning
from magus_anharmonic.sscha.supercells import image_warning
from magus_anharmonic.structures import bare, space_group


def record_of(
    job: Job,
    key: Key,
    outcome: Outcome,
    enthalpy: float | None,
    symprec: float,
    *,
    trust: EnsembleTrust | None = None,
    parent: str = "",
    cutoff: float | None = None,
) -> Record | None:
    """What is stored of an outcome; None for a failure that may not happen again. ``cutoff`` : of the model, A, where it has one."""
    result = outcome.result
    if result is None:
        if not outcome.lasting:
            return None
        spg = space_group(job.atoms, symprec)
        failed = Record(job.structure, key, job.atoms, "failed", outcome.reason, enthalpy=enthalpy, parent=parent, spg_static=spg)
        return failed if outcome.partial is None else replace(failed, **_partial_numbers(outcome.partial))
    notes = ["" if result.converged else result.reason or "did not converge", *_warnings(result, cutoff)]
    notes.append("" if trust is None else trust.warning)
    return Record(
        structure=job.structure,
        key=key,
        start=job.atoms,
        status="sscha" if result.converged else "unconverged",
        reason="; ".join(filter(None, notes)),
        enthalpy=enthalpy,
        gibbs=float(result.gibbs),
        gibbs_error=float(result.gibbs_error),
        gibbs_raw=_float(result.gibbs_raw),
        finite_size=_float(result.finite_size),
        volume=_float(result.volume),
        ensemble_error=None if trust is None else trust.force_error,
        error_vector=None if trust is None else trust.error_vector,
        n_evaluations=int(result.n_evaluations),
        n_supercell=int(result.n_atoms_supercell),
        spg_static=result.space_group_start,
        spg_quantum=result.space_group,
        symmetry_tolerance=float(result.symmetry_tolerance),
        centroids=bare(result.centroids),
        parent=parent,
        decrease=_float(result.decrease),
        n_populations=int(result.n_populations),
    )


def standing_of(record: Record, before: Record | None) -> Standing:
    """What the race knows of a run that has a G; ``before``: the same run one round earlier."""
    assert record.gibbs is not None
    fallen = None if before is None or before.gibbs is None else max(0.0, before.gibbs - record.gibbs)
    if before is None and record.n_populations > 1:
        fallen = record.decrease or 0.0
    n_new = record.n_evaluations - (0 if before is None else before.n_evaluations)
    converged = record.status in CONVERGED
    return Standing(record.gibbs, record.gibbs_error or 0.0, record.decrease or 0.0, fallen, converged, record.n_populations, n_new)


def stopped_record(record: Record, stop: Stop) -> Record:
    """The record with the reason why the race went on without it.

    A converged one keeps its status: when the budget ended, its place may still be open, but its G is that of the end of a relaxation,
    and its error bar says how well it is known.
    """
    converged = record.status in CONVERGED
    if not stop.reason or (converged and stop.eliminated):
        return record
    status = record.status if converged else "eliminated" if stop.eliminated else "unconverged"
    reason = f"{stop.reason} before its place was known" if converged else stop.reason
    reasons = "; ".join(filter(None, (reason, record.reason)))
    return replace(record, status=status, reason=reasons, budget_spent=stop.budget_spent)


def _partial_numbers(result: Any) -> dict[str, Any]:
    """Fields of a failed run's record from its last population: no G, which would rank."""
    numbers = {
        "gibbs_raw": result.gibbs_raw, "gibbs_error": result.gibbs_error, "volume": result.volume, "decrease": result.decrease
    }  # fmt: skip
    known = {name: float(value) for name, value in numbers.items() if value is not None and np.isfinite(value)}
    return {**known, "n_evaluations": int(result.n_evaluations), "n_populations": int(result.n_populations)}


def _warnings(result: Any, cutoff: float | None) -> list[str]:
    if result.force_constants is None:
        return []
    state = result.state
    return [rotation_warning(state), melting_warning(state), image_warning(state.supercell.cell.array, cutoff)]


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def with_result(candidate: Candidate, record: Record, final: Record) -> Candidate:
    """``candidate`` with the result ``final``, to which its own run ``record`` led."""
    if record.status == "failed":
        return replace(
            candidate,
            status="failed",
            reason=record.reason,
            gibbs_error=record.gibbs_error,
            gibbs_raw=record.gibbs_raw,
            volume=record.volume,
            n_evaluations=record.n_evaluations,
            record=record.structure,
            folder=record.folder,
        )
    reason = final.reason
    if final is not record:
        note = f"G of its {len(final.phase)}-atom primitive cell, run again"
        reason = f"{reason}; {note}" if reason else note
    return replace(
        candidate,
        status=final.status,
        reason=reason,
        gibbs=final.gibbs,
        gibbs_error=final.gibbs_error,
        gibbs_raw=final.gibbs_raw,
        finite_size=final.finite_size,
        volume=final.volume,
        ensemble_error=final.ensemble_error,
        error_vector=final.error_vector,
        hessian_lowest=final.hessian_lowest,
        hessian_error=final.hessian_error,
        p_stable=final.p_stable,
        spg_quantum=final.spg_quantum,
        symmetry_tolerance=final.symmetry_tolerance,
        centroids=final.centroids,
        n_evaluations=record.n_evaluations + (final.n_evaluations if final is not record else 0),
        n_supercell=final.n_supercell,
        record=final.structure,
        folder=final.folder,
    )


def set_info(population: Sequence[Atoms], candidates: Sequence[Candidate], model: str) -> None:
    """The flat ``info`` keys that fitness, host and ``magus summary`` read, on every structure of the population."""
    several = len({candidate.composition for candidate in candidates}) > 1
    for candidate in candidates:
        above = {"gibbs_above_hull": np.nan if candidate.gibbs_above_hull is None else candidate.gibbs_above_hull} if several else {}
        for index in candidate.members:
            population[index].info.update(
                candidate_id=candidate.id,
                model=model,
                gibbs=np.nan if candidate.gibbs is None else candidate.gibbs,
                gibbs_error=np.nan if candidate.gibbs is None or candidate.gibbs_error is None else candidate.gibbs_error,
                status=candidate.status,
                gibbs_model=model,
                reason=candidate.reason,
                spg_quantum=candidate.spg_quantum,
                **above,
            )
