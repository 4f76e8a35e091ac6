"""Ranking by free energy: which structures get an SSCHA run, which a stored result, which an
estimate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.evaluator import ENERGY_ERROR, Evaluator, device_kind
from magus_anharmonic.hull import comparable
from magus_anharmonic.ranking.candidate import (
    Candidate,
    RankingTable,
    by_composition,
    draw_best,
    numbered,
    write_quantum,
    write_ranking,
    write_results,
)
from magus_anharmonic.ranking.certify import Calibration, Predictor, calibration, uncertified
from magus_anharmonic.ranking.fitness import (
    GibbsEstimate,
    composition,
    fit_estimates,
    number,
    with_heights,
)
from magus_anharmonic.ranking.jobs import Job, Workers, set_info, with_result
from magus_anharmonic.ranking.matcher import distinct
from magus_anharmonic.ranking.phases import common_error, label_phases, merge_duplicates
from magus_anharmonic.ranking.runs import (
    Runs,
    chosen_groups,
    run_race,
    run_reduced,
    sscha_is_due,
    why_not,
)
from magus_anharmonic.ranking.stability import check_stability, with_followers
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, Run
from magus_anharmonic.ranking.uncertainty import ModelTerm, with_electronic, with_probabilities
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.scheduler import open_scheduler
from magus_anharmonic.settings import Settings
from magus_anharmonic.sscha.record import FreeEnergy
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import isotopes, space_group, stripped, structure_id

log = logging.getLogger(__name__)

SEED_KEY = "sscha_centroid"
"""``info`` key of a seed: the structure id of the SSCHA run whose centroid it is."""


def rank(
    population: Sequence[Atoms],
    *,
    evaluator: Evaluator,
    settings: Settings,
    run_dir: str | Path,
    seed: int = 0,
    generation: int | None = None,
    n_generations: int | None = None,
    energy_rmse: float | None = None,
    free_energy: Callable[..., SschaResult] | None = None,
    workers: Workers = None,
    starts: Mapping[str, SschaState] | None = None,
    measured: Mapping[str, ModelTerm] | None = None,
    truth: Truth | None = None,
    model: Evaluator | None = None,
) -> RankingTable:
    """Rank structures that all carry ``info['enthalpy']`` (eV/atom) of ``evaluator``'s model.

    Writes ``ranking.csv`` (and ``ranking_<T>K.csv`` for the further temperatures),
    ``results.json``, ``quantum.traj`` and ``free_energies.db`` in ``run_dir``, one folder
    per SSCHA run in ``run_dir/sscha``, and the flat ``info`` keys.

    Parameters
    ----------
    energy_rmse
        Of the model on its validation set, eV/atom; None: unknown.
    generation, n_generations
        Decide about ``sscha.when``; None: not part of a search, SSCHA runs now. What later
        generations stored is not seen.
    free_energy
        `magus_anharmonic.sscha.free_energy`, or a stand-in with its arguments.
    workers
        Who runs SSCHA: a scheduler, or a number of local processes; None takes
        ``settings.scheduler``.
    starts
        By structure id: the SSCHA state from which that structure's run starts, instead of a
        harmonic one.
    measured
        By candidate id or space-group symbol: what DFT labels say about the model's G
        (`uncertainty.with_probabilities`).
    truth
        Labels the lowest phases of each temperature, once they are known; then G is that of DFT
        (`with_truth`).

    model
        The free-energy model that the search moves on, where that is not ``evaluator``:
        ``info['enthalpy']`` is its G then, and SSCHA certifies the lowest (`certify`).

    Structures of several compositions are ranked in one table, composition by composition
    (`numbered`): estimates, early stopping, order and probabilities are those inside of a
    composition, and beside them stands the distance above the hull (`with_heights`).

    Returns the candidates at the first temperature (the one that ranks) in the order of the table.
    Raises ValueError when a structure's energy belongs to another model, ``InputError`` for other
    isotopes in one composition.
    """
    origins = {
        structure_id(atoms): str(atoms.info.get(SEED_KEY) or "") for atoms in reversed(population)
    }
    runs = Runs(
        evaluator,
        settings,
        Path(run_dir),
        seed,
        free_energy,
        energy_rmse if model is None else None,
        starts,
        generation,
        origins,
    )
    if model is not None:
        runs.predictor = Predictor(model, settings.pressure)
    ranking = Ranking(population, runs, measured)
    if settings.sscha is not None:
        runs.look_up(ranking.candidates)
        if sscha_is_due(settings, generation, n_generations, energy_rmse):
            with (
                contextlib.nullcontext(workers)
                if workers is not None
                else open_scheduler(settings, device=device_kind(evaluator))
            ) as runs.workers:
                ranking.decide()
            if truth is not None:
                ranking.label(truth)
        else:
            log.info("no SSCHA yet: %s", why_not(settings, energy_rmse))
    tables = ranking.tables()
    set_info(population, tables[0], ranking.model_of_energies)
    write_tables(Path(run_dir), tables, runs.store)
    if settings.sscha is not None:
        draw_best(Path(run_dir), tables[0], settings.sscha.keep_best)
    return tables[0]


class Ranking:
    """Who of a population is distinct, and the table of what `Runs` knows of them."""

    def __init__(
        self,
        population: Sequence[Atoms],
        runs: Runs,
        measured: Mapping[str, ModelTerm] | None = None,
    ) -> None:
        self.population, self.runs, self.measured = population, runs, dict(measured or {})
        self.labelled: dict[Key, dict[str, ModelTerm]] = {}
        self.settings, self.model = runs.settings, runs.evaluator.model_id
        found = [number(atoms.info.get("enthalpy")) for atoms in population]
        usable = [i for i, enthalpy in enumerate(found) if enthalpy is not None]
        self.unusable = [i for i, enthalpy in enumerate(found) if enthalpy is None]
        self.enthalpies = [np.inf if enthalpy is None else enthalpy for enthalpy in found]
        self.model_of_energies = self.model
        if runs.predictor is not None:
            self.model_of_energies = runs.predictor.model.model_id
        self._check_models(usable)
        self._check_isotopes(usable)
        inside = distinct([population[i] for i in usable], [self.enthalpies[i] for i in usable])
        self.candidates = [self._candidate([usable[k] for k in group]) for group in inside]
        if runs.predictor is not None:
            self.candidates = runs.predictor.predicted(self.candidates, runs.evaluator)

    def _check_models(self, usable: Sequence[int]) -> None:
        for i in usable:
            model = self.population[i].info.get("model") or self.model_of_energies
            if model != self.model_of_energies:
                raise ValueError(
                    f"structure {i}: its enthalpy is of model {model}, the ranking of"
                    f" {self.model_of_energies}; evaluate it first"
                )

    def _check_isotopes(self, usable: Sequence[int]) -> None:
        """Free energies of one compound with other masses cannot be compared (D and T make
        compositions of their own)."""
        found: dict[str, dict[str, float]] = {}
        for i in usable:
            atoms = self.population[i]
            if (known := found.setdefault(composition(atoms), isotopes(atoms))) != isotopes(atoms):
                raise InputError(
                    f"structure {i} ({composition(atoms)}): has the isotopes"
                    f" {isotopes(atoms) or 'of nature'}, others of this composition"
                    f" {known or 'those of nature'}; rank them one after the other"
                )

    def _candidate(self, members: Sequence[int]) -> Candidate:
        """The lowest of structures that are one, which stands for them."""
        atoms = self.population[members[0]]
        tags = (str(self.population[i].info.get(SEED_KEY) or "") for i in members)
        return Candidate(
            id=structure_id(atoms),
            name=_name(atoms),
            merged=", ".join(filter(None, (_name(self.population[i]) for i in members[1:]))),
            atoms=stripped(atoms),
            pressure=self.settings.pressure,
            enthalpy=self.enthalpies[members[0]],
            model=self.model,
            spg_static=space_group(
                atoms, self.settings.sscha.symprec if self.settings.sscha else 0.05
            ),
            members=tuple(members),
            n_merged=len(members) - 1,
            seed_of=next((tag for tag in tags if tag), ""),
            model_error=number(atoms.info.get(ENERGY_ERROR)),
        )

    def _failed(self, index: int, temperature: float) -> Candidate:
        atoms = self.population[index]
        reason = str(atoms.info.get("reason") or "it has no enthalpy")
        return Candidate(
            id=structure_id(atoms),
            name=_name(atoms),
            atoms=stripped(atoms),
            pressure=self.settings.pressure,
            temperature=temperature,
            model=self.model,
            spg_static=space_group(atoms),
            members=(index,),
            free_energy=FreeEnergy(status="failed", reason=reason),
        )

    def decide(self) -> None:
        """Run SSCHA for whom the ranking needs it; on a free energy until nobody who may be lower
        than the lowest is left without it."""
        if self.runs.predictor is None:
            self.run(self.chosen())
            return
        key, asked = self.runs.keys[0], set[str]()
        while more := [
            c
            for c in uncertified(self.candidates, self._final, self.runs.sscha.max_candidates)
            if c.id not in asked and (c.id, key) not in self.runs.failures
        ]:
            asked |= {c.id for c in more}
            self.run([*(c for c in self.candidates if self.runs.of(c, key)), *more])
        log.info("free-energy model %s: %s", self.model_of_energies, self._calibration())

    def _final(self, candidate: Candidate) -> Run | None:
        run = self.runs.of(candidate, self.runs.keys[0])
        return None if run is None else self.runs.store.final(run)

    def _calibration(self) -> Calibration:
        return calibration(self.runs.store.runs(self.runs.keys[0]))

    def chosen(self) -> list[Candidate]:
        """Those that get a free energy: by enthalpy, or by the distance above the hull of several
        compositions."""
        energies = comparable([composition(atoms) for atoms in self.population], self.enthalpies)
        groups = [candidate.members for candidate in self.candidates]
        found = chosen_groups(groups, energies, self.runs.sscha, self.runs.energy_rmse)
        return [self.candidates[index] for index in found]

    def run(self, chosen: Sequence[Candidate]) -> None:
        """Run SSCHA for the chosen candidates that lack a final result, then again for results that
        gained symmetry."""
        runs = self.runs
        first = {c.id: runs.of(c, runs.keys[0]) for c in chosen}
        out = {c.id: c for c in chosen if (run := first[c.id]) and run.status == "eliminated"}
        todo = [
            c
            for c in chosen
            if c.id not in out and any(runs.of(c, key) is None for key in runs.keys)
        ]
        for candidate in (c for c in todo if c.name):
            log.info("%s is %s", candidate.id, candidate.name)
        log.info(
            "SSCHA: %d distinct structures of %d, %d within reach, %d of them already known",
            len(self.candidates), len(self.population), len(chosen), len(chosen) - len(todo),
        )  # fmt: skip
        if runs.sscha.allocation == "elimination":
            run_race(runs, chosen)
            jobs = self._later_temperatures([*todo, *out.values()])
        else:
            jobs = [runs.job(c.structure, runs.keys) for c in todo]
        runs.execute_for(chosen, jobs)
        run_reduced(runs)
        if runs.sscha.hessian:
            # before anything that is not needed for them: a library that ends the process takes no
            # finished result along
            write_tables(runs.run_dir, self.tables(), runs.store)
            for key in runs.keys:
                check_stability(runs, key, lambda key=key: self.table(key))

    def label(self, truth: Truth) -> None:
        """Ask ``truth`` for the terms of the lowest phases at each temperature."""
        for key in self.runs.keys:
            write_tables(self.runs.run_dir, self.tables(), self.runs.store)
            self.labelled[key] = dict(truth(self.table(key), self.runs.evaluator))

    def _later_temperatures(self, candidates: Sequence[Candidate]) -> list[Job]:
        """Jobs of those that were not eliminated at the first temperature, from where they ended
        there."""
        first, *later = self.runs.keys
        jobs = []
        for candidate in candidates:
            run = self.runs.of(candidate, first)
            if run is None or run.status == "failed":
                reason = f"not run: {first.temperature:g} K, where it would start, failed"
                self.runs.failures.update({(candidate.id, key): reason for key in later})
            elif later and run.status != "eliminated":
                start = self.runs.root / run.folder
                jobs.append(self.runs.job(candidate.structure, later, start=start))
        return jobs

    def tables(self) -> list[RankingTable]:
        """The candidates in the order of the table, one list per temperature (one list without
        ``sscha``)."""
        return [self.table(key) for key in self.runs.keys] or [self.table(None)]

    def table(self, key: Key | None) -> RankingTable:
        """The candidates as they are known now, in the order of the table; ``key`` None: without
        free energies."""
        candidates, runs, energy_rmse = list(self.candidates), self.runs, self.runs.energy_rmse
        if key is not None:
            candidates = [self._with_run(candidate, key) for candidate in candidates]
            candidates = self._estimated(candidates, key)
            candidates = with_followers(candidates, runs.store, runs.results(key))
            covariance = runs.common_numbers.covariance
            phases = label_phases(candidates)
            phases = merge_duplicates(phases, runs.store, key, runs.root, covariance)
            phases = with_electronic(phases, self.measured)
            terms = self.measured | self.labelled.get(key, {})
            phases, left = with_truth(phases, self.labelled.get(key, {}))
            candidates = with_probabilities(
                phases, energy_rmse, terms | left, lambda a, b: common_error(a, b, covariance)
            )
            candidates = [_with_term(c, terms) if c.id in left else c for c in candidates]
        failed = [self._failed(i, key.temperature if key else 0.0) for i in self.unusable]
        return numbered(with_heights(candidates + failed, energy_rmse))

    def _with_run(self, candidate: Candidate, key: Key) -> Candidate:
        candidate = replace(candidate, temperature=key.temperature)
        if (reason := self.runs.failures.get((candidate.id, key))) is not None:
            return candidate.updated(status="failed", reason=reason)
        run = self.runs.of(candidate, key)
        return candidate if run is None else with_result(candidate, run, self.runs.store.final(run))

    def _estimated(self, candidates: list[Candidate], key: Key) -> list[Candidate]:
        """Give the structures without a result, failed ones too, the estimate from those that have
        one."""
        store = self.runs.store
        if self.runs.predictor is None:
            found = [
                (composition(run.start), run.enthalpy, store.final(run)) for run in store.runs(key)
            ]
        else:
            found = [(c.composition, c.energy, c) for c in candidates if c.run is not None]
        known = [
            (name, energy, final.gibbs, final.gibbs_error or 0.0)
            for name, energy, final in found
            if energy is not None and final.gibbs is not None and final.status != "unconverged"
        ]
        estimates = fit_estimates(known, [c.composition for c in candidates])
        return [_with_estimate(c, estimates.get(c.composition)) for c in candidates]


Truth = Callable[[Sequence[Candidate], Evaluator], Mapping[str, ModelTerm]]
"""From a ranked table and its model what DFT labels say about G, by candidate id
(`paper.truth.labels_of`)."""


def with_truth(
    candidates: Sequence[Candidate], terms: Mapping[str, ModelTerm]
) -> tuple[list[Candidate], dict[str, ModelTerm]]:
    """G of DFT in the place of the model's, and what the terms still say: their errors.

    A phase that was labelled is shifted by its own correction, with those that it stands for; all
    else that has a G, by the mean of the corrections in its composition. One without any keeps the
    G of the model, which is told.
    """
    found = {c.id: terms[c.same_as or c.id] for c in candidates if (c.same_as or c.id) in terms}
    if not found:
        return list(candidates), {}
    shifted: list[Candidate] = []
    for block in by_composition(candidates):
        own = [terms[c.id].correction for c in block if c.id in terms]
        if not own:
            log.warning("%s: no labels, G is that of the model", block[0].composition)
        mean = float(np.mean(own)) if own else 0.0
        for c in block:
            shift = found[c.id].correction if c.id in found else mean
            shifted.append(c if c.gibbs is None else c.updated(gibbs=c.gibbs + shift))
    return shifted, {name: replace(term, correction=0.0) for name, term in terms.items()}


def _with_term(candidate: Candidate, terms: Mapping[str, ModelTerm]) -> Candidate:
    term = terms[candidate.id]
    return replace(candidate, model_correction=term.correction, model_correction_error=term.error)


def _with_estimate(candidate: Candidate, estimate: GibbsEstimate | None) -> Candidate:
    """A failed one stays failed, in the place of its estimate: it ranks no lower than if its run
    had not been made."""
    status, reason = candidate.status, candidate.reason
    if estimate is None or status not in ("static", "failed") or candidate.energy is None:
        return candidate
    told = estimate.description
    return candidate.updated(
        status="failed" if status == "failed" else "estimated",
        gibbs=estimate(candidate.energy),
        gibbs_error=estimate.margin,
        reason=f"{reason}; in the place of its estimate: {told}" if status == "failed" else told,
    )


def write_tables(
    run_dir: Path, tables: Sequence[Sequence[Candidate]], store: FreeEnergyStore
) -> None:
    """``ranking.csv`` for the first temperature, ``ranking_<T>K.csv`` for the others,
    ``results.json`` of all together, ``quantum.traj`` for all results."""
    files = SearchFolder(run_dir)
    for index, candidates in enumerate(tables):
        first = index == 0 or not candidates
        other = "" if first else f"ranking_{candidates[0].temperature:g}K.csv"
        write_ranking(files.ranking if first else run_dir / other, candidates)
    write_results(files.results, tables)
    write_quantum(files.quantum, store.runs())


def _name(atoms: Atoms) -> str:
    return one_line(str(atoms.info.get("name") or ""))
