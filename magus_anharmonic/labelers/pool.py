"""One worker process per slot: labels run side by side, and no crash or hang of a DFT code reaches
the search."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import MachineError
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.io.files import replacing
from magus_anharmonic.labelers.base import Failure, Label, OnResult, Recipe
from magus_anharmonic.labelers.worker import begin
from magus_anharmonic.processes import Worker, descendants, end_processes
from magus_anharmonic.runs.record import Progress
from magus_anharmonic.structures import stripped, structure_id
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)

START_TIMEOUT = 300.0
"""Seconds for a worker to import what it needs (a busy file system can be slow); not part of a
label's own time."""
ENDING = 10.0
"""Seconds that a crash may take until its exit code is known."""
LOG_LIMIT = 1 << 20
"""Bytes of a worker's log above which the next job begins a new one; as much of the end of one
earlier log is kept."""
_ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
    )
}


class WorkerDied(Exception):
    """The worker process ended or was ended before it answered; the message is the reason.

    ``machine_error`` : it was killed, as the kernel does where memory runs out, and not by its own
    fault or a time limit of ours.
    """

    machine_error = False


class DftProcess:
    """The process of a DFT code; started at the first job and again after a crash or a hang."""

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self._worker: Worker | None = None
        self._closed = False

    def run(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send one job and wait for its result; raises ``WorkerDied`` on a crash or after
        ``timeout`` seconds."""
        bound_log(self.log_file)
        if self._closed:
            raise WorkerDied("the labeler was closed")
        if self._worker is None or not self._worker.alive:
            self.stop()
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self._worker = Worker(begin, variables=_ONE_THREAD, output=self.log_file)
            self._ask(self._worker, None, START_TIMEOUT, "the labeler's process did not start")
        worker = self._worker
        answer = self._ask(worker, job, timeout, "no answer (learning.labeler.timeout)")
        if not answer["ok"]:
            # A launcher that failed may have left its ranks behind.
            end_processes(descendants(worker.pid), worker.mark, spare=[worker.pid])
        return answer

    def _ask(self, worker: Worker, job: Any, timeout: float, what: str) -> Any:
        try:
            worker.send(job)
            if worker.connection.poll(timeout):
                return worker.connection.recv()
        except Exception:  # also what a code wrote into the pipe
            log.debug("no answer of a labeler's process", exc_info=True)
            how = worker.end(ENDING)
            died = WorkerDied(f"the labeler's process ended: {how} (see {self.log_file})")
            died.machine_error = how.endswith("SIGKILL")
            if self._closed:
                died = WorkerDied("the labeler was closed")
            raise died from None
        self.stop()
        raise WorkerDied(f"{what} within {timeout:g} s; the process was ended")

    def stop(self) -> None:
        """End the process and everything that it started."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end(0.0)

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self.stop()


def bound_log(file: Path, limit: int = LOG_LIMIT) -> None:
    """Empty a log longer than ``limit`` bytes, its end kept in ``NAME.earlier.log``; whoever
    appends to it goes on."""
    if not file.is_file() or file.stat().st_size <= limit:
        return
    with file.open("rb+") as log_file, replacing(file.with_suffix(".earlier.log")) as temporary:
        log_file.seek(-limit, os.SEEK_END)
        temporary.write_bytes(log_file.read(limit))
        # not renamed: the worker and the programs that it starts hold this file open
        log_file.truncate(0)


class JobLabeler:
    """What labelers that run one `Recipe` as jobs share; `_run` says where the jobs run."""

    def __init__(self, recipe: Recipe, directory: Path, *, timeout: float) -> None:
        self.recipe = recipe
        self.directory = Path(directory).absolute()
        self.timeout = timeout

    @property
    def settings_hash(self) -> str:
        """Names the energy surface, see `Recipe`."""
        return self.recipe.settings_hash

    @property
    def description(self) -> str:
        """One line: code, arguments, k-point spacing."""
        arguments = ", ".join(f"{key}={value}" for key, value in self.recipe.arguments.items())
        spacing = (
            ""
            if self.recipe.k_spacing is None
            else f", k spacing 2 pi x {self.recipe.k_spacing:g} / A"
        )
        return f"{self.recipe.code} ({arguments}{spacing})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def label(
        self, structures: Sequence[Atoms], on_result: OnResult | None = None
    ) -> list[Label | Failure]:
        """Single points in the order of the input; ``on_result(index, result)`` is called here as
        each one finishes."""
        jobs = [{"task": "label", "atoms": stripped(atoms)} for atoms in structures]
        results: list[Any] = [None] * len(jobs)
        progress = _Progress("label", len(jobs))

        def accept(index: int, answer: dict[str, Any]) -> None:
            results[index] = self._as_label(structures[index], answer)
            progress.finished(results[index].ok)
            if on_result is not None:
                on_result(index, results[index])

        self._run(jobs, structures, accept)
        return results

    def relax(
        self,
        structures: Sequence[Atoms],
        pressure: GPa = 0.0,
        *,
        force_tolerance: float = 0.05,
        max_steps: int = 300,
    ) -> list[Relaxation]:
        """Relax positions and cell at ``pressure`` (GPa) by BFGS until forces are below
        ``force_tolerance`` (eV/A).

        A structure that fails comes back as it was given, with ``failed=True`` and the reason.
        ``timeout`` is per structure.
        """
        common = {
            "task": "relax",
            "pressure": pressure,
            "force_tolerance": force_tolerance,
            "max_steps": max_steps,
        }
        jobs = [{**common, "atoms": stripped(atoms)} for atoms in structures]
        results: list[Any] = [None] * len(jobs)
        progress = _Progress("relaxation", len(jobs))

        def accept(index: int, answer: dict[str, Any]) -> None:
            results[index] = _as_relaxation(structures[index], answer, max_steps)
            progress.finished(not results[index].failed)

        self._run(jobs, structures, accept)
        return results

    def _as_label(self, atoms: Atoms, answer: dict[str, Any]) -> Label | Failure:
        reason = problem(answer, len(atoms))
        if reason:
            return Failure(atoms, reason, self.settings_hash)
        return Label(
            atoms,
            answer["energy"],
            answer["free_energy"],
            answer["forces"],
            answer["stress"],
            self.settings_hash,
            answer["seconds"],
        )

    def _run(
        self,
        jobs: list[dict[str, Any]],
        structures: Sequence[Atoms],
        accept: Callable[[int, dict[str, Any]], None],
    ) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End what the labeler has started; it cannot be used afterwards."""
        raise NotImplementedError


class WorkerLabeler(JobLabeler):
    """Labeler that runs one `Recipe` in ``n_workers`` processes.

    Scratch folders ``slot0``, ... and ``worker0.log``, ... (of bounded length) are below
    ``directory``; the folder of a failed label is kept as ``failed/<structure id>``. Call `close`
    (or use it in a ``with`` block) to end the processes; they also end with the search.
    """

    def __init__(
        self, recipe: Recipe, directory: Path, *, n_workers: int, timeout: float = 3600.0
    ) -> None:
        super().__init__(recipe, directory, timeout=timeout)
        self.n_workers = n_workers
        self._workers = [
            DftProcess(self.directory / f"worker{slot}.log") for slot in range(n_workers)
        ]
        self._finalizer = weakref.finalize(self, _close_all, self._workers)

    def close(self) -> None:
        """End all worker processes; the labeler cannot be used afterwards."""
        self._finalizer()

    def _run(
        self,
        jobs: list[dict[str, Any]],
        structures: Sequence[Atoms],
        accept: Callable[[int, dict[str, Any]], None],
    ) -> None:
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            waiting.put(index)
        answers: queue.SimpleQueue[tuple[int, dict[str, Any] | BaseException]] = queue.SimpleQueue()
        stopping = threading.Event()

        def serve(slot: int) -> None:
            while not stopping.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put((index, self._one(slot, jobs[index], structures[index])))
                except BaseException as error:  # handed to the calling thread, which raises it
                    answers.put((index, error))
                    return

        threads = [
            threading.Thread(target=serve, args=(slot,), daemon=True)
            for slot in range(min(self.n_workers, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in jobs:
                index, answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                accept(index, answer)
        except BaseException:
            stopping.set()
            for worker in self._workers:
                worker.stop()
            raise

    def _one(self, slot: int, job: dict[str, Any], atoms: Atoms) -> dict[str, Any]:
        scratch = self.directory / f"slot{slot}"
        # A code that dies early must not find the output of the structure before.
        shutil.rmtree(scratch, ignore_errors=True)
        job = {**job, "recipe": self.recipe, "directory": str(scratch)}
        try:
            answer = self._workers[slot].run(job, self.timeout)
        except WorkerDied as error:
            answer = {"ok": False, "reason": str(error), "machine_error": error.machine_error}
        if not answer["ok"] and scratch.is_dir():
            kept = self.directory / "failed" / structure_id(atoms)
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(kept)
        return answer


def _close_all(workers: list[DftProcess]) -> None:
    for worker in workers:
        worker.close()


def problem(answer: dict[str, Any], n_atoms: int) -> str | None:
    """Why an answer is no valid label for ``n_atoms`` atoms; None when it is one. Raises
    ``MachineError`` where that was the reason."""
    if answer.get("machine_error"):
        raise MachineError(f"a labeler's process: {answer['reason']}")
    if not answer["ok"]:
        return answer["reason"]
    forces, stress = (
        np.asarray(answer["forces"], dtype=float),
        np.asarray(answer["stress"], dtype=float),
    )
    if forces.shape != (n_atoms, 3):
        return (
            f"wrong number of atoms: forces of shape {forces.shape} for a structure of {n_atoms}"
            " atoms"
        )
    if stress.shape != (3, 3):
        return f"stress of shape {stress.shape} instead of (3, 3)"
    for name, values in (
        ("energy", np.asarray(answer["energy"])),
        ("forces", forces),
        ("stress", stress),
    ):
        if not np.isfinite(values).all():
            return f"NaN or infinite {name}"
    return None


def _as_relaxation(atoms: Atoms, answer: dict[str, Any], max_steps: int) -> Relaxation:
    reason = problem(answer, len(atoms))
    if reason:
        return Relaxation.without_result(atoms.copy(), reason)
    return Relaxation(
        answer["atoms"],
        answer["energy"],
        answer["enthalpy"],
        answer["forces"],
        answer["stress"],
        answer["converged"],
        False,
        answer["n_steps"],
        "" if answer["converged"] else f"not converged after {max_steps} steps",
    )


class _Progress:
    """Logs ``label 7 of 100, 2 failed, about 3 min left``."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.failed = what, total, 0, 0
        self.pace = Progress(total)

    def finished(self, ok: bool) -> None:
        self.done += 1
        self.failed += not ok
        log.info(
            "%s %d of %d, %d failed%s",
            self.what,
            self.done,
            self.total,
            self.failed,
            self.pace.left(self.done, separator=", "),
        )
