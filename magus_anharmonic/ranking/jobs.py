"""Runs SSCHA for several candidates, on the workers of a `Scheduler`.

A candidate that fails comes back with its reason; a worker that dies takes only its own candidate with it.
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

from ase import Atoms

from magus_anharmonic.errors import InputError, MagusAnharmonicError, SschaError, is_trouble, one_line, typed_line
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.potential.portable import portable
from magus_anharmonic.scheduler import Scheduler
from magus_anharmonic.scheduler.files import changed, packed, unpack
from magus_anharmonic.scheduler.local import LocalScheduler
from magus_anharmonic.units import time_left

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """SSCHA of one structure at one temperature (K) or several, each starting from the former; ``start``: see `free_energy`."""

    structure: str
    atoms: Atoms
    temperatures: tuple[float, ...]
    folders: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)
    start: Any = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job at one temperature: an ``SschaResult``, or None and the reason.

    ``lasting``: the same input will fail again (an SSCHA failure, not a full disk), so it need not be tried again. ``partial``: the
    ``SschaResult`` of a run that failed, with the numbers of its last population.
    """

    temperature: float
    result: Any
    reason: str = ""
    lasting: bool = True
    partial: Any = None


def run_job(job: Job, evaluator: Evaluator, free_energy: Callable[..., Any]) -> list[Outcome]:
    """One outcome per temperature; raises nothing but what ends the whole program, trouble of the machine for one."""
    outcomes: list[Outcome] = []
    previous: Any = job.start
    for temperature, folder in zip(job.temperatures, job.folders, strict=True):
        if outcomes and outcomes[-1].result is None:
            reason = f"not run: {outcomes[-1].temperature:g} K, where it would start, failed"
            outcomes.append(Outcome(temperature, None, reason, outcomes[-1].lasting))
            continue
        try:
            result = free_energy(job.atoms, evaluator, temperature=temperature, start=previous, directory=folder, **job.options)
        except (SschaError, InputError) as error:
            outcomes.append(Outcome(temperature, None, one_line(error)))
        except MagusAnharmonicError as error:
            if is_trouble(error):
                raise
            outcomes.append(Outcome(temperature, None, one_line(error), lasting=False))
        except Exception as error:
            if is_trouble(error):
                raise
            log.warning("SSCHA of %s at %g K stopped", job.structure, temperature, exc_info=True)
            outcomes.append(Outcome(temperature, None, typed_line(error), lasting=False))
        else:
            failed = result.status == "failed" or not math.isfinite(result.gibbs)
            reason = (result.reason or "it has no free energy") if failed else ""
            outcomes.append(Outcome(temperature, None if failed else result, reason, partial=result if failed else None))
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
    """Run all jobs; ``on_done(job, outcomes)`` is called in this process as each finishes, and a job's files are in its folders then.

    A job that cannot be sent elsewhere, and a single one where the workers are processes of this machine, runs in this process.
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
    source = portable(evaluator, remote=workers.remote) if wanted and _travels(free_energy) else None
    if source is None:
        for job in jobs:
            done(job, run_job(job, evaluator, free_energy))
        return
    log.info("SSCHA of %d structures: %s", len(jobs), workers.description)
    run = _run_elsewhere if workers.remote else _run_in_process
    items = ((_parcel(job) if workers.remote else job, free_energy) for job in jobs)
    for end in workers.map(run, items, source):
        job = jobs[end.index]
        outcomes = [Outcome(t, None, end.reason, lasting=False) for t in job.temperatures] if end.reason else end.value
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
class Parcel:
    """A job with the content of its folders, and of the one where it starts, for a worker that does not see them."""

    job: Job
    files: list[dict[str, bytes]]
    start: dict[str, bytes] | None


def _parcel(job: Job) -> Parcel:
    start = packed(job.start) if isinstance(job.start, Path) else None
    return Parcel(job, [packed(folder) for folder in job.folders], start)


def _run_elsewhere(item: tuple[Parcel, Callable[..., Any]], evaluator: Evaluator) -> tuple[list[Outcome], list[dict[str, bytes]]]:
    """Run the job in a temporary folder; its outcomes, and for each of its folders the files that are new or changed."""
    parcel, free_energy = item
    with tempfile.TemporaryDirectory(prefix="sscha-job-") as scratch:
        # The folder's own name is kept: it is part of what the log says.
        folders = tuple(Path(scratch) / str(place) / folder.name for place, folder in enumerate(parcel.job.folders))
        for folder, files in zip(folders, parcel.files, strict=True):
            unpack(files, folder)
        job = replace(parcel.job, folders=folders)
        if parcel.start is not None:
            job = replace(job, start=Path(scratch) / "start")
            unpack(parcel.start, job.start)
        outcomes = run_job(job, evaluator, free_energy)
        return outcomes, [changed(files, packed(folder)) for folder, files in zip(folders, parcel.files, strict=True)]


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
            log.info("SSCHA %d of %d: %s %s%s", self.finished, self.total, job.structure, _words(outcome), f"; {left}" if left else "")


def _words(outcome: Outcome) -> str:
    where = f"at {outcome.temperature:g} K"
    if outcome.result is None:
        return f"{where} failed: {outcome.reason}"
    r = outcome.result
    return (
        f"{where}: {r.space_group_start} -> {r.space_group}, G = {r.gibbs:.5f} +- {r.gibbs_error:.5f} eV/atom, "
        f"{r.n_evaluations} evaluations, {r.status}"
    )
