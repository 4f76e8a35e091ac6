"""Who is selected, reduced to a smaller cell, and raced.

Who gets an SSCHA run, and in which round of a search.

Results that gained symmetry are run again from their primitive cell.

Then Im-3m that came from an 8-atom cell and from a 4-atom cell has one reference supercell and one
G.

Successive elimination with SSCHA runs: who gets the next population, until the order is decided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from magus_anharmonic.ranking.candidate import RANKED
from magus_anharmonic.ranking.elimination import Rules, Standing, race
from magus_anharmonic.ranking.fitness import composition
from magus_anharmonic.ranking.jobs import (
    Job,
    Outcome,
    Workers,
    record_of,
    run_jobs,
    standing_of,
    stopped_record,
)
from magus_anharmonic.ranking.phases import reduced_centroids, same_records
from magus_anharmonic.ranking.store import Record
from magus_anharmonic.settings import Settings, SschaSettings
from magus_anharmonic.structures import structure_id

if TYPE_CHECKING:
    from magus_anharmonic.ranking.rank import Ranking


RMSE_FACTOR = 3.0


def sscha_is_due(
    settings: Settings, generation: int | None, n_generations: int | None, energy_rmse: float | None
) -> bool:
    """``sscha.when``: every time without learning; else in the last round, or once the model is
    good enough."""
    if settings.sscha is None:
        return False
    if settings.sscha.when == "every_generation" or settings.learning is None or generation is None:
        return True
    if n_generations is not None and generation >= n_generations:
        return True
    target = settings.learning.target_rmse
    return target is not None and energy_rmse is not None and energy_rmse <= target


def why_not(settings: Settings, energy_rmse: float | None) -> str:
    """Why there is no SSCHA in this round, for the log."""
    target = settings.learning.target_rmse if settings.learning else None
    if target is None:
        return (
            "sscha.when is converged_model and learning.target_rmse is not set, so it runs in the"
            " last round"
        )
    known = "unknown" if energy_rmse is None else f"{1000 * energy_rmse:.1f} meV/atom"
    return (
        f"the model's validation RMSE is {known}, learning.target_rmse {1000 * target:.1f} meV/atom"
    )


def chosen_groups(
    groups: Sequence[Sequence[int]],
    energies: Sequence[float],
    settings: SschaSettings,
    energy_rmse: float | None,
) -> list[int]:
    """Positions in ``groups`` of the structures that get a free energy: the lowest distinct ones
    within the window.

    ``energies`` (eV/atom) are the enthalpies, or the distances above their hull
    (`hull.comparable`). The window is widened to three times the model's validation RMSE: closer
    structures are not told apart by it.
    """
    if not groups:
        return []
    window = np.inf if settings.window is None else settings.window
    if energy_rmse is not None:
        window = max(window, RMSE_FACTOR * energy_rmse)
    lowest = [energies[members[0]] for members in groups]
    order = sorted(range(len(groups)), key=lambda g: lowest[g])
    limit = lowest[order[0]] + window
    return [g for g in order if lowest[g] <= limit][: settings.max_candidates]


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


def run_reduced(
    ranking: Ranking, records: Sequence[Record], free_energy: Callable[..., Any], workers: Workers
) -> None:
    """Run the reductions of ``records`` again, once per phase, and let them take over."""
    jobs: dict[str, Job] = {}
    waiting: list[tuple[Reduction, str]] = []
    for reduction in reductions(records):
        key = reduction.record.key
        known = ranking.store.get(reduction.structure, key) or ranking.store.find_phase(
            reduction.atoms, key
        )
        if known is not None:
            ranking.put(replace(reduction.record, reduced=known.structure))
            continue
        like = next(
            (
                s
                for other, s in waiting
                if other.record.key == key and same_records(other.atoms, reduction.atoms)
            ),
            None,
        )
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


START = 100
"""Force evaluations that the harmonic start of a run is taken to need at most, when the budget is
dealt out."""


def run_race(
    ranking: Ranking,
    todo: Sequence[int],
    out: Sequence[int],
    chosen: Sequence[int],
    free_energy: Callable[..., Any],
    workers: Workers,
) -> None:
    """Successive elimination at the first temperature: ``todo`` has no result there, ``out`` was
    eliminated before."""
    key = ranking.keys[0]
    groups = {structure_id(ranking.leader(g)): g for g in (*todo, *out)}
    sscha = ranking.sscha

    def cost(standing: Standing | None) -> int:
        if standing is None:
            return sscha.ranking_start + START
        return (
            sscha.n_configs
            if standing.converged
            else sscha.configurations(standing.n_populations + 1, sscha.ranking_start)
        )

    rules = Rules(
        sscha.confidence,
        sscha.keep_best,
        sscha.max_populations,
        ranking.error_tolerance(),
        sscha.budget,
        cost,
    )
    latest: dict[str, tuple[Job, Outcome, Record]] = {}

    def enthalpy_of(name: str) -> float:
        return ranking.enthalpies[ranking.groups[groups[name]][0]]

    def advance(wanted: dict[str, int]) -> dict[str, Standing]:
        found: dict[str, Standing] = {}

        def done(job: Job, outcomes: list[Outcome]) -> None:
            (outcome,) = outcomes
            record = record_of(job, key, outcome, enthalpy_of(job.structure), ranking.sscha.symprec)
            if record is None or record.gibbs is None:
                ranking.keep(groups[job.structure], key, record, outcome)
            else:
                before = latest[job.structure][2] if job.structure in latest else None
                assert outcome.result is not None
                standing = standing_of(record, before)
                # a run whose phase is open has not come to its end, though its G has
                found[job.structure] = replace(
                    standing, converged=standing.converged and not outcome.result.reason
                )
                latest[job.structure] = job, outcome, record

        jobs = [
            ranking.job(ranking.leader(groups[name]), [key], max_populations=count)
            for name, count in wanted.items()
        ]
        run_jobs(jobs, ranking.evaluator, free_energy, done, workers)
        return found

    known = {
        str(g): standing_of(record, None)
        for g in chosen
        if g not in (*todo, *out)
        and (record := ranking.records[g, key]).gibbs is not None
        and record.status in RANKED
    }
    eliminated_before = {
        structure_id(ranking.leader(g)): standing_of(ranking.records[g, key], None) for g in out
    }
    again = [g for g in todo if (g, key) not in ranking.records]
    names = [structure_id(ranking.leader(g)) for g in again]

    def folder_of(name: str) -> str:
        if name in latest:
            return latest[name][2].folder
        return ranking.records[groups[name] if name in groups else int(name), key].folder

    def common(one: str, other: str) -> float:
        return ranking.common_numbers.covariance(folder_of(one), folder_of(other))

    def composition_of(name: str) -> str:
        return composition(ranking.leader(groups[name] if name in groups else int(name)))

    stops = race(names, advance, rules, known, eliminated_before, common, composition_of)
    for name, stop in stops.items():
        job, outcome, record = latest[name]
        # Only now: what the model says about an ensemble is asked once, of the last one.
        final = ranking.recorded(job, key, outcome, enthalpy_of(name)) or record
        ranking.keep(groups[name], key, stopped_record(final, stop))
    waiting = sum(
        name not in stops
        and (groups[name], key) not in ranking.records
        and (groups[name], key) not in ranking.failures
        for name in names
    )
    if waiting:
        log.warning(
            "SSCHA: the budget of %s force evaluations was spent before %d candidates began: they"
            " keep their estimate",
            rules.budget,
            waiting,
        )
    spent = sum(record.n_evaluations for _, _, record in latest.values())
    early = sum(stop.eliminated for stop in stops.values())
    if stops:
        log.info(
            "SSCHA: %d candidates, %d of them stopped early; %d force evaluations",
            len(stops),
            early,
            spent,
        )
