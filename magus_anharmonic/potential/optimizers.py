"""Steps of a relaxation: the state of the minimiser, the rules from gradients to the next step, and
the arguments a caller may choose."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from scipy.linalg import LinAlgError, cho_factor, cho_solve, expm, expm_frechet

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.guards import SymmetryProjector
from magus_anharmonic.settings.section import MAX_PRESSURE_GPA
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import gpa_to_ev_per_a3


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


class AseBfgs:
    """ASE's ``BFGS``, step for step when the coordinates are those of its ``FrechetCellFilter``:
    Newton steps along |eigenvalues| of a BFGS model B of the Hessian, down from saddles too.

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
        curvatures = np.maximum(np.abs(values), self.SMALLEST_CURVATURE)
        return -vectors @ ((gradient @ vectors) / curvatures)

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """The BFGS update."""
        curvature, predicted = float(step @ change), self.hessian @ step
        along = float(step @ predicted)
        if self._tells(step, curvature, along):
            self.hessian += (
                np.outer(change, change) / curvature - np.outer(predicted, predicted) / along
            )

    def _tells(self, step: np.ndarray, curvature: float, along: float) -> bool:
        """Whether B can learn of a step; also with a negative curvature along it."""
        return bool(np.abs(step).max() >= self.SHORTEST_STEP and curvature and along)

    def predicted_decrease(self, gradient: np.ndarray) -> float:
        """Half of what the Newton step gains at first order."""
        return -0.5 * float(gradient @ self.step(gradient))

    def shorten(self) -> None:
        """Nothing to do: what was learnt stays valid."""


class Bfgs(AseBfgs):
    """The same with a smaller first B, in coordinates of its own.

    B is positive definite nearly always: the step is then found by Cholesky's decomposition,
    several times faster than by eigenvectors.
    """

    coordinates: ClassVar[Coordinates] = Coordinates()
    START_CURVATURE = 40.0  # between a soft metal and a bond of hydrogen
    SMALLEST_CURVATURE = 1e-2

    def step(self, gradient: np.ndarray) -> np.ndarray:
        try:
            return -cho_solve(cho_factor(self.hessian), gradient)
        except LinAlgError:
            return super().step(gradient)

    def _tells(self, step: np.ndarray, curvature: float, along: float) -> bool:
        """Not where the curvature along the step is lost in rounding."""
        return abs(curvature) > 1e-8 * (step @ step) and abs(along) > 1e-12


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


OPTIMIZERS: dict[str, type[AseBfgs] | type[Fire]] = {"bfgs": Bfgs, "ase": AseBfgs, "fire": Fire}


def _real(value: Any) -> Any:
    if not isinstance(value, Real) or np.isnan(float(value)):
        raise ValueError("must be a number")
    return float(value)


def _whole(value: Any) -> Any:
    if not isinstance(value, Integral):
        raise ValueError("must be a whole number")
    return int(value)


Number = Annotated[float, BeforeValidator(_real)]
Whole = Annotated[int, BeforeValidator(_whole)]
Switch = Annotated[bool, BeforeValidator(bool)]


class Options(BaseModel):
    """Arguments of `relax`; pressures in GPa when they are given, in eV/A^3 here."""

    model_config = ConfigDict(frozen=True)

    force_tolerance: Annotated[Number, Field(gt=0)]
    stress_tolerance: Annotated[Number, Field(gt=0)]
    max_move: Annotated[Number, Field(gt=0)]
    symprec: Annotated[Number, Field(gt=0, allow_inf_nan=False)]
    max_steps: Annotated[Whole, Field(ge=1)]
    edges_in_flight: Annotated[Whole, Field(ge=1)] | None
    relax_cell: Switch
    fix_symmetry: Switch
    perturbations: Annotated[Whole, Field(ge=0)]
    pressure: Annotated[Number, Field(ge=-MAX_PRESSURE_GPA, le=MAX_PRESSURE_GPA)]
    optimizer: Annotated[
        tuple[Literal["bfgs", "ase", "fire"], ...],
        BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
        Field(min_length=1),
    ]

    @field_validator("perturbations")
    @classmethod
    def _symmetric(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("fix_symmetry"):
            raise ValueError("must be 0 with fix_symmetry, because they break it")
        return value


def checked(**given: Any) -> Options:
    """The options; raises InputError with one line for each argument that makes no sense."""
    try:
        options = Options(**given)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for item in error.errors():
            name, text = str(item["loc"][0]), item["msg"].removeprefix("Value error, ")
            problems.setdefault(name, f"{name} = {given[name]!r}: {text.removeprefix('Input ')}")
        raise InputError(*problems.values()) from None
    pressures = ("pressure", "stress_tolerance")
    return options.model_copy(
        update={name: gpa_to_ev_per_a3(getattr(options, name)) for name in pressures}
    )


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
        options: Options,
        projector: SymmetryProjector | None,
        optimizer: str = "ase",
        fixed: np.ndarray | None = None,
    ) -> None:
        start = stripped(atoms if projector is None else projector.structure(atoms))
        self.start, self.projector = start, projector
        self.pressure, self.max_move = options.pressure, options.max_move
        self.start_lattice = start.cell.array.copy()
        self.periodic = bool(start.pbc.all())
        self.relax_cell = options.relax_cell and self.periodic
        rule = OPTIMIZERS[optimizer]
        self.coordinates = rule.coordinates
        self.length = len(start) ** rule.coordinates.cell_power
        self.x = np.concatenate([start.positions.ravel(), np.zeros(9 if self.relax_cell else 0)])
        self.free = np.ones((len(start), 1)) if fixed is None else 1.0 - fixed[:, None]
        self.mobile = np.ones_like(self.x)
        self.mobile[: 3 * len(start)] = np.repeat(self.free, 3)
        self.trial = self.x
        self.rule = rule(len(self.x))
        self.radius = self.max_move
        self.point: Point | None = None
        self.best: Any = None  # a Point where there is one
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
        if self.point is None:
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
        progress = self.here.enthalpy < self.best.enthalpy - noise
        self.without_progress = 0 if progress else self.without_progress + 1
        if self.here.enthalpy <= self.best.enthalpy:
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
        self.point, self.x = self.best, self.best.x

    def shrink(self) -> None:
        """The last trial was bad: the next one is shorter."""
        self.radius = min(self.radius, self._size(self.trial - self.x)) / 3.0
        self.rule.shorten()

    @property
    def here(self) -> Point:
        """Where the search stands, once anything was evaluated."""
        return self.point  # type: ignore[return-value]

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
        force = float(np.sqrt(((self.free * self.here.forces) ** 2).sum(axis=1).max()))
        return force, float(
            np.abs(self.here.stress + self.pressure * np.eye(3)).max()
        ) if self.relax_cell else 0.0
