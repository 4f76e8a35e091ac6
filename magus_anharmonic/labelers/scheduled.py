"""Labels on the workers of a remote scheduler: each worker runs the DFT code in a process of its own, as `WorkerLabeler` does here."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.labelers.base import Recipe
from magus_anharmonic.labelers.pool import JobLabeler, Worker, WorkerDied
from magus_anharmonic.scheduler import Scheduling, open_scheduler
from magus_anharmonic.scheduler.files import packed, unpack
from magus_anharmonic.structures import structure_id

log = logging.getLogger(__name__)

LARGEST = 1_000_000
"""Bytes; larger files of a failed label (wave functions, densities) are not returned."""


class ScheduledLabeler(JobLabeler):
    """Labeler that runs one `Recipe` on the workers of ``scheduling``; nothing is read or written by them in ``directory``.

    The files of a failed label come back (those up to a megabyte) and are kept in ``directory`` as ``failed/<structure id>``.
    """

    def __init__(self, recipe: Recipe, directory: Path, scheduling: Scheduling, *, timeout: float = 3600.0) -> None:
        super().__init__(recipe, directory, timeout=timeout)
        self.scheduling = scheduling

    def _run(self, jobs: list[dict[str, Any]], structures: Sequence[Atoms], accept: Callable[[int, dict[str, Any]], None]) -> None:
        items = (({**job, "recipe": self.recipe.as_json()}, self.timeout) for job in jobs)
        with open_scheduler(self.scheduling) as scheduler, closing(scheduler.map(label_on_worker, items)) as ends:
            for end in ends:
                answer, files = ({"ok": False, "reason": end.reason, "trouble": end.died}, {}) if end.reason else end.value
                if files:
                    kept = self.directory / "failed" / structure_id(structures[end.index])
                    shutil.rmtree(kept, ignore_errors=True)
                    unpack(files, kept)
                accept(end.index, answer)

    def close(self) -> None:
        """Nothing to end: the workers are the scheduler's."""


_THREAD = threading.local()


def label_on_worker(item: tuple[dict[str, Any], float], shared: None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run one job; its answer, and the files of a failed one. The process of the DFT code is kept for the next job."""
    job, timeout = item
    with tempfile.TemporaryDirectory(prefix="label-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / "run"
        worker = _warm_worker()
        try:
            answer = worker.run({**job, "directory": str(folder)}, timeout)
        except WorkerDied as error:
            answer = {"ok": False, "reason": str(error), "trouble": error.trouble}
        files = {} if answer["ok"] else packed(folder, largest=LARGEST)
        if not answer["ok"] and worker.log_file.is_file():
            files["worker.log"] = worker.log_file.read_bytes()[-LARGEST:]
        return answer, files


def _warm_worker() -> Worker:
    """The process of this thread; its log is in a temporary folder of the node."""
    if not hasattr(_THREAD, "worker"):
        _THREAD.folder = tempfile.TemporaryDirectory(prefix="labeler-")
        _THREAD.worker = Worker(Path(_THREAD.folder.name) / "worker.log")
    return _THREAD.worker
