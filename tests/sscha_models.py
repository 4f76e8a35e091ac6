"""Energy surfaces with known answers, for the SSCHA tests."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.sscha.ensemble import Ensemble, average
from magus_anharmonic.sscha.result import SschaResult, final_populations
from magus_anharmonic.sscha.start import harmonic_force_constants
from magus_anharmonic.sscha.state import SschaState, displaced, floor_modes, sample
from magus_anharmonic.sscha.supercells import shape_supercell_matrix
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import gibbs_energy
from magus_anharmonic.units import HBAR, KELVIN


class LatticeSprings(Calculator):
    """Simple cubic crystal of lattice constant ``a``; springs between nearest neighbours, exactly
    harmonic.

    Energy of a bond along axis b: 1/2 (longitudinal u_b^2 + transverse |u_perp|^2) with u the
    relative displacement, so that omega_i^2(q) = 2/m sum_b k_ib (1 - cos 2 pi q_b) with k_ii =
    longitudinal, else transverse.
    """

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, a=3.0, longitudinal=2.0, transverse=0.5):
        super().__init__()
        self.a = a
        self.springs = np.full((3, 3), transverse) + np.eye(3) * (longitudinal - transverse)
        self.n_structures = 0
        self.model_id = f"lattice-springs-{a:g}-{longitudinal:g}-{transverse:g}"

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.n_structures += 1
        supercell_matrix = np.rint(self.atoms.cell.lengths() / self.a).astype(int)
        sites = np.rint(self.atoms.positions / self.a).astype(int)
        u = np.zeros((*supercell_matrix, 3))
        index = tuple(np.mod(sites, supercell_matrix).T)
        u[index] = self.atoms.positions - sites * self.a
        energy, forces = 0.0, np.zeros_like(u)
        for axis in range(3):
            relative = np.roll(u, -1, axis) - u
            pull = relative * self.springs[:, axis]
            energy += 0.5 * float((relative * pull).sum())
            forces += pull - np.roll(pull, 1, axis)
        self.results = {"energy": energy, "forces": forces[index], "stress": np.zeros(6)}

    def quanta(self, q, mass):
        """hbar omega in eV at fractional q (m, 3), (m, 3)."""
        return HBAR * np.sqrt(2.0 / mass * (1.0 - np.cos(2.0 * np.pi * q)) @ self.springs.T)

    def free_energy(self, mesh, mass, temperature):
        """Harmonic free energy per atom on a q mesh without the translations, eV."""
        q = np.array(list(np.ndindex(*mesh)))[1:] / np.array(mesh)
        quanta = self.quanta(q, mass)
        thermal = (
            0.0
            if temperature == 0
            else KELVIN * temperature * np.log1p(-np.exp(-quanta / (KELVIN * temperature))).sum()
        )
        return float((quanta.sum() / 2.0 + thermal) / np.prod(mesh))


class QuarticPair(Calculator):
    """Two atoms in one cell, bound by v(d) = sum_i 1/2 k d_i^2 + c d_i^4 in the deviation d from
    half the body diagonal."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, a=3.0, k=-1.0, c=8.0):
        super().__init__()
        self.a, self.k, self.c = a, k, c
        self.model_id = f"quartic-pair-{a:g}-{k:g}-{c:g}"

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        d = self.atoms.positions[1] - self.atoms.positions[0] - self.a / 2.0
        pull = self.k * d + 4.0 * self.c * d**3
        energy = float((0.5 * self.k * d**2 + self.c * d**4).sum())
        self.results = {"energy": energy, "forces": np.array([pull, -pull]), "stress": np.zeros(6)}

    def scha_free_energy(self, reduced_mass, temperature):
        """Minimum over omega of F_0(omega) + <v - v_0>, three equal oscillators, eV; moments by
        Gauss-Hermite quadrature."""
        from scipy.optimize import minimize_scalar

        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        weights = weights / weights.sum()

        def free_energy(log_hbar_omega):
            hbar_omega = np.exp(log_hbar_omega)
            spring = reduced_mass * (hbar_omega / HBAR) ** 2
            variance = HBAR**2 / (2.0 * reduced_mass * hbar_omega)
            f0 = hbar_omega / 2.0
            if temperature > 0:
                thermal = KELVIN * temperature
                variance /= np.tanh(hbar_omega / (2.0 * thermal))
                f0 += thermal * np.log1p(-np.exp(-hbar_omega / thermal))
            d = np.sqrt(variance) * nodes
            return float(f0 + weights @ (0.5 * self.k * d**2 + self.c * d**4 - 0.5 * spring * d**2))

        return (
            3.0
            * minimize_scalar(
                free_energy,
                bounds=(np.log(1e-3), np.log(1.0)),
                method="bounded",
                options={"xatol": 1e-10},
            ).fun
        )


class CountingCalculator(Calculator):
    """Passes on to another calculator and counts; raises ``KeyboardInterrupt`` after ``stop_after``
    structures."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, calculator, stop_after=None):
        super().__init__()
        self.inner, self.count, self.stop_after = calculator, 0, stop_after

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.count += 1
        if self.stop_after is not None and self.count > self.stop_after:
            raise KeyboardInterrupt
        self.inner.calculate(self.atoms, ("energy", "forces", "stress"), all_changes)
        self.results = dict(self.inner.results)


EV = as_evaluator(EMT())


def harmonic_state(atoms, supercell_matrix, evaluator=EV, temperature=0.0, *, raised=False):
    """Harmonic force constants; with ``raised`` as a start has them, without imaginary modes."""
    symmetry = Symmetry(atoms, supercell_matrix)
    compact = harmonic_force_constants(atoms, supercell_matrix, symmetry, evaluator)
    state = SschaState(atoms, supercell_matrix, compact, temperature)
    return floor_modes(state, symmetry) if raised else state


def evaluated(state, evaluator, n_configs, seed=0):
    """Draw and evaluate an ensemble; ``seed`` may be a generator."""
    u = sample(state, n_configs, np.random.default_rng(seed))
    found = evaluator.evaluate(displaced(state, u))
    return Ensemble(u, found.energy, np.array(found.forces), found.stress)


class AnharmonicCell:
    """Eight atoms in one cell with known SCHA free energy; an evaluator that takes all
    configurations at once.

    V(u) = 1/2 u K u + sum_b (g_b x_b^3 + c_b x_b^4), x_b = e_b.(u_i - u_j), over the bonds of a
    2x2x2 simple cubic cell with periodic images folded in: Gaussian averages of polynomials are
    closed expressions. ``cubic``: full symmetry, no cubic term; else springs, directions, masses
    and cubic terms of their own for every bond, and no symmetry at all.
    """

    model_id = "anharmonic-cell"

    def __init__(self, cubic=False, a=2.0):
        rng = np.random.default_rng(11)
        sites = np.array(list(np.ndindex(2, 2, 2)), dtype=float)
        self.atoms = Atoms("H8", positions=a * sites, cell=[2 * a] * 3, pbc=True)
        pairs = [
            (i, j) for i in range(8) for j in range(i) if np.abs(sites[i] - sites[j]).sum() == 1
        ]
        rows, springs, thirds, fourths = [], [], [], []
        for i, j in pairs:
            axis = sites[i] - sites[j]
            directions = np.eye(3) if cubic else np.eye(3) + 0.2 * rng.normal(size=(3, 3))
            for direction in directions:
                row = np.zeros((8, 3))
                row[i], row[j] = direction, -direction
                rows.append(row.ravel())
                along = abs(axis @ direction) > 0.5
                scale = 1.0 if cubic else rng.uniform(0.8, 1.2)
                springs.append((2.0 if along else 0.8) * scale)
                thirds.append(0.0 if cubic else 0.8 * rng.normal())
                fourths.append(1.5 * scale)
        if not cubic:
            self.atoms.positions += 0.05 * rng.normal(size=(8, 3))
        self.rows, self.springs, self.thirds, self.fourths = (
            np.array(part) for part in (rows, springs, thirds, fourths)
        )
        self.reference = self.atoms.positions.copy()

    def evaluate(self, structures):
        """Energies, forces and (zero) stresses."""
        from magus_anharmonic.evaluator import Evaluation

        u = np.array([atoms.positions for atoms in structures]) - self.reference
        x = u.reshape(len(u), -1) @ self.rows.T
        energy = (0.5 * self.springs * x**2 + self.thirds * x**3 + self.fourths * x**4).sum(axis=1)
        pull = self.springs * x + 3.0 * self.thirds * x**2 + 4.0 * self.fourths * x**3
        forces = -(pull @ self.rows).reshape(u.shape)
        return Evaluation(energy, list(forces), np.zeros((len(u), 3, 3)))

    def start(self, temperature):
        """Harmonic force constants about the reference positions, 20 per cent too stiff."""
        return SschaState(
            self.atoms, (1, 1, 1), self._compact(1.2 * self._matrix(self.springs)), temperature
        )

    def _matrix(self, springs):
        return (self.rows * springs[:, None]).T @ self.rows

    def _compact(self, matrix):
        return matrix.reshape(8, 3, 8, 3).transpose(0, 2, 1, 3)[None]

    def _moments(self, state):
        mean = self.rows @ (state.atoms.positions - self.reference).ravel()
        return mean, np.einsum("bi,ij,bj->b", self.rows, state.covariance, self.rows, optimize=True)

    def free_energy(self, state):
        """F of any state, eV per cell, without sampling."""
        m, s = self._moments(state)
        potential = (
            0.5 * self.springs * (m**2 + s)
            + self.thirds * (m**3 + 3 * m * s)
            + self.fourths * (m**4 + 6 * m**2 * s + 3 * s**2)
        )
        return state.harmonic_free_energy + float(
            potential.sum() - 0.5 * np.sum(state.full * state.covariance)
        )

    def minimum(self, temperature):
        """Smallest F in eV per cell and its state: half-way self-consistent steps until nothing
        moves."""
        from dataclasses import replace

        state = self.start(temperature)
        for _ in range(200):
            m, s = self._moments(state)
            curvature = self._matrix(
                self.springs + 6.0 * self.thirds * m + 12.0 * self.fourths * (m**2 + s)
            )
            pull = (
                self.springs * m
                + 3.0 * self.thirds * (m**2 + s)
                + 4.0 * self.fourths * (m**3 + 3 * m * s)
            )
            step = -np.linalg.pinv(curvature, rcond=1e-10) @ (pull @ self.rows)
            atoms = state.atoms.copy()
            atoms.positions += 0.5 * step.reshape(8, 3)
            state = replace(
                state,
                atoms=atoms,
                force_constants=0.5 * (state.force_constants + self._compact(curvature)),
            )
        return self.free_energy(state), state


def averaged_anew(folder):
    """Result, last state and ensemble of a run that lies in ``folder``, whose G is the average of
    that ensemble."""
    result = SschaResult.read(folder)
    ((state, ensemble),) = final_populations(folder, result).values()
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    found = gibbs_energy(state, average(state, ensemble, symmetry), result.target_pressure)
    assert found == pytest.approx((result.gibbs_raw, result.gibbs_error), abs=1e-9)
    return result, state, ensemble


def phonopy_of(atoms, supercell_matrix):
    """phonopy, with these atoms as its primitive cell; its matrix has the new vectors as
    columns."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    cell = PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell.array,
        positions=atoms.positions,
        masses=atoms.get_masses(),
    )
    matrix = shape_supercell_matrix(supercell_matrix).T
    return Phonopy(cell, supercell_matrix=matrix, primitive_matrix=np.eye(3))


def cu3au(turned=False):
    """L1_2 crystal of four atoms, if wanted in an orientation in which no axis is an axis of the
    crystal."""
    atoms = Atoms(
        "AuCu3",
        scaled_positions=[[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
        cell=[3.75] * 3,
        pbc=True,
    )
    if turned:
        atoms.rotate(37, (1, 2, 3), rotate_cell=True)
    return atoms
