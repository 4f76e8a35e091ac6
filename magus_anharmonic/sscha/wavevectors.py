"""Normal modes, ensembles and symmetry operations by wave vector: what the translations of the supercell make of them.

A covector c of the supercell (a force, for example) has the components c(q, mode) = sum over cells and atoms of
exp(-2 pi i q.R) conj(e_q) c / sqrt(n_cells mass); averages of products are zero unless the wave vectors add up to a
reciprocal lattice vector. Where every q is its own negative (no repetition above 2), everything is real.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magus_anharmonic.errors import SschaError
from magus_anharmonic.sscha.averages import Ensemble, gamma_matrix
from magus_anharmonic.sscha.state import SschaState, fourier, normal_modes, variance
from magus_anharmonic.sscha.supercells import Repeats, cell_index, cell_offsets, dual, fractional_points, q_index
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR


@dataclass(frozen=True)
class Wavevectors:
    """Modes of a state on the q points of its supercell.

    points : (n_q, 3) whole numbers, see `supercells.fractional_points`, the first zero; minus : (n_q,) index of -q; vectors :
    (n_q, 3n, 3n) columns e with e(-q) = conj e(q), mass weighted, zero for the three translations; quantum,
    variance : (n_q, 3n) in eV and A^2 amu, one for the translations; root_mass : (3n,).
    """

    repeats: Repeats
    points: np.ndarray
    minus: np.ndarray
    vectors: np.ndarray
    quantum: np.ndarray
    variance: np.ndarray
    root_mass: np.ndarray

    @cached_property
    def q(self) -> np.ndarray:
        """(n_q, 3) the points in fractions of the reciprocal vectors."""
        return fractional_points(self.points, self.repeats)

    @property
    def moving(self) -> np.ndarray:
        """(n_q, 3n) False for the three translations."""
        moving = np.ones(self.quantum.shape, dtype=bool)
        moving[0, :3] = False
        return moving

    def third(self, first: int, second: int) -> int:
        """Index of the q that makes the sum of three zero."""
        return int(cell_index(-(self.points[first] + self.points[second]), dual(self.repeats)))

    def covectors(self, values: np.ndarray) -> np.ndarray:
        """Components (n_q, n_configs, 3n) of covectors (n_configs, n_supercell, 3)."""
        n_cells = len(self.points)
        cells = values.reshape(len(values), n_cells, -1)
        phase = np.exp(-2j * np.pi * self.q @ cell_offsets(self.repeats).T) / np.sqrt(n_cells)
        phase = phase if np.iscomplexobj(self.vectors) else phase.real
        waves = np.einsum("qr,cra->qca", phase, cells, optimize=True)
        return waves @ (self.vectors.conj() / self.root_mass[:, None])


def wavevectors(state: SschaState) -> Wavevectors:
    """Diagonalise the state at every q; raises ``SschaError`` for imaginary auxiliary modes."""
    points = cell_offsets(dual(state.repeats))
    minus = cell_index(-points, dual(state.repeats))
    root = np.sqrt(np.repeat(state.atoms.get_masses(), 3))
    size = len(root)
    real = bool(np.all(minus == np.arange(len(points))))
    matrices = fourier(state.force_constants, state.repeats, fractional_points(points, state.repeats))
    vectors = np.zeros((len(points), size, size), dtype=float if real else complex)
    quantum = np.ones((len(points), size))
    gamma = normal_modes(gamma_matrix(state), state.atoms.get_masses())
    vectors[0, :, 3:], quantum[0, 3:] = gamma.vectors, gamma.quantum
    for index in range(1, len(points)):
        if minus[index] < index:
            vectors[index], quantum[index] = vectors[minus[index]].conj(), quantum[minus[index]]
            continue
        matrix = matrices[index] / np.outer(root, root)
        matrix = matrix.real if minus[index] == index else matrix
        squares, vectors[index] = np.linalg.eigh(0.5 * (matrix + matrix.conj().T))
        quantum[index] = np.sign(squares) * HBAR * np.sqrt(np.abs(squares))
    if np.any(quantum <= 0):
        raise SschaError(f"the auxiliary force constants have {int((quantum <= 0).sum())} imaginary modes: the state is no SSCHA state")
    return Wavevectors(state.repeats, points, minus, vectors, quantum, variance(quantum, state.temperature), root)


@dataclass(frozen=True)
class Samples:
    """An ensemble in modes, the two members of a pair taken together.

    scaled : (n_q, n, 3n), <uu>^-1 u; even, odd : residual forces (f + harmonic pull) that go with an even and an odd
    number of displacements: mean and half difference of a pair; the same array twice where there are no pairs.
    """

    scaled: np.ndarray
    even: np.ndarray
    odd: np.ndarray

    def __len__(self) -> int:
        return self.scaled.shape[1]

    def part(self, chosen: slice) -> Samples:
        """Some of the samples."""
        return Samples(self.scaled[:, chosen], self.even[:, chosen], self.odd[:, chosen])


def samples(state: SschaState, ensemble: Ensemble, modes: Wavevectors) -> Samples:
    """The ensemble of a state in its modes."""
    u = ensemble.displacements
    n_configs = len(u)
    residual = ensemble.forces + (u.reshape(n_configs, -1) @ state.full).reshape(u.shape)
    paired = n_configs % 2 == 0 and np.allclose(u[0::2], -u[1::2], rtol=0.0, atol=1e-6)
    even = odd = residual
    if paired:
        u, even, odd = u[0::2], 0.5 * (residual[0::2] + residual[1::2]), 0.5 * (residual[0::2] - residual[1::2])
    masses = np.repeat(state.supercell.get_masses(), 3).reshape(-1, 3)
    scaled = modes.covectors(u * masses) / modes.variance[:, None, :]
    components = modes.covectors(even)
    return Samples(scaled, components, modes.covectors(odd) if paired else components)


class Representation:
    """Operations of a space group on mode components: c(g q) = matrix(g, q) c(q), up to a phase that triples lose."""

    def __init__(self, modes: Wavevectors, symmetry: Symmetry) -> None:
        self._modes = modes
        self._symmetry = symmetry
        inverse = np.array([np.rint(np.linalg.inv(w)).astype(int) for w in symmetry.fractional])
        # q turns with the inverse transpose; it stays one of the points because the supercell is kept
        self.images = q_index(np.einsum("gji,qj->gqi", inverse, modes.q), modes.repeats)
        """(n_operations, n_q) index of the q to which an operation takes a q."""
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images)

    def matrix(self, operation: int, q: int) -> np.ndarray:
        """(3n, 3n) from the modes at ``q`` to those at ``images[operation, q]``."""
        key = (operation, q)
        if key not in self._known:
            modes, image = self._modes, self.images[operation, q]
            permutation = self._symmetry.permutations[operation]
            shifts = self._symmetry.shifts[operation]
            phase = np.exp(-2j * np.pi * shifts @ modes.q[image])
            n = len(permutation)
            turned = np.zeros((n, 3, n, 3), dtype=complex)
            turned[permutation, :, np.arange(n), :] = phase[:, None, None] * self._symmetry.rotations[operation]
            turned = turned.reshape(3 * n, 3 * n) if np.iscomplexobj(modes.vectors) else turned.real.reshape(3 * n, 3 * n)
            self._known[key] = modes.vectors[image].conj().T @ turned @ modes.vectors[q]
        return self._known[key]

    def stars(self) -> list[dict[int, int]]:
        """One dictionary for every set of equivalent q, the representative first: q -> an operation that leads there."""
        stars: list[dict[int, int]] = []
        seen: set[int] = set()
        for q in range(self.images.shape[1]):
            if q not in seen:
                members: dict[int, int] = {}
                for operation in range(len(self)):
                    members.setdefault(int(self.images[operation, q]), operation)
                stars.append({q: members.pop(q), **members})
                seen |= set(stars[-1])
        return stars
