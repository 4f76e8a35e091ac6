"""Relaxation of many structures at once, at a pressure, on any `Evaluator`, here or on workers; and
what a worker needs to have the same evaluator."""

from __future__ import annotations

import logging
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from threadpoolctl import threadpool_limits

from magus_anharmonic.calculator_check import check_calculator
from magus_anharmonic.errors import MachineError, MagusAnharmonicError, one_line
from magus_anharmonic.evaluator import Evaluator, Relaxation, evaluate_each
from magus_anharmonic.io.digests import digest
from magus_anharmonic.notebook import says_in_notebooks
from magus_anharmonic.potential.guards import why_invalid
from magus_anharmonic.potential.optimizers import Options, checked
from magus_anharmonic.potential.relaxation import Result, SingleRelaxation
from magus_anharmonic.runs.record import Progress
from magus_anharmonic.scheduler import Done, Scheduler
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa

logger = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # s
BATCHES_IN_FLIGHT = 8  # so that the last batch of a round is seldom a small one
EDGES_IN_FLIGHT = 200_000  # for evaluators that do not say how many edges they take at once
ABSURD = 1e12  # eV, eV/A, eV/A^3; step rules square them and would overflow before long


@says_in_notebooks
def relax(
    evaluator: Evaluator,
    structures: Sequence[Atoms],
    pressure: GPa = 0.0,
    *,
    force_tolerance: float = 0.05,
    stress_tolerance: float = 0.1,
    max_steps: int = 500,
    max_move: float = 0.1,
    relax_cell: bool = True,
    fix_symmetry: bool = False,
    symprec: float = 0.01,
    optimizer: str | Sequence[str] = "ase",
    perturbations: int = 0,
    edges_in_flight: int | None = None,
) -> list[Relaxation]:
    """Relax positions and cell of each structure to the nearest minimum of E + P V; results in the
    order of the input.

    Every round evaluates all structures in flight in one call; those that have finished leave, and
    waiting ones enter. Atoms held by ASE's FixAtoms stay (where the cell relaxes: at their place in
    it) and do not count for convergence; a structure with another constraint fails. The given Atoms
    are not changed, and one that is not periodic in three directions keeps its cell. A structure's
    path does not depend on the others, except for the rounding of their common batches.

    pressure, stress_tolerance
        GPa, the pressure from -2000 to 2000; converged when the largest force is below
        ``force_tolerance`` (eV/A) and each component of stress + P below this.
    max_move
        Longest step of an atom, Angstrom; also of each row of sqrt(N) times the strain.
    fix_symmetry
        Keep the space group found at ``symprec`` (Angstrom); only of structures that are periodic
        in three directions.
    optimizer
        ``ase``, the path of ASE's BFGS with FrechetCellFilter (whose own ``max_move`` is 0.2);
        ``bfgs``, quasi-Newton steps, a third fewer but more often to a higher minimum; or ``fire``,
        damped dynamics: slower, and no harm where forces are rough. Several of
        them: each relaxes from the start, the lowest end is kept.
    perturbations
        How often a converged structure is displaced at random (0.2, 0.35 and 0.5 Angstrom in turn,
        seeded by the structure) and relaxed again, for each optimiser; the lowest is kept, and a
        relaxation ends as soon as it is not expected to get lower. Relaxations from symmetric
        starts end on saddle points with every optimiser; this leaves them. The steps of all
        together count for ``max_steps``.
    edges_in_flight
        Pairs within 5 Angstrom (estimated from the densities) of all structures in flight; more
        wait. Default: eight batches of the evaluator.

    One bad structure stops no other: it comes back with ``failed`` and a reason. A result with
    species that the model was never trained on says so in its reason, even where it has converged.
    Raises InputError for invalid arguments, and for an ASE calculator whose forces or stress do
    not belong to its energies (`calculator_check`).
    """
    options = checked(
        pressure=pressure,
        force_tolerance=force_tolerance,
        stress_tolerance=stress_tolerance,
        max_steps=max_steps,
        max_move=max_move,
        relax_cell=relax_cell,
        fix_symmetry=fix_symmetry,
        symprec=symprec,
        optimizer=optimizer,
        perturbations=perturbations,
        edges_in_flight=edges_in_flight,
    )
    _warn_of_open_ones(structures, fix_symmetry)
    results: dict[int, Relaxation] = {}
    # Hessians and cells have less than a hundred rows: more threads of BLAS only wait for each
    # other, and take the cores from the evaluations (on two cores 12.1 s with, 4.4 s without)
    with threadpool_limits(1, user_api="blas"):
        first = next((atoms for atoms in structures if not why_invalid(atoms)), None)
        if first is not None:
            check_calculator(evaluator, first, stress=relax_cell)
        for index, relaxation in _finished(
            evaluator, structures, options, edges_in_flight or _capacity(evaluator)
        ):
            results[index] = _with_note(relaxation.result(), evaluator)
    return [results[index] for index in range(len(structures))]


def _warn_of_open_ones(structures: Sequence[Atoms], fix_symmetry: bool) -> None:
    open_ones = sum(not atoms.pbc.all() for atoms in structures) if fix_symmetry else 0
    if open_ones:
        logger.warning(
            "fix_symmetry: %d of %d structures are not periodic in three directions and relax"
            " without it",
            open_ones,
            len(structures),
        )


def _with_note(result: Relaxation, evaluator: Evaluator) -> Relaxation:
    """A result whose reason names the species that the model has never seen."""
    seen = getattr(evaluator, "species_seen", None)
    unseen = sorted(set(result.atoms.numbers.tolist()) - set(seen)) if seen is not None else []
    if not unseen:
        return result
    note = (
        "the model was never trained on"
        f" {', '.join(chemical_symbols[number] for number in unseen)}: its numbers mean nothing"
        " there"
    )
    return replace(result, reason="; ".join(filter(None, (result.reason, note))))


def _capacity(evaluator: Evaluator) -> int:
    per_batch = getattr(evaluator, "edges_per_batch", None)
    return BATCHES_IN_FLIGHT * int(per_batch) if per_batch else EDGES_IN_FLIGHT


def _finished(
    evaluator: Evaluator, structures: Sequence[Atoms], options: Options, capacity: int
) -> Iterator[tuple[int, SingleRelaxation]]:
    """Index and end of each relaxation as it finishes; at most ``capacity`` edges, or one
    structure, are in flight at a time."""
    flying: dict[int, SingleRelaxation] = {}
    waiting, entered, ended, rounds = iter(enumerate(structures)), 0, 0, 0
    progress = Progress(len(structures), interval=LOG_INTERVAL)
    while flying or entered < len(structures):
        # nobody waits in most rounds, and then nobody asks
        waits = entered < len(structures)
        edges = sum(relaxation.n_edges() for relaxation in flying.values()) if waits else 0.0
        while entered < len(structures) and (edges < capacity or not flying):
            index, atoms = next(waiting)
            entered += 1
            relaxation = SingleRelaxation(atoms, options)
            if relaxation.done:
                yield index, relaxation
                continue
            flying[index] = relaxation
            edges += relaxation.n_edges()
        _round(evaluator, list(flying.values()))
        done = [index for index, relaxation in flying.items() if relaxation.done]
        rounds, ended = rounds + 1, entered - len(flying) + len(done)
        if ended < len(structures) and progress.due():
            # until the first one has ended, by the rounds that it may take
            pace = (
                (ended, len(structures) - ended)
                if ended
                else (rounds, max(options.max_steps - rounds, 1))
            )
            logger.info(
                "relaxed %d of %d structures, %d rounds, %.0f s%s",
                ended, len(structures), rounds, progress.seconds, progress.left(*pace, ", "),
            )  # fmt: skip
        for index in done:
            yield index, flying.pop(index)


def _round(evaluator: Evaluator, relaxations: list[SingleRelaxation]) -> None:
    """One step of every structure in flight."""
    trials = [(relaxation, relaxation.attempt(relaxation.propose)) for relaxation in relaxations]
    usable = [(relaxation, atoms) for relaxation, atoms in trials if atoms is not None]
    found = evaluate_each(evaluator, [atoms for _, atoms in usable], Exception)
    for (relaxation, _), one in zip(usable, found, strict=True):
        if isinstance(one, str):
            # alone it is number 0, which is not its number among the structures of `relax`
            result: Result | str = re.sub(
                r"\bstructure 0\b", "the structure", one.removeprefix("structure 0: ")
            )
        else:
            numbers = float(one.energy[0]), one.forces[0], one.stress[0]
            result = _why_invalid_numbers(*numbers) or numbers
        relaxation.attempt(relaxation.receive, result)
    for relaxation in relaxations:
        relaxation.attempt(relaxation.judge)


def _why_invalid_numbers(energy: float, forces: np.ndarray, stress: np.ndarray) -> str:
    """What is wrong with a result, or an empty string; one without any stress will do while the
    cell is fixed (`SingleRelaxation.receive`)."""
    largest = {"energy": abs(energy), "forces": np.abs(forces).max(initial=0.0)}
    largest |= {} if np.isnan(stress).all() else {"stress": np.abs(stress).max()}
    if not np.isfinite(list(largest.values())).all():
        return "energy, forces or stress are not finite"
    absurd = [f"{name} of {value:.1e}" for name, value in largest.items() if value > ABSURD]
    return f"{', '.join(absurd)} in eV and A cannot be" if absurd else ""


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
        logger.info("the evaluator cannot be sent to another process: %s", one_line(error))
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
        logger.info("relaxed %d of %d structures", len(found), len(copies))

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
    ones = (([copies[i]], pressure, options) for i in alone)
    for done in scheduler.map(_relax_chunk, ones, source) if alone else ():
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
