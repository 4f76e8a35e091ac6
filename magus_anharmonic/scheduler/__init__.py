"""Who runs the independent pieces of a step: this process, processes of this machine, or Dask
workers anywhere.

A piece is a *task*, a function of one item that returns data. Only the process that calls `map`
writes tables and databases: workers return what they wrote as bytes.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from typing import Protocol

from magus_anharmonic.scheduler.base import (
    MAX_DEATHS,
    THREAD_VARIABLES,
    Done,
    LocalScheduler,
    Scheduler,
    SerialScheduler,
    Shared,
    available_cores,
    changed,
    packed,
    unpack,
)
from magus_anharmonic.settings import WorkerSettings

_CLUSTERS: dict[str, Scheduler] = {}


class Scheduling(Protocol):
    """What says which scheduler to take: the keys ``scheduler`` and ``workers`` of `Settings`."""

    @property
    def scheduler(self) -> str: ...

    @property
    def workers(self) -> WorkerSettings: ...


@contextlib.contextmanager
def open_scheduler(scheduling: Scheduling, *, device: str = "cpu") -> Iterator[Scheduler]:
    """The scheduler that the settings name. Local processes end with the block; a cluster stays for
    the next one, until this process ends.

    ``device`` (cpu or cuda) is where local processes will compute: they share the GPU. Raises
    ``InputError``: no scheduler at that address, package or command of the queue system missing.
    """
    name, workers = scheduling.scheduler, scheduling.workers
    if is_remote(name):
        yield _cluster(name, workers)
        return
    if name == "serial":
        yield SerialScheduler()
        return
    with contextlib.closing(
        LocalScheduler(workers.count, threads=workers.cores, device=device)
    ) as local:
        yield local


def is_remote(name: str) -> bool:
    """Whether ``scheduler: name`` means workers that need not see this process's folders."""
    return name not in ("local", "serial")


def _cluster(name: str, workers: WorkerSettings) -> Scheduler:
    from magus_anharmonic.scheduler.cluster import DaskScheduler

    key = f"{name} {workers.model_dump_json()}"
    if key not in _CLUSTERS:
        _CLUSTERS[key] = DaskScheduler.connect(name, workers)
    return _CLUSTERS[key]


@atexit.register
def close_clusters() -> None:
    """Leave every Dask scheduler and end the jobs that were sent for one; called when the process
    ends."""
    while _CLUSTERS:
        _CLUSTERS.popitem()[1].close()
