"""Force constants, modes and ensembles by wave vector, where the translations of the supercell make
them block diagonal, and interpolation between wave vectors (finite-size term, bands).

A covector c of the supercell (a force, for example) has the components c(q, mode) = sum over cells
and atoms of exp(-2 pi i q.R) conj(e_q) c / sqrt(n_cells mass); averages of products are zero unless
the wave vectors add up to a reciprocal lattice vector. Where every q is its own negative (no
repetition above 2), everything is real.

The Hessian needs all q (`Wavevectors`, `Samples`, `Representation`); the minimisation keeps one of
each pair q, -q (`Reciprocal`, `Spectrum`): n_cells times less work per step than on the supercell,
and exact lattice symmetry.

Finite-size term: the auxiliary harmonic free energy on a fine q mesh minus that of the supercell;
with long-range dipoles where Born charges are given (`nonanalytic`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ase import Atoms
from ase.geometry import minkowski_reduce

from magus_anharmonic.errors import SschaError
from magus_anharmonic.sscha.ensemble import Ensemble, level_deviations, static_response
from magus_anharmonic.sscha.nonanalytic import NonAnalytic, dipole_squares
from magus_anharmonic.sscha.state import (
    SschaState,
    fourier,
    oscillator_free_energy,
    phonon_energy,
    root_mass,
    variance,
    without_zero_modes,
)
from magus_anharmonic.sscha.supercells import (
    SupercellMatrix,
    Three,
    cell_index,
    cell_offsets,
    containing_mesh,
    dual,
    fractional_points,
    q_index,
    q_points,
    shape_supercell_matrix,
    three,
)
from magus_anharmonic.sscha.symmetry import Symmetry


@dataclass(frozen=True)
class Wavevectors:
    """Modes of a state on the q points of its supercell.

    points : (n_q, 3) whole numbers, see `supercells.fractional_points`, the first zero; minus :
    (n_q,) index of -q; vectors : (n_q, 3n, 3n) columns e with e(-q) = conj e(q), mass weighted,
    zero for the three translations; hbar_omega, variance : (n_q, 3n) in eV and A^2 amu, one for
    the translations; moving : (n_q, 3n) False for these; root_mass : (3n,).
    """

    supercell_matrix: SupercellMatrix
    points: np.ndarray
    minus: np.ndarray
    vectors: np.ndarray
    hbar_omega: np.ndarray
    variance: np.ndarray
    moving: np.ndarray
    root_mass: np.ndarray
    temperature: float

    @cached_property
    def q(self) -> np.ndarray:
        """(n_q, 3) the points in fractions of the reciprocal vectors."""
        return fractional_points(self.points, self.supercell_matrix)

    @cached_property
    def precision(self) -> np.ndarray:
        """(n_q, 3n) inverse of the variance, zero for the three translations."""
        return np.where(self.moving, 1.0 / self.variance, 0.0)

    @cached_property
    def response(self) -> np.ndarray:
        """L (n_q, n_q, 3n, 3n) for two modes at any two q, A^2 amu / (eV/A^2/amu); zero for the
        translations."""
        n_q, size = self.hbar_omega.shape
        response = static_response(self.hbar_omega.ravel(), self.temperature)
        response = np.where(np.outer(self.moving, self.moving), response, 0.0)
        return response.reshape(n_q, size, n_q, size).transpose(0, 2, 1, 3)

    @cached_property
    def _thirds(self) -> np.ndarray:
        sums = self.points[:, None] + self.points
        return cell_index(-sums, dual(self.supercell_matrix))

    def third(self, first: int, second: int) -> int:
        """Index of the q that makes the sum of three zero."""
        return int(self._thirds[first, second])

    def covectors(self, values: np.ndarray) -> np.ndarray:
        """Components (n_q, n_configs, 3n) of covectors (n_configs, n_supercell, 3)."""
        n_cells = len(self.points)
        cells = values.reshape(len(values), n_cells, -1)
        phase = np.exp(-2j * np.pi * self.q @ cell_offsets(self.supercell_matrix).T) / np.sqrt(
            n_cells
        )
        phase = phase if np.iscomplexobj(self.vectors) else phase.real
        waves = np.einsum("qr,cra->qca", phase, cells, optimize=True)
        return waves @ (self.vectors.conj() / self.root_mass[:, None])


def wavevectors(state: SschaState) -> Wavevectors:
    """Diagonalise the state at every q; raises ``SschaError`` for imaginary auxiliary modes."""
    matrix, masses, root = state.supercell_matrix, state.masses, root_mass(state.atoms)
    points = cell_offsets(dual(matrix))
    minus = cell_index(-points, dual(matrix))
    dynamical = fourier(state.force_constants, matrix, q_points(matrix)) / np.outer(root, root)
    dynamical[0] = without_zero_modes(dynamical[0], masses, np.abs(dynamical).max())
    real = bool(np.all(minus == np.arange(len(points))))
    vectors = np.zeros(dynamical.shape, dtype=float if real else complex)
    squares, moving = np.empty(vectors.shape[:2]), np.ones(vectors.shape[:2], dtype=bool)
    for q, other in enumerate(minus):
        if other < q:
            squares[q], vectors[q] = squares[other], vectors[other].conj()
            continue
        one = dynamical[q].real if other == q else dynamical[q]
        squares[q], vectors[q] = np.linalg.eigh(0.5 * (one + one.conj().T))
    moving[0, -3:] = vectors[0, :, -3:] = 0
    hbar_omega = np.where(moving, phonon_energy(squares), 1.0)
    if np.any(hbar_omega <= 0):
        raise SschaError(
            f"the auxiliary force constants have {int((hbar_omega <= 0).sum())} imaginary modes:"
            " the state is no SSCHA state"
        )
    sizes, at = variance(hbar_omega, state.temperature), state.temperature
    return Wavevectors(matrix, points, minus, vectors, hbar_omega, sizes, moving, root, at)


@dataclass(frozen=True)
class Samples:
    """An ensemble in modes, the two members of a pair taken together.

    scaled : (n_q, n, 3n), <uu>^-1 u; even, odd : residual forces (f + harmonic pull) that go with
    an even and an odd number of displacements: mean and half difference of a pair; the same array
    twice where there are no pairs. level : (n,), see `Ensemble`; of two levels the forces are
    times n over the number of their level, so that plain means are sums of the levels' means.
    """

    modes: Wavevectors
    scaled: np.ndarray
    even: np.ndarray
    odd: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        return self.scaled.shape[1]

    def part(self, chosen: slice) -> Samples:
        """Some of the samples."""
        level = self.level[chosen]
        factor = (_level_factors(level) / _level_factors(self.level)[chosen])[:, None]
        even, odd = (factor * values[:, chosen] for values in (self.even, self.odd))
        return Samples(self.modes, self.scaled[:, chosen], even, odd, level)

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """``values`` (n, ...) linear in the forces, with a scatter that gives the error of their
        mean: each level about its own mean, see `ensemble.pair_means`."""
        if not self.level.any():
            return values
        factors = _level_factors(self.level).reshape(-1, *(1,) * (values.ndim - 1))
        return level_deviations(values / factors, self.level)


def _level_factors(level: np.ndarray) -> np.ndarray:
    """(n,) n over the number of samples in the same level (n,)."""
    return len(level) / np.bincount(level)[level]


def samples(state: SschaState, ensemble: Ensemble, modes: Wavevectors) -> Samples:
    """The ensemble of a state in its modes."""
    u, level = ensemble.displacements, ensemble.level
    even = odd = ensemble.residual(state)[1].reshape(u.shape)
    paired = len(u) % 2 == 0 and np.allclose(u[0::2], -u[1::2], rtol=0.0, atol=1e-6)
    if paired:
        u, plus, minus, level = u[0::2], even[0::2], even[1::2], level[0::2]
        even, odd = 0.5 * (plus + minus), 0.5 * (plus - minus)
    scaled = modes.covectors(u * state.supercell.get_masses()[:, None])
    factor = _level_factors(level)[:, None, None]
    components = modes.covectors(factor * even)
    return Samples(
        modes,
        scaled / modes.variance[:, None, :],
        components,
        modes.covectors(factor * odd) if paired else components,
        level,
    )


class Representation:
    """Operations of a space group on mode components: c(g q) = matrix(g, q) c(q), up to a phase
    that triples lose."""

    def __init__(self, modes: Wavevectors, symmetry: Symmetry) -> None:
        self.modes = modes
        self._symmetry = symmetry
        inverse = np.array([np.rint(np.linalg.inv(w)).astype(int) for w in symmetry.fractional])
        # q turns with the inverse transpose; it stays one of the points because the supercell is
        # kept
        self.images = q_index(np.einsum("gji,qj->gqi", inverse, modes.q), modes.supercell_matrix)
        """(n_operations, n_q) index of the q to which an operation takes a q."""
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images)

    def matrix(self, operation: int, q: int) -> np.ndarray:
        """(3n, 3n) from the modes at ``q`` to those at ``images[operation, q]``."""
        key = (operation, q)
        if key not in self._known:
            modes, image = self.modes, self.images[operation, q]
            permutation = self._symmetry.permutations[operation]
            shifts = self._symmetry.shifts[operation]
            phase = np.exp(-2j * np.pi * shifts @ modes.q[image])
            n = len(permutation)
            turned = np.zeros((n, 3, n, 3), dtype=complex)
            turned[permutation, :, np.arange(n), :] = (
                phase[:, None, None] * self._symmetry.rotations[operation]
            )
            turned = turned.reshape(3 * n, 3 * n)
            turned = turned if np.iscomplexobj(modes.vectors) else turned.real
            self._known[key] = modes.vectors[image].conj().T @ turned @ modes.vectors[q]
        return self._known[key]

    @cached_property
    def stars(self) -> list[dict[int, int]]:
        """One dictionary for every set of equivalent q, the representative first: q -> an operation
        that leads there."""
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


@dataclass(frozen=True)
class Reciprocal:
    """The q points of a supercell, Gamma first, one of each pair q, -q (weight 2; weight 1 where q
    = -q)."""

    supercell_matrix: SupercellMatrix

    @cached_property
    def _partner(self) -> np.ndarray:
        """(n_cells,) index of -q."""
        return cell_index(-cell_offsets(dual(self.supercell_matrix)), dual(self.supercell_matrix))

    @cached_property
    def _chosen(self) -> np.ndarray:
        return np.flatnonzero(np.arange(len(self._partner)) <= self._partner)

    @cached_property
    def weights(self) -> np.ndarray:
        """(n_q,) how many q points each of the kept ones stands for; they add up to the number of
        cells."""
        return np.where(self._partner[self._chosen] == self._chosen, 1.0, 2.0)

    @cached_property
    def phase(self) -> np.ndarray:
        """(n_q, n_cells) exp(2 pi i q.R); real where every q equals -q."""
        phase = np.exp(
            2j
            * np.pi
            * q_points(self.supercell_matrix)[self._chosen]
            @ cell_offsets(self.supercell_matrix).T
        )
        return np.ascontiguousarray(phase.real) if np.all(self.weights == 1.0) else phase

    @property
    def n_cells(self) -> int:
        return self.phase.shape[1]

    def matrices(self, compact: np.ndarray) -> np.ndarray:
        """Compact force constants (n_cells, n, n, 3, 3) as D(q) = sum_R C(R) exp(2 pi i q.R), (n_q,
        3n, 3n)."""
        n_cells, n = compact.shape[:2]
        flat = compact.transpose(0, 1, 3, 2, 4).reshape(n_cells, -1)
        return (self.phase @ flat).reshape(-1, 3 * n, 3 * n)

    def compact(self, matrices: np.ndarray) -> np.ndarray:
        """The inverse of `matrices`."""
        n = matrices.shape[1] // 3
        back = (
            (self.phase.conj() * self.weights[:, None]).T
            @ matrices.reshape(len(matrices), -1)
            / self.n_cells
        )
        return back.real.reshape(-1, n, 3, n, 3).transpose(0, 1, 3, 2, 4)

    def amplitudes(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of the supercell (m, n_cells n, 3) as sum_S x_S exp(-2 pi i q.S) / sqrt(n_cells),
        (n_q, m, 3n)."""
        rows = vectors.reshape(len(vectors), self.n_cells, -1)
        moved = np.tensordot(self.phase.conj(), rows, axes=(1, 1)) / np.sqrt(self.n_cells)
        return np.ascontiguousarray(moved)


def without_translations(matrices: np.ndarray) -> np.ndarray:
    """The Hermitian part of D(q), with the translations of the crystal taken out of Gamma (the
    first block)."""
    size = matrices.shape[1]
    projector = np.eye(size) - np.tile(np.eye(3), (size // 3, size // 3)) * (3.0 / size)
    hermitian = 0.5 * (matrices + matrices.conj().transpose(0, 2, 1))
    gamma = projector @ hermitian[0].real @ projector
    hermitian[0] = 0.5 * (gamma + gamma.T)
    return hermitian


@dataclass(frozen=True)
class Spectrum:
    """Auxiliary modes of D(q), and the Gaussian that follows from them.

    hbar_omega : (n_q, 3n) eV; negative where the force constant is. vectors : (n_q, 3n, 3n) mass
    weighted. real : (n_q, 3n) False for the three translations, which are no modes (their phonon
    energy is a placeholder).
    """

    hbar_omega: np.ndarray
    vectors: np.ndarray
    real: np.ndarray
    root_mass: np.ndarray
    reciprocal: Reciprocal
    temperature: float

    @classmethod
    def of(
        cls, matrices: np.ndarray, masses: np.ndarray, reciprocal: Reciprocal, temperature: float
    ) -> Spectrum:
        """Diagonalise D(q) (eV/A^2, acoustic sum rule obeyed) of one cell with ``masses`` (n,) in
        amu."""
        root = np.sqrt(np.repeat(masses, 3))
        dynamical = matrices / np.outer(root, root)
        dynamical[0] = without_zero_modes(dynamical[0], masses, np.abs(dynamical).max())
        squares, vectors = np.linalg.eigh(dynamical)
        real = np.ones(squares.shape, dtype=bool)
        real[0, -3:] = False
        hbar_omega = phonon_energy(np.where(real, squares, 1.0))
        return cls(hbar_omega, vectors, real, root, reciprocal, temperature)

    @property
    def lowest(self) -> float:
        """Smallest phonon energy, eV."""
        return float(self.hbar_omega[self.real].min(initial=np.inf))

    @cached_property
    def variances(self) -> np.ndarray:
        """(n_q, 3n) <|Q|^2> in A^2 amu."""
        return variance(self.hbar_omega, self.temperature)

    @cached_property
    def precision(self) -> np.ndarray:
        """(n_q, 3n, 3n) inverse covariance, 1/A^2."""
        scaled = self.vectors * self.root_mass[:, None]
        return (
            scaled * np.where(self.real, 1.0 / self.variances, 0.0)[:, None, :]
        ) @ scaled.conj().transpose(0, 2, 1)

    @cached_property
    def log_volume(self) -> float:
        """Half the logarithm of the determinant of the covariance, up to a constant that the masses
        give."""
        return 0.5 * float(
            self.reciprocal.weights @ np.where(self.real, np.log(self.variances), 0.0).sum(axis=1)
        )

    @cached_property
    def free_energy(self) -> float:
        """Free energy of the auxiliary oscillators, eV per primitive cell."""
        each = np.where(
            self.real, oscillator_free_energy(self.hbar_omega, self.temperature), 0.0
        ).sum(axis=1)
        return float(self.reciprocal.weights @ each) / self.reciprocal.n_cells

    def in_modes(self, matrices: np.ndarray) -> np.ndarray:
        """A matrix per q (eV/A^2) between the mass-weighted modes, zero for the translations."""
        scaled = self.vectors / self.root_mass[:, None]
        return (scaled.conj().transpose(0, 2, 1) @ matrices @ scaled) * (
            self.real[:, :, None] & self.real[:, None, :]
        )


CHUNK = 2048
"""Points between which the force constants are interpolated at once."""


@dataclass(frozen=True)
class FiniteSize:
    """term : eV per primitive cell, added to F; mesh : q points; imaginary : part of interpolated
    modes below zero; dipoles : what of the term comes from long-range dipoles, None without."""

    term: float
    mesh: Three
    imaginary: float
    dipoles: float | None = None


def reference_mesh(atoms: Atoms, spacing: float, supercell_matrix: SupercellMatrix) -> Three:
    """Gamma-centred mesh with at most ``spacing`` (2 pi / A) between points, never coarser than the
    supercell's."""
    lengths = np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    return three(
        max(np.ceil(length / spacing - 1e-6), n)
        for length, n in zip(lengths, containing_mesh(supercell_matrix), strict=True)
    )


def finite_size_term(
    state: SschaState, spacing: float, nonanalytic: NonAnalytic | None = None
) -> FiniteSize:
    """Fourier interpolation of the force constants with shared nearest images (Wigner-Seitz cell of
    the supercell).

    An imaginary interpolated mode enters with the size of its frequency, and is counted. The three
    translations at Gamma are left out, as in the supercell. Long-range dipoles (LO-TO splitting)
    are in it where ``nonanalytic`` is given.
    """
    mesh = reference_mesh(state.atoms, spacing, state.supercell_matrix)
    grid = np.array(list(np.ndindex(*mesh))) / np.array(mesh)

    def term(squares: np.ndarray) -> float:
        hbar_omega = np.abs(phonon_energy(squares))
        total = oscillator_free_energy(hbar_omega[hbar_omega > 1e-6], state.temperature).sum()
        return float(total) / len(grid) - state.harmonic_free_energy

    squares, plain = interpolated_squares(state, grid, nonanalytic).ravel()[3:], None
    if nonanalytic is not None:
        plain = term(interpolated_squares(state, grid).ravel()[3:])
    found = term(squares)
    dipoles = None if plain is None else found - plain
    return FiniteSize(found, mesh, float((squares <= 0).mean()), dipoles)


def nearest_images(state: SschaState) -> tuple[np.ndarray, np.ndarray]:
    """Lattice vectors (m, 3) and blocks (m, n, n, 3, 3): every pair's block shared among its
    nearest images."""
    cell = state.atoms.cell.array
    # of a reduced basis, whose nearest images are within two shells
    periods = shape_supercell_matrix(state.supercell_matrix)
    periods = np.rint(minkowski_reduce(periods @ cell)[1] @ periods).astype(int)
    offsets = cell_offsets(state.supercell_matrix)
    shells = np.array(list(np.ndindex(5, 5, 5))) - 2
    candidates = offsets[:, None] + (shells @ periods)[None]
    between = state.atoms.positions[None] - state.atoms.positions[:, None]
    distances = np.linalg.norm((candidates @ cell)[:, :, None, None] + between[None, None], axis=-1)
    near = distances < distances.min(axis=1, keepdims=True) + 1e-3
    weights = near / near.sum(axis=1, keepdims=True)
    flat = candidates.reshape(-1, 3)
    blocks = (weights[..., None, None] * state.force_constants[:, None]).reshape(
        len(flat), *state.force_constants.shape[1:]
    )
    used = weights.reshape(len(flat), -1).any(axis=1)
    return flat[used], blocks[used]


def interpolated(vectors: np.ndarray, blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Force constants at fractional ``q``, (n_q, 3n, 3n) eV/A^2, from `nearest_images`."""
    size = 3 * blocks.shape[1]
    flat = blocks.transpose(0, 1, 3, 2, 4).reshape(len(vectors), -1)
    return (np.exp(2j * np.pi * q @ vectors.T) @ flat).reshape(-1, size, size)


def interpolated_squares(
    state: SschaState, q: np.ndarray, nonanalytic: NonAnalytic | None = None
) -> np.ndarray:
    """Eigenvalues (n_q, 3n) of the dynamical matrix at fractional ``q``, ascending, eV/A^2/amu;
    with long-range dipoles where these are given (`nonanalytic.dipole_squares`)."""
    if nonanalytic is not None:
        return dipole_squares(state, nonanalytic, q)
    root, images, found = root_mass(state.atoms), nearest_images(state), []
    for offset in range(0, len(q), CHUNK):
        matrices = interpolated(*images, q[offset : offset + CHUNK])
        matrices = 0.5 * (matrices + matrices.conj().transpose(0, 2, 1)) / np.outer(root, root)
        found.append(np.linalg.eigvalsh(matrices))
    return np.concatenate(found)
