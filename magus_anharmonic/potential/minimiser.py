"""State of the minimiser of one structure: its coordinates, and which steps are taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from scipy.linalg import expm, expm_frechet

from magus_anharmonic.potential.optimizers import OPTIMIZERS
from magus_anharmonic.potential.symmetrise import SymmetryProjector
from magus_anharmonic.structures import stripped

SMALLEST_STEP = 1e-5  # Angstrom
ENTHALPY_NOISE = 2e-6  # eV/atom, the rounding of float32 models


@dataclass(frozen=True)
class Point:
    """A point of the search: x (n,), gradient (n,), enthalpy and energy in eV, forces (N, 3) eV/A,
    stress (3, 3) eV/A^3."""

    x: np.ndarray
    gradient: np.ndarray
    enthalpy: float
    energy: float
    forces: np.ndarray
    stress: np.ndarray


class MinimiserState:
    """Positions and cell of one structure as one vector, and a step rule that goes down in the
    enthalpy H = E + P V.

    ``held`` (N,) marks atoms whose q stays.

    The cell is h0 D and the positions are q D with D^T = expm(U), U the logarithm of the
    deformation, as in ASE's FrechetCellFilter; the vector holds q and U times a power of the number
    of atoms, see `Coordinates`. As with ASE's optimisers a step may rise, but not by more than
    ``largest_rise``, and no longer once ``patience`` steps brought no new lowest enthalpy: then the
    search goes on from the best point, downwards, within a trust radius.
    """

    def __init__(
        self,
        atoms: Atoms,
        pressure: float,
        max_move: float,
        relax_cell: bool,
        projector: SymmetryProjector | None,
        optimizer: str = "ase",
        fixed: np.ndarray | None = None,
    ) -> None:
        start = stripped(atoms if projector is None else projector.structure(atoms))
        self.start, self.projector, self.pressure, self.max_move = (
            start,
            projector,
            pressure,
            max_move,
        )
        self.start_lattice = start.cell.array.copy()
        self.periodic = bool(start.pbc.all())
        self.relax_cell = relax_cell and self.periodic
        rule = OPTIMIZERS[optimizer]
        self.coordinates = rule.coordinates
        self.length = len(start) ** rule.coordinates.cell_power
        self.x = np.concatenate([start.positions.ravel(), np.zeros(9 if self.relax_cell else 0)])
        self.free = np.ones((len(start), 1)) if fixed is None else 1.0 - fixed[:, None]
        self.mobile = np.ones_like(self.x)
        self.mobile[: 3 * len(start)] = np.repeat(self.free, 3)
        self.trial = self.x
        self.rule = rule(len(self.x))
        self.radius = max_move
        self.point: Point | None = None
        self.best: Point | None = None
        self.without_progress = 0
        self.downwards = False

    def lattice(self, x: np.ndarray) -> np.ndarray:
        """Cell vectors (3, 3) in Angstrom at a point."""
        return self.start_lattice @ self._deformation(x) if self.relax_cell else self.start_lattice

    def structure(self, x: np.ndarray | None = None) -> Atoms:
        """The structure at a point; by default where the search stands."""
        point = self.x if x is None else x
        atoms = self.start.copy()
        positions = point[: 3 * len(atoms)].reshape(-1, 3)
        if self.relax_cell:
            deformation = self._deformation(point)
            atoms.cell[:] = self.start_lattice @ deformation
            positions = positions @ deformation
        atoms.positions = positions
        return atoms

    def _logarithm(self, point: np.ndarray) -> np.ndarray:
        return point[-9:].reshape(3, 3) / self.length

    def _deformation(self, point: np.ndarray) -> np.ndarray:
        """D of the class's docstring."""
        logarithm = self._logarithm(point)
        if self.coordinates.turns:
            return expm(logarithm).T
        values, vectors = np.linalg.eigh(logarithm)
        return (vectors * np.exp(values)) @ vectors.T

    def _gradient(
        self, x: np.ndarray, lattice: np.ndarray, forces: np.ndarray, stress: np.ndarray
    ) -> np.ndarray:
        """dH/dx; the derivative of the exponential is exact."""
        if not self.relax_cell:
            return -(self.free * forces).ravel()
        deformation = self._deformation(x)
        virial = abs(np.linalg.det(lattice)) * (stress + self.pressure * np.eye(3))
        by_deformation = virial @ np.linalg.inv(deformation)
        if not self.coordinates.turns:
            by_deformation = 0.5 * (by_deformation + by_deformation.T)
        # the derivative of expm at U is adjoint to that at U^T
        cell = expm_frechet(self._logarithm(x).T, by_deformation, compute_expm=False) / self.length
        return np.concatenate([-(self.free * forces @ deformation.T).ravel(), cell.ravel()])

    def receive(self, energy: float, forces: np.ndarray, stress: np.ndarray) -> bool:
        """Take the result at ``trial``: move there, or only learn from it when it lies too high.
        True when moved."""
        lattice = self.lattice(self.trial)
        if self.projector is not None:
            forces, stress = (
                self.projector.forces(lattice, forces),
                self.projector.stress(lattice, stress),
            )
        stress = 0.5 * (stress + stress.T)
        enthalpy = energy + (self.pressure * abs(np.linalg.det(lattice)) if self.periodic else 0.0)
        point = Point(
            self.trial,
            self._gradient(self.trial, lattice, forces, stress),
            enthalpy,
            energy,
            forces,
            stress,
        )
        if self.point is None or self.best is None:
            self.point, self.best, self.x = point, point, point.x
            return True
        self.rule.learn(self.trial - self.x, point.gradient - self.point.gradient)
        noise = ENTHALPY_NOISE * len(self.start)
        if enthalpy > self.point.enthalpy + (
            noise if self.downwards else self.coordinates.largest_rise * len(self.start)
        ):
            self.shrink()
            return False
        self.radius = min(self.max_move, 1.5 * self.radius)
        self.point, self.x = point, point.x
        self._remember(noise)
        return True

    def _remember(self, noise: float) -> None:
        """Keep the lowest point; go back to it, and only downwards from there, after ``patience``
        steps without a lower one."""
        assert self.point is not None and self.best is not None
        progress = self.point.enthalpy < self.best.enthalpy - noise
        self.without_progress = 0 if progress else self.without_progress + 1
        if self.point.enthalpy <= self.best.enthalpy:
            self.best = self.point
        if self.without_progress >= self.coordinates.patience and not self.downwards:
            self.downwards = True
            self.return_to_best()

    def perturb(self, x: np.ndarray, size: float, rng: np.random.Generator) -> None:
        """Start again at a random point nearby: off a saddle, with what was learnt about the
        curvature.

        size : standard deviation (Angstrom) of each coordinate of the atoms and of each component
        of the cell's rows.
        """
        strain = np.zeros((0, 3))
        if self.relax_cell:
            half = rng.normal(0.0, size, (3, 3))
            strain = 0.5 * (half + half.T)
        self.x = x
        self.trial = (
            x
            + self.mobile
            * np.concatenate([rng.normal(0.0, size, (len(self.start), 3)), strain]).ravel()
        )
        self.point = self.best = None
        self.radius, self.without_progress, self.downwards = self.max_move, 0, False

    def return_to_best(self) -> None:
        """Stand at the lowest point that was visited."""
        assert self.best is not None
        self.point, self.x = self.best, self.best.x

    def shrink(self) -> None:
        """The last trial was bad: the next one is shorter."""
        self.radius = min(self.radius, self._size(self.trial - self.x)) / 3.0
        self.rule.shorten()

    @property
    def stuck(self) -> bool:
        """No step, however short, is possible."""
        return self.radius < SMALLEST_STEP

    def propose(self) -> Atoms:
        """The next trial structure."""
        if self.point is not None:
            step = self.mobile * self.rule.step(self.point.gradient)
            self.trial = self.x + step * min(1.0, self.radius / max(self._size(step), 1e-300))
        return self.structure(self.trial)

    def _size(self, step: np.ndarray) -> float:
        """Longest row of the step: the move of an atom, or of a row of the cell's coordinates."""
        return float(np.sqrt((step.reshape(-1, 3) ** 2).sum(axis=1).max()))

    def residual(self) -> tuple[float, float]:
        """Largest force (eV/A) on an atom that is not fixed, and largest component of stress + P
        (eV/A^3; zero when the cell is fixed)."""
        assert self.point is not None
        force = float(np.sqrt(((self.free * self.point.forces) ** 2).sum(axis=1).max()))
        return force, float(
            np.abs(self.point.stress + self.pressure * np.eye(3)).max()
        ) if self.relax_cell else 0.0
