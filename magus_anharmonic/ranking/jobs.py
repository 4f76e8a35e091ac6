"""SSCHA runs on workers and what is stored of them.

From what an SSCHA run returned to the record of the store, to the candidate of the table, and to
the flat ``info`` keys.

Runs SSCHA for several candidates, on the workers of a `Scheduler`.

A candidate that fails comes back with its reason; a worker that dies takes only its own candidate
with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import (
    MagusAnharmonicError,
    SschaError,
    is_machine_error,
    one_line,
    typed_line,
)
from magus_anharmonic.evaluator import Evaluator, as_evaluator, device_kind
from magus_anharmonic.potential.relax import serialised
from magus_anharmonic.ranking.candidate import Candidate, info_of
from magus_anharmonic.ranking.elimination import Standing, Stop
from magus_anharmonic.ranking.store import Key, Run
from magus_anharmonic.ranking.uncertainty import EnsembleTrust
from magus_anharmonic.runs.record import Progress
from magus_anharmonic.scheduler import (
    LocalScheduler,
    Scheduler,
    changed,
    is_remote,
    open_scheduler,
    packed,
    unpack,
)
from magus_anharmonic.settings import Settings
from magus_anharmonic.sscha.record import FreeEnergy
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import melting_warning, rotation_warning
from magus_anharmonic.sscha.supercells import image_warning
from magus_anharmonic.structures import space_group, stripped, structure_id


def run_of(
    job: Job,
    key: Key,
    outcome: Outcome,
    enthalpy: float | None,
    symprec: float,
    *,
    trust: EnsembleTrust | None = None,
    parent: str = "",
    cutoff: float | None = None,
) -> Run | None:
    """What is stored of an outcome; None for a failure that may not happen again. ``cutoff`` : of
    the model, A, where it has one."""
    made = {"structure": job.structure, "key": key, "start": job.atoms, "enthalpy": enthalpy}
    result = outcome.result
    if result is None:
        if not outcome.lasting:
            return None
        found = FreeEnergy() if outcome.partial is None else outcome.partial.numbers
        failed = replace(
            found,
            status="failed",
            reason=outcome.reason,
            gibbs=None,
            space_group_start=space_group(job.atoms, symprec),
            space_group="",
        )
        return Run(**made, free_energy=failed, parent=parent)
    notes = [
        "" if result.converged else result.reason or "did not converge",
        *_warnings(result, cutoff),
        "" if trust is None else trust.warning,
        NO_CHARGES if job.options.get("born") and result.numbers.nonanalytic is None else "",
    ]
    numbers = replace(
        result.numbers,
        reason="; ".join(filter(None, notes)),
        ensemble_error=None if trust is None else trust.force_error,
        error_vector=None if trust is None else trust.error_vector,
    )
    centroids = stripped(result.centroids)
    return Run(**made, free_energy=numbers, centroids=centroids, parent=parent)


def standing_of(run: Run, before: Run | None) -> Standing:
    """What the race knows of a run that has a G; ``before``: the same run one round earlier."""
    now, was = run.free_energy, None if before is None else before.free_energy
    assert now.gibbs is not None
    fallen = None if was is None or was.gibbs is None else max(0.0, was.gibbs - now.gibbs)
    if was is None and now.n_populations > 1:
        fallen = now.predicted_decrease or 0.0
    n_new = now.n_evaluations - (0 if was is None else was.n_evaluations)
    return Standing(now, fallen, n_new, len(run.phase))


def potential_energy(result: Any, enthalpy: float | None) -> float:
    """Mean potential energy and P V of the state of an ``SschaResult`` above the static
    ``enthalpy`` (eV/atom) of its start; infinite where that is not known.

    At least that of its auxiliary crystal, <V_0>: the start may be no minimum.
    """
    if enthalpy is None or result.gibbs_raw is None or result.force_constants is None:
        return math.inf
    state, n = result.state, len(result.centroids)
    auxiliary = 0.5 * float(np.sum(state.full * state.covariance)) / state.n_cells / n
    mean = result.gibbs_raw - state.harmonic_free_energy / n + auxiliary
    return max(mean - enthalpy, auxiliary)


def stopped_run(run: Run, stop: Stop) -> Run:
    """The run with the reason why the race went on without it.

    A converged one keeps its status: when the budget ended, its rank may still be open, but its G
    is that of the end of a relaxation, and its error bar says how well it is known.
    """
    converged = run.free_energy.converged
    if not stop.reason or (converged and stop.eliminated):
        return run
    status = run.status if converged else "eliminated" if stop.eliminated else "unconverged"
    reason = f"{stop.reason} before its rank was known" if converged else stop.reason
    reasons = "; ".join(filter(None, (reason, run.reason)))
    return replace(run.updated(status=status, reason=reasons), budget_spent=stop.budget_spent)


def _warnings(result: Any, cutoff: float | None) -> list[str]:
    if result.force_constants is None:
        return []
    state = result.state
    return [
        rotation_warning(state),
        melting_warning(state),
        image_warning(state.supercell.cell.array, cutoff),
    ]


def with_result(candidate: Candidate, own: Run, final: Run) -> Candidate:
    """``candidate`` with the free energy of ``final``, to which its ``own`` run led."""
    found = final.free_energy
    if final is not own:
        mine, merged = own.free_energy, own.status == "eliminated"
        again = f"G of its {len(final.phase)}-atom primitive cell, run again"
        found = replace(
            found,
            reason="; ".join(filter(None, (found.reason, mine.reason if merged else again))),
            n_evaluations=mine.n_evaluations + (0 if merged else found.n_evaluations),
        )
    return replace(
        candidate,
        free_energy=found,
        run=final,
        sscha_folder=final.folder,
        n_pooled=1 if found.ranked else None,
    )


def set_info(population: Sequence[Atoms], candidates: Sequence[Candidate], model: str) -> None:
    """The flat ``info`` keys that fitness, host and ``magus summary`` read, on every structure of
    the population."""
    several = len({candidate.composition for candidate in candidates}) > 1
    for candidate in candidates:
        height = candidate.gibbs_above_hull
        above = {"gibbs_above_hull": np.nan if height is None else height} if several else {}
        for index in candidate.members:
            population[index].info.update(
                info_of(candidate.free_energy),
                candidate_id=candidate.id,
                model=model,
                gibbs_model=model,
                **above,
            )


log = logging.getLogger(__name__)

NO_CHARGES = "no long-range dipoles in G: none of sscha.born is of this phase"


@dataclass(frozen=True)
class Job:
    """SSCHA of one structure at one temperature (K) or several, each starting from the former;
    ``start``: see `free_energy`. ``part``: of a run that goes on with the next populations."""

    structure: str
    atoms: Atoms
    temperatures: tuple[float, ...]
    folders: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)
    start: Any = None
    part: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job at one temperature: an ``SschaResult``, or None and the reason.

    ``lasting``: the same input will fail again (an SSCHA failure, not a full disk), so it need not
    be tried again. ``partial``: the ``SschaResult`` of a run that failed, with the numbers of its
    last population.
    """

    temperature: float
    result: Any
    reason: str = ""
    lasting: bool = True
    partial: Any = None


def run_job(job: Job, evaluator: Evaluator, free_energy: Callable[..., Any]) -> list[Outcome]:
    """One outcome per temperature; raises nothing but what ends the whole program, a machine error
    for one."""
    outcomes: list[Outcome] = []
    previous: Any = job.start
    for temperature, folder in zip(job.temperatures, job.folders, strict=True):
        if outcomes and outcomes[-1].result is None:
            reason = f"not run: {outcomes[-1].temperature:g} K, where it would start, failed"
            outcomes.append(Outcome(temperature, None, reason, outcomes[-1].lasting))
            continue
        try:
            result = free_energy(
                job.atoms,
                evaluator,
                temperature=temperature,
                start=previous,
                directory=folder,
                **job.options,
            )
        except SschaError as error:
            outcomes.append(Outcome(temperature, None, one_line(error)))
        except MagusAnharmonicError as error:
            if is_machine_error(error):
                raise
            outcomes.append(Outcome(temperature, None, one_line(error), lasting=False))
        except Exception as error:
            if is_machine_error(error):
                raise
            log.warning("SSCHA of %s at %g K stopped", job.structure, temperature, exc_info=True)
            outcomes.append(Outcome(temperature, None, typed_line(error), lasting=False))
        else:
            failed = result.status == "failed" or result.numbers.gibbs is None
            reason = (result.reason or "it has no free energy") if failed else ""
            outcomes.append(
                Outcome(
                    temperature,
                    None if failed else result,
                    reason,
                    partial=result if failed else None,
                )
            )
            previous = None if failed else result
    return outcomes


def free_energy_on(settings: Settings) -> Callable[[Atoms, Evaluator, Path], SschaResult]:
    """SSCHA of one structure into a folder, as ``settings`` say (the first temperature), on a
    worker of their scheduler. Raises ``SschaError`` when it has no result, ``InputError``."""
    from magus_anharmonic.sscha.gibbs import DEFAULTS, free_energy

    sscha = settings.sscha or DEFAULTS
    temperature = sscha.temperatures[0]
    options = {**sscha.of_a_run(), "pressure": settings.pressure, "seed": settings.seed or 0}

    def run(atoms: Atoms, evaluator: Evaluator, folder: Path) -> SschaResult:
        evaluator = as_evaluator(evaluator, [atoms])
        if not is_remote(settings.scheduler):
            return free_energy(
                atoms, evaluator, temperature=temperature, directory=folder, **options
            )
        found: list[Outcome] = []
        job = Job(structure_id(atoms), atoms, (temperature,), (folder,), options)
        with open_scheduler(settings) as scheduler:
            run_jobs([job], evaluator, free_energy, lambda _, ends: found.extend(ends), scheduler)
        result = found[0].result or found[0].partial
        if result is None:
            raise SschaError(found[0].reason)
        return result

    return run


Workers = Scheduler | int | None
"""Who runs the jobs: a scheduler, a number of local processes, or None: one process per core."""


def run_jobs(
    jobs: Sequence[Job],
    evaluator: Evaluator,
    free_energy: Callable[..., Any],
    on_done: Callable[[Job, list[Outcome]], None],
    workers: Workers = None,
) -> None:
    """Run all jobs; ``on_done(job, outcomes)`` is called in this process as each finishes, and a
    job's files are in its folders then.

    A job that cannot be sent elsewhere, and a single one where the workers are processes of this
    machine, runs in this process.
    """
    if workers is None or isinstance(workers, int):
        local = LocalScheduler(workers, device=device_kind(evaluator))
        with contextlib.closing(local) as scheduler:
            run_jobs(jobs, evaluator, free_energy, on_done, scheduler)
        return
    count = max(1, min(workers.n_workers, len(jobs)))
    progress = _Finished(len(jobs), count)

    def done(job: Job, outcomes: list[Outcome]) -> None:
        on_done(job, outcomes)
        progress.step(job, outcomes)

    wanted = bool(jobs) and (workers.remote or count > 1)
    source = (
        serialised(evaluator, remote=workers.remote) if wanted and _travels(free_energy) else None
    )
    if source is None:
        for job in jobs:
            done(job, run_job(job, evaluator, free_energy))
        return
    log.info("SSCHA of %d structures: %s", len(jobs), workers.description)
    run = _run_elsewhere if workers.remote else _run_in_process
    items = ((_remote_job(job) if workers.remote else job, free_energy) for job in jobs)
    for end in workers.map(run, items, source):
        job = jobs[end.index]
        outcomes = (
            [Outcome(t, None, end.reason, lasting=False) for t in job.temperatures]
            if end.reason
            else end.value
        )
        if workers.remote and not end.reason:
            outcomes, files = end.value
            for folder, new in zip(job.folders, files, strict=True):
                unpack(new, folder)
        done(job, outcomes)


def _travels(free_energy: Callable[..., Any]) -> bool:
    try:
        pickle.dumps(free_energy)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        log.info("SSCHA runs in this process, one structure after the other: %s", one_line(error))
        return False
    return True


def _run_in_process(item: tuple[Job, Callable[..., Any]], evaluator: Evaluator) -> list[Outcome]:
    job, free_energy = item
    return run_job(job, evaluator, free_energy)


@dataclass(frozen=True)
class RemoteJob:
    """A job with the content of its folders, and of the one where it starts, for a worker that does
    not see them."""

    job: Job
    files: list[dict[str, bytes]]
    start: dict[str, bytes] | None


def _remote_job(job: Job) -> RemoteJob:
    start = packed(job.start) if isinstance(job.start, Path) else None
    return RemoteJob(job, [packed(folder) for folder in job.folders], start)


def _run_elsewhere(
    item: tuple[RemoteJob, Callable[..., Any]], evaluator: Evaluator
) -> tuple[list[Outcome], list[dict[str, bytes]]]:
    """Run the job in a temporary folder; its outcomes, and for each of its folders the files that
    are new or changed."""
    remote_job, free_energy = item
    with tempfile.TemporaryDirectory(prefix="sscha-job-") as scratch:
        # The folder's own name is kept: it is part of what the log says.
        folders = tuple(
            Path(scratch) / str(index) / folder.name
            for index, folder in enumerate(remote_job.job.folders)
        )
        for folder, files in zip(folders, remote_job.files, strict=True):
            unpack(files, folder)
        job = replace(remote_job.job, folders=folders)
        if remote_job.start is not None:
            job = replace(job, start=Path(scratch) / "start")
            unpack(remote_job.start, job.start)
        outcomes = run_job(job, evaluator, free_energy)
        return outcomes, [
            changed(files, packed(folder))
            for folder, files in zip(folders, remote_job.files, strict=True)
        ]


class _Finished:
    """Log lines with the number done and an estimate of the time left."""

    def __init__(self, total: int, workers: int = 1) -> None:
        self.total, self.workers, self.finished = total, workers, 0
        self.pace = Progress(total)

    def step(self, job: Job, outcomes: Sequence[Outcome]) -> None:
        """Log that ``job`` is done."""
        self.finished += 1
        waiting = self.total - self.finished
        # The other processes are in the middle of theirs, on average.
        left = self.pace.left(self.finished, waiting - 0.5 * min(self.workers - 1, waiting))
        for outcome in outcomes:
            log.info(
                "SSCHA %d of %d: %s %s%s",
                self.finished,
                self.total,
                job.structure,
                _words(outcome, job.part),
                left,
            )


def _words(outcome: Outcome, part: bool) -> str:
    where = f"at {outcome.temperature:g} K"
    if outcome.result is None:
        return f"{where} failed: {outcome.reason}"
    r = outcome.result
    unfinished = part and r.status == "unconverged"
    status = f"so far ({r.n_populations} of its populations)" if unfinished else r.status
    return (
        f"{where}: {r.space_group_start} -> {r.space_group}, G = {r.numbers.gibbs:.5f} +-"
        f" {r.gibbs_error:.5f} eV/atom, {r.n_evaluations} evaluations, {status}"
    )
