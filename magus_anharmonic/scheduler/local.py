"""Processes of this machine, one task at a time each; one that dies takes only its own task with
it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from magus_anharmonic.processes import MARK, descendants, end_processes, new_mark
from magus_anharmonic.runs.lock import adopt, claims
from magus_anharmonic.scheduler.base import MAX_DEATHS, Done, Shared, Task, attempt, available_cores

log = logging.getLogger(__name__)

MAX_PER_GPU = 4
GOODBYE = 5.0
"""Seconds that an idle process may take to end by itself."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
DIED = (
    "its process died {} times (crash, or out of memory); a script of your own needs `if __name__"
    " == '__main__':`"
)


class LocalScheduler:
    """``n_workers`` fresh interpreters (torch and CUDA do not survive a fork), started when first
    needed and kept until `close`.

    n_workers : None takes one per core, at most four where they share a GPU; threads : of each,
    None shares the cores.
    """

    remote = False

    def __init__(
        self, n_workers: int | None = None, *, threads: int | None = None, device: str = "cpu"
    ) -> None:
        cores = available_cores()
        fitting = min(cores, MAX_PER_GPU) if device == "cuda" else cores
        self.n_workers = n_workers or max(1, fitting // (threads or 1))
        self.threads = threads or max(1, cores // self.n_workers)
        self.device = device
        self._processes: list[_Process] = []

    @property
    def description(self) -> str:
        """One line for the log."""
        return f"{self.n_workers} processes with {self.threads} threads each"

    def map(self, task: Task, items: Iterable[Any], shared: Shared | None = None) -> Iterator[Done]:
        """See `Scheduler`."""
        waiting = enumerate(items)
        again: deque[tuple[int, Any]] = deque()
        deaths: dict[int, int] = {}
        busy: dict[Connection, _Process] = {}
        free = [process for process in self._processes if process.alive]
        try:
            while True:
                self._feed(task, shared, again, waiting, busy, free)
                if not busy:
                    return
                for connection in wait(list(busy)):
                    process = busy.pop(connection)  # type: ignore[arg-type]
                    index, item = process.job
                    answer = process.answer()
                    if answer is not None:
                        free.append(process)
                        yield Done(index, *answer)
                        continue
                    self._processes.remove(process)
                    deaths[index] = deaths.get(index, 0) + 1
                    log.warning("a worker process died (%s)", process.end())
                    if deaths[index] >= MAX_DEATHS:
                        yield Done(index, None, DIED.format(deaths[index]), died=True)
                    else:
                        again.append((index, item))
        finally:
            for process in busy.values():
                self._processes.remove(process)
                process.end()

    def _feed(
        self,
        task: Task,
        shared: Shared | None,
        again: deque,
        waiting: Iterator,
        busy: dict,
        free: list[_Process],
    ) -> None:
        while len(busy) < self.n_workers:
            job = again.popleft() if again else next(waiting, None)
            if job is None:
                return
            if not free:
                free.append(_Process(self.threads))
                self._processes.append(free[-1])
            process = free.pop()
            process.send(task, job, shared)
            busy[process.connection] = process

    def close(self) -> None:
        """End the processes: each is told to go, and killed only where it does not, so that it can
        give back what it holds."""
        for process in self._processes:
            process.connection.close()
        while self._processes:
            self._processes.pop().end(patience=GOODBYE)


class _Process:
    """One worker process and the job it has."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._known: set[str] = set()
        self.job: tuple[int, Any] = (-1, None)
        self._mark = new_mark()
        self._process = context.Process(target=_serve, args=(other, threads), daemon=True)
        # which would take the mark of the first process that is started, and its end
        resource_tracker.ensure_running()
        with _variables({**dict.fromkeys(THREAD_VARIABLES, str(threads)), MARK: self._mark}):
            self._process.start()
        other.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, task: Task, job: tuple[int, Any], shared: Shared | None) -> None:
        """Hand over a job; what is shared goes along the first time only. A dead process shows in
        `answer`."""
        self.job = job
        key = None if shared is None else shared.key
        new = shared if key not in self._known else None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((task, job[1], key, new, claims()))
            if key is not None:
                self._known.add(key)

    def answer(self) -> tuple[Any, str] | None:
        """Value and reason; None when the process is dead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def end(self, patience: float = 0.1) -> str:
        """End the process, if it has not ended within ``patience`` seconds; how it ended."""
        if self._process.exitcode is None:
            self._process.join(patience)
        known = (
            descendants(self._process.pid)
            if self._process.pid and self._process.exitcode is None
            else []
        )
        self._process.kill()
        self._process.join()
        end_processes(known, self._mark)
        self.connection.close()
        code = self._process.exitcode
        return (
            f"killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )


def _serve(connection: Connection, threads: int) -> None:
    """Run jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    known: dict[str, Shared] = {}
    while True:
        try:
            task, item, key, new, locks = connection.recv()
        except EOFError:
            return
        if new is not None:
            known[key] = new
        adopt(locks)
        limit_torch(threads)
        connection.send(attempt(task, item, known.get(key)))


def limit_torch(threads: int) -> None:
    """Torch counts cores by itself; it is not imported for this."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Leave nothing behind that writes into a folder which a restarted search works in."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        end_processes(descendants(os.getpid()), os.environ.get(MARK, ""))
        os._exit(1)


@contextlib.contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """The environment in which workers start: BLAS and torch read their number of threads when they
    are loaded."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
