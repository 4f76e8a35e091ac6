"""The SSCHA runs of one ranking: what each is asked, who runs it, and what is kept of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.elimination import resolution
from magus_anharmonic.ranking.jobs import Job, Outcome, Workers, run_jobs, run_of
from magus_anharmonic.ranking.matcher import ENERGY_TOLERANCE
from magus_anharmonic.ranking.run import Key, Run, sscha_hash
from magus_anharmonic.ranking.store import NAME, FreeEnergyStore
from magus_anharmonic.ranking.uncertainty import CommonNumbers, ensemble_trust
from magus_anharmonic.runs.record import record_failure
from magus_anharmonic.settings import Settings, SschaSettings
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import stripped, structure_id

log = logging.getLogger(__name__)

_TRUST, _SAMPLES = 106, 107
"""Separate the random numbers of two purposes with the same seed."""


class Runs:
    """Those of the candidates of one ranking, and the store of all.

    ``origins`` : structure -> the run whose centroids it came from as a seed, if any. ``workers`` :
    who runs them, set before the first.
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
        self.root = run_dir / "sscha"
        self.store = FreeEnergyStore(run_dir / NAME, generation)
        self.common_numbers = CommonNumbers(self.root)
        temperatures = settings.sscha.temperatures if settings.sscha else ()
        self.keys = [self._key(n) for n in range(len(temperatures))]
        self.failures: dict[tuple[str, Key], str] = {}
        self._of: dict[tuple[str, Key], str] = {}
        self._free_energy = free_energy
        self.workers: Workers = None

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
        return run_of(
            job,
            key,
            outcome,
            enthalpy,
            self.sscha.symprec,
            trust=trust,
            parent=parent,
            cutoff=getattr(self.evaluator, "cutoff", None),
        )

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
