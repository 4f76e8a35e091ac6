"""Rules for the next step of a relaxation, and what a caller may choose of them.

Step rules of the relaxation: from gradients to the next step, for one structure each.

Arguments of a relaxation: what is allowed, and in which units it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.section import MAX_PRESSURE_GPA
from magus_anharmonic.units import gpa_to_ev_per_a3

START_CURVATURE = 40.0  # eV/A^2, between a soft metal and a bond of hydrogen; ASE has 70
SMALLEST_CURVATURE = 1e-2  # eV/A^2


@dataclass(frozen=True)
class Coordinates:
    """How a relaxation writes a cell and when it refuses a step.

    cell_power
        The coordinates of the cell are U times the number of atoms to this power, U the logarithm
        of the deformation. ASE has 1, which makes cells needlessly stiff.
    turns
        U has nine components, as ASE's, and the cell may turn; else it is symmetric.
    largest_rise
        eV/atom; a step that rises more is refused.
    patience
        Steps without a new lowest enthalpy, after which only steps that lower it are taken.
    """

    cell_power: float = 0.5
    turns: bool = False
    largest_rise: float = 1.0
    patience: float = 40


class _Newton:
    """What rules with a model of the Hessian share."""

    def step(self, gradient: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def predicted_decrease(self, gradient: np.ndarray) -> float:
        """Half of what the Newton step gains at first order."""
        return -0.5 * float(gradient @ self.step(gradient))

    def shorten(self) -> None:
        """Nothing to do: what was learnt stays valid."""


class Bfgs(_Newton):
    """Newton steps on a BFGS model of the Hessian B, along |eigenvalues|, so that they go down from
    saddles too.

    The rule of ASE's BFGS with a smaller first B. B is positive definite nearly always: the step is
    then found by Cholesky's decomposition, several times faster than by eigenvectors.
    """

    coordinates: ClassVar[Coordinates] = Coordinates()

    def __init__(self, size: int) -> None:
        self.hessian = START_CURVATURE * np.eye(size)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        try:
            return -cho_solve(cho_factor(self.hessian), gradient)
        except LinAlgError:
            values, vectors = np.linalg.eigh(self.hessian)
            return -vectors @ (
                (vectors.T @ gradient) / np.maximum(np.abs(values), SMALLEST_CURVATURE)
            )

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """The BFGS update; left out where the curvature along the step is lost in rounding."""
        curvature = float(step @ change)
        predicted = self.hessian @ step
        along = float(step @ predicted)
        if abs(curvature) > 1e-8 * (step @ step) and abs(along) > 1e-12:
            self.hessian += (
                np.outer(change, change) / curvature - np.outer(predicted, predicted) / along
            )


class AseBfgs(_Newton):
    """ASE's ``BFGS``, step for step when the coordinates are those of its ``FrechetCellFilter``.

    It follows ASE's path to the same minimum until rounding decides: where the curvature along a
    step vanishes, and at saddle points, which a symmetric start reaches.
    """

    coordinates: ClassVar[Coordinates] = Coordinates(
        cell_power=1.0, turns=True, largest_rise=np.inf, patience=np.inf
    )
    START_CURVATURE = 70.0  # eV/A^2
    SMALLEST_CURVATURE = 1e-9  # eV/A^2; ASE has no limit
    SHORTEST_STEP = 1e-7  # Angstrom

    def __init__(self, size: int) -> None:
        self.hessian = self.START_CURVATURE * np.eye(size)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(self.hessian)
        return -vectors @ (
            (gradient @ vectors) / np.maximum(np.abs(values), self.SMALLEST_CURVATURE)
        )

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """The BFGS update, also with a negative curvature along the step."""
        curvature, predicted = float(step @ change), self.hessian @ step
        along = float(step @ predicted)
        if np.abs(step).max() >= self.SHORTEST_STEP and curvature and along:
            self.hessian += (
                np.outer(change, change) / curvature - np.outer(predicted, predicted) / along
            )


class Fire:
    """The fast inertial relaxation engine: damped dynamics that stop whenever they go uphill.

    E. Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006), doi:10.1103/PhysRevLett.97.170201, with
    ASE's order of operations and values; all masses are 1.
    """

    coordinates: ClassVar[Coordinates] = Coordinates()
    FIRST_TIME_STEP, LONGEST_TIME_STEP, SHORTEST_TIME_STEP = 0.1, 1.0, 0.02
    GROWTH, DECAY, PATIENCE = 1.1, 0.5, 5
    MIXING, MIXING_DECAY = 0.1, 0.99

    def __init__(self, size: int) -> None:
        self.velocity = np.zeros(size)
        self.time_step, self.mixing, self.downhill = self.FIRST_TIME_STEP, self.MIXING, 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        force = -gradient
        if self.velocity @ force > 0:
            along = force * (
                np.linalg.norm(self.velocity) / max(float(np.linalg.norm(force)), 1e-300)
            )
            self.velocity = (1.0 - self.mixing) * self.velocity + self.mixing * along
            if self.downhill > self.PATIENCE:
                self.time_step = min(self.time_step * self.GROWTH, self.LONGEST_TIME_STEP)
                self.mixing *= self.MIXING_DECAY
            self.downhill += 1
        elif self.velocity.any():
            self.shorten()
        self.velocity = self.velocity + self.time_step * force
        return self.time_step * self.velocity

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """Nothing to do: the velocity is all it knows."""

    def predicted_decrease(self, gradient: np.ndarray) -> float:
        """Not known without curvatures."""
        return np.inf

    def shorten(self) -> None:
        self.velocity = np.zeros_like(self.velocity)
        self.time_step = max(self.time_step * self.DECAY, self.SHORTEST_TIME_STEP)
        self.mixing, self.downhill = self.MIXING, 0


OPTIMIZERS: dict[str, type[Bfgs] | type[AseBfgs] | type[Fire]] = {
    "bfgs": Bfgs,
    "ase": AseBfgs,
    "fire": Fire,
}


@dataclass(frozen=True)
class Options:
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
    perturbations: int


def checked(
    *,
    pressure: Any,
    force_tolerance: Any,
    stress_tolerance: Any,
    max_steps: Any,
    max_move: Any,
    relax_cell: bool,
    fix_symmetry: bool,
    symprec: Any,
    optimizer: Any,
    perturbations: Any,
    edges_in_flight: Any,
) -> Options:
    """The options, pressures given in GPa; raises InputError with one line for each argument that
    makes no sense."""
    positive = {
        "force_tolerance": force_tolerance,
        "stress_tolerance": stress_tolerance,
        "max_move": max_move,
        "symprec": symprec,
    }
    problems = [
        f"{name} = {value!r}: must be a positive number"
        for name, value in positive.items()
        if not _is_number(value) or not value > 0
    ]
    if _is_number(symprec) and np.isposinf(symprec):
        problems.append(f"symprec = {symprec!r}: must be finite")
    counts = {
        "max_steps": max_steps,
        "edges_in_flight": 1 if edges_in_flight is None else edges_in_flight,
    }
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            problems.append(f"{name} = {value!r}: must be a whole number, at least 1")
    if (
        not isinstance(perturbations, Integral)
        or perturbations < 0
        or (perturbations and fix_symmetry)
    ):
        problems.append(
            f"perturbations = {perturbations!r}: must be a whole number, 0 or more, and 0 with"
            " fix_symmetry, because they break it"
        )
    if not _is_number(pressure) or not abs(pressure) <= MAX_PRESSURE_GPA:
        problems.append(
            f"pressure = {pressure!r}: must be a number in GPa between -{MAX_PRESSURE_GPA:g} and"
            f" {MAX_PRESSURE_GPA:g}"
        )
    optimizers = _names(optimizer)
    if not optimizers:
        problems.append(
            f"optimizer = {optimizer!r}: only {', '.join(OPTIMIZERS)}, or several of them, are"
            " possible"
        )
    if problems:
        raise InputError(*problems)
    return Options(
        pressure=gpa_to_ev_per_a3(pressure),
        force_tolerance=force_tolerance,
        stress_tolerance=gpa_to_ev_per_a3(stress_tolerance),
        max_steps=max_steps,
        max_move=max_move,
        relax_cell=relax_cell,
        fix_symmetry=fix_symmetry,
        symprec=symprec,
        optimizers=optimizers,
        perturbations=perturbations,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not np.isnan(float(value))


def _names(optimizer: Any) -> tuple[str, ...]:
    """Names of optimisers; none where one is not known."""
    names = (
        (optimizer,)
        if isinstance(optimizer, str)
        else tuple(optimizer)
        if isinstance(optimizer, Sequence)
        else ()
    )
    return names if all(isinstance(name, str) and name in OPTIMIZERS for name in names) else ()
