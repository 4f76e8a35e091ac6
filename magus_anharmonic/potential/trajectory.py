"""One structure on its way to the nearest minimum of the enthalpy: coordinates, quasi-Newton model, trust region."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from magus_anharmonic.potential.symmetrise import SymmetryProjector
from magus_anharmonic.structures import bare

START_CURVATURE = 40.0  # eV/A^2, between a soft metal and a bond of hydrogen
SMALLEST_STEP = 1e-5  # Angstrom
ENTHALPY_NOISE = 2e-6  # eV/atom, the rounding of float32 models


class Trajectory:
    """Positions and cell of one structure as one vector, with a BFGS model of the enthalpy H = E + P V.

    The cell is h0 expm(U) and the positions are q expm(U) with U symmetric, the logarithm of the deformation (as in ASE's
    FrechetCellFilter); the vector holds q and U times a length. Steps follow |eigenvalues| of the BFGS Hessian, so that they
    go down from saddles too, and are limited by a trust radius which shrinks when a step did not lower H.
    """

    def __init__(self, atoms: Atoms, pressure: float, max_move: float, relax_cell: bool, projector: SymmetryProjector | None) -> None:
        start = bare(atoms if projector is None else projector.structure(atoms))
        self.start, self.projector, self.pressure, self.max_move = start, projector, pressure, max_move
        self.periodic = bool(start.pbc.all())
        self.relax_cell = relax_cell and self.periodic
        self.length = np.sqrt(len(start))
        self.x = np.concatenate([start.positions.ravel(), np.zeros(9 if self.relax_cell else 0)])
        self.trial = self.x.copy()
        self.hessian = START_CURVATURE * np.eye(len(self.x))
        self.radius = max_move
        self.gradient: np.ndarray | None = None
        self.enthalpy = np.inf
        self.energy, self.forces, self.stress = np.nan, np.full((len(start), 3), np.nan), np.full((3, 3), np.nan)

    def structure(self, x: np.ndarray | None = None) -> Atoms:
        """The structure at a point; by default at the best point so far."""
        point = self.x if x is None else x
        atoms = self.start.copy()
        positions = point[: 3 * len(atoms)].reshape(-1, 3)
        if self.relax_cell:
            deformation = self._deformation(point)[0]
            atoms.set_cell(self.start.cell.array @ deformation)
            positions = positions @ deformation
        atoms.positions = positions
        return atoms

    def _deformation(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """expm(U), and the eigenvalues and eigenvectors of U."""
        values, vectors = np.linalg.eigh(point[-9:].reshape(3, 3) / self.length)
        return (vectors * np.exp(values)) @ vectors.T, values, vectors

    def _gradient(self, x: np.ndarray, lattice: np.ndarray, forces: np.ndarray, stress: np.ndarray) -> np.ndarray:
        """dH/dx; the derivative of the exponential is exact (Daleckii and Krein's formula)."""
        if not self.relax_cell:
            return -forces.ravel()
        deformation, values, vectors = self._deformation(x)
        virial = abs(np.linalg.det(lattice)) * (stress + self.pressure * np.eye(3))
        by_deformation = np.linalg.inv(deformation) @ virial
        difference = values[:, None] - values[None]
        near = np.abs(difference) < 1e-6
        average = np.exp(0.5 * (values[:, None] + values[None]))
        quotient = np.where(near, average, (np.exp(values)[:, None] - np.exp(values)) / np.where(near, 1.0, difference))
        rotated = vectors.T @ (0.5 * (by_deformation + by_deformation.T)) @ vectors
        cell = vectors @ (rotated * quotient) @ vectors.T / self.length
        return np.concatenate([-(forces @ deformation).ravel(), cell.ravel()])

    def receive(self, energy: float, forces: np.ndarray, stress: np.ndarray) -> bool:
        """Take the result at ``trial``: move there when the enthalpy is not higher, else only learn from it. True when moved."""
        atoms = self.structure(self.trial)
        lattice = atoms.cell.array
        if self.projector is not None:
            forces, stress = self.projector.forces(lattice, forces), self.projector.stress(lattice, stress)
        stress = 0.5 * (stress + stress.T)
        enthalpy = energy + (self.pressure * atoms.cell.volume if self.periodic else 0.0)
        gradient = self._gradient(self.trial, lattice, forces, stress)
        step = self.trial - self.x
        if self.gradient is not None:
            self._update(step, gradient - self.gradient)
        if enthalpy > self.enthalpy + ENTHALPY_NOISE * len(atoms):
            self.shrink()
            return False
        if self.gradient is not None:
            self.radius = min(self.max_move, 1.5 * self.radius)
        self.x, self.gradient, self.enthalpy = self.trial.copy(), gradient, enthalpy
        self.energy, self.forces, self.stress = energy, forces, stress
        return True

    def _update(self, step: np.ndarray, change: np.ndarray) -> None:
        """BFGS update; left out where the curvature along the step is lost in rounding."""
        curvature = float(step @ change)
        predicted = self.hessian @ step
        along = float(step @ predicted)
        if abs(curvature) > 1e-8 * (step @ step) and abs(along) > 1e-12:
            self.hessian += np.outer(change, change) / curvature - np.outer(predicted, predicted) / along

    def shrink(self) -> None:
        """The last trial was bad: the next one is shorter."""
        self.radius = min(self.radius, self._size(self.trial - self.x)) / 3.0

    @property
    def stuck(self) -> bool:
        """No step, however short, lowers the enthalpy."""
        return self.radius < SMALLEST_STEP

    def propose(self) -> Atoms:
        """The next trial structure."""
        if self.gradient is not None:
            values, vectors = np.linalg.eigh(0.5 * (self.hessian + self.hessian.T))
            step = -vectors @ ((vectors.T @ self.gradient) / np.maximum(np.abs(values), 1e-2))
            self.trial = self.x + step * min(1.0, self.radius / max(self._size(step), 1e-300))
        return self.structure(self.trial)

    def _size(self, step: np.ndarray) -> float:
        """Longest move of an atom, or twice the largest strain times 1 Angstrom, whichever is more."""
        n = 3 * len(self.start)
        largest = float(np.linalg.norm(step[:n].reshape(-1, 3), axis=1).max())
        return max(largest, 2.0 * float(np.abs(step[n:]).max()) / self.length) if self.relax_cell else largest

    def residual(self) -> tuple[float, float]:
        """Largest force (eV/A), and largest component of stress + P (eV/A^3; zero when the cell is fixed)."""
        force = float(np.linalg.norm(self.forces, axis=1).max())
        return force, float(np.abs(self.stress + self.pressure * np.eye(3)).max()) if self.relax_cell else 0.0
