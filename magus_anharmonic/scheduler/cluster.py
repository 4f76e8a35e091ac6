"""Dask workers on this or other machines: at an address, or started by jobs of SLURM, LSF or
PBS."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import magus_anharmonic
from magus_anharmonic.errors import InputError, MagusAnharmonicError, one_line, typed_line
from magus_anharmonic.scheduler.base import MAX_DEATHS, Done, Shared, Task, attempt, limit_torch
from magus_anharmonic.settings import WorkerSettings

log = logging.getLogger(__name__)

REFRESH = 2.0  # s between two questions how many workers there are
PATIENCE = 60.0  # s between two lines that say that nobody works
AHEAD = 2  # tasks per worker on their way, so that none waits for its next
DIED = "its worker died {} times while running it (crash, out of memory, or the end of its job)"


class DaskScheduler:
    """A connection to a Dask scheduler; at most ``AHEAD`` tasks per worker are with it, so that its
    memory and ours stay bounded."""

    remote = True

    def __init__(
        self, client: Any, *, description: str, device: str | None = None, cluster: Any = None
    ) -> None:
        self._client, self._cluster, self.description = client, cluster, description
        self._device = device
        self._workers, self._asked = 0, 0.0

    @classmethod
    def connect(cls, name: str, workers: WorkerSettings) -> DaskScheduler:
        """Connect to the address ``name``, or start a scheduler here and send jobs of the queue
        system ``name``.

        Raises ``InputError`` when nobody answers within ``workers.timeout`` seconds, or something
        is not installed.
        """
        try:
            from distributed import Client
        except ImportError as error:
            raise InputError(
                f"scheduler: {name}: {error}; pip install 'magus-anharmonic[dask]'"
            ) from None
        if "://" not in name:
            from magus_anharmonic.scheduler.queues import start_cluster

            cluster = start_cluster(name, workers)
            client = Client(cluster, set_as_default=False)
            return cls(
                client,
                description=f"{workers.count or 1} {name} jobs",
                device="cuda" if workers.gpus else "cpu",
                cluster=cluster,
            )
        if name.startswith("tls://") and not _has_certificates():
            raise InputError(
                f"scheduler: {name}: Dask's configuration names no certificates for TLS;"
                " docs/clusters.md says how"
            )
        try:
            with _silent("distributed"):
                client = Client(name, timeout=workers.timeout, set_as_default=False)
        except (OSError, TimeoutError, ValueError, RuntimeError) as error:
            raise InputError(
                f"scheduler: {name}: no Dask scheduler answers within {workers.timeout:g} s"
                f" ({one_line(error)}); start one with `dask scheduler` and workers with `dask"
                " worker ADDRESS --nthreads 1`"
            ) from None
        if name.startswith("tcp://") and not _is_here(name):
            log.warning(
                "%s: without TLS everybody who reaches it can run programs as you; docs/clusters.md"
                " says how to use tls://",
                name,
            )
        return cls(client, description=f"the Dask workers at {name}")

    @property
    def n_workers(self) -> int:
        """Tasks that run at the same time now."""
        if time.monotonic() - self._asked > REFRESH:
            self._workers, self._asked = sum(self._client.nthreads().values()), time.monotonic()
        return self._workers

    @property
    def device(self) -> str:
        """``cuda`` when a worker has a CUDA device."""
        if self._device is None:
            found = self._client.run(_device_of_worker, on_error="ignore") if self.n_workers else {}
            if not found:
                return "cpu"
            self._device = "cuda" if "cuda" in found.values() else "cpu"
        return self._device

    def map(self, task: Task, items: Iterable[Any], shared: Shared | None = None) -> Iterator[Done]:
        """See `Scheduler`; raises ``MagusAnharmonicError`` when the scheduler is lost or its
        workers lack this package."""
        yield from _Call(self, self._client, task, items, shared).results()

    def refusal(self) -> str:
        """Why no job will come, in the queue system's own words; empty while one may."""
        return "" if self._cluster is None else self._cluster.submissions.refusal()

    def close(self) -> None:
        """Disconnect, and end the jobs that were started for this."""
        with contextlib.suppress(Exception), _silent("distributed"):
            self._client.close()
            if self._cluster is not None:
                self._cluster.close(timeout=10)
                self._cluster.certificates.remove()


class _Call:
    """One `map`: which items wait, which are with the scheduler, whose workers died."""

    def __init__(
        self,
        scheduler: DaskScheduler,
        client: Any,
        task: Task,
        items: Iterable[Any],
        shared: Shared | None,
    ) -> None:
        self.scheduler, self.client, self.task, self.shared = scheduler, client, task, shared
        self.waiting = enumerate(items)
        self.again: deque[tuple[int, Any]] = deque()
        self.running: dict[str, tuple[Any, int, Any]] = {}
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.deaths: dict[int, int] = {}
        self.alone = ""
        self.token, self.numbers = uuid.uuid4().hex, itertools.count()
        self.quiet_since = time.monotonic()

    def results(self) -> Iterator[Done]:
        """See `Scheduler.map`."""
        try:
            with _carried(self.client, self.shared):
                while self._feed() or self.running:
                    try:
                        key = self.ended.get(timeout=REFRESH)
                    except queue.Empty:
                        self._complain()
                        continue
                    self.quiet_since = time.monotonic()
                    done = self._end(key)
                    if done is not None:
                        yield done
        finally:
            with contextlib.suppress(Exception):
                self.client.cancel([future for future, _, _ in self.running.values()], force=True)

    def _feed(self) -> bool:
        """Submit while there is room. A task whose worker died runs again with no other beside it:
        its deaths are its own then."""
        if self.alone in self.running or (self.again and self.running):
            return True
        if self.again:
            self.alone = self._submit(*self.again.popleft())
            return True
        room = max(1, self.scheduler.n_workers * AHEAD)
        while len(self.running) < room:
            job = next(self.waiting, None)
            if job is None:
                break
            self._submit(*job)
        return bool(self.running)

    def _submit(self, index: int, item: Any) -> str:
        key = f"task-{self.token}-{next(self.numbers)}"
        carried = None if self.shared is None else self.shared.key
        future = self.client.submit(
            run_on_worker,
            self.task,
            item,
            carried,
            magus_anharmonic.__version__,
            key=key,
            pure=False,
            priority=-index,
        )
        self.running[key] = future, index, item
        future.add_done_callback(lambda future: self.ended.put(future.key))
        return key

    def _end(self, key: str) -> Done | None:
        """What became of a future; None when its item is to run again."""
        from distributed.scheduler import KilledWorker

        future, index, item = self.running.pop(key)
        error = None
        try:
            if future.status == "finished":
                fetched = _fetched(future)
                if fetched is not None:
                    return Done(index, *fetched)
                log.debug("the result of task %d was lost with its worker", index)
            if future.status == "error":
                error = future.exception()
        except CancelledError:
            # The connection broke between the task's end and the fetching of its result.
            log.debug("the result of task %d was lost with the connection", index)
        finally:
            future.release()
        if isinstance(error, NotCarried):
            self.again.append((index, item))
            return None
        if isinstance(error, KilledWorker):
            self.deaths[index] = self.deaths.get(index, 0) + error.allowed_failures + 1
            log.warning("a worker died running task %d (%s)", index, error.last_worker.address)
            if self.deaths[index] >= MAX_DEATHS and key == self.alone:
                return Done(index, None, DIED.format(self.deaths[index]), died=True)
            self.again.append((index, item))
            return None
        if error is None:
            # Dask drops what was under way when a connection breaks, and makes a new one by itself.
            self._connected()
            self.again.append((index, item))
            return None
        raise MagusAnharmonicError(
            f"{self.scheduler.description}: a worker cannot run this package's tasks:"
            f" {typed_line(error)}; install the same version of magus-anharmonic and Dask there"
        )

    def _connected(self) -> None:
        """Wait for a broken connection; raises ``MagusAnharmonicError`` when it does not come
        back."""
        end = time.monotonic() + PATIENCE
        while self.client.status == "connecting" and time.monotonic() < end:
            time.sleep(0.1)
        if self.client.status != "running":
            raise MagusAnharmonicError(
                f"{self.scheduler.description}: the connection to the Dask scheduler is lost;"
                " finished work is kept"
            )

    def _complain(self) -> None:
        self._connected()
        if self.scheduler.n_workers:
            return
        if reason := self.scheduler.refusal():
            raise MagusAnharmonicError(
                f"{self.scheduler.description}: {reason}; finished work is kept, run the same"
                " command again to go on"
            )
        if time.monotonic() - self.quiet_since > PATIENCE:
            self.quiet_since = time.monotonic()
            log.warning("%s: no worker is there; waiting", self.scheduler.description)


class NotCarried(Exception):
    """The worker has not received yet what the tasks share; the task is to be sent again."""


_CARRIED: dict[str, Shared] = {}


def run_on_worker(task: Task, item: Any, key: str | None, version: str) -> tuple[Any, str]:
    """Runs on the worker: value and reason, as `attempt`; raises what says that no task can run
    here."""
    if version != magus_anharmonic.__version__:
        raise RuntimeError(
            f"magus-anharmonic {magus_anharmonic.__version__} on the worker, {version} where the"
            " search runs"
        )
    if key is not None and key not in _CARRIED:
        raise NotCarried(key)
    _threads()
    return attempt(task, item, None if key is None else _CARRIED[key])


def _fetched(future: Any) -> tuple[Any, str] | None:
    """Value and reason of a finished future, however long they travel; None when the worker that
    held them has died since."""
    while True:
        try:
            value, reason = future.result(timeout=REFRESH)
        except TimeoutError:
            if future.status != "finished":
                return None
        else:
            return value, reason


def _threads() -> None:
    """As many threads as the job has cores: torch would count those of the node."""
    with contextlib.suppress(ValueError):
        limit_torch(int(os.environ.get("OMP_NUM_THREADS", "")))


def _device_of_worker() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _carried(client: Any, shared: Shared | None) -> Iterator[None]:
    """Bring ``shared`` to every worker, those of later too: the scheduler hands it to each one
    before its first task."""
    if shared is None:
        yield
        return
    from distributed import WorkerPlugin

    class Carry(WorkerPlugin):
        """Puts the shared object where `run_on_worker` finds it."""

        def __init__(self, shared: Shared) -> None:
            self.shared, self.name = shared, f"magus-anharmonic-{shared.key}"

        def setup(self, worker: Any) -> None:
            from magus_anharmonic.scheduler.cluster import _CARRIED

            _CARRIED[self.shared.key] = self.shared

        def teardown(self, worker: Any) -> None:
            from magus_anharmonic.scheduler.cluster import _CARRIED

            _CARRIED.pop(self.shared.key, None)

    plugin = Carry(shared)
    client.register_plugin(plugin)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            client.unregister_worker_plugin(plugin.name)


def _has_certificates() -> bool:
    import dask
    from distributed.security import Security

    made_elsewhere = dask.config.get("distributed.client.security-loader", None)
    return (
        bool(made_elsewhere) or Security().get_connection_args("client")["ssl_context"] is not None
    )


def _is_here(address: str) -> bool:
    host = address.partition("://")[2].rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Dask reports a refused connection with tracebacks of its own."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
