"""Processes of this machine, one task at a time each; one that dies takes only its own task with
it."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from magus_anharmonic.processes import Worker
from magus_anharmonic.runs.lock import adopt, claims
from magus_anharmonic.scheduler import MAX_DEATHS, Done, Shared, Task, attempt, available_cores

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
            process.give(task, job, shared)
            busy[process.connection] = process

    def close(self) -> None:
        """End the processes: each is told to go, and killed only where it does not, so that it can
        give back what it holds."""
        for process in self._processes:
            process.connection.close()
        while self._processes:
            self._processes.pop().end(patience=GOODBYE)


class _Process(Worker):
    """One worker process, the job it has, and which shared objects it knows."""

    def __init__(self, threads: int) -> None:
        self.job: tuple[int, Any] = (-1, None)
        self._known: set[str | None] = {None}
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        super().__init__(_begin, threads, variables=variables, with_main=True)

    def give(self, task: Task, job: tuple[int, Any], shared: Shared | None) -> None:
        """Hand over a job; what is shared goes along the first time only."""
        self.job = job
        key = None if shared is None else shared.key
        self.send((task, job[1], key, None if key in self._known else shared, claims()))
        self._known.add(key)

    def answer(self) -> tuple[Any, str] | None:
        """Value and reason; None when the process is dead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None


def _begin(threads: int) -> Callable[[Any], tuple[Any, str]]:
    known: dict[str | None, Shared | None] = {}

    def run(job: Any) -> tuple[Any, str]:
        task, item, key, new, locks = job
        known.setdefault(key, new)
        adopt(locks)
        limit_torch(threads)
        return attempt(task, item, known[key])

    return run


def limit_torch(threads: int) -> None:
    """Torch counts cores by itself; it is not imported for this."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
