"""One task after the other in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from magus_anharmonic.scheduler.base import Done, Shared, Task, attempt


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
