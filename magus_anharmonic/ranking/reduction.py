"""Results that gained symmetry are run again from their primitive cell.

Then Im-3m that came from an 8-atom cell and from a 4-atom cell has one reference supercell and one G.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ase import Atoms

from magus_anharmonic.ranking.jobs import Job, Outcome, Workers, run_jobs
from magus_anharmonic.ranking.phases import reduced_centroids, same_records
from magus_anharmonic.ranking.store import Record
from magus_anharmonic.structures import structure_id

if TYPE_CHECKING:
    from magus_anharmonic.ranking.rank import Ranking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reduction:
    """A run whose result has a smaller primitive cell, and the run that is to take over."""

    record: Record
    atoms: Atoms
    structure: str


def reductions(records: Sequence[Record]) -> list[Reduction]:
    """Those of the results that have a smaller primitive cell and were not run again."""
    found = []
    for record in {r.folder: r for r in records}.values():
        if record.gibbs is None or record.reduced or record.status == "eliminated":
            continue
        smaller = reduced_centroids(record)
        if smaller is not None:
            found.append(Reduction(record, smaller, structure_id(smaller)))
    return found


def run_reduced(ranking: Ranking, records: Sequence[Record], free_energy: Callable[..., Any], workers: Workers) -> None:
    """Run the reductions of ``records`` again, once per phase, and let them take over."""
    jobs: dict[str, Job] = {}
    waiting: list[tuple[Reduction, str]] = []
    for reduction in reductions(records):
        key = reduction.record.key
        known = ranking.store.get(reduction.structure, key) or ranking.store.find_phase(reduction.atoms, key)
        if known is not None:
            ranking.put(replace(reduction.record, reduced=known.structure))
            continue
        like = next((s for other, s in waiting if other.record.key == key and same_records(other.atoms, reduction.atoms)), None)
        if like is None:
            like = reduction.structure
            job = ranking.job(reduction.atoms, [key])
            jobs[str(job.folders[0])] = job
        waiting.append((reduction, like))
    if not jobs:
        return
    log.info("%d results gained symmetry; run again from their primitive cells", len(jobs))
    parents = {(like, r.record.key): r.record.structure for r, like in reversed(waiting)}

    def done(job: Job, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            key = ranking.key_at(outcome.temperature)
            record = ranking.recorded(job, key, outcome, None, parent=parents[job.structure, key])
            if record is not None:
                ranking.put(record)

    run_jobs(list(jobs.values()), ranking.evaluator, free_energy, done, workers)
    for reduction, like in waiting:
        if ranking.store.get(like, reduction.record.key) is not None:
            ranking.put(replace(reduction.record, reduced=like))
