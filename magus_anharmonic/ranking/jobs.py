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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import (
    InputError,
    MagusAnharmonicError,
    SschaError,
    is_machine_error,
    one_line,
    typed_line,
)
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.potential.remote import serialised
from magus_anharmonic.ranking.candidate import CONVERGED, Candidate
from magus_anharmonic.ranking.elimination import Standing, Stop
from magus_anharmonic.ranking.store import Key, Record
from magus_anharmonic.ranking.uncertainty import EnsembleTrust
from magus_anharmonic.scheduler import Scheduler
from magus_anharmonic.scheduler.base import changed, packed, unpack
from magus_anharmonic.scheduler.local import LocalScheduler
from magus_anharmonic.sscha.supercells import image_warning
from magus_anharmonic.sscha.warnings import melting_warning, rotation_warning
from magus_anharmonic.structures import space_group, stripped
from magus_anharmonic.units import time_left


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
    """What is stored of an outcome; None for a failure that may not happen again. ``cutoff`` : of
    the model, A, where it has one."""
    result = outcome.result
    if result is None:
        if not outcome.lasting:
            return None
        spg = space_group(job.atoms, symprec)
        failed = Record(
            job.structure,
            key,
            job.atoms,
            "failed",
            outcome.reason,
            enthalpy=enthalpy,
            parent=parent,
            spg_static=spg,
        )
        return (
            failed
            if outcome.partial is None
            else replace(failed, **_partial_numbers(outcome.partial))
        )
    notes = [
        "" if result.converged else result.reason or "did not converge",
        *_warnings(result, cutoff),
    ]
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
        centroids=stripped(result.centroids),
        parent=parent,
        predicted_decrease=_float(result.predicted_decrease),
        n_populations=int(result.n_populations),
    )


def standing_of(record: Record, before: Record | None) -> Standing:
    """What the race knows of a run that has a G; ``before``: the same run one round earlier."""
    assert record.gibbs is not None
    fallen = (
        None if before is None or before.gibbs is None else max(0.0, before.gibbs - record.gibbs)
    )
    if before is None and record.n_populations > 1:
        fallen = record.predicted_decrease or 0.0
    n_new = record.n_evaluations - (0 if before is None else before.n_evaluations)
    converged = record.status in CONVERGED
    return Standing(
        record.gibbs,
        record.gibbs_error or 0.0,
        record.predicted_decrease or 0.0,
        fallen,
        converged,
        record.n_populations,
        n_new,
    )


def stopped_record(record: Record, stop: Stop) -> Record:
    """The record with the reason why the race went on without it.

    A converged one keeps its status: when the budget ended, its rank may still be open, but its G
    is that of the end of a relaxation, and its error bar says how well it is known.
    """
    converged = record.status in CONVERGED
    if not stop.reason or (converged and stop.eliminated):
        return record
    status = record.status if converged else "eliminated" if stop.eliminated else "unconverged"
    reason = f"{stop.reason} before its rank was known" if converged else stop.reason
    reasons = "; ".join(filter(None, (reason, record.reason)))
    return replace(record, status=status, reason=reasons, budget_spent=stop.budget_spent)


def _partial_numbers(result: Any) -> dict[str, Any]:
    """Fields of a failed run's record from its last population: no G, which would rank."""
    numbers = {
        "gibbs_raw": result.gibbs_raw,
        "gibbs_error": result.gibbs_error,
        "volume": result.volume,
        "decrease": result.predicted_decrease,
    }
    known = {
        name: float(value)
        for name, value in numbers.items()
        if value is not None and np.isfinite(value)
    }
    return {
        **known,
        "n_evaluations": int(result.n_evaluations),
        "n_populations": int(result.n_populations),
    }


def _warnings(result: Any, cutoff: float | None) -> list[str]:
    if result.force_constants is None:
        return []
    state = result.state
    return [
        rotation_warning(state),
        melting_warning(state),
        image_warning(state.supercell.cell.array, cutoff),
    ]


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
    """The flat ``info`` keys that fitness, host and ``magus summary`` read, on every structure of
    the population."""
    several = len({candidate.composition for candidate in candidates}) > 1
    for candidate in candidates:
        above = (
            {
                "gibbs_above_hull": (
                    np.nan if candidate.gibbs_above_hull is None else candidate.gibbs_above_hull
                )
            }
            if several
            else {}
        )
        for index in candidate.members:
            population[index].info.update(
                candidate_id=candidate.id,
                model=model,
                gibbs=np.nan if candidate.gibbs is None else candidate.gibbs,
                gibbs_error=(
                    np.nan
                    if candidate.gibbs is None or candidate.gibbs_error is None
                    else candidate.gibbs_error
                ),
                status=candidate.status,
                gibbs_model=model,
                reason=candidate.reason,
                spg_quantum=candidate.spg_quantum,
                **above,
            )


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """SSCHA of one structure at one temperature (K) or several, each starting from the former;
    ``start``: see `free_energy`."""

    structure: str
    atoms: Atoms
    temperatures: tuple[float, ...]
    folders: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)
    start: Any = None


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
        except (SschaError, InputError) as error:
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
            failed = result.status == "failed" or not math.isfinite(result.gibbs)
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
        device = "cuda" if str(getattr(evaluator, "device", "cpu")).startswith("cuda") else "cpu"
        with contextlib.closing(LocalScheduler(workers, device=device)) as scheduler:
            run_jobs(jobs, evaluator, free_energy, on_done, scheduler)
        return
    count = max(1, min(workers.n_workers, len(jobs)))
    progress = Progress(len(jobs), count)

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


class Progress:
    """Log lines with the number done and an estimate of the time left."""

    def __init__(self, total: int, workers: int = 1) -> None:
        self.total, self.workers, self.finished, self.began = total, workers, 0, time.monotonic()

    def step(self, job: Job, outcomes: Sequence[Outcome]) -> None:
        """Log that ``job`` is done."""
        self.finished += 1
        elapsed = time.monotonic() - self.began
        waiting = self.total - self.finished
        # The other processes are in the middle of theirs, on average.
        left = time_left(elapsed, self.finished, waiting - 0.5 * min(self.workers - 1, waiting))
        for outcome in outcomes:
            log.info(
                "SSCHA %d of %d: %s %s%s",
                self.finished,
                self.total,
                job.structure,
                _words(outcome),
                f"; {left}" if left else "",
            )


def _words(outcome: Outcome) -> str:
    where = f"at {outcome.temperature:g} K"
    if outcome.result is None:
        return f"{where} failed: {outcome.reason}"
    r = outcome.result
    return (
        f"{where}: {r.space_group_start} -> {r.space_group}, G = {r.gibbs:.5f} +-"
        f" {r.gibbs_error:.5f} eV/atom, {r.n_evaluations} evaluations, {r.status}"
    )
