"""Runs SSCHA for several candidates, in processes of their own when there is more than one core.

A candidate that fails comes back with its reason; a process that dies takes only its own candidate with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import InputError, MagusAnharmonicError, SschaError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.labelers.pool import available_cores, duration

log = logging.getLogger(__name__)

MAX_WORKERS_PER_GPU = 4
DIED = "its process died (crash, or out of memory); a script of your own needs `if __name__ == '__main__':`"


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

    ``lasting``: the same input will fail again (an SSCHA failure, not a full disk), so it need not be tried again.
    """

    temperature: float
    result: Any
    reason: str = ""
    lasting: bool = True


def run_job(job: Job, evaluator: Evaluator, free_energy: Callable[..., Any]) -> list[Outcome]:
    """One outcome per temperature; raises nothing but what ends the whole program."""
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
            outcomes.append(Outcome(temperature, None, _one_line(error)))
        except MagusAnharmonicError as error:
            outcomes.append(Outcome(temperature, None, _one_line(error), lasting=False))
        except Exception as error:
            log.warning("SSCHA of %s at %g K stopped", job.structure, temperature, exc_info=True)
            outcomes.append(Outcome(temperature, None, f"{type(error).__name__}: {_one_line(error)}", lasting=False))
        else:
            failed = result.status == "failed" or not math.isfinite(result.gibbs)
            reason = (result.reason or "it has no free energy") if failed else ""
            outcomes.append(Outcome(temperature, None if failed else result, reason))
            previous = None if failed else result
    return outcomes


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def run_jobs(
    jobs: Sequence[Job],
    evaluator: Evaluator,
    free_energy: Callable[..., Any],
    on_done: Callable[[Job, list[Outcome]], None],
    workers: int | None = None,
) -> None:
    """Run all jobs; ``on_done(job, outcomes)`` is called in this process as each finishes.

    ``workers``: processes at the same time; None takes one per core, at most four where they share a GPU.
    """
    count = _n_workers(len(jobs), evaluator, workers)
    progress = Progress(len(jobs), count)

    def done(job: Job, outcomes: list[Outcome]) -> None:
        on_done(job, outcomes)
        progress.step(job, outcomes)

    source = portable(evaluator, free_energy) if count > 1 else None
    if source is None:
        for job in jobs:
            done(job, run_job(job, evaluator, free_energy))
        return
    log.info("SSCHA of %d structures in %d processes", len(jobs), count)
    left = _run_pool(list(jobs), source, count, done)
    for job in left:
        # Which of the jobs killed the pool shows only when each has a process of its own.
        if _run_pool([job], source, 1, done):
            done(job, [Outcome(t, None, DIED, lasting=False) for t in job.temperatures])


def _n_workers(n_jobs: int, evaluator: Evaluator, workers: int | None) -> int:
    count = available_cores() if workers is None else workers
    if workers is None and str(getattr(evaluator, "device", "cpu")).startswith("cuda"):
        count = min(count, MAX_WORKERS_PER_GPU)
    return max(1, min(count, n_jobs))


@dataclass(frozen=True)
class Source:
    """What a worker needs to make its own evaluator: a checkpoint to load, or the pickled evaluator."""

    free_energy: Callable[..., Any]
    model_id: str
    checkpoint: str = ""
    device: str | None = None
    dtype: str = ""
    evaluator: Evaluator | None = None

    def make(self) -> Evaluator:
        """The evaluator; raises MagusAnharmonicError when the checkpoint is no longer the same model."""
        if self.evaluator is not None:
            return self.evaluator
        from magus_anharmonic.potential import load

        potential = load(self.checkpoint, self.device, dtype=self.dtype)
        if potential.model_id != self.model_id:
            raise MagusAnharmonicError(f"{self.checkpoint}: holds model {potential.model_id}, not {self.model_id}: it was replaced")
        return potential


def portable(evaluator: Evaluator, free_energy: Callable[..., Any]) -> Source | None:
    """None (with a line in the log) when evaluator or function cannot be sent to another process."""
    path = getattr(evaluator, "path", None)
    if path is not None and hasattr(evaluator, "dtype"):
        dtype = str(evaluator.dtype).removeprefix("torch.")
        source = Source(free_energy, evaluator.model_id, checkpoint=str(path), device=getattr(evaluator, "device", None), dtype=dtype)
    else:
        source = Source(free_energy, evaluator.model_id, evaluator=evaluator)
    try:
        pickle.dumps(source)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        log.info("SSCHA runs in this process, one structure after the other: %s", _one_line(error))
        return None
    return source


_SOURCE: Source | None = None
_EVALUATOR: Evaluator | None = None


def _start_worker(source: Source, threads: int) -> None:
    """Runs first in each worker: Ctrl-C is the parent's business, threads are shared fairly."""
    global _SOURCE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _SOURCE = source
    if source.checkpoint:
        import torch

        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Leave nothing behind that writes into a folder which a restarted search works in."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(job: Job) -> list[Outcome]:
    global _EVALUATOR
    if _SOURCE is None:
        raise RuntimeError("the worker was not started by run_jobs")
    if _EVALUATOR is None:
        try:
            _EVALUATOR = _SOURCE.make()
        except MagusAnharmonicError as error:
            return [Outcome(t, None, _one_line(error), lasting=False) for t in job.temperatures]
    return run_job(job, _EVALUATOR, _SOURCE.free_energy)


def _run_pool(jobs: list[Job], source: Source, workers: int, done: Callable[[Job, list[Outcome]], None]) -> list[Job]:
    """Run the jobs in a pool of processes; returns those left over because a process died."""
    threads = max(1, available_cores() // workers)
    pending: dict[Future, Job] = {}
    with _thread_variables(threads), _pool(workers, source, threads) as pool:
        try:
            pending = {pool.submit(_in_worker, job): job for job in jobs}
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    outcomes = future.result()
                    done(pending.pop(future), outcomes)
        except BrokenProcessPool:
            log.warning("an SSCHA process died; what it worked on is run again alone")
    return list(pending.values())


@contextlib.contextmanager
def _pool(workers: int, source: Source, threads: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh interpreters (torch and CUDA do not survive a fork) that is gone when the block is left early."""
    context = multiprocessing.get_context("spawn")
    others = {child.pid for child in multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(source, threads))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child.pid not in others:
                child.terminate()
        raise
    pool.shutdown()


@contextlib.contextmanager
def _thread_variables(threads: int) -> Iterator[None]:
    """The environment in which workers start: BLAS reads its number of threads when it is loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(threads) for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
        left = elapsed / self.finished * (waiting - 0.5 * min(self.workers - 1, waiting))
        note = "" if self.finished == self.total else f"; about {duration(left)} left"
        for outcome in outcomes:
            log.info("SSCHA %d of %d: %s %s%s", self.finished, self.total, job.structure, _words(outcome), note)


def _words(outcome: Outcome) -> str:
    where = f"at {outcome.temperature:g} K"
    if outcome.result is None:
        return f"{where} failed: {outcome.reason}"
    r = outcome.result
    return (
        f"{where}: {r.space_group_start} -> {r.space_group}, G = {r.gibbs:.5f} +- {r.gibbs_error:.5f} eV/atom, "
        f"{r.n_evaluations} evaluations, {r.status}"
    )
