"""Successive elimination with SSCHA runs: who gets the next population, until the order is decided."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from magus_anharmonic.ranking.candidate import RANKED
from magus_anharmonic.ranking.compositions import composition
from magus_anharmonic.ranking.elimination import Rules, Standing, race
from magus_anharmonic.ranking.jobs import Job, Outcome, Workers, run_jobs
from magus_anharmonic.ranking.outcomes import record_of, standing_of, stopped_record
from magus_anharmonic.ranking.store import Record
from magus_anharmonic.structures import structure_id

if TYPE_CHECKING:
    from magus_anharmonic.ranking.rank import Ranking

log = logging.getLogger(__name__)

START = 100
"""Force evaluations that the harmonic start of a run is taken to need at most, when the budget is dealt out."""


def run_race(
    ranking: Ranking, todo: Sequence[int], out: Sequence[int], chosen: Sequence[int], free_energy: Callable[..., Any], workers: Workers
) -> None:
    """Successive elimination at the first temperature: ``todo`` has no result there, ``out`` was eliminated before."""
    key = ranking.keys[0]
    groups = {structure_id(ranking.leader(g)): g for g in (*todo, *out)}
    sscha = ranking.sscha

    def cost(standing: Standing | None) -> int:
        if standing is None:
            return sscha.ranking_start + START
        return sscha.n_configs if standing.converged else sscha.configurations(standing.n_populations + 1, sscha.ranking_start)

    rules = Rules(sscha.confidence, sscha.keep_best, sscha.max_populations, ranking.error_tolerance(), sscha.budget, cost)
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
                found[job.structure] = replace(standing, converged=standing.converged and not outcome.result.reason)
                latest[job.structure] = job, outcome, record

        jobs = [ranking.job(ranking.leader(groups[name]), [key], max_populations=count) for name, count in wanted.items()]
        run_jobs(jobs, ranking.evaluator, free_energy, done, workers)
        return found

    known = {
        str(g): standing_of(record, None)
        for g in chosen
        if g not in (*todo, *out) and (record := ranking.records[g, key]).gibbs is not None and record.status in RANKED
    }
    dormant = {structure_id(ranking.leader(g)): standing_of(ranking.records[g, key], None) for g in out}
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

    stops = race(names, advance, rules, known, dormant, common, composition_of)
    for name, stop in stops.items():
        job, outcome, record = latest[name]
        # Only now: what the model says about an ensemble is asked once, of the last one.
        final = ranking.recorded(job, key, outcome, enthalpy_of(name)) or record
        ranking.keep(groups[name], key, stopped_record(final, stop))
    waiting = sum(
        name not in stops and (groups[name], key) not in ranking.records and (groups[name], key) not in ranking.failures for name in names
    )
    if waiting:
        log.warning(
            "SSCHA: the budget of %s force evaluations was spent before %d candidates began: they keep their estimate",
            rules.budget,
            waiting,
        )
    spent = sum(record.n_evaluations for _, _, record in latest.values())
    early = sum(stop.eliminated for stop in stops.values())
    if stops:
        log.info("SSCHA: %d candidates, %d of them stopped early; %d force evaluations", len(stops), early, spent)
