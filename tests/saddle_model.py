"""A hydrogen bond with a known free energy: F-H-F in a cell, the proton in the middle a minimum or
a saddle point.

V = 1/2 k d^2 + c d^4 + g d^2 s + 1/2 K s^2 + transverse springs, d the proton's distance from the
middle, s the change of the F-F
distance: the smallest model in which the third order (d, d, s) makes a symmetric state unstable.
"""

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_masses
from scipy.optimize import minimize

from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.units import HBAR

STRETCH, TRANSVERSE = 15.0, 4.0
"""K and the transverse springs, eV/A^2."""
HALF = 1.2
"""A, half the F-F distance at rest."""


class HydrogenBond:
    """Evaluator; every F-H-F unit is on its own."""

    def __init__(self, k=-6.0, c=12.0, g=14.0):
        self.k, self.c, self.g = k, c, g
        self.model_id = f"bond {k:g} {c:g} {g:g}"

    @staticmethod
    def crystal(shift=0.0):
        """P4/mmm, or P4mm with the proton ``shift`` A off the middle."""
        return Atoms(
            "HF2",
            positions=[[0, 0, shift], [0, 0, -HALF], [0, 0, HALF]],
            cell=[3.0, 3.0, 5.0],
            pbc=True,
        )

    def evaluate(self, structures):
        """Energies, forces and (zero) stresses; the atoms are F-H-F units, each H, F, F."""
        cells = np.array([atoms.cell.array for atoms in structures])
        positions = np.array([atoms.positions for atoms in structures]).reshape(
            len(structures), -1, 3, 3
        )
        between = positions[:, :, 1:] - positions[:, :, :1]
        between -= np.einsum(
            "umai,uij->umaj",
            np.round(np.einsum("umai,uij->umaj", between, np.linalg.inv(cells))),
            cells,
        )
        order = np.argsort(between[..., 2], axis=2)
        low, high = np.take_along_axis(between, order[..., None], axis=2).transpose(2, 0, 1, 3)
        middle, tilt = -(low + high) / 2.0, high - low
        d, s = middle[..., 2], tilt[..., 2] - 2 * HALF
        energy = 0.5 * self.k * d**2 + self.c * d**4 + self.g * d**2 * s + 0.5 * STRETCH * s**2
        energy += (
            0.5
            * TRANSVERSE
            * ((middle[..., :2] ** 2).sum(axis=-1) + (tilt[..., :2] ** 2).sum(axis=-1))
        )
        pull, twist = TRANSVERSE * middle, TRANSVERSE * tilt
        pull[..., 2] = self.k * d + 4 * self.c * d**3 + 2 * self.g * d * s
        twist[..., 2] = self.g * d**2 + STRETCH * s
        sorted_forces = np.stack([pull / 2.0 + twist, pull / 2.0 - twist], axis=2)
        back = np.argsort(order, axis=2)[..., None]
        forces = np.concatenate(
            [-pull[:, :, None], np.take_along_axis(sorted_forces, back, axis=2)], axis=2
        )
        return Evaluation(
            energy.sum(axis=1),
            list(forces.reshape(len(structures), -1, 3)),
            np.zeros((len(structures), 3, 3)),
        )

    def free_energy(self, symmetric):
        """SCHA free energy of (d, s) at 0 K in eV (transverse modes left out), minimised, and the
        centroid d.

        By closed Gaussian averages; d and s are normal coordinates of kinetic energy 1/2 m d'^2 +
        1/2 M s'^2.
        """
        proton, fluorine = atomic_masses[1], atomic_masses[9]
        masses = np.array([proton * 2 * fluorine / (proton + 2 * fluorine), fluorine / 2.0])
        root = np.sqrt(masses)

        def value(x):
            d, s = (0.0 if symmetric else x[0]), x[1]
            factor = np.array([[x[2], 0.0], [0.0 if symmetric else x[3], x[4]]])
            matrix = factor @ factor.T + 1e-6 * np.eye(2)
            squares, vectors = np.linalg.eigh(matrix / np.outer(root, root))
            hbar_omega = HBAR * np.sqrt(squares)
            covariance = (vectors * (HBAR**2 / (2 * hbar_omega))) @ vectors.T / np.outer(root, root)
            a, b, ab = covariance[0, 0], covariance[1, 1], covariance[0, 1]
            mean = 0.5 * self.k * (d**2 + a) + self.c * (d**4 + 6 * d**2 * a + 3 * a**2)
            mean += self.g * ((d**2 + a) * s + 2 * d * ab) + 0.5 * STRETCH * (s**2 + b)
            return float(hbar_omega.sum() / 2.0 + mean - 0.5 * np.sum(matrix * covariance))

        begin = [0.3, 0.0, 2.0, 0.0, 5.0]
        found = minimize(
            value,
            begin,
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20000, "maxfev": 20000},
        )
        return float(found.fun), float(found.x[0])


class RockSaltWells:
    """Evaluator: SnTe in the primitive cell of rock salt, V = sum over the cubic axes of 1/2 k u^2
    + c u^4, u between the two sublattices.

    The eight wells along [111] are 8 meV/atom deep. Between k and c the motion of the ions makes
    the middle a minimum of the free energy, and the wells, beyond a barrier, are lower: a
    transition of first order.
    """

    def __init__(self, c=0.9, depth=0.016 / 3.0):
        """``c`` in eV/A^4, ``depth`` of a well along one axis in eV per cell."""
        self.k, self.c = -float(np.sqrt(16.0 * c * depth)), c
        self.model_id = f"rock salt {c:g} {depth:g}"

    @staticmethod
    def crystal():
        """Fm-3m, two atoms."""
        return bulk("SnTe", "rocksalt", a=6.3)

    def evaluate(self, structures):
        """Energies, forces and (zero) stresses of primitive cells."""
        energies, forces = [], []
        for atoms in structures:
            tin, tellurium = (
                int(np.flatnonzero(atoms.numbers == number)[0]) for number in (50, 52)
            )
            apart = (atoms.positions[tellurium] - atoms.positions[tin]) @ np.linalg.inv(
                atoms.cell.array
            ) - 0.5
            u = (apart - np.round(apart)) @ atoms.cell.array
            slope = self.k * u + 4.0 * self.c * u**3
            force = np.zeros((2, 3))
            force[tellurium], force[tin] = -slope, slope
            energies.append(float(np.sum(0.5 * self.k * u**2 + self.c * u**4)))
            forces.append(force)
        return Evaluation(np.array(energies), forces, np.zeros((len(structures), 3, 3)))

    def free_energy(self, symmetric):
        """SCHA free energy at 0 K in eV/atom by closed Gaussian averages, and the centroid along
        one axis (A); the three axes alike."""
        tin, tellurium = atomic_masses[50], atomic_masses[52]
        mass = tin * tellurium / (tin + tellurium)

        def value(x):
            d, spring = (0.0 if symmetric else x[0]), np.exp(x[1])
            hbar_omega = HBAR * np.sqrt(spring / mass)
            a = HBAR**2 / (2.0 * hbar_omega * mass)
            mean = 0.5 * self.k * (d**2 + a) + self.c * (d**4 + 6.0 * d**2 * a + 3.0 * a**2)
            return float(hbar_omega / 2.0 + mean - 0.5 * spring * a)

        begin = [np.sqrt(-self.k / (4.0 * self.c)), np.log(-2.0 * self.k)]
        found = minimize(
            value,
            begin,
            method="Nelder-Mead",
            options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20000, "maxfev": 20000},
        )
        return 1.5 * float(found.fun), float(found.x[0])
