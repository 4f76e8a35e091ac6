"""Relaxation of one structure: optimisers, perturbations, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import is_machine_error, one_line
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.potential.guards import (
    APART_AT_START,
    BOND_RANGE,
    CellGuard,
    SymmetryProjector,
    expected_pairs,
    isolated,
    n_pieces,
    overlap,
    why_invalid,
)
from magus_anharmonic.potential.optimizers import ENTHALPY_NOISE, MinimiserState, Options, Point
from magus_anharmonic.structures import fixed_atoms, stripped, structure_id
from magus_anharmonic.units import ev_per_a3_to_gpa

logger = logging.getLogger(__name__)

# Angstrom, in turn; smaller ones fall back where they came from, each mends other starts
PERTURBATION_SIZES = (0.2, 0.35, 0.5)
NEAR_MINIMUM = 1.0  # eV/A
FREE_STEPS = 12  # after a perturbation, before its Hessian is believed
DECREASE_FACTOR = 5.0  # on what a Hessian from few steps expects
SMALLEST_GAIN = 1e-4  # eV/atom

Result = tuple[float, np.ndarray, np.ndarray]
T = TypeVar("T")


class SingleRelaxation:
    """Relaxation of one structure, a `MinimiserState` for each optimiser, until it has converged,
    failed or run out of steps."""

    minimiser: MinimiserState
    """Of the present optimiser; not there while `_start` has not found the structure sound."""

    def __init__(self, atoms: Atoms, options: Options) -> None:
        self.options = options
        self.atoms = stripped(atoms)
        self.reason = ""
        self.failed = self.done = self.converged = False
        self.n_steps = 0
        self.kept: tuple[Point, Atoms] | None = None
        self.waiting = list(options.optimizer)
        self.lowest: Point | None = None
        self.attempt(self._start, atoms)

    def _start(self, given: Atoms) -> None:
        """Check the structure and set up the first optimiser."""
        options = self.options
        if reason := why_invalid(self.atoms):
            self.done, self.reason, self.failed = True, reason, True
            return
        self.fixed = fixed_atoms(given)
        projected = options.fix_symmetry and self.atoms.pbc.all()
        self.projector = SymmetryProjector(self.atoms, options.symprec) if projected else None
        if options.perturbations:
            self.rng = np.random.default_rng(int(structure_id(self.atoms), 16))
        self._next_optimizer()

    def attempt(self, action: Callable[..., T], *arguments: object) -> T | None:
        """Call a method of this relaxation; what it raises ends this relaxation and no other,
        unless it is a machine error."""
        try:
            return action(*arguments)
        except Exception as error:
            if is_machine_error(error):
                raise
            logger.debug("%s of %s failed", action.__name__, self.atoms, exc_info=True)
            reason = one_line(error)
            if not hasattr(self, "minimiser"):
                self.done, self.reason, self.failed = True, reason, True
            else:
                self._end(f"the next step fails: {reason}", failed=True)
            return None

    def _next_optimizer(self) -> None:
        """Begin at the start with the next of the optimisers."""
        self.minimiser = MinimiserState(
            self.atoms, self.options, self.projector, self.waiting.pop(0), self.fixed
        )
        self.isolated = isolated(self.minimiser.start)
        self.n_pieces = n_pieces(self.minimiser.start, APART_AT_START)
        self.guard = CellGuard(self.minimiser.start_lattice, len(self.atoms))
        self.n_perturbations = self.free_until = 0
        self.reason, self.lowest = "", None

    def n_edges(self) -> float:
        """Pairs of atoms within `BOND_RANGE`, estimated from the density."""
        return expected_pairs(self.minimiser.structure(), BOND_RANGE)

    def propose(self) -> Atoms | None:
        """The next structure to evaluate; None when the step led to overlapping atoms (the next
        step is shorter)."""
        self.n_steps += 1
        atoms = self.minimiser.propose()
        if self.minimiser.point is not None and (reason := overlap(atoms)):
            self.minimiser.shrink()
            self.reason = reason
            return None
        return atoms

    def receive(self, result: Result | str) -> None:
        if isinstance(result, tuple):
            if not self.minimiser.relax_cell or np.isfinite(result[2]).all():
                if self.minimiser.receive(*result):
                    self.reason = ""
                return
            result = "there is no stress, which a variable cell needs"
        if self.minimiser.point is None:
            self._end(result, failed=True)
        else:
            self.minimiser.shrink()
            self.reason = result

    def _end(self, reason: str, failed: bool = False, converged: bool = False) -> None:
        """The end, another perturbation or the next optimiser; a search that fails does not spoil a
        minimum that was found before it."""
        if converged:
            self._keep_lower()
        if self.kept is not None:
            reason, failed, converged = "", False, True
        if self.n_steps < self.options.max_steps:
            if self.lowest is not None and self.n_perturbations < self.options.perturbations:
                self.minimiser.perturb(
                    self.lowest.x,
                    PERTURBATION_SIZES[self.n_perturbations % len(PERTURBATION_SIZES)],
                    self.rng,
                )
                self.n_perturbations += 1
                self.free_until = self.n_steps + FREE_STEPS
                return
            if self.waiting:
                self._next_optimizer()
                return
        self.done, self.reason, self.failed, self.converged = True, reason, failed, converged

    def _keep_lower(self) -> None:
        point = self.minimiser.here
        if self.lowest is None or point.enthalpy < self.lowest.enthalpy:
            self.lowest = point
        if self.kept is None or point.enthalpy < self.kept[0].enthalpy:
            self.kept = point, self.minimiser.structure()

    def judge(self) -> None:
        """End the relaxation where it has converged, diverged, got stuck or run out of steps."""
        minimiser = self.minimiser
        if self.done or minimiser.point is None:
            return
        last = minimiser.stuck or self.n_steps >= self.options.max_steps
        if not last and self._to_be_pruned():
            self._end("ends no lower than before the perturbation")
            return
        noise = ENTHALPY_NOISE * len(self.atoms)
        higher = minimiser.here.enthalpy > minimiser.best.enthalpy + noise
        if higher and (last or self._converged()):
            minimiser.return_to_best()
            minimiser.downwards = True
        diverged = (
            self.guard.diverged(minimiser.lattice(minimiser.x)) if minimiser.relax_cell else ""
        )
        if diverged:
            self._end(diverged, failed=True)
        elif last or self._converged():
            self._finish()

    def _to_be_pruned(self) -> bool:
        """After a perturbation: near a minimum that is not expected to be lower than the
        unperturbed one."""
        minimiser = self.minimiser
        if self.lowest is None or self.n_steps < self.free_until:
            return False
        if minimiser.residual()[0] > NEAR_MINIMUM:
            return False
        decrease = DECREASE_FACTOR * minimiser.rule.predicted_decrease(minimiser.here.gradient)
        expected = minimiser.here.enthalpy - decrease
        return expected > self.lowest.enthalpy - SMALLEST_GAIN * len(self.atoms)

    def _converged(self) -> bool:
        force, stress = self.minimiser.residual()
        return force < self.options.force_tolerance and stress < self.options.stress_tolerance

    def _finish(self) -> None:
        """Say how it ended at the point where the search stands."""
        atoms = self.minimiser.structure()
        wrong = overlap(atoms) or self._dissolved(atoms)
        if wrong:
            self._end(wrong, failed=True)
        elif self._converged():
            self._end("", converged=True)
        elif self.minimiser.stuck and self.reason:
            self._end(f"every step fails: {self.reason}", failed=True)
        else:
            force, stress = self.minimiser.residual()
            cause = (
                "no step lowers the enthalpy"
                if self.minimiser.stuck
                else f"not converged after {self.n_steps} steps"
            )
            self._end(
                f"{cause} (largest force {force:.3g} eV/A, stress off by"
                f" {ev_per_a3_to_gpa(stress):.3g} GPa)"
            )

    def _dissolved(self, atoms: Atoms) -> str:
        if lost := sorted(isolated(atoms) - self.isolated):
            return f"dissolved: atom {lost[0]} has no neighbour within {BOND_RANGE:g} A any more"
        if n_pieces(atoms, BOND_RANGE) > self.n_pieces:
            return (
                f"dissolved: falls into pieces that are more than {BOND_RANGE:g} A from each other"
            )
        return ""

    def result(self) -> Relaxation:
        minimiser = getattr(self, "minimiser", None)
        if self.kept is None and minimiser is not None and minimiser.point is not None:
            self.kept = minimiser.point, minimiser.structure()
        if self.kept is None:
            return Relaxation.without_result(
                self.atoms, self.reason or "never evaluated", self.n_steps
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
