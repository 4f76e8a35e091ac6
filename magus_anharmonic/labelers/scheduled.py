"""Labels made where a scheduler says.

A labeler around any function, e.g. MAGUS's own MainCalculator.

Labels on the workers of a remote scheduler: each worker runs the DFT code in a process of its own,
as `WorkerLabeler` does here.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import LabelerError
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.labelers.base import Failure, Label, OnResult, Recipe, settings_hash
from magus_anharmonic.labelers.pool import DftProcess, JobLabeler, WorkerDied, problem
from magus_anharmonic.scheduler import Scheduling, open_scheduler
from magus_anharmonic.scheduler.base import packed, unpack
from magus_anharmonic.structures import change_of, structure_id
from magus_anharmonic.units import GPa


class CallableLabeler:
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

    def relax(
        self,
        structures: Sequence[Atoms],
        pressure: GPa = 0.0,
        *,
        force_tolerance: float = 0.05,
        max_steps: int = 300,
    ) -> list[Relaxation]:
        """Raises ``LabelerError``: a function of single points cannot relax."""
        raise LabelerError(f"{self.description}: makes single points only")

    def close(self) -> None:
        """Nothing to end."""


log = logging.getLogger(__name__)

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

    def _run(
        self,
        jobs: list[dict[str, Any]],
        structures: Sequence[Atoms],
        accept: Callable[[int, dict[str, Any]], None],
    ) -> None:
        items = (({**job, "recipe": self.recipe}, self.timeout) for job in jobs)
        with (
            open_scheduler(self.scheduling) as scheduler,
            closing(scheduler.map(label_on_worker, items)) as ends,
        ):
            for end in ends:
                answer, files = (
                    ({"ok": False, "reason": end.reason, "machine_error": end.died}, {})
                    if end.reason
                    else end.value
                )
                if files:
                    kept = self.directory / "failed" / structure_id(structures[end.index])
                    shutil.rmtree(kept, ignore_errors=True)
                    unpack(files, kept)
                accept(end.index, answer)

    def close(self) -> None:
        """Nothing to end: the workers are the scheduler's."""


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
        try:
            answer = worker.run({**job, "directory": str(folder)}, timeout)
        except WorkerDied as error:
            answer = {"ok": False, "reason": str(error), "machine_error": error.machine_error}
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
