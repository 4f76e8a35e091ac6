"""Evaluators in other processes: what travels, and relaxations on workers."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import MachineError, MagusAnharmonicError, one_line
from magus_anharmonic.evaluator import Evaluator, Relaxation
from magus_anharmonic.io.digests import digest
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.scheduler import Done, Scheduler
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)

CHUNK = {"cpu": 20, "cuda": 500}
"""Structures that are relaxed together; a GPU needs many at once. Fixed, so that results do not
depend on the number of workers."""


@dataclass(frozen=True)
class Source:
    """What a worker needs to make its own evaluator: a checkpoint to load (its bytes where folders
    are not shared), or the evaluator.

    Of a pickled evaluator ``digest`` tells two with one ``model_id`` apart.
    """

    model_id: str
    checkpoint: str = ""
    content: bytes | None = None
    device: str | None = None
    dtype: str = ""
    evaluator: Evaluator | None = None
    digest: str = ""

    @property
    def key(self) -> str:
        """See `magus_anharmonic.scheduler.Shared`."""
        return "-".join(filter(None, (self.model_id, self.dtype, self.device, self.digest)))

    def make(self) -> Evaluator:
        """The evaluator; raises MagusAnharmonicError when the checkpoint is no longer the same
        model."""
        if self.evaluator is not None:
            return self._checked(self.evaluator)
        from magus_anharmonic.potential import load

        if self.content is None:
            potential = load(self.checkpoint, self.device, dtype=self.dtype)
        else:
            with tempfile.TemporaryDirectory(prefix="model-") as folder:
                path = Path(folder) / Path(self.checkpoint).name
                path.write_bytes(self.content)
                potential = load(path, self.device, dtype=self.dtype)
        return self._checked(potential)

    def _checked(self, evaluator: Evaluator) -> Evaluator:
        if evaluator.model_id != self.model_id:
            what = self.checkpoint or "the evaluator"
            raise MagusAnharmonicError(
                f"{what}: holds model {evaluator.model_id}, not {self.model_id}: it was replaced"
            )
        return evaluator


def serialised(evaluator: Evaluator, *, remote: bool = False) -> Source | None:
    """None (with a line in the log) when the evaluator cannot be sent to another process;
    ``remote``: nor can it read our files."""
    path = getattr(evaluator, "path", None)
    if path is not None and hasattr(evaluator, "dtype"):
        dtype = str(evaluator.dtype).removeprefix("torch.")
        content = Path(path).read_bytes() if remote else None
        device = None if remote else getattr(evaluator, "device", None)
        return Source(
            evaluator.model_id,
            checkpoint=os.path.abspath(path),
            content=content,
            device=device,
            dtype=dtype,
        )
    try:
        identity = digest(pickle.dumps(evaluator))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        log.info("the evaluator cannot be sent to another process: %s", one_line(error))
        return None
    return Source(evaluator.model_id, evaluator=evaluator, digest=identity)


OnRelaxed = Callable[[int, Relaxation], None]


def relax_options(keys: Any) -> dict[str, Any]:
    """Arguments of `relax` and `relax_on` from the keys of a calculator's block, which have MAGUS's
    names."""
    return {
        "force_tolerance": keys.eps,
        "max_steps": keys.max_step,
        "max_move": keys.max_move,
        "optimizer": keys.optimizer,
        "fix_symmetry": keys.fix_symmetry,
        "perturbations": keys.perturbations,
        "relax_cell": keys.relax_lattice,
    }


def relax_on(
    scheduler: Scheduler,
    evaluator: Evaluator,
    structures: Sequence[Atoms],
    pressure: GPa = 0.0,
    on_relaxed: OnRelaxed | None = None,
    **options: Any,
) -> list[Relaxation]:
    """As `relax`, on the workers of a remote scheduler; here, with all threads, when it is none or
    the evaluator cannot travel.

    ``on_relaxed(index, relaxation)`` is called here as structures end, in any order. Raises
    ``MagusAnharmonicError`` for what is no property of a structure: the workers cannot make the
    evaluator, or one structure alone has ended several of them.
    """
    source = serialised(evaluator, remote=True) if scheduler.remote and structures else None
    if source is None:
        results = relax(evaluator, structures, pressure, **options)
        for index, result in enumerate(results if on_relaxed is not None else ()):
            on_relaxed(index, result)  # type: ignore[misc]
        return results
    size = CHUNK[scheduler.device]
    copies = [stripped(atoms, constraints=True) for atoms in structures]
    chunks = [
        list(range(first, min(first + size, len(copies)))) for first in range(0, len(copies), size)
    ]
    found: dict[int, Relaxation] = {}
    lost: list[list[int]] = []

    def take(chunk: list[int], done: Done) -> None:
        names = ", ".join(copies[index].get_chemical_formula() for index in chunk[:3])
        for index, result in zip(chunk, _results(done, names), strict=True):
            found[index] = result
            if on_relaxed is not None:
                on_relaxed(index, result)
        log.info("relaxed %d of %d structures", len(found), len(copies))

    for done in scheduler.map(
        _relax_chunk, (([copies[i] for i in chunk], pressure, options) for chunk in chunks), source
    ):
        chunk = chunks[done.index]
        if done.died and len(chunk) > 1:
            lost.append(chunk)
        else:
            take(chunk, done)
    # Which structure of a chunk kills workers shows only when each is alone.
    alone = [index for chunk in lost for index in chunk]
    for done in (
        scheduler.map(_relax_chunk, (([copies[i]], pressure, options) for i in alone), source)
        if alone
        else ()
    ):
        take([alone[done.index]], done)
    return [found[index] for index in range(len(copies))]


def _relax_chunk(
    item: tuple[list[Atoms], float, dict[str, Any]], evaluator: Evaluator
) -> list[Relaxation]:
    structures, pressure, options = item
    return relax(evaluator, structures, pressure, **options)


def _results(done: Done, names: str) -> list[Relaxation]:
    if done.died:
        raise MachineError(f"the workers that relax {names} die: {done.reason}")
    if done.reason:
        raise MagusAnharmonicError(f"no relaxation on the workers: {done.reason}")
    return done.value
