"""Step rules of the relaxation: from gradients to the next step, for one structure each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

START_CURVATURE = 40.0  # eV/A^2, between a soft metal and a bond of hydrogen; ASE has 70
SMALLEST_CURVATURE = 1e-2  # eV/A^2


@dataclass(frozen=True)
class Coordinates:
    """How a relaxation writes a cell and when it refuses a step.

    cell_power
        The coordinates of the cell are U times the number of atoms to this power, U the logarithm of the deformation. ASE has 1,
        which makes cells needlessly stiff.
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

    def decrease(self, gradient: np.ndarray) -> float:
        """Half of what the Newton step gains at first order."""
        return -0.5 * float(gradient @ self.step(gradient))

    def shorten(self) -> None:
        """Nothing to do: what was learnt stays valid."""


class Bfgs(_Newton):
    """Newton steps on a BFGS model of the Hessian B, along |eigenvalues|, so that they go down from saddles too.

    The rule of ASE's BFGS with a smaller first B. B is positive definite nearly always: the step is then found by Cholesky's
    decomposition, several times faster than by eigenvectors.
    """

    coordinates: ClassVar[Coordinates] = Coordinates()

    def __init__(self, size: int) -> None:
        self.hessian = START_CURVATURE * np.eye(size)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        try:
            return -cho_solve(cho_factor(self.hessian), gradient)
        except LinAlgError:
            values, vectors = np.linalg.eigh(self.hessian)
            return -vectors @ ((vectors.T @ gradient) / np.maximum(np.abs(values), SMALLEST_CURVATURE))

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """The BFGS update; left out where the curvature along the step is lost in rounding."""
        curvature = float(step @ change)
        predicted = self.hessian @ step
        along = float(step @ predicted)
        if abs(curvature) > 1e-8 * (step @ step) and abs(along) > 1e-12:
            self.hessian += np.outer(change, change) / curvature - np.outer(predicted, predicted) / along


class AseBfgs(_Newton):
    """ASE's ``BFGS``, step for step when the coordinates are those of its ``FrechetCellFilter``.

    It follows ASE's path to the same minimum until rounding decides: where the curvature along a step vanishes, and at saddle
    points, which a symmetric start reaches.
    """

    coordinates: ClassVar[Coordinates] = Coordinates(cell_power=1.0, turns=True, largest_rise=np.inf, patience=np.inf)
    START_CURVATURE = 70.0  # eV/A^2
    SMALLEST_CURVATURE = 1e-9  # eV/A^2; ASE has no limit
    SHORTEST_STEP = 1e-7  # Angstrom

    def __init__(self, size: int) -> None:
        self.hessian = self.START_CURVATURE * np.eye(size)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(self.hessian)
        return -vectors @ ((gradient @ vectors) / np.maximum(np.abs(values), self.SMALLEST_CURVATURE))

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """The BFGS update, also with a negative curvature along the step."""
        curvature, predicted = float(step @ change), self.hessian @ step
        along = float(step @ predicted)
        if np.abs(step).max() >= self.SHORTEST_STEP and curvature and along:
            self.hessian += np.outer(change, change) / curvature - np.outer(predicted, predicted) / along


class Fire:
    """The fast inertial relaxation engine: damped dynamics that stop whenever they go uphill.

    E. Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006), doi:10.1103/PhysRevLett.97.170201, with ASE's order of operations and
    values; all masses are 1.
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
            along = force * (np.linalg.norm(self.velocity) / max(float(np.linalg.norm(force)), 1e-300))
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

    def decrease(self, gradient: np.ndarray) -> float:
        """Not known without curvatures."""
        return np.inf

    def shorten(self) -> None:
        self.velocity = np.zeros_like(self.velocity)
        self.time_step = max(self.time_step * self.DECAY, self.SHORTEST_TIME_STEP)
        self.mixing, self.downhill = self.MIXING, 0


OPTIMIZERS: dict[str, type[Bfgs] | type[AseBfgs] | type[Fire]] = {"bfgs": Bfgs, "ase": AseBfgs, "fire": Fire}
