"""One worker process per slot: labels run side by side, and no crash or hang of a DFT code reaches
the search."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import MachineError
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.io.digests import from_json, to_json
from magus_anharmonic.io.files import replacing
from magus_anharmonic.labelers.base import Failure, Label, OnResult, Recipe
from magus_anharmonic.labelers.worker import READY, atoms_from_json, atoms_to_json
from magus_anharmonic.processes import MARK, descendants, end_processes, new_mark, require_space
from magus_anharmonic.runs.progress import Progress
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)

# The parent's module search path travels as an argument: no environment variable that the DFT code
# would inherit.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv.pop(1).split(chr(10)); from"
    " magus_anharmonic.labelers.worker import main; main()"
)
START_TIMEOUT = 300.0
"""Seconds for a worker to import what it needs (a busy file system can be slow); not part of a
label's own time."""
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


class Worker:
    """One persistent worker process; started at the first job and again after a crash or a hang."""

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = new_mark()
        self._buffer = b""
        self._closed = False

    def run(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send one job and wait for its result; raises ``WorkerDied`` on a crash or after
        ``timeout`` seconds."""
        bound_log(self.log_file)
        process = self._start()
        assert process.stdin is not None
        number = secrets.token_hex(8)
        try:
            process.stdin.write(to_json({**job, "job": number}).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._end_of(process) from None
        answer = self._read_reply(process, number, timeout, "no answer (learning.labeler.timeout)")
        if not answer["ok"]:
            # A launcher that failed may have left its ranks behind.
            end_processes(descendants(process.pid), self._mark, spare=[process.pid])
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise WorkerDied("the labeler was closed")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        paths = [os.path.abspath(path or ".") for path in sys.path]
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOTSTRAP, "\n".join(paths)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **_ONE_THREAD, MARK: self._mark},
            )
        self._read_reply(self._process, READY, START_TIMEOUT, "the labeler's process did not start")
        return self._process

    def _read_reply(
        self, process: subprocess.Popen[bytes], number: str, timeout: float, what: str
    ) -> dict[str, Any]:
        """The answer to the job ``number``; whatever else comes through the pipe (from the code,
        from a copy of the process) is dropped."""
        deadline = time.monotonic() + timeout
        while True:
            line = self._read_line(process, deadline, f"{what} within {timeout:g} s")
            try:
                answer = from_json(line) if line else None
            except ValueError:
                answer = None
            if (
                isinstance(answer, dict)
                and answer.get("job") == number
                and isinstance(answer.get("ok"), bool)
            ):
                return answer
            if line:
                log.warning(
                    "a line that answers no job came from the labeler's process and is dropped: %s",
                    ascii(line[:60])[2:-1],
                )

    def _read_line(self, process: subprocess.Popen[bytes], deadline: float, what: str) -> bytes:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.stop()
                    raise WorkerDied(f"{what}; the process was ended")
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._end_of(process)
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _end_of(self, process: subprocess.Popen[bytes]) -> WorkerDied:
        code = process.wait()
        self.stop()
        if self._closed:
            return WorkerDied("the labeler was closed")
        require_space(self.log_file.parent)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        died = WorkerDied(f"the labeler's process ended: {how} (see {self.log_file})")
        died.machine_error = code == -signal.SIGKILL
        return died

    def stop(self) -> None:
        """End the process and everything that it started."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        known = descendants(process.pid)
        process.kill()
        process.wait()
        end_processes(known, self._mark)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

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
        jobs = [{"task": "label", "atoms": atoms_to_json(atoms)} for atoms in structures]
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
        jobs = [{**common, "atoms": atoms_to_json(atoms)} for atoms in structures]
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
            np.array(answer["forces"]),
            np.array(answer["stress"]),
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
        self._workers = [Worker(self.directory / f"worker{slot}.log") for slot in range(n_workers)]
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
        job = {**job, "recipe": asdict(self.recipe), "directory": str(scratch)}
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


def _close_all(workers: list[Worker]) -> None:
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
        atoms_from_json(answer["atoms"]),
        answer["energy"],
        answer["enthalpy"],
        np.array(answer["forces"]),
        np.array(answer["stress"]),
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
