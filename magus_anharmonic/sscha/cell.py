"""Strains that keep the symmetry, how stiff each of them is, and the strain that leads to the
target pressure.

Every independent strain has its own stiffness: none is taken for stiffer than it is, so that the
soft axis of a layered crystal relaxes as far as the others. The stiffness begins as the static one,
ions relaxed, and learns from what the steps of the cell did to the stress.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator, has_stress
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import strain_cell, stripped
from magus_anharmonic.units import GPa, gpa_to_ev_per_a3

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
STRAIN = 0.005
"""Of the central differences of the stress."""
UNKNOWN = 0.3
"""Standard deviation of a stiffness before any step of the cell was seen, in parts of the static
one."""
CURVED = 0.15
"""Part of the change of stress that a step of the cell leaves to the change of stiffness along
it."""
FOLLOWED = 0.05
"""The same of what the ions take away by following: a stiff bond that follows by a little too much
hides the stiffness of the lattice."""
SOFTEST = gpa_to_ev_per_a3(0.1)
"""eV/A^3, least stiffness: what is softer, or unstable in the static crystal, is taken as that
until a step has told more."""
LARGEST_STRAIN = 0.02
"""Largest component of the strain that one step makes along one axis of the stiffness."""


def symmetric_strains(symmetry: Symmetry) -> np.ndarray:
    """(k, 3, 3) orthonormal basis of the symmetric strains that keep the symmetry."""
    units = np.zeros((6, 3, 3))
    for unit, (row, column) in zip(units, VOIGT, strict=True):
        unit[row, column] = unit[column, row] = 1.0 if row == column else np.sqrt(0.5)
    kept = symmetry.tensor(units)
    projector = np.einsum("aij,bij->ab", units, kept)
    values, vectors = np.linalg.eigh(0.5 * (projector + projector.T))
    return np.einsum("ak,aij->kij", vectors[:, values > 0.5], units)


@dataclass(frozen=True)
class StaticResponse:
    """How the static crystal answers to a strain at fixed fractional positions, by Voigt strains
    with engineering shear.

    stress : (6, 6) d(stress)/d(strain), eV/A^3; forces : (6, 3n) d(forces)/d(strain), eV/A.
    """

    stress: np.ndarray
    forces: np.ndarray


def static_response_to_strain(atoms: Atoms, evaluator: Evaluator) -> StaticResponse:
    """By central differences of stress and forces: twelve evaluations of the cell. Raises
    ``InputError`` where there is no stress."""
    strained = []
    for row, column in VOIGT:
        for sign in (1.0, -1.0):
            strain = np.zeros((3, 3))
            strain[row, column] = strain[column, row] = sign * (
                STRAIN if row == column else STRAIN / 2.0
            )
            copy = stripped(atoms)
            strain_cell(copy, strain)
            strained.append(copy)
    found = evaluator.evaluate(strained)
    if not has_stress(found):
        raise InputError(
            f"evaluator {evaluator.model_id}: gives no stress, which cell: variable needs; take"
            " cell: fixed"
        )
    stresses, forces = np.asarray(found.stress, dtype=float), np.array(found.forces, dtype=float)
    slopes = (stresses[0::2] - stresses[1::2]) / (2.0 * STRAIN)
    internal = (forces[0::2] - forces[1::2]).reshape(6, -1) / (2.0 * STRAIN)
    return StaticResponse(
        np.array([[slope[row, column] for slope in slopes] for row, column in VOIGT]), internal
    )


@dataclass(frozen=True)
class CellStiffness:
    """d(stress)/d(strain) along the strains that keep the symmetry, with its uncertainty.

    strains : (k, 3, 3), see `symmetric_strains`; forces : (k, 3n), eV/A, d(forces)/d(strain);
    internal : (k, k) eV/A^3, what the ions take away by following; matrix : (k, k), eV/A^3, ions
    relaxed, symmetric and positive definite; covariance : (k, k, k, k) of its elements; pressure :
    the target, eV/A^3.
    """

    strains: np.ndarray
    forces: np.ndarray
    internal: np.ndarray
    matrix: np.ndarray
    covariance: np.ndarray
    pressure: float

    @classmethod
    def of(
        cls,
        response: StaticResponse,
        gamma: np.ndarray,
        volume: float,
        symmetry: Symmetry,
        pressure: GPa,
    ) -> CellStiffness:
        """``gamma`` (3n, 3n) eV/A^2, of lattice-periodic displacements; ``volume`` A^3;
        ``pressure`` in GPa."""
        strains = symmetric_strains(symmetry)
        engineering = np.array(
            [[s[i, j] * (1.0 if i == j else 2.0) for i, j in VOIGT] for s in strains]
        )
        # the work of a stress on an engineering strain is that of its Voigt components
        forces = engineering @ response.forces
        internal = forces @ np.linalg.pinv(gamma, rcond=1e-9) @ forces.T / volume
        matrix = engineering @ response.stress @ engineering.T - internal
        values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
        found = (vectors * np.maximum(np.abs(values), SOFTEST)) @ vectors.T
        return cls(
            strains, forces, internal, found, _wishart(UNKNOWN * found), gpa_to_ev_per_a3(pressure)
        )

    def excess(self, stress: np.ndarray) -> np.ndarray:
        """(..., k) stress (..., 3, 3) in eV/A^3 beyond that of the target pressure, along the
        strains."""
        return np.einsum("...ij,kij->...k", stress + self.pressure * np.eye(3), self.strains)

    def relaxed_excess(self, stress: np.ndarray, shift: np.ndarray, volume: float) -> np.ndarray:
        """`excess` after the centroids have moved by ``shift`` (..., 3n) A: without the noise of
        stiff bonds. ``volume`` in A^3."""
        return self.excess(stress) - shift @ self.forces.T / volume

    @property
    def compliance(self) -> np.ndarray:
        """(k, k), A^3/eV."""
        return np.linalg.inv(self.matrix)

    def strain(self, parts: np.ndarray) -> np.ndarray:
        """(3, 3) strain from its parts (k,) along the strains."""
        return np.tensordot(parts, self.strains, axes=1)

    def step(self, excess: np.ndarray) -> np.ndarray:
        """(k,) strain that removes ``excess`` (k,), no component of it along an axis of the
        stiffness above `LARGEST_STRAIN`."""
        values, vectors = np.linalg.eigh(self.matrix)
        most = LARGEST_STRAIN / np.abs(np.einsum("km,kij->mij", vectors, self.strains)).max(
            axis=(1, 2)
        )
        return vectors @ np.clip(-(vectors.T @ excess) / values, -most, most)

    def misfit(self, strain: np.ndarray) -> float:
        """Standard error of 1/2 strain.matrix.strain (eV/A^3) from the covariance of the matrix."""
        square = np.einsum("i,j,k,l,ijkl->", strain, strain, strain, strain, self.covariance)
        return 0.5 * float(np.sqrt(max(0.0, square)))

    def learned(self, step: np.ndarray, change: np.ndarray, noise: np.ndarray) -> CellStiffness:
        """After a ``step`` (k,) changed the excess by ``change`` (k,) with covariance ``noise`` (k,
        k): Gaussian update of the elements."""
        k = len(step)
        size = k * k
        prior = self.covariance.reshape(size, size)
        design = np.kron(np.eye(k), step[None, :])
        expected = self.matrix @ step
        curved = (CURVED * np.linalg.norm(expected)) ** 2 + (
            FOLLOWED * np.linalg.norm(self.internal @ step)
        ) ** 2
        error = noise + np.eye(k) * curved
        gain = prior @ design.T @ np.linalg.inv(design @ prior @ design.T + error)
        matrix = (self.matrix.ravel() + gain @ (change - expected)).reshape(k, k)
        values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
        covariance = (prior - gain @ design @ prior).reshape(k, k, k, k)
        return replace(
            self, matrix=(vectors * np.maximum(values, SOFTEST)) @ vectors.T, covariance=covariance
        )


def _wishart(scale: np.ndarray) -> np.ndarray:
    """(k, k, k, k) covariance of a symmetric random matrix whose element ij varies by about
    sqrt(s_ii s_jj)."""
    one = np.einsum("ik,jl->ijkl", scale, scale)
    return 0.5 * (one + one.transpose(0, 1, 3, 2))


@dataclass(frozen=True)
class Start:
    """First state, the static answer to strains (None with a fixed cell), evaluations spent."""

    state: SschaState
    response: StaticResponse | None
    n_evaluations: int

    def stiffness(self, symmetry: Symmetry, pressure: GPa) -> CellStiffness | None:
        """Of the cell, for a target ``pressure`` in GPa; None with a fixed cell."""
        if self.response is None:
            return None
        return CellStiffness.of(
            self.response, self.state.gamma, self.state.atoms.get_volume(), symmetry, pressure
        )
