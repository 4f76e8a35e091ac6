"""Relaxation of many structures at once, at a pressure, on any `Evaluator`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.potential.graph import expected_pairs
from magus_anharmonic.potential.guards import BOND_RANGE, CellGuard, isolated, overlap, senseless
from magus_anharmonic.potential.optimizers import OPTIMIZERS
from magus_anharmonic.potential.symmetrise import SymmetryProjector
from magus_anharmonic.potential.threads import one_thread_for_small_matrices
from magus_anharmonic.potential.trajectory import ENTHALPY_NOISE, Point, Trajectory
from magus_anharmonic.structures import bare, structure_id
from magus_anharmonic.units import ev_per_a3_to_gpa, gpa_to_ev_per_a3

logger = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # s
BATCHES_IN_FLIGHT = 8  # so that the last batch of a round is seldom a small one
KICKS = (0.2, 0.35, 0.5)  # Angstrom, in turn; smaller ones fall back where they came from, each mends other starts
NEAR_MINIMUM = 1.0  # eV/A
FREE_STEPS = 12  # after a kick, before its Hessian is believed
DECREASE_MARGIN = 5.0  # on what a Hessian from few steps expects
SMALLEST_GAIN = 1e-4  # eV/atom
EDGES_IN_FLIGHT = 200_000  # for evaluators that do not say how many edges they take at once


@dataclass(frozen=True)
class Relaxation:
    """The end of one relaxation.

    atoms carries species, cell and positions alone; energy eV; enthalpy eV/atom; forces (N, 3) eV/A; stress (3, 3) eV/A^3 in
    ASE's sign. ``failed`` structures must not be used, ``reason`` says why (or why one has not converged); n_steps counts
    evaluations.
    """

    atoms: Atoms
    energy: float
    enthalpy: float
    forces: np.ndarray
    stress: np.ndarray
    converged: bool
    failed: bool
    n_steps: int
    reason: str = ""


@dataclass(frozen=True)
class _Options:
    """Arguments of `relax`, with pressures in eV/A^3."""

    pressure: float
    force_tolerance: float
    stress_tolerance: float
    max_steps: int
    max_move: float
    relax_cell: bool
    fix_symmetry: bool
    symprec: float
    optimizers: tuple[str, ...]
    kicks: int


def relax(
    evaluator: Evaluator,
    structures: Sequence[Atoms],
    pressure: float = 0.0,
    *,
    force_tolerance: float = 0.05,
    stress_tolerance: float = 0.1,
    max_steps: int = 500,
    max_move: float = 0.1,
    relax_cell: bool = True,
    fix_symmetry: bool = False,
    symprec: float = 0.01,
    optimizer: str | Sequence[str] = "ase",
    kicks: int = 0,
    edges_in_flight: int | None = None,
) -> list[Relaxation]:
    """Relax positions and cell of each structure to the nearest minimum of E + P V; results in the order of the input.

    Every round evaluates all structures in flight in one call; those that have finished leave, and waiting ones enter.
    Constraints of the given Atoms are ignored, the Atoms are not changed, and a structure that is not periodic in three
    directions keeps its cell. A structure's path does not depend on the others, except for the rounding of their common batches.

    pressure, stress_tolerance
        GPa; converged when the largest force is below ``force_tolerance`` (eV/A) and each component of stress + P below this.
    max_move
        Longest step of an atom, Angstrom; also of each row of sqrt(N) times the strain.
    fix_symmetry
        Keep the space group found at ``symprec`` (Angstrom).
    optimizer
        ``ase``, the path of ASE's BFGS with FrechetCellFilter (whose own ``max_move`` is 0.2); ``bfgs``, quasi-Newton steps, a third
        fewer but more often to a higher minimum; or ``fire``, damped dynamics: slower, and no harm where forces are rough. Several of
        them: each goes its own way from the start, the lowest end is kept.
    kicks
        How often a converged structure is displaced at random (0.2, 0.35 and 0.5 Angstrom in turn, seeded by the structure) and relaxed
        again, for each optimiser; the lowest is kept, and a relaxation ends as soon as it is not expected to get lower. Relaxations from
        symmetric starts end on saddle points with every optimiser; this leaves them. The steps of all together count for ``max_steps``.
    edges_in_flight
        Pairs within 5 Angstrom (estimated from the densities) of all structures in flight; more wait. Default: eight batches
        of the evaluator.

    One bad structure stops no other: it comes back with ``failed`` and a reason. Raises InputError for senseless arguments.
    """
    for name, value in (("force_tolerance", force_tolerance), ("stress_tolerance", stress_tolerance), ("max_move", max_move)):
        if not value > 0:
            raise InputError(f"{name} = {value}: must be positive")
    for name, value in (("max_steps", max_steps), ("edges_in_flight", 1 if edges_in_flight is None else edges_in_flight)):
        if value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    if kicks < 0 or (kicks and fix_symmetry):
        raise InputError(f"kicks = {kicks}: must be 0 or more, and 0 with fix_symmetry, because they break it")
    if not np.isfinite(pressure):
        raise InputError(f"pressure = {pressure}: must be a number in GPa")
    optimizers = (optimizer,) if isinstance(optimizer, str) else tuple(optimizer)
    if not optimizers or not set(optimizers) <= set(OPTIMIZERS):
        raise InputError(f"optimizer = {optimizer!r}: only {', '.join(OPTIMIZERS)}, or several of them, are possible")
    options = _Options(
        pressure=gpa_to_ev_per_a3(pressure),
        force_tolerance=force_tolerance,
        stress_tolerance=gpa_to_ev_per_a3(stress_tolerance),
        max_steps=max_steps,
        max_move=max_move,
        relax_cell=relax_cell,
        fix_symmetry=fix_symmetry,
        symprec=symprec,
        optimizers=optimizers,
        kicks=kicks,
    )
    results: dict[int, Relaxation] = {}
    progress = _Progress(len(structures), max_steps)
    with one_thread_for_small_matrices():
        for index, way in _finished(evaluator, structures, options, edges_in_flight or _capacity(evaluator), progress):
            results[index] = way.result()
    return [results[index] for index in range(len(structures))]


def _capacity(evaluator: Evaluator) -> int:
    per_batch = getattr(evaluator, "edges_per_batch", None)
    return BATCHES_IN_FLIGHT * int(per_batch) if per_batch else EDGES_IN_FLIGHT


def _finished(
    evaluator: Evaluator, structures: Sequence[Atoms], options: _Options, capacity: int, progress: _Progress
) -> Iterator[tuple[int, _Way]]:
    """Index and end of each relaxation as it finishes; at most ``capacity`` edges, or one structure, are in flight at a time."""
    flying: dict[int, _Way] = {}
    waiting, entered = iter(enumerate(structures)), 0
    while flying or entered < len(structures):
        edges = sum(way.n_edges() for way in flying.values())
        while entered < len(structures) and (edges < capacity or not flying):
            index, atoms = next(waiting)
            entered += 1
            way = _Way(atoms, options)
            if way.done:
                yield index, way
                continue
            flying[index] = way
            edges += way.n_edges()
        _round(evaluator, list(flying.values()))
        done = [index for index, way in flying.items() if way.done]
        progress.report(len(done))
        for index in done:
            yield index, flying.pop(index)


_Result = tuple[float, np.ndarray, np.ndarray]


def _round(evaluator: Evaluator, ways: list[_Way]) -> None:
    """One step of every structure in flight."""
    trials = [(way, way.propose()) for way in ways]
    usable = [(way, atoms) for way, atoms in trials if atoms is not None]
    for (way, _), result in zip(usable, _evaluate_each(evaluator, [atoms for _, atoms in usable]), strict=True):
        way.receive(result)
    for way in ways:
        way.judge()


def _evaluate_each(evaluator: Evaluator, structures: list[Atoms]) -> list[_Result | str]:
    """Energy, forces and stress of each structure, or the reason why there is none.

    When a batch fails, its structures are evaluated one by one, so that the others do not suffer.
    """
    if not structures:
        return []
    try:
        found = evaluator.evaluate(structures)
    except Exception as error:
        if len(structures) > 1:
            return [_evaluate_each(evaluator, [atoms])[0] for atoms in structures]
        logger.debug("evaluation of %s failed", structures[0], exc_info=True)
        return [" ".join(str(error).split()) or type(error).__name__]
    results: list[_Result | str] = []
    for energy, forces, stress in zip(found.energy, found.forces, found.stress, strict=True):
        finite = np.isfinite(energy) and np.isfinite(forces).all() and np.isfinite(stress).all()
        results.append((float(energy), forces, stress) if finite else "energy, forces or stress are not finite")
    return results


class _Way:
    """The way of one structure, a `Trajectory` for each optimiser, with its end: converged, failed, or out of steps."""

    def __init__(self, atoms: Atoms, options: _Options) -> None:
        self.options = options
        self.atoms = bare(atoms)
        self.reason = senseless(self.atoms)
        self.failed = self.done = bool(self.reason)
        self.converged = False
        self.n_steps = 0
        self.trajectory: Trajectory | None = None
        self.kept: tuple[Point, Atoms] | None = None
        self.waiting = list(options.optimizers)
        if not self.failed:
            projected = options.fix_symmetry and self.atoms.pbc.all()
            self.projector = SymmetryProjector(self.atoms, options.symprec) if projected else None
            self.rng = np.random.default_rng(int(structure_id(self.atoms), 16)) if options.kicks else None
            self._next_optimizer()

    def _next_optimizer(self) -> None:
        """Begin at the start with the next of the optimisers."""
        options = self.options
        self.trajectory = Trajectory(
            self.atoms, options.pressure, options.max_move, options.relax_cell, self.projector, self.waiting.pop(0)
        )
        self.isolated = isolated(self.trajectory.start)
        self.guard = CellGuard(self.trajectory.start_lattice, len(self.atoms))
        self.n_kicks = self.free_until = 0
        self.reason = ""
        self.lowest: Point | None = None

    def n_edges(self) -> float:
        """Pairs of atoms within `BOND_RANGE`, estimated from the density."""
        assert self.trajectory is not None
        return expected_pairs(self.trajectory.structure(), BOND_RANGE)

    def propose(self) -> Atoms | None:
        """The next structure to evaluate; None when the step led to overlapping atoms (the next step is shorter)."""
        assert self.trajectory is not None
        atoms = self.trajectory.propose()
        self.n_steps += 1
        if self.trajectory.point is not None and (reason := overlap(atoms)):
            self.trajectory.shrink()
            self.reason = reason
            return None
        return atoms

    def receive(self, result: _Result | str) -> None:
        assert self.trajectory is not None
        if not isinstance(result, str):
            if self.trajectory.receive(*result):
                self.reason = ""
        elif self.trajectory.point is None:
            self._end(result, failed=True)
        else:
            self.trajectory.shrink()
            self.reason = result

    def _end(self, reason: str, failed: bool = False, converged: bool = False) -> None:
        """The end, another kick or the next optimiser; a search that fails does not spoil a minimum that was found before it."""
        if converged:
            self._keep_lower()
        if self.kept is not None:
            reason, failed, converged = "", False, True
        if self.n_steps < self.options.max_steps:
            if self.lowest is not None and self.n_kicks < self.options.kicks:
                assert self.trajectory is not None and self.rng is not None
                self.trajectory.kick(self.lowest.x, KICKS[self.n_kicks % len(KICKS)], self.rng)
                self.n_kicks += 1
                self.free_until = self.n_steps + FREE_STEPS
                return
            if self.waiting:
                self._next_optimizer()
                return
        self.done, self.reason, self.failed, self.converged = True, reason, failed, converged

    def _keep_lower(self) -> None:
        assert self.trajectory is not None and self.trajectory.point is not None
        point = self.trajectory.point
        if self.lowest is None or point.enthalpy < self.lowest.enthalpy:
            self.lowest = point
        if self.kept is None or point.enthalpy < self.kept[0].enthalpy:
            self.kept = point, self.trajectory.structure()

    def judge(self) -> None:
        """End the relaxation where it has converged, gone astray, stuck or run out of steps."""
        way = self.trajectory
        if self.done or way is None or way.point is None or way.best is None:
            return
        last = way.stuck or self.n_steps >= self.options.max_steps
        if not last and self._hopeless():
            self._end("ends no lower than before the kick")
            return
        higher = way.point.enthalpy > way.best.enthalpy + ENTHALPY_NOISE * len(self.atoms)
        if higher and (last or self._converged()):
            way.return_to_best()
            way.downwards = True
        astray = self.guard.astray(way.lattice(way.x)) if way.relax_cell else ""
        if astray:
            self._end(astray, failed=True)
        elif last or self._converged():
            self._finish()

    def _hopeless(self) -> bool:
        """After a kick: near a minimum that is not expected to be lower than the one that it was kicked from."""
        way = self.trajectory
        if self.lowest is None or way is None or way.point is None:
            return False
        if self.n_steps < self.free_until or way.residual()[0] > NEAR_MINIMUM:
            return False
        expected = way.point.enthalpy - DECREASE_MARGIN * way.rule.decrease(way.point.gradient)
        return expected > self.lowest.enthalpy - SMALLEST_GAIN * len(self.atoms)

    def _converged(self) -> bool:
        assert self.trajectory is not None
        force, stress = self.trajectory.residual()
        return force < self.options.force_tolerance and stress < self.options.stress_tolerance

    def _finish(self) -> None:
        """Say how it ended at the point where the search stands."""
        assert self.trajectory is not None
        atoms = self.trajectory.structure()
        wrong = overlap(atoms) or self._dissolved(atoms)
        if wrong:
            self._end(wrong, failed=True)
        elif self._converged():
            self._end("", converged=True)
        elif self.trajectory.stuck and self.reason:
            self._end(f"every step fails: {self.reason}", failed=True)
        else:
            force, stress = self.trajectory.residual()
            cause = "no step lowers the enthalpy" if self.trajectory.stuck else f"not converged after {self.n_steps} steps"
            self._end(f"{cause} (largest force {force:.3g} eV/A, stress off by {ev_per_a3_to_gpa(stress):.3g} GPa)")

    def _dissolved(self, atoms: Atoms) -> str:
        lost = sorted(isolated(atoms) - self.isolated)
        return f"dissolved: atom {lost[0]} has no neighbour within {BOND_RANGE:g} A any more" if lost else ""

    def result(self) -> Relaxation:
        way = self.trajectory
        if self.kept is None and way is not None and way.point is not None:
            self.kept = way.point, way.structure()
        if self.kept is None:
            nothing = np.full((len(self.atoms), 3), np.nan)
            return Relaxation(
                self.atoms, np.nan, np.nan, nothing, np.full((3, 3), np.nan), False, True, self.n_steps, self.reason or "never evaluated"
            )
        point, atoms = self.kept
        return Relaxation(
            atoms=atoms,
            energy=point.energy,
            enthalpy=point.enthalpy / len(atoms),
            forces=point.forces,
            stress=point.stress,
            converged=self.converged,
            failed=self.failed,
            n_steps=self.n_steps,
            reason=self.reason,
        )


class _Progress:
    """One log line every ten seconds."""

    def __init__(self, total: int, max_steps: int) -> None:
        self.total, self.max_steps = total, max_steps
        self.rounds = self.finished = 0
        self.begun = self.last = time.monotonic()

    def report(self, newly_finished: int) -> None:
        self.rounds += 1
        self.finished += newly_finished
        now, remaining = time.monotonic(), self.total - self.finished
        if now - self.last < LOG_INTERVAL or not remaining:
            return
        self.last = now
        spent = now - self.begun
        guess = spent * remaining / self.finished if self.finished else spent * max(self.max_steps - self.rounds, 1) / self.rounds
        logger.info(
            "relaxed %d of %d structures, %d rounds, %.0f s, about %.0f s left", self.finished, self.total, self.rounds, spent, guess
        )
