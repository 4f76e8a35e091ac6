"""What every scheduler is and hands back, what a worker does with a task, and the schedulers of
this machine: this process, and processes beside it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from magus_anharmonic.errors import (
    LostLock,
    MachineError,
    MagusAnharmonicError,
    is_machine_error,
    reason_of,
    typed_line,
)
from magus_anharmonic.io.files import replacing
from magus_anharmonic.processes import Worker
from magus_anharmonic.runs.lock import adopt, claims

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""A task whose worker died this many times is given up."""

KEPT = 2
"""Shared objects (models) that a worker keeps: the one in use and the one before."""


def available_cores() -> int:
    """Cores that this process may use (a job's share of the machine), not those that the machine
    has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Done:
    """The end of one task: what it returned, or why it returned nothing; ``died``: because its
    worker did.

    Raises ``MachineError`` where that is what the worker met (see `attempt`).
    """

    index: int
    value: Any = None
    reason: str = ""
    died: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.value, MachineError):
            raise self.value


class Shared(Protocol):
    """What all tasks of a call need, e.g. a model: travels once to each worker, which makes the
    object once and keeps it."""

    @property
    def key(self) -> str:
        """Names the content: equal keys, equal objects."""
        ...

    def make(self) -> Any:
        """The object; raises what the tasks are to fail with."""
        ...


Task = Callable[[Any, Any], Any]
"""``task(item, shared object or None) -> data``; a function of a module, so that another process
finds it."""


class Scheduler(Protocol):
    """Runs tasks. ``remote``: the workers need not see this process's folders; ``device``: where
    they compute, cpu or cuda."""

    remote: bool

    @property
    def description(self) -> str: ...

    @property
    def n_workers(self) -> int: ...

    @property
    def device(self) -> str: ...

    def map(self, task: Task, items: Iterable[Any], shared: Shared | None = None) -> Iterator[Done]:
        """One `Done` per item, in the order in which they end; items are taken as workers become
        free.

        Raises ``MachineError`` when the memory, the disk or the GPU of a worker gave out.
        """
        ...

    def close(self) -> None: ...


_MADE: OrderedDict[str, Any] = OrderedDict()


def made(shared: Shared | None) -> Any:
    """The object of ``shared`` in this process, made at its first use and kept while it is among
    the last `KEPT`."""
    if shared is None:
        return None
    if shared.key not in _MADE:
        # Room first: two models and a third would be too much for a GPU.
        while len(_MADE) >= KEPT:
            _MADE.popitem(last=False)
        _MADE[shared.key] = shared.make()
    _MADE.move_to_end(shared.key)
    return _MADE[shared.key]


def attempt(task: Task, item: Any, shared: Shared | None) -> tuple[Any, str]:
    """Value and empty reason, or None and why: an error of one task stops no other. A machine error
    comes back as the value."""
    try:
        return task(item, made(shared)), ""
    except LostLock as error:
        return MachineError(str(error)), ""
    except Exception as error:
        if is_machine_error(error):
            return MachineError(
                f"{socket.gethostname()}, process {os.getpid()}: {reason_of(error)}"
            ), ""
        log.warning("a task failed", exc_info=True)
        return None, typed_line(error)


Files = Mapping[str, bytes]
"""Name relative to the folder -> content."""

LAST = "result.json"
"""Written after everything else: a run counts as finished when it is there."""


def packed(folder: Path, *, largest: int | None = None) -> dict[str, bytes]:
    """Every plain file below ``folder`` (none when there is no folder), except temporary ones and
    those above ``largest`` bytes."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix != ".tmp"
    )
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if largest is None or path.stat().st_size <= largest
    }


def changed(before: Files, after: Files) -> dict[str, bytes]:
    """What is new or different in ``after``."""
    return {name: content for name, content in after.items() if before.get(name) != content}


def unpack(files: Files, folder: Path) -> None:
    """Write the files below ``folder``, each whole or not at all; raises ``MagusAnharmonicError``
    for a name that leads out of it."""
    root = folder.resolve()
    for name in sorted(files, key=lambda name: (Path(name).name == LAST, name)):
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise MagusAnharmonicError(f"{name}: a worker returned a file outside its folder")
        with replacing(target) as temporary:
            temporary.write_bytes(files[name])


class SerialScheduler:
    """No other process: for debugging, and where a step is one piece anyway."""

    remote = False
    device = "cpu"
    n_workers = 1
    description = "this process, one task after the other"

    def map(self, task: Task, items: Iterable[Any], shared: Shared | None = None) -> Iterator[Done]:
        """See `Scheduler`."""
        for index, item in enumerate(items):
            value, reason = attempt(task, item, shared)
            yield Done(index, value, reason)

    def close(self) -> None:
        """Nothing to end."""


MAX_PER_GPU = 4
GOODBYE = 5.0
"""Seconds that an idle process may take to end by itself."""
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
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
