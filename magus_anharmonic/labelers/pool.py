"""Labels side by side, in processes here or on the workers of a scheduler, so that no crash or hang
of a DFT code reaches the search; and labels by any function, e.g. MAGUS's own MainCalculator."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import LabelerError, MachineError
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.io.files import replacing
from magus_anharmonic.labelers.base import Failure, Label, Labeler, OnResult, Recipe, settings_hash
from magus_anharmonic.labelers.codes import code_of
from magus_anharmonic.labelers.worker import begin
from magus_anharmonic.processes import Worker, descendants, end_processes, require_space
from magus_anharmonic.runs.record import Progress
from magus_anharmonic.scheduler import THREAD_VARIABLES, Scheduling, open_scheduler, packed, unpack
from magus_anharmonic.structures import change_of, stripped, structure_id
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
_ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")


def _failed(reason: str, machine_error: bool = False) -> dict[str, Any]:
    """The answer to a job that has none."""
    return {"ok": False, "reason": reason, "machine_error": machine_error}


class DftProcess:
    """The process of a DFT code; started at the first job and again after a crash or a hang."""

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self._worker: Worker | None = None
        self._closed = False

    def run(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to one job (`worker.run_job`), or why there is none: a crash, or more than
        ``timeout`` seconds.

        A process that was killed, as the kernel does where memory runs out or a queue when time is
        up, and not by its own fault or a time limit of ours, is a ``machine_error``.
        """
        bound_log(self.log_file)
        worker, answer = self._worker, None
        if self._closed:
            return _failed("the labeler was closed")
        if worker is None or not worker.alive:
            self.stop()
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            worker = self._worker = Worker(begin, variables=_ONE_THREAD, output=self.log_file)
            answer = self._ask(worker, None, START_TIMEOUT, "the labeler's process did not start")
        if answer is None:
            what = "no answer (learning.labeler.timeout)"
            answer = self._ask(worker, job, timeout, what)
        if not answer["ok"] and self._worker is worker:
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
            if self._closed:
                return _failed("the labeler was closed")
            require_space(self.log_file.parent)
            reason = f"the labeler's process ended: {how} (see {self.log_file})"
            return _failed(reason, machine_error=how.endswith(("SIGKILL", "SIGTERM")))
        self.stop()
        return _failed(f"{what} within {timeout:g} s; the process was ended")

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


class JobLabeler(Labeler):
    """What labelers that run one `Recipe` as jobs share; `_answers` says where the jobs run, and
    ``timeout`` (s) is that of one structure."""

    def __init__(self, recipe: Recipe, directory: Path, *, timeout: float) -> None:
        self.recipe = recipe
        self.directory = Path(directory).absolute()
        self.timeout = timeout
        self.settings_hash = recipe.settings_hash
        self.surface = code_of(recipe.code).surface(recipe)
        arguments = ", ".join(f"{key}={value}" for key, value in recipe.arguments.items())
        if recipe.k_spacing is not None:
            arguments += f", k spacing 2 pi x {recipe.k_spacing:g} / A"
        self.description = f"{recipe.code} ({arguments})"

    def label(
        self, structures: Sequence[Atoms], on_result: OnResult | None = None
    ) -> list[Label | Failure]:
        """See `Labeler`."""

        def made(atoms: Atoms, answer: dict[str, Any], reason: str | None) -> Label | Failure:
            if reason:
                return Failure(atoms, reason, self.settings_hash)
            numbers = (answer[name] for name in ("energy", "free_energy", "forces", "stress"))
            rest = self.settings_hash, answer["seconds"]
            return Label(atoms, *numbers, *rest, info=answer.get("info", {}))

        return self._all("label", {}, structures, made, on_result)

    def relax(
        self,
        structures: Sequence[Atoms],
        pressure: GPa = 0.0,
        *,
        force_tolerance: float = 0.05,
        max_steps: int = 300,
    ) -> list[Relaxation]:
        """See `Labeler`."""

        def made(atoms: Atoms, answer: dict[str, Any], reason: str | None) -> Relaxation:
            if reason:
                return Relaxation.without_result(atoms.copy(), reason)
            numbers = (answer[name] for name in ("atoms", "energy", "enthalpy", "forces", "stress"))
            said = "" if answer["converged"] else f"not converged after {max_steps} steps"
            return Relaxation(*numbers, answer["converged"], False, answer["n_steps"], said)

        options = {"pressure": pressure, "force_tolerance": force_tolerance, "max_steps": max_steps}
        return self._all("relaxation", options, structures, made)

    def _all(
        self,
        what: str,
        options: dict[str, Any],
        structures: Sequence[Atoms],
        made: Callable[[Atoms, dict[str, Any], str | None], Any],
        on_result: OnResult | None = None,
    ) -> list[Any]:
        """What is ``made`` of the answers, or of the reasons why there is none."""
        task = {"task": what, "recipe": self.recipe, **options}
        jobs = [{**task, "atoms": stripped(atoms, moments=True)} for atoms in structures]
        results: list[Any] = [None] * len(jobs)
        progress, n_failed = Progress(len(jobs)), 0
        with closing(self._answers(jobs, structures)) as answers:
            for done, (index, answer) in enumerate(answers, start=1):
                atoms = structures[index]
                reason = problem(answer, len(atoms))
                n_failed += reason is not None
                left = progress.left(done, separator=", ")
                log.info("%s %d of %d, %d failed%s", what, done, len(jobs), n_failed, left)
                results[index] = made(atoms, answer, reason)
                if on_result is not None:
                    on_result(index, results[index])
        return results

    def found(self, folder: Path, known: Set[str] = frozenset()) -> Iterator[tuple[Atoms, Label]]:
        """See `Labeler`."""
        return code_of(self.recipe.code).found(self.recipe, folder, known)

    def _for_files_of(self, atoms: Atoms) -> Path:
        """Where the files of a failed label are kept; those of an earlier failure are gone."""
        kept = self.directory / "failed" / structure_id(atoms)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        return kept

    def _answers(
        self, jobs: Sequence[dict[str, Any]], structures: Sequence[Atoms]
    ) -> Generator[tuple[int, dict[str, Any]]]:
        """Places and answers of the jobs as they end."""
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

    def _answers(
        self, jobs: Sequence[dict[str, Any]], structures: Sequence[Atoms]
    ) -> Generator[tuple[int, dict[str, Any]]]:
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.n_workers):
            free.put(slot)

        def one(job: dict[str, Any], atoms: Atoms) -> dict[str, Any]:
            slot = free.get()
            try:
                return self._one(slot, job, atoms)
            finally:
                free.put(slot)

        with ThreadPoolExecutor(self.n_workers) as pool:
            places = {
                pool.submit(one, job, atoms): index
                for index, (job, atoms) in enumerate(zip(jobs, structures, strict=True))
            }
            try:
                for future in as_completed(places):
                    yield places[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in self._workers:
                    worker.stop()
                raise

    def _one(self, slot: int, job: dict[str, Any], atoms: Atoms) -> dict[str, Any]:
        scratch = self.directory / f"slot{slot}"
        # A code that dies early must not find the output of the structure before.
        shutil.rmtree(scratch, ignore_errors=True)
        answer = self._workers[slot].run({**job, "directory": str(scratch)}, self.timeout)
        if not answer["ok"] and scratch.is_dir():
            scratch.replace(self._for_files_of(atoms))
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


LARGEST = 1_000_000
"""Bytes; larger files of a failed label (wave functions, densities) are not returned."""


class ScheduledLabeler(JobLabeler):
    """Labeler that runs one `Recipe` on the workers of ``scheduling``; nothing is read or written
    by them in ``directory``.

    The files of a failed label come back (those up to a megabyte) and are kept in ``directory`` as
    ``failed/<structure id>``.
    """

    def __init__(
        self, recipe: Recipe, directory: Path, scheduling: Scheduling, *, timeout: float = 3600.0
    ) -> None:
        super().__init__(recipe, directory, timeout=timeout)
        self.scheduling = scheduling

    def _answers(
        self, jobs: Sequence[dict[str, Any]], structures: Sequence[Atoms]
    ) -> Generator[tuple[int, dict[str, Any]]]:
        with (
            open_scheduler(self.scheduling) as scheduler,
            closing(scheduler.map(label_on_worker, ((job, self.timeout) for job in jobs))) as ends,
        ):
            for end in ends:
                answer, files = end.value or (_failed(end.reason, end.died), {})
                if files:
                    unpack(files, self._for_files_of(structures[end.index]))
                yield end.index, answer


_THREAD = threading.local()


def label_on_worker(
    item: tuple[dict[str, Any], float], shared: None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run one job; its answer, and the files of a failed one. The process of the DFT code is kept
    for the next job."""
    job, timeout = item
    with tempfile.TemporaryDirectory(prefix="label-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / "run"
        worker = _warm_worker()
        answer = worker.run({**job, "directory": str(folder)}, timeout)
        files = {} if answer["ok"] else packed(folder, largest=LARGEST)
        if not answer["ok"] and worker.log_file.is_file():
            files["worker.log"] = worker.log_file.read_bytes()[-LARGEST:]
        return answer, files


def _warm_worker() -> DftProcess:
    """The process of this thread; its log is in a temporary folder of the node."""
    if not hasattr(_THREAD, "worker"):
        _THREAD.folder = tempfile.TemporaryDirectory(prefix="labeler-")
        _THREAD.worker = DftProcess(Path(_THREAD.folder.name) / "worker.log")
    return _THREAD.worker


class CallableLabeler(Labeler):
    """Labels made by ``function(structures) -> results``, one result per structure, in order.

    A result is a mapping with ``energy`` (eV), ``forces`` (N, 3) eV/A, ``stress`` (6,) or (3, 3)
    eV/A^3 in ASE's sign and, if known, ``free_energy`` (eV); or a string, the reason why there is
    none. ``settings`` is whatever defines the energy surface; it is hashed.
    """

    def __init__(
        self,
        function: Callable[[list[Atoms]], Sequence[Mapping[str, Any] | str]],
        *,
        description: str,
        settings: Mapping[str, Any],
    ) -> None:
        self._function = function
        self.description = description
        self.settings_hash = settings_hash("main", settings, None)

    def label(
        self, structures: Sequence[Atoms], on_result: OnResult | None = None
    ) -> list[Label | Failure]:
        """See `Labeler`; raises ``LabelerError`` when the function returns another number of
        results."""
        started = time.monotonic()
        given = [atoms.copy() for atoms in structures]
        found = list(self._function(given))
        if len(found) != len(structures):
            raise LabelerError(
                f"{self.description}: {len(structures)} structures given, {len(found)} results came"
                " back"
            )
        seconds = (time.monotonic() - started) / max(1, len(structures))
        changes = [change_of(*pair) for pair in zip(structures, given, strict=True)]
        results: list[Label | Failure] = [
            (
                Failure(
                    atoms,
                    f"{self.description} {changed}: its results are those of another structure",
                    self.settings_hash,
                )
                if changed and not isinstance(item, str)
                else self._result(atoms, item, seconds)
            )
            for atoms, item, changed in zip(structures, found, changes, strict=True)
        ]
        if on_result is not None:
            for index, result in enumerate(results):
                on_result(index, result)
        return results

    def _result(
        self, atoms: Atoms, found: Mapping[str, Any] | str, seconds: float
    ) -> Label | Failure:
        from ase.stress import voigt_6_to_full_3x3_stress

        if isinstance(found, str):
            return Failure(atoms, found, self.settings_hash)
        stress = np.asarray(found["stress"], dtype=float)
        stress = voigt_6_to_full_3x3_stress(stress) if stress.shape == (6,) else stress
        forces = np.asarray(found["forces"], dtype=float)
        reason = problem(
            {"ok": True, "energy": found["energy"], "forces": forces, "stress": stress}, len(atoms)
        )
        if reason:
            return Failure(atoms, reason, self.settings_hash)
        return Label(
            atoms,
            float(found["energy"]),
            found.get("free_energy"),
            forces,
            stress,
            self.settings_hash,
            seconds,
        )
