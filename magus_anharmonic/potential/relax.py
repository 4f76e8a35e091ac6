"""Relaxation of many structures at once, at a pressure, on any `Evaluator`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from vesin import NeighborList

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.potential.graph import complete_cell
from magus_anharmonic.potential.symmetrise import SymmetryProjector
from magus_anharmonic.potential.trajectory import Trajectory
from magus_anharmonic.structures import bare
from magus_anharmonic.units import ev_per_a3_to_gpa, gpa_to_ev_per_a3

logger = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # s
OVERLAP = 0.4  # of the sum of covalent radii
COINCIDENT = 0.1  # Angstrom
BOND_RANGE = 5.0  # Angstrom; an atom without a neighbour in this range is on its own
MAX_EXPANSION = 4.0  # of the volume at the start
MIN_VOLUME = 0.3  # A^3/atom
MAX_ASPECT = 30.0  # longest by shortest cell vector
MIN_SHAPE = 0.02  # volume by product of the vectors' lengths


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
) -> list[Relaxation]:
    """Relax positions and cell of each structure to the nearest minimum of E + P V; results in the order of the input.

    Every round evaluates all structures that are still on their way in one batch. Constraints of the given Atoms are ignored,
    the Atoms are not changed, and a structure that is not periodic in three directions keeps its cell.

    pressure, stress_tolerance
        GPa; converged when the largest force is below ``force_tolerance`` (eV/A) and each component of stress + P below this.
    max_move
        Longest step of an atom, Angstrom; a step's strain is at most half that per Angstrom.
    fix_symmetry
        Keep the space group found at ``symprec`` (Angstrom).

    One bad structure stops no other: it comes back with ``failed`` and a reason. Raises InputError for senseless arguments.
    """
    for name, value in (("force_tolerance", force_tolerance), ("stress_tolerance", stress_tolerance), ("max_move", max_move)):
        if not value > 0:
            raise InputError(f"{name} = {value}: must be positive")
    if max_steps < 1:
        raise InputError(f"max_steps = {max_steps}: must be at least 1")
    if not np.isfinite(pressure):
        raise InputError(f"pressure = {pressure}: must be a number in GPa")
    stress_limit = gpa_to_ev_per_a3(stress_tolerance)
    ways = [_Way(atoms, gpa_to_ev_per_a3(pressure), max_move, relax_cell, fix_symmetry, symprec) for atoms in structures]
    progress = _Progress(len(ways), max_steps)
    for step in range(1, max_steps + 1):
        pending = [way for way in ways if not way.done]
        trials = [way.propose() for way in pending]
        usable = [(way, atoms) for way, atoms in zip(pending, trials, strict=True) if atoms is not None]
        for (way, _), result in zip(usable, _evaluate_each(evaluator, [atoms for _, atoms in usable]), strict=True):
            way.receive(result)
        for way in pending:
            way.judge(force_tolerance, stress_limit, last=step == max_steps)
        progress.report(step, sum(not way.done for way in ways))
        if all(way.done for way in ways):
            break
    return [way.result() for way in ways]


_Result = tuple[float, np.ndarray, np.ndarray]


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
    """A `Trajectory` with its end: converged, failed, or out of steps."""

    def __init__(self, atoms: Atoms, pressure: float, max_move: float, relax_cell: bool, fix_symmetry: bool, symprec: float) -> None:
        self.atoms = bare(atoms)
        self.reason = _senseless(self.atoms)
        self.failed = self.done = bool(self.reason)
        self.converged = False
        self.n_steps = 0
        self.trajectory: Trajectory | None = None
        if not self.failed:
            projector = SymmetryProjector(self.atoms, symprec) if fix_symmetry and self.atoms.pbc.all() else None
            self.trajectory = Trajectory(self.atoms, pressure, max_move, relax_cell, projector)
            self.isolated = _isolated(self.trajectory.start)
            self.start_volume = self.trajectory.start.cell.volume
            self.aspect, self.shape = _aspect(self.trajectory.start), _shape(self.trajectory.start)

    def propose(self) -> Atoms | None:
        """The next structure to evaluate; None when the step led to overlapping atoms (the next step is shorter)."""
        assert self.trajectory is not None
        atoms = self.trajectory.propose()
        self.n_steps += 1
        if self.trajectory.gradient is not None and _overlap(atoms):
            self.trajectory.shrink()
            self.reason = _overlap(atoms)
            return None
        return atoms

    def receive(self, result: _Result | str) -> None:
        assert self.trajectory is not None
        if not isinstance(result, str):
            if self.trajectory.receive(*result):
                self.reason = ""
        elif self.trajectory.gradient is None:
            self._end(result, failed=True)
        else:
            self.trajectory.shrink()
            self.reason = result

    def _end(self, reason: str, failed: bool = False, converged: bool = False) -> None:
        self.done, self.reason, self.failed, self.converged = True, reason, failed, converged

    def judge(self, force_tolerance: float, stress_limit: float, last: bool) -> None:
        """End the relaxation where it has converged, gone astray, stuck or run out of steps."""
        if self.done or self.trajectory is None or self.trajectory.gradient is None:
            return
        force, stress = self.trajectory.residual()
        rest = f"largest force {force:.3g} eV/A, stress off by {ev_per_a3_to_gpa(stress):.3g} GPa"
        atoms = self.trajectory.structure()
        astray = self._astray(atoms)
        converged = force < force_tolerance and stress < stress_limit
        if astray:
            self._end(astray, failed=True)
        elif converged or last or self.trajectory.stuck:
            wrong = _overlap(atoms) or self._dissolved(atoms)
            if wrong:
                self._end(wrong, failed=True)
            elif converged:
                self._end("", converged=True)
            elif self.trajectory.stuck and self.reason:
                self._end(f"every step fails: {self.reason}", failed=True)
            else:
                cause = "no step lowers the enthalpy" if self.trajectory.stuck else f"not converged after {self.n_steps} steps"
                self._end(f"{cause} ({rest})")

    def _astray(self, atoms: Atoms) -> str:
        if not self.trajectory.relax_cell:
            return ""
        volume = atoms.cell.volume
        if volume > MAX_EXPANSION * self.start_volume:
            return f"runaway cell: the volume grew {volume / self.start_volume:.1f} times"
        if volume < MIN_VOLUME * len(atoms):
            return f"runaway cell: collapsed to {volume / len(atoms):.2f} A^3/atom"
        if _aspect(atoms) > max(MAX_ASPECT, 1.5 * self.aspect) or _shape(atoms) < min(MIN_SHAPE, 0.7 * self.shape):
            return f"runaway cell: needle or plate (longest by shortest vector {_aspect(atoms):.0f})"
        return ""

    def _dissolved(self, atoms: Atoms) -> str:
        lost = sorted(_isolated(atoms) - self.isolated)
        return f"dissolved: atom {lost[0]} has no neighbour within {BOND_RANGE:g} A any more" if lost else ""

    def result(self) -> Relaxation:
        way = self.trajectory
        if way is None or way.gradient is None:
            nothing = np.full((len(self.atoms), 3), np.nan)
            return Relaxation(
                self.atoms, np.nan, np.nan, nothing, np.full((3, 3), np.nan), False, True, self.n_steps, self.reason or "never evaluated"
            )
        enthalpy = way.enthalpy / len(self.atoms)
        return Relaxation(
            way.structure(), way.energy, enthalpy, way.forces, way.stress, self.converged, self.failed, self.n_steps, self.reason
        )


class _Progress:
    """One log line every ten seconds."""

    def __init__(self, total: int, max_steps: int) -> None:
        self.total, self.max_steps = total, max_steps
        self.begun = self.last = time.monotonic()

    def report(self, step: int, remaining: int) -> None:
        now = time.monotonic()
        if now - self.last < LOG_INTERVAL or not remaining:
            return
        self.last = now
        spent = now - self.begun
        finished = self.total - remaining
        guess = spent * remaining / finished if finished else spent * (self.max_steps - step) / step
        logger.info("relaxed %d of %d structures, %d steps, %.0f s, about %.0f s left", finished, self.total, step, spent, guess)


def _pairs(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    finder = NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
    first, second, distance = finder.compute(atoms.positions, complete_cell(atoms).array, atoms.pbc, "ijd")
    return first.astype(int), second.astype(int), distance


def _senseless(atoms: Atoms) -> str:
    """Why a structure cannot be evaluated at all, or an empty string."""
    if len(atoms) == 0:
        return "no atoms"
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return "positions or cell are not finite"
    if atoms.pbc.any() and abs(complete_cell(atoms).volume) < 1e-3:
        return "the cell is flat"
    first, second, distance = _pairs(atoms, COINCIDENT)
    return f"atoms {first[0]} and {second[0]} coincide ({distance[0]:.3f} A)" if len(distance) else ""


def _overlap(atoms: Atoms) -> str:
    radii = covalent_radii[atoms.numbers]
    first, second, distance = _pairs(atoms, max(2.0 * OVERLAP * float(radii.max()), COINCIDENT))
    close = np.flatnonzero(distance < OVERLAP * (radii[first] + radii[second]))
    return f"atoms {first[close[0]]} and {second[close[0]]} overlap ({distance[close[0]]:.2f} A)" if len(close) else ""


def _isolated(atoms: Atoms) -> set[int]:
    return set(range(len(atoms))) - set(_pairs(atoms, BOND_RANGE)[0].tolist())


def _aspect(atoms: Atoms) -> float:
    lengths = atoms.cell.lengths()
    return float(lengths.max() / max(lengths.min(), 1e-9))


def _shape(atoms: Atoms) -> float:
    return float(atoms.cell.volume / max(np.prod(atoms.cell.lengths()), 1e-9))
