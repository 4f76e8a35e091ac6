"""The SSCHA runs of one ranking: what each is asked, who runs it, and what is kept of it.

Who gets a run, and in which round of a search; who gets the next population, until the order is
decided (`elimination`). Results that gained symmetry are run again from their primitive cell: then
Im-3m that came from an 8-atom cell and from a 4-atom cell has one reference supercell and one G.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.io.files import read_whole
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.elimination import FAR, Rules, Standing, race, resolution
from magus_anharmonic.ranking.jobs import (
    Job,
    Outcome,
    Workers,
    potential_energy,
    run_jobs,
    run_of,
    standing_of,
    stopped_run,
)
from magus_anharmonic.ranking.matcher import ENERGY_TOLERANCE
from magus_anharmonic.ranking.phases import (
    Alike,
    Ending,
    alike,
    ending_of,
    reduced_centroids,
    same_primitive,
)
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, Run, sscha_hash
from magus_anharmonic.ranking.uncertainty import CommonNumbers, ensemble_trust
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.runs.record import record_failure
from magus_anharmonic.settings import Settings, SschaSettings
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import stripped, structure_id
from magus_anharmonic.units import ev_to_mev

log = logging.getLogger(__name__)

_TRUST, _SAMPLES = 106, 107
"""Separate the random numbers of two purposes with the same seed."""


class Runs:
    """Those of the candidates of one ranking, and the store of all.

    ``origins`` : structure -> the run whose centroids it came from as a seed, if any. Set before
    the first: ``workers``, who runs them; ``predictor``, the free-energy model of the search.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        settings: Settings,
        run_dir: Path,
        seed: int,
        free_energy: Callable[..., Any] | None,
        energy_rmse: float | None = None,
        starts: Mapping[str, SschaState] | None = None,
        generation: int | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.evaluator, self.settings, self.run_dir, self.seed = evaluator, settings, run_dir, seed
        self.energy_rmse = energy_rmse
        self.starts, self.origins = dict(starts or {}), dict(origins or {})
        self.root = SearchFolder(run_dir).sscha
        self.store = FreeEnergyStore(SearchFolder(run_dir).free_energies, generation)
        self.common_numbers = CommonNumbers(self.root)
        temperatures = settings.sscha.temperatures if settings.sscha else ()
        self.keys = [self._key(n) for n in range(len(temperatures))]
        self.failures: dict[tuple[str, Key], str] = {}
        self._of: dict[tuple[str, Key], str] = {}
        self._free_energy = free_energy
        self.workers: Workers = None
        self.predictor: Any = None

    @property
    def sscha(self) -> SschaSettings:
        """The block ``sscha``; only asked for where there is one."""
        if self.settings.sscha is None:
            raise ValueError("the settings have no block sscha")
        return self.settings.sscha

    def _key(self, n: int) -> Key:
        temperatures = self.sscha.temperatures
        physics = sscha_hash(self.sscha, self.seed, temperatures[:n])
        return Key(self.evaluator.model_id, self.settings.pressure, temperatures[n], physics)

    def key_at(self, temperature: float) -> Key:
        """What free energies of this ranking at one temperature (K) belong to."""
        return next(key for key in self.keys if key.temperature == temperature)

    def of(self, candidate: Candidate, key: Key) -> Run | None:
        """The run that holds for a candidate, as it is stored now."""
        name = self._of.get((candidate.id, key))
        return None if name is None else self.store.get(name, key)

    def of_all(self) -> list[Run]:
        """The runs of all candidates, in the order in which they were found."""
        found = (self.store.get(name, key) for (_, key), name in self._of.items())
        return [run for run in found if run is not None]

    def results(self, key: Key) -> list[Run]:
        """What the runs of all candidates led to at ``key``."""
        return [self.store.final(run) for run in self.of_all() if run.key == key]

    def look_up(self, candidates: Sequence[Candidate]) -> None:
        """Take over every stored free energy that holds for one of the candidates."""
        for candidate in candidates:
            for key in self.keys:
                run = self.store.find(
                    candidate.structure,
                    key,
                    candidate.enthalpy,
                    ENERGY_TOLERANCE,
                    candidate.seed_of,
                )
                if run is not None and not self._goes_on(run):
                    self._of[candidate.id, key] = run.structure

    def _goes_on(self, run: Run) -> bool:
        """Whether a run that another budget ended is to be taken up again. Those of further
        temperatures have begun where it ended."""
        final = self.store.final(run)
        return (
            final.status == "unconverged"
            and len(self.keys) == 1
            and final.budget_spent not in (None, self.sscha.budget)
        )

    def error_tolerance(self) -> float:
        """Sampling error of G that is small enough for this ranking, eV/atom."""
        wanted = self.sscha.error_tolerance
        if wanted is not None:
            return wanted
        return resolution(self.energy_rmse, self.sscha.free_energy_tolerance)

    def job(
        self,
        atoms: Atoms,
        keys: Sequence[Key],
        *,
        start: Any = None,
        max_populations: int | None = None,
    ) -> Job:
        """The SSCHA run of a structure with this ranking's settings; ``start``: see `free_energy`;
        None: an earlier model's run, if any."""
        name, sscha = structure_id(atoms), self.sscha
        # one for all: alike candidates get the same random numbers, and a restarted run the same
        # configurations
        generator = np.random.default_rng([self.seed, _SAMPLES])
        racing = sscha.allocation == "elimination"
        options = {
            **sscha.of_a_run(),
            "pressure": self.settings.pressure,
            "n_configs_start": sscha.ranking_start,
            "max_populations": max_populations or sscha.max_populations,
            "seed": int(generator.integers(2**31)),
            "error_tolerance": self.error_tolerance() if racing else sscha.error_tolerance,
        }
        begin = self.starts.get(name) if start is None else start
        folders = tuple(self.root / key.folder(name) for key in keys)
        return Job(
            name,
            stripped(atoms),
            tuple(key.temperature for key in keys),
            folders,
            options,
            self._earlier_run(atoms, keys[0]) if begin is None else begin,
            part=options["max_populations"] < sscha.max_populations,
        )

    def _earlier_run(self, atoms: Atoms, key: Key) -> Path | None:
        """The folder of a run that another model made of the same start: its state and its
        configurations are taken over."""
        run = self.store.earlier(atoms, key, self.origins.get(structure_id(atoms), ""))
        folder = None if run is None else self.root / run.folder
        return folder if folder is not None and (folder / "result.npz").is_file() else None

    def execute(self, jobs: Sequence[Job], done: Callable[[Job, list[Outcome]], None]) -> None:
        """Run all jobs; ``done`` is called as each finishes."""
        if self._free_energy is None:
            from magus_anharmonic.sscha.gibbs import free_energy

            self._free_energy = free_energy
        run_jobs(jobs, self.evaluator, self._free_energy, done, self.workers)

    def execute_for(self, candidates: Sequence[Candidate], jobs: Sequence[Job]) -> None:
        """Run the jobs of candidates, and keep what they come to."""
        whose = {candidate.id: candidate for candidate in candidates}

        def done(job: Job, outcomes: list[Outcome]) -> None:
            candidate = whose[job.structure]
            for outcome in outcomes:
                key = self.key_at(outcome.temperature)
                run = self.made(job, key, outcome, candidate.enthalpy)
                self.keep(candidate, key, run, outcome)

        self.execute(jobs, done)

    def made(
        self, job: Job, key: Key, outcome: Outcome, enthalpy: float | None, parent: str = ""
    ) -> Run | None:
        """What is stored of an outcome, with what the model says about the ensemble; None for what
        may not happen again."""
        rng = np.random.default_rng([self.seed, int(job.structure, 16), _TRUST])
        found = outcome.result
        trust = None if found is None else ensemble_trust(found, self.evaluator, rng)
        if trust is not None and trust.warning:
            log.warning("%s: G is not to be trusted: %s", job.structure, trust.warning)
        more = {"parent": parent, "cutoff": getattr(self.evaluator, "cutoff", None)}
        run = run_of(job, key, outcome, enthalpy, self.sscha.symprec, trust=trust, **more)
        # of one that goes on from an earlier round, populations may have trained the model
        new = run is not None and self.store.get(job.structure, key) is None
        return self.predictor.at_end(run) if new and self.predictor is not None else run

    def keep(self, candidate: Candidate, key: Key, run: Run | None, outcome: Outcome) -> None:
        """Store what a candidate's run came to; a failure goes to ``failures.jsonl``, and None (may
        not happen again) is not stored."""
        if run is None or run.status == "failed":
            what = {
                "id": candidate.id,
                "temperature_K": key.temperature,
                "model": self.evaluator.model_id,
            }
            reason = outcome.reason if run is None else run.reason
            record_failure(self.run_dir, "sscha", reason, **what)
        if run is None:
            self.failures[candidate.id, key] = outcome.reason
        else:
            self.store.put(run)
            self._of[candidate.id, key] = run.structure


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
        max(FAR, RMSE_FACTOR * (runs.energy_rmse or 0.0)),
    )


def _standing_before(runs: Runs, run: Run) -> Standing:
    """That of a run which an earlier race eliminated, with what the state in its folder says."""
    found = read_whole(runs.root / run.folder / "result.json", lambda p: SschaResult.read(p.parent))
    known = math.inf if found is None else potential_energy(found, run.enthalpy)
    return replace(standing_of(run, None), potential=known)


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
            if outcome.result.reason:
                # a run whose phase is open has not come to its end, though its G has
                standing = standing.updated(status="unconverged")
            potential = potential_energy(outcome.result, candidate.enthalpy)
            found[job.structure] = replace(standing, potential=potential)
            latest[job.structure] = job, outcome, run

        jobs = [
            runs.job(whose[name].structure, [key], max_populations=count)
            for name, count in wanted.items()
        ]
        runs.execute(jobs, done)
        return found

    def now(name: str) -> Run:
        return latest[name][2] if name in latest else before[name]

    def common(one: str, other: str) -> float:
        return runs.common_numbers.covariance(now(one).folder, now(other).folder)

    endings: dict[str, tuple[Run, Ending]] = {}

    def ending(name: str) -> Ending:
        run = now(name)
        if name not in endings or endings[name][0] is not run:
            endings[name] = run, ending_of(run)
        return endings[name][1]

    def alike_now(one: str, other: str) -> Alike:
        return alike(ending(one), ending(other))

    names = [name for name in whose if name not in before]
    counted = {name: run for name, run in before.items() if run.ranked}
    known = {n: standing_of(r, None) for n, r in counted.items() if r.status != "eliminated"}
    # one for whose phase another run goes on has the result of that one
    alone = (n for n, r in counted.items() if n not in known and runs.store.final(r) is r)
    eliminated = {name: _standing_before(runs, before[name]) for name in alone}
    stops = race(
        names,
        advance,
        rules,
        known,
        eliminated,
        common,
        lambda name: whose[name].composition,
        alike_now,
    )
    for name, stop in stops.items():
        job, outcome, run = latest[name]
        # Only now: what the model says about an ensemble is asked once, of the last one.
        final = runs.made(job, key, outcome, whose[name].enthalpy) or run
        stopped = stopped_run(final, stop)
        if stop.same_as and stopped.status == "eliminated":
            stopped = replace(stopped, reduced=now(stop.same_as).structure)
            stopped = stopped.updated(reason=stop.reason)
        runs.keep(whose[name], key, stopped, outcome)
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
