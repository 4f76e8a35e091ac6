"""Ranking by free energy: which structures get an SSCHA run, which a stored result, which an
estimate."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import ENERGY_ERROR, Evaluator
from magus_anharmonic.failures import record_failure
from magus_anharmonic.hull import comparable
from magus_anharmonic.ranking.candidate import Candidate, numbered
from magus_anharmonic.ranking.elimination import resolution
from magus_anharmonic.ranking.fitness import (
    GibbsEstimate,
    composition,
    fit_estimates,
    number,
    with_heights,
)
from magus_anharmonic.ranking.jobs import (
    Job,
    Outcome,
    Workers,
    record_of,
    run_jobs,
    set_info,
    with_result,
)
from magus_anharmonic.ranking.matcher import ENERGY_TOLERANCE, distinct
from magus_anharmonic.ranking.phases import common_error, label_phases, merge_duplicates
from magus_anharmonic.ranking.probabilities import with_probabilities
from magus_anharmonic.ranking.racing import (
    chosen_groups,
    run_race,
    run_reduced,
    sscha_is_due,
    why_not,
)
from magus_anharmonic.ranking.stability import check_stability, with_followers
from magus_anharmonic.ranking.store import NAME, FreeEnergyStore, Key, Record, sscha_hash
from magus_anharmonic.ranking.table import draw_best, write_quantum, write_ranking
from magus_anharmonic.ranking.uncertainty import CommonNumbers, ModelTerm, ensemble_trust
from magus_anharmonic.scheduler import Scheduler, open_scheduler
from magus_anharmonic.settings import Settings, SschaSettings
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import isotopes, space_group, stripped, structure_id

log = logging.getLogger(__name__)

_TRUST, _DRAWS = 106, 107
"""Separate the random numbers of two purposes with the same seed."""

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
    free_energy: Callable[..., Any] | None = None,
    workers: Workers = None,
    starts: Mapping[str, SschaState] | None = None,
    measured: Mapping[str, ModelTerm] | None = None,
) -> list[Candidate]:
    """Rank structures that all carry ``info['enthalpy']`` (eV/atom) of ``evaluator``'s model.

    Writes ``ranking.csv`` (and ``ranking_<T>K.csv`` for the further temperatures), ``quantum.traj``
    and ``free_energies.db`` in ``run_dir``, one folder per SSCHA run in ``run_dir/sscha``, and the
    flat ``info`` keys.

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
        (`probabilities.with_probabilities`).

    Structures of several compositions are ranked in one table, composition by composition
    (`numbered`): estimates, early stopping, order and probabilities are those inside of a
    composition, and beside them stands the distance above the hull (`compositions`).

    Returns the candidates at the first temperature (the one that ranks) in the order of the table.
    Raises ValueError when a structure's energy belongs to another model, ``InputError`` for other
    isotopes in one composition.
    """
    ranking = Ranking(
        population,
        evaluator,
        settings,
        Path(run_dir),
        seed,
        energy_rmse,
        starts,
        measured,
        generation,
    )
    if settings.sscha is not None:
        chosen = chosen_groups(ranking.groups, ranking.comparable(), settings.sscha, energy_rmse)
        ranking.look_up()
        if sscha_is_due(settings, generation, n_generations, energy_rmse):
            with (
                contextlib.nullcontext(workers)
                if workers is not None
                else _scheduler(settings, evaluator)
            ) as who:
                ranking.run(chosen, free_energy or _free_energy(), who)
        else:
            log.info("no SSCHA yet: %s", why_not(settings, energy_rmse))
    tables = ranking.tables()
    set_info(population, tables[0], evaluator.model_id)
    write_tables(Path(run_dir), tables, ranking.store)
    if settings.sscha is not None:
        draw_best(Path(run_dir), tables[0], settings.sscha.keep_best)
    return tables[0]


def _scheduler(
    settings: Settings, evaluator: Evaluator
) -> contextlib.AbstractContextManager[Scheduler]:
    return open_scheduler(
        settings,
        device="cuda" if str(getattr(evaluator, "device", "cpu")).startswith("cuda") else "cpu",
    )


def _free_energy() -> Callable[..., Any]:
    from magus_anharmonic.sscha.gibbs import free_energy

    return free_energy


class Ranking:
    """The state of one call of `rank`: who is distinct, what is known, what was run."""

    def __init__(
        self,
        population: Sequence[Atoms],
        evaluator: Evaluator,
        settings: Settings,
        run_dir: Path,
        seed: int,
        energy_rmse: float | None,
        starts: Mapping[str, SschaState] | None = None,
        measured: Mapping[str, ModelTerm] | None = None,
        generation: int | None = None,
    ) -> None:
        self.population, self.evaluator, self.settings, self.energy_rmse = (
            population,
            evaluator,
            settings,
            energy_rmse,
        )
        self.run_dir, self.seed, self.model, self.starts = (
            run_dir,
            seed,
            evaluator.model_id,
            dict(starts or {}),
        )
        self.measured = dict(measured or {})
        self.store = FreeEnergyStore(run_dir / NAME, generation)
        self.common_numbers = CommonNumbers(run_dir / "sscha")
        found = [number(atoms.info.get("enthalpy")) for atoms in population]
        self.usable = [i for i, enthalpy in enumerate(found) if enthalpy is not None]
        self.unusable = [i for i, enthalpy in enumerate(found) if enthalpy is None]
        self.enthalpies = [np.inf if enthalpy is None else enthalpy for enthalpy in found]
        self._check_models()
        self._check_isotopes()
        inside = distinct(
            [population[i] for i in self.usable], [self.enthalpies[i] for i in self.usable]
        )
        self.groups = [[self.usable[k] for k in group] for group in inside]
        sscha = settings.sscha
        self.keys = [self.key_at(t) for t in sscha.temperatures] if sscha else []
        self.records: dict[tuple[int, Key], Record] = {}
        self.failures: dict[tuple[int, Key], str] = {}

    @property
    def sscha(self) -> SschaSettings:
        """The block ``sscha``; only asked for where there is one."""
        if self.settings.sscha is None:
            raise ValueError("the settings have no block sscha")
        return self.settings.sscha

    def key_at(self, temperature: float) -> Key:
        """What free energies of this ranking at one temperature (K) belong to."""
        sscha = self.sscha
        earlier = sscha.temperatures[: sscha.temperatures.index(temperature)]
        return Key(
            self.model, self.settings.pressure, temperature, sscha_hash(sscha, self.seed, earlier)
        )

    def _check_models(self) -> None:
        for i in self.usable:
            model = self.population[i].info.get("model") or self.model
            if model != self.model:
                raise ValueError(
                    f"structure {i}: its enthalpy is of model {model}, the ranking of {self.model};"
                    " evaluate it first"
                )

    def _check_isotopes(self) -> None:
        """Free energies of one compound with other masses cannot be compared (D and T make
        compositions of their own)."""
        found: dict[str, dict[str, float]] = {}
        for i in self.usable:
            atoms = self.population[i]
            if (known := found.setdefault(composition(atoms), isotopes(atoms))) != isotopes(atoms):
                raise InputError(
                    f"structure {i} ({composition(atoms)}): has the isotopes"
                    f" {isotopes(atoms) or 'of nature'}, others of this composition"
                    f" {known or 'those of nature'}; rank them one after the other"
                )

    def leader(self, group: int) -> Atoms:
        """The lowest member of the group."""
        return self.population[self.groups[group][0]]

    def comparable(self) -> list[float]:
        """What the structures are chosen by (eV/atom): their enthalpies, or the distances above the
        hull of several compositions."""
        return comparable([composition(atoms) for atoms in self.population], self.enthalpies)

    def origin(self, group: int) -> str:
        """The run whose centroid one of the members was seeded from, or an empty string."""
        tags = (str(self.population[i].info.get(SEED_KEY) or "") for i in self.groups[group])
        return next((tag for tag in tags if tag), "")

    def look_up(self) -> None:
        """Take over every stored free energy that holds for a structure of this population."""
        for group in range(len(self.groups)):
            atoms, enthalpy = self.leader(group), self.enthalpies[self.groups[group][0]]
            for key in self.keys:
                record = self.store.find(atoms, key, enthalpy, ENERGY_TOLERANCE, self.origin(group))
                if record is not None and not self._goes_on(record):
                    self.records[group, key] = record

    def _goes_on(self, record: Record) -> bool:
        """Whether to continue a run that another budget ended; not with several temperatures, whose
        runs started from its end."""
        final = self.store.final(record)
        return (
            final.status == "unconverged"
            and len(self.keys) == 1
            and final.budget_spent not in (None, self.sscha.budget)
        )

    def run(self, chosen: Sequence[int], free_energy: Callable[..., Any], workers: Workers) -> None:
        """Run SSCHA for the chosen groups that lack a final result, then again for results that
        gained symmetry."""
        first = self.keys[0]
        out = [
            g
            for g in chosen
            if (record := self.records.get((g, first))) is not None
            and record.status == "eliminated"
        ]
        todo = [
            g
            for g in chosen
            if g not in out and any((g, key) not in self.records for key in self.keys)
        ]
        log.info(
            "SSCHA: %d distinct structures of %d, %d within reach, %d of them already known",
            len(self.groups), len(self.population), len(chosen), len(chosen) - len(todo),
        )  # fmt: skip
        if self.sscha.allocation == "elimination":
            run_race(self, todo, out, chosen, free_energy, workers)
            jobs = self._later_temperatures([*todo, *out])
        else:
            jobs = [(self.job(self.leader(g), self.keys), g) for g in todo]
        groups = {job.structure: g for job, g in jobs}
        self._run([job for job, _ in jobs], free_energy, lambda job: groups[job.structure], workers)
        run_reduced(self, list(self.records.values()), free_energy, workers)
        if self.sscha.hessian:
            # before anything that is not needed for them: a library that ends the process takes no
            # finished result along
            write_tables(self.run_dir, self.tables(), self.store)
            for key in self.keys:
                check_stability(self, key, free_energy, workers)

    def _later_temperatures(self, groups: Sequence[int]) -> list[tuple[Job, int]]:
        """Jobs of those that were not eliminated at the first temperature, from where they ended
        there."""
        jobs = []
        for group in groups:
            record = self.records.get((group, self.keys[0]))
            if record is None or record.status == "failed":
                reason = f"not run: {self.keys[0].temperature:g} K, where it would start, failed"
                self.failures.update({(group, key): reason for key in self.keys[1:]})
            elif self.keys[1:] and record.status != "eliminated":
                jobs.append(
                    (
                        self.job(
                            self.leader(group),
                            self.keys[1:],
                            start=self.run_dir / "sscha" / record.folder,
                        ),
                        group,
                    )
                )
        return jobs

    def error_tolerance(self) -> float:
        """Sampling error of G that is small enough for this ranking, eV/atom."""
        wanted = self.sscha.error_tolerance
        return (
            resolution(self.energy_rmse, self.sscha.free_energy_tolerance)
            if wanted is None
            else wanted
        )

    def keep(
        self, group: int, key: Key, record: Record | None, outcome: Outcome | None = None
    ) -> None:
        """Store what a group's run came to; a failure goes to ``failures.jsonl``, and None (may not
        happen again) is not stored."""
        if record is None or record.status == "failed":
            reason = (
                record.reason
                if record is not None
                else outcome.reason
                if outcome is not None
                else "no result"
            )
            what = {
                "id": structure_id(self.leader(group)),
                "temperature_K": key.temperature,
                "model": self.model,
            }
            record_failure(self.run_dir, "sscha", reason, **what)
        if record is None:
            self.failures[group, key] = outcome.reason if outcome is not None else "no result"
        else:
            self.store.put(record)
            self.records[group, key] = record

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
        folders = tuple(self.run_dir / "sscha" / key.folder(name) for key in keys)
        # one for all: alike candidates get the same random numbers, and a restarted run the same
        # configurations
        generator = np.random.default_rng([self.seed, _DRAWS])
        options = {
            "pressure": self.settings.pressure,
            "supercell": sscha.supercell,
            "cell": sscha.cell,
            "n_configs": sscha.n_configs,
            "n_configs_start": sscha.ranking_start,
            "max_populations": max_populations or sscha.max_populations,
            "engine": sscha.engine,
            "seed": int(generator.integers(2**31)),
            "pressure_tolerance": sscha.pressure_tolerance,
            "strain_tolerance": sscha.strain_tolerance,
            "centroid_tolerance": sscha.centroid_tolerance,
            "free_energy_tolerance": sscha.free_energy_tolerance,
            "min_effective_sample": sscha.min_effective_sample,
            "symprec": sscha.symprec,
            "reference_spacing": sscha.reference_spacing,
            "error_tolerance": (
                self.error_tolerance()
                if sscha.allocation == "elimination"
                else sscha.error_tolerance
            ),
        }
        chosen_start = self.starts.get(name) if start is None else start
        if chosen_start is None:
            chosen_start = self._earlier_run(atoms, keys[0])
        return Job(
            name,
            stripped(atoms),
            tuple(key.temperature for key in keys),
            folders,
            options,
            chosen_start,
        )

    @functools.cached_property
    def _origins(self) -> dict[str, str]:
        """Structure -> the name of the saddle point that it was followed from, if any; the first of
        equal ones."""
        return {
            structure_id(atoms): str(atoms.info.get(SEED_KEY) or "")
            for atoms in reversed(self.population)
        }

    def _earlier_run(self, atoms: Atoms, key: Key) -> Path | None:
        """The folder of a run that another model made of the same start: its state and its
        configurations are taken over."""
        record = self.store.earlier(atoms, key, self._origins.get(structure_id(atoms), ""))
        if record is None:
            return None
        folder = self.run_dir / "sscha" / record.folder
        return folder if (folder / "result.npz").is_file() else None

    def _run(
        self,
        jobs: list[Job],
        free_energy: Callable[..., Any],
        group_of: Callable[[Job], int],
        workers: Workers,
    ) -> None:
        def done(job: Job, outcomes: list[Outcome]) -> None:
            group = group_of(job)
            for outcome in outcomes:
                key = self.key_at(outcome.temperature)
                record = self.recorded(job, key, outcome, self.enthalpies[self.groups[group][0]])
                self.keep(group, key, record, outcome)

        run_jobs(jobs, self.evaluator, free_energy, done, workers)

    def recorded(
        self, job: Job, key: Key, outcome: Outcome, enthalpy: float | None, parent: str = ""
    ) -> Record | None:
        """What is stored of an outcome, with what the model says about the ensemble; None for what
        may not happen again."""
        rng = np.random.default_rng([self.seed, int(job.structure, 16), _TRUST])
        trust = (
            None if outcome.result is None else ensemble_trust(outcome.result, self.evaluator, rng)
        )
        if trust is not None and trust.warning:
            log.warning("%s: G is not to be trusted: %s", job.structure, trust.warning)
        cutoff = getattr(self.evaluator, "cutoff", None)
        return record_of(
            job,
            key,
            outcome,
            enthalpy,
            self.sscha.symprec,
            trust=trust,
            parent=parent,
            cutoff=cutoff,
        )

    def results(self, key: Key) -> list[Record]:
        """What the runs of this population led to at ``key``."""
        return [
            self.store.final(record) for (_, other), record in self.records.items() if other == key
        ]

    def put(self, record: Record) -> None:
        """Store a record, new or changed, for every place where it is used."""
        self.store.put(record)
        for entry, known in self.records.items():
            if known.folder == record.folder:
                self.records[entry] = record

    def tables(self) -> list[list[Candidate]]:
        """The candidates in the order of the table, one list per temperature (one list without
        ``sscha``)."""
        return [self.table(key) for key in self.keys] or [self.table(None)]

    def table(self, key: Key | None) -> list[Candidate]:
        """The candidates as they are known now, in the order of the table; ``key`` None: without
        free energies."""
        candidates = [self._candidate(group, key) for group in range(len(self.groups))]
        if key is not None:
            candidates = self._estimated(candidates, key)
            candidates = with_followers(candidates, self.store, self.results(key))
            covariance = self.common_numbers.covariance
            phases = merge_duplicates(
                label_phases(candidates), self.store, key, self.run_dir / "sscha", covariance
            )
            candidates = with_probabilities(
                phases, self.energy_rmse, self.measured, lambda a, b: common_error(a, b, covariance)
            )
        temperature = key.temperature if key else 0.0
        failed = [self._failed(i, temperature) for i in self.unusable]
        return numbered(with_heights(candidates + failed, self.energy_rmse))

    def _failed(self, index: int, temperature: float) -> Candidate:
        atoms = self.population[index]
        reason = str(atoms.info.get("reason") or "it has no enthalpy")
        return Candidate(
            structure_id(atoms), stripped(atoms), self.settings.pressure, temperature, None,
            self.model, spg_static=space_group(atoms), members=(index,), status="failed",
            reason=reason,
        )  # fmt: skip

    def _candidate(self, group: int, key: Key | None) -> Candidate:
        atoms = self.leader(group)
        symprec = self.settings.sscha.symprec if self.settings.sscha else 0.05
        candidate = Candidate(
            structure_id(atoms),
            stripped(atoms),
            self.settings.pressure,
            key.temperature if key else 0.0,
            self.enthalpies[self.groups[group][0]],
            self.model,
            spg_static=space_group(atoms, symprec),
            members=tuple(self.groups[group]),
            seed=self.origin(group),
            model_error=number(atoms.info.get(ENERGY_ERROR)),
        )
        if key is None:
            return candidate
        if (group, key) in self.failures:
            return replace(candidate, status="failed", reason=self.failures[group, key])
        record = self.records.get((group, key))
        return (
            candidate
            if record is None
            else with_result(candidate, record, self.store.final(record))
        )

    def _estimated(self, candidates: list[Candidate], key: Key) -> list[Candidate]:
        """Give the structures without a result, failed ones too, the estimate from those that have
        one."""
        results = [(record, self.store.final(record)) for record in self.store.records(key)]
        known = [
            (composition(record.start), record.enthalpy, final.gibbs, final.gibbs_error or 0.0)
            for record, final in results
            if record.enthalpy is not None
            and final.gibbs is not None
            and final.status != "unconverged"
        ]
        estimates = fit_estimates(known, [c.composition for c in candidates])
        return [_with_estimate(c, estimates.get(c.composition)) for c in candidates]


def _with_estimate(candidate: Candidate, estimate: GibbsEstimate | None) -> Candidate:
    """A failed one stays failed, in the place of its estimate: it ranks no lower than if its run
    had not been made."""
    if (
        estimate is None
        or candidate.status not in ("static", "failed")
        or candidate.enthalpy is None
    ):
        return candidate
    status, reason = "estimated", estimate.description
    if candidate.status == "failed":
        status, reason = "failed", f"{candidate.reason}; in the place of its estimate: {reason}"
    return replace(
        candidate,
        status=status,
        gibbs=estimate(candidate.enthalpy),
        gibbs_error=estimate.margin,
        reason=reason,
    )


def write_tables(
    run_dir: Path, tables: Sequence[Sequence[Candidate]], store: FreeEnergyStore
) -> None:
    """``ranking.csv`` for the first temperature, ``ranking_<T>K.csv`` for the others,
    ``quantum.traj`` for all results."""
    for index, candidates in enumerate(tables):
        name = (
            "ranking.csv"
            if index == 0 or not candidates
            else f"ranking_{candidates[0].temperature:g}K.csv"
        )
        write_ranking(run_dir / name, candidates)
    write_quantum(run_dir / "quantum.traj", store.records())
