"""Force constants and displacements in reciprocal space, where the translations of the supercell make them block diagonal.

One block of size 3n for every q point of the supercell, one of each pair q, -q: n_cells times less work per step than on
the supercell, and exact lattice symmetry. Supercells of one or two cells along each axis need no complex numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magus_anharmonic.sscha.state import oscillator_free_energy, variance
from magus_anharmonic.sscha.supercells import Repeats, cell_index, cell_offsets, dual, q_points
from magus_anharmonic.units import HBAR


@dataclass(frozen=True)
class Reciprocal:
    """The q points of a supercell, Gamma first, one of each pair q, -q (weight 2; weight 1 where q = -q)."""

    repeats: Repeats

    @cached_property
    def _partner(self) -> np.ndarray:
        """(n_cells,) index of -q."""
        return cell_index(-cell_offsets(dual(self.repeats)), dual(self.repeats))

    @cached_property
    def _chosen(self) -> np.ndarray:
        return np.flatnonzero(np.arange(len(self._partner)) <= self._partner)

    @cached_property
    def weights(self) -> np.ndarray:
        """(n_q,) how many q points each of the kept ones stands for; they add up to the number of cells."""
        return np.where(self._partner[self._chosen] == self._chosen, 1.0, 2.0)

    @cached_property
    def phase(self) -> np.ndarray:
        """(n_q, n_cells) exp(2 pi i q.R); real where every q equals -q."""
        phase = np.exp(2j * np.pi * q_points(self.repeats)[self._chosen] @ cell_offsets(self.repeats).T)
        return np.ascontiguousarray(phase.real) if np.all(self.weights == 1.0) else phase

    @property
    def n_cells(self) -> int:
        return self.phase.shape[1]

    def matrices(self, compact: np.ndarray) -> np.ndarray:
        """Compact force constants (n_cells, n, n, 3, 3) as D(q) = sum_R C(R) exp(2 pi i q.R), (n_q, 3n, 3n)."""
        n_cells, n = compact.shape[:2]
        flat = compact.transpose(0, 1, 3, 2, 4).reshape(n_cells, -1)
        return (self.phase @ flat).reshape(-1, 3 * n, 3 * n)

    def compact(self, matrices: np.ndarray) -> np.ndarray:
        """The inverse of `matrices`."""
        n = matrices.shape[1] // 3
        back = (self.phase.conj() * self.weights[:, None]).T @ matrices.reshape(len(matrices), -1) / self.n_cells
        return back.real.reshape(-1, n, 3, n, 3).transpose(0, 1, 3, 2, 4)

    def amplitudes(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of the supercell (m, n_cells n, 3) as sum_S x_S exp(-2 pi i q.S) / sqrt(n_cells), (n_q, m, 3n)."""
        rows = vectors.reshape(len(vectors), self.n_cells, -1)
        moved = np.tensordot(self.phase.conj(), rows, axes=(1, 1)) / np.sqrt(self.n_cells)
        return np.ascontiguousarray(moved)


def without_translations(matrices: np.ndarray) -> np.ndarray:
    """The Hermitian part of D(q), with the translations of the crystal taken out of Gamma (the first block)."""
    size = matrices.shape[1]
    projector = np.eye(size) - np.tile(np.eye(3), (size // 3, size // 3)) * (3.0 / size)
    hermitian = 0.5 * (matrices + matrices.conj().transpose(0, 2, 1))
    gamma = projector @ hermitian[0].real @ projector
    hermitian[0] = 0.5 * (gamma + gamma.T)
    return hermitian


@dataclass(frozen=True)
class Spectrum:
    """Auxiliary modes of D(q), and the Gaussian that follows from them.

    quantum : (n_q, 3n) eV; negative where the force constant is. vectors : (n_q, 3n, 3n) mass weighted. real : (n_q, 3n)
    False for the three translations, which are no modes (their quantum is a placeholder).
    """

    quantum: np.ndarray
    vectors: np.ndarray
    real: np.ndarray
    root_mass: np.ndarray
    reciprocal: Reciprocal
    temperature: float

    @classmethod
    def of(cls, matrices: np.ndarray, masses: np.ndarray, reciprocal: Reciprocal, temperature: float) -> Spectrum:
        """Diagonalise D(q) (eV/A^2, acoustic sum rule obeyed) of one cell with ``masses`` (n,) in amu."""
        root = np.sqrt(np.repeat(masses, 3))
        dynamical = matrices / np.outer(root, root)
        translations = np.zeros((len(root), 3))
        for axis in range(3):
            translations[axis::3, axis] = root[axis::3]
        translations /= np.linalg.norm(translations, axis=0)
        dynamical[0] += translations @ translations.T * (10.0 * max(np.abs(dynamical).max(), 1e-12) * len(root))
        squares, vectors = np.linalg.eigh(dynamical)
        real = np.ones(squares.shape, dtype=bool)
        real[0, -3:] = False
        squares = np.where(real, squares, 1.0)
        return cls(np.sign(squares) * HBAR * np.sqrt(np.abs(squares)), vectors, real, root, reciprocal, temperature)

    @property
    def lowest(self) -> float:
        """Smallest quantum, eV."""
        return float(self.quantum[self.real].min(initial=np.inf))

    @cached_property
    def variances(self) -> np.ndarray:
        """(n_q, 3n) <|Q|^2> in A^2 amu."""
        return variance(self.quantum, self.temperature)

    @cached_property
    def precision(self) -> np.ndarray:
        """(n_q, 3n, 3n) inverse covariance, 1/A^2."""
        scaled = self.vectors * self.root_mass[:, None]
        return (scaled * np.where(self.real, 1.0 / self.variances, 0.0)[:, None, :]) @ scaled.conj().transpose(0, 2, 1)

    @cached_property
    def log_volume(self) -> float:
        """Half the logarithm of the determinant of the covariance, up to a constant that the masses give."""
        return 0.5 * float(self.reciprocal.weights @ np.where(self.real, np.log(self.variances), 0.0).sum(axis=1))

    @cached_property
    def free_energy(self) -> float:
        """Free energy of the auxiliary oscillators, eV per primitive cell."""
        each = np.where(self.real, oscillator_free_energy(self.quantum, self.temperature), 0.0).sum(axis=1)
        return float(self.reciprocal.weights @ each) / self.reciprocal.n_cells

    def in_modes(self, matrices: np.ndarray) -> np.ndarray:
        """A matrix per q (eV/A^2) between the mass-weighted modes, zero for the translations."""
        scaled = self.vectors / self.root_mass[:, None]
        return (scaled.conj().transpose(0, 2, 1) @ matrices @ scaled) * (self.real[:, :, None] & self.real[:, None, :])
