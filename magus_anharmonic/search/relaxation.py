"""Relaxation of a whole population, in chunks that a restart does not repeat."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.evaluator import Evaluator, device_kind, set_energy_errors
from magus_anharmonic.io.files import remove
from magus_anharmonic.ranking.evaluators import evaluator_of
from magus_anharmonic.runs.record import record_failures
from magus_anharmonic.scheduler import Scheduling, is_remote, open_scheduler
from magus_anharmonic.search.archive import read_frames, whole_frames, write_frames
from magus_anharmonic.search.population import reduce_cell
from magus_anharmonic.settings import RelaxationSettings, Settings
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa, time_left

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Relaxer:
    """An evaluator and how to relax with it; ``evaluator`` is replaced when learning makes a new
    model.

    Failures are recorded in ``run_dir``.
    """

    evaluator: Evaluator
    settings: RelaxationSettings
    pressure: GPa
    run_dir: Path | None = None
    scheduling: Scheduling | None = None

    def relax(self, population: Sequence[Atoms], folder: Path) -> list[Atoms]:
        """Relaxed copies at ``pressure`` (GPa) with MAGUS's ``info`` keys; failures are dropped
        with their reason in the log.

        Finished chunks lie in ``folder`` (removed by `forget`) and are not computed again.
        """
        from magus_anharmonic.potential.relax import CHUNK

        size = CHUNK[device_kind(self.evaluator)]
        relaxed: list[Atoms] = []
        begun, computed = time.perf_counter(), 0
        if self.scheduling is not None and is_remote(self.scheduling.scheduler):
            self._relax_elsewhere(population, folder, size)
        for first in range(0, len(population), size):
            chunk = population[first : first + size]
            file = folder / f"chunk-{first // size}.traj"
            known = whole_frames(file)
            if known is None:
                write_frames(file, self._relax_chunk(chunk))
                computed += len(chunk)
                known = read_frames(file)
            relaxed.extend(known)
            _report(relaxed, len(population), computed, time.perf_counter() - begun)
        failed = [atoms.info for atoms in relaxed if "failure" in atoms.info]
        if self.run_dir is not None:
            names = {"generation": "gen", "id": "identity", "reason": "failure"}
            what = [{name: info.get(key) for name, key in names.items()} for info in failed]
            record_failures(self.run_dir, "relaxation", what)
        reasons = Counter(info["failure"] for info in failed)
        for reason, count in reasons.most_common():
            log.warning("%d relaxations failed: %s", count, reason)
        return [atoms for atoms in relaxed if "failure" not in atoms.info]

    def _relax_elsewhere(self, population: Sequence[Atoms], folder: Path, size: int) -> None:
        """Write the chunks that are missing, each as its last structure comes back from the
        workers."""
        assert self.scheduling is not None
        files = {index: folder / f"chunk-{index // size}.traj" for index in range(len(population))}
        wanted = [index for index, file in files.items() if not file.exists()]
        left = Counter(files[index] for index in wanted)
        found: dict[int, Any] = {}

        def keep(position: int, result: Any) -> None:
            file = files[wanted[position]]
            found[wanted[position]] = result
            left[file] -= 1
            if left[file] == 0:
                members = [index for index in wanted if files[index] == file]
                chunk = [population[index] for index in members]
                write_frames(file, self._described_all(chunk, [found.pop(i) for i in members]))

        from magus_anharmonic.potential.relax import relax_on, relax_options

        with open_scheduler(self.scheduling) as scheduler:
            starts = [_start(population[index]) for index in wanted]
            relax_on(
                scheduler,
                self.evaluator,
                starts,
                self.pressure,
                keep,
                **relax_options(self.settings),
            )

    def _relax_chunk(self, chunk: Sequence[Atoms]) -> list[Atoms]:
        from magus_anharmonic.potential.relax import relax, relax_options

        return self._described_all(
            chunk,
            relax(
                self.evaluator,
                [_start(atoms) for atoms in chunk],
                self.pressure,
                **relax_options(self.settings),
            ),
        )

    def _described_all(self, chunk: Sequence[Atoms], results: Sequence[Any]) -> list[Atoms]:
        described = [
            self._described(atoms, result) for atoms, result in zip(chunk, results, strict=True)
        ]
        set_energy_errors(
            self.evaluator, [atoms for atoms in described if "failure" not in atoms.info]
        )
        return described

    def _described(self, before: Atoms, result: Any) -> Atoms:
        atoms = stripped(result.atoms)
        atoms.info = dict(before.info)
        if result.failed:
            atoms.info["failure"] = result.reason
            return atoms
        atoms.wrap()
        atoms.info |= {
            "energy": float(result.energy),
            "enthalpy": float(result.enthalpy),
            "forces": result.forces,
            "stress": full_3x3_to_voigt_6_stress(result.stress),
            "model": self.evaluator.model_id,
            "relaxed": bool(result.converged),
            "n_evaluations": int(result.n_steps),
        }
        return atoms


def _start(atoms: Atoms) -> Atoms:
    start = stripped(atoms)
    reduce_cell(start)
    return start


def forget(folder: Path) -> None:
    """Remove the chunks once the whole population is saved."""
    remove(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def build_relaxer(settings: Settings, checkpoint: Path | None = None) -> Relaxer:
    """The calculator of ``MLCalculator`` or ``MainCalculator``, with ``checkpoint`` when learning
    made one.

    Raises ``InputError`` when it cannot be used.
    """
    evaluator, block = evaluator_of(settings, checkpoint)
    return Relaxer(
        evaluator=evaluator, settings=block, pressure=settings.pressure, scheduling=settings
    )


def _report(relaxed: Sequence[Atoms], total: int, computed: int, seconds: float) -> None:
    enthalpies = [atoms.info["enthalpy"] for atoms in relaxed if "enthalpy" in atoms.info]
    best = f"best enthalpy {min(enthalpies):.4f} eV/atom" if enthalpies else "none succeeded yet"
    left = time_left(seconds, computed, total - len(relaxed))
    log.info(
        "relaxed %d of %d structures, %s, %.0f s%s",
        len(relaxed),
        total,
        best,
        seconds,
        f", {left}" if left else "",
    )


def require(population: Sequence[Atoms], what: str, hint: str) -> None:
    """Raise ``MagusAnharmonicError`` for an empty population instead of going on without
    structures."""
    if not population:
        raise MagusAnharmonicError(f"{what}: no structure is left; {hint}")
