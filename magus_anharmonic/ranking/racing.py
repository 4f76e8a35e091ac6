"""Who is selected, reduced to a smaller cell, and raced.

Who gets an SSCHA run, and in which round of a search.

Results that gained symmetry are run again from their primitive cell.

Then Im-3m that came from an 8-atom cell and from a 4-atom cell has one reference supercell and one
G.

Successive elimination with SSCHA runs: who gets the next population, until the order is decided.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.elimination import Rules, Standing, race
from magus_anharmonic.ranking.jobs import Job, Outcome, run_of, standing_of, stopped_run
from magus_anharmonic.ranking.phases import reduced_centroids, same_primitive
from magus_anharmonic.ranking.run import Run
from magus_anharmonic.ranking.runs import Runs
from magus_anharmonic.settings import Settings, SschaSettings
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import ev_to_mev

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
    known = "unknown" if energy_rmse is None else f"{ev_to_mev(energy_rmse):.1f} meV/atom"
    wanted = f"learning.target_rmse {ev_to_mev(target):.1f} meV/atom"
    return f"the model's validation RMSE is {known}, {wanted}"


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

    run: Run
    atoms: Atoms
    structure: str


def reductions(runs: Sequence[Run]) -> list[Reduction]:
    """Those of the results that have a smaller primitive cell and were not run again."""
    found = []
    for run in {r.folder: r for r in runs}.values():
        if run.gibbs is None or run.reduced or run.status == "eliminated":
            continue
        smaller = reduced_centroids(run)
        if smaller is not None:
            found.append(Reduction(run, smaller, structure_id(smaller)))
    return found


def run_reduced(runs: Runs) -> None:
    """Run what gained symmetry again from its primitive cell, once per phase, to take over."""
    store = runs.store
    jobs: dict[str, Job] = {}
    waiting: list[tuple[Reduction, str]] = []
    for reduction in reductions(runs.of_all()):
        run, key = reduction.run, reduction.run.key
        known = store.get(reduction.structure, key) or store.find_phase(reduction.atoms, key)
        if known is not None:
            store.put(replace(run, reduced=known.structure))
            continue
        like = next(
            (
                name
                for other, name in waiting
                if other.run.key == key and same_primitive(other.atoms, reduction.atoms)
            ),
            None,
        )
        if like is None:
            like = reduction.structure
            job = runs.job(reduction.atoms, [key])
            jobs[str(job.folders[0])] = job
        waiting.append((reduction, like))
    if not jobs:
        return
    log.info("%d results gained symmetry; run again from their primitive cells", len(jobs))
    parents = {(like, r.run.key): r.run.structure for r, like in reversed(waiting)}

    def done(job: Job, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            key = runs.key_at(outcome.temperature)
            run = runs.made(job, key, outcome, None, parent=parents[job.structure, key])
            if run is not None:
                store.put(run)

    runs.execute(list(jobs.values()), done)
    for reduction, like in waiting:
        if store.get(like, reduction.run.key) is not None:
            store.put(replace(reduction.run, reduced=like))


START = 100
"""Force evaluations that the harmonic start of a run is taken to need at most, when the budget is
dealt out."""


def race_rules(runs: Runs) -> Rules:
    """Those of the settings of a ranking."""
    sscha = runs.sscha

    def cost(standing: Standing | None) -> int:
        if standing is None:
            return sscha.ranking_start + START
        if standing.converged:
            return sscha.n_configs
        return sscha.configurations(standing.n_populations + 1, sscha.ranking_start)

    return Rules(
        sscha.confidence,
        sscha.keep_best,
        sscha.max_populations,
        runs.error_tolerance(),
        sscha.budget,
        cost,
    )


def run_race(runs: Runs, candidates: Sequence[Candidate]) -> None:
    """Successive elimination of the candidates at the first temperature; those that have a result
    there take part with it."""
    key, rules = runs.keys[0], race_rules(runs)
    whose = {candidate.id: candidate for candidate in candidates}
    before = {name: run for name, c in whose.items() if (run := runs.of(c, key)) is not None}
    latest: dict[str, tuple[Job, Outcome, Run]] = {}

    def advance(wanted: dict[str, int]) -> dict[str, Standing]:
        found: dict[str, Standing] = {}

        def done(job: Job, outcomes: list[Outcome]) -> None:
            (outcome,) = outcomes
            candidate = whose[job.structure]
            run = run_of(job, key, outcome, candidate.enthalpy, runs.sscha.symprec)
            if run is None or run.gibbs is None:
                runs.keep(candidate, key, run, outcome)
                return
            earlier = latest[job.structure][2] if job.structure in latest else None
            standing = standing_of(run, earlier)
            # a run whose phase is open has not come to its end, though its G has
            settled = standing.converged and not outcome.result.reason
            found[job.structure] = replace(standing, converged=settled)
            latest[job.structure] = job, outcome, run

        jobs = [
            runs.job(whose[name].structure, [key], max_populations=count)
            for name, count in wanted.items()
        ]
        runs.execute(jobs, done)
        return found

    def common(one: str, other: str) -> float:
        folders = [
            (latest[name][2] if name in latest else before[name]).folder for name in (one, other)
        ]
        return runs.common_numbers.covariance(*folders)

    names = [name for name in whose if name not in before]
    counted = {name: standing_of(run, None) for name, run in before.items() if run.ranked}
    known = {name: one for name, one in counted.items() if before[name].status != "eliminated"}
    eliminated = {name: one for name, one in counted.items() if name not in known}
    stops = race(
        names, advance, rules, known, eliminated, common, lambda name: whose[name].composition
    )
    for name, stop in stops.items():
        job, outcome, run = latest[name]
        # Only now: what the model says about an ensemble is asked once, of the last one.
        final = runs.made(job, key, outcome, whose[name].enthalpy) or run
        runs.keep(whose[name], key, stopped_run(final, stop), outcome)
    waiting = sum(
        runs.of(whose[name], key) is None and (name, key) not in runs.failures for name in names
    )
    if waiting:
        log.warning(
            "SSCHA: the budget of %s force evaluations was spent before %d candidates began: they"
            " keep their estimate",
            rules.budget,
            waiting,
        )
    if stops:
        log.info(
            "SSCHA: %d candidates, %d of them stopped early; %d force evaluations",
            len(stops),
            sum(stop.eliminated for stop in stops.values()),
            sum(run.free_energy.n_evaluations for _, _, run in latest.values()),
        )
