"""The SSCHA state: centroids, cell, auxiliary force constants, temperature; and what follows from
it alone.

Force constants are compact: ``force_constants[R, a, b]`` is the 3x3 block (eV/A^2) between atom a
of the first cell and atom b of cell R of the supercell. Supercell atoms are ordered cell by cell:
index = R * n_atoms + a.

Signs that a state means something else. How far atoms stray from their centroids is measured in
distances between atoms (Lindemann's ratio): sqrt(<|u|^2>) of an atom over the distance of
neighbours in a close packing of the same density, 2^(1/6) (V/N)^(1/3). The shortest bond would not
do, because the atoms of a molecule stray by much of it together. Crystals melt at ratios about 0.1,
the most quantum ones at up to 0.3, helium at 0 K included (Dusseault, Boninsegni, arXiv:1612.08006,
and what they cite). So a ratio above 0.3 is beyond any crystal, whatever moves the atoms; and
thermal motion alone, that is what is above the zero-point part, beyond 0.15 is where classical
crystals are liquid: superheated at best, and said so. And the Gaussian of SSCHA (Eq. 3 of the
paper) is one in Cartesian displacements: a bond that librates by a large angle is stretched on the
chord instead of turning on the arc, so the free energy of rotating H2 or CHn units comes out too
high.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.errors import SschaError
from magus_anharmonic.io.digests import digest
from magus_anharmonic.sscha.supercells import (
    SupercellMatrix,
    cell_index,
    cell_offsets,
    n_cells,
    shape_supercell_matrix,
)
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import strain_cell
from magus_anharmonic.units import HBAR, KELVIN


def expand(compact: np.ndarray, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """Compact force constants (n_cells, n, n, 3, 3) to the full matrix (3 n_cells n, 3 n_cells
    n)."""
    offsets = cell_offsets(supercell_matrix)
    n_cells, n = compact.shape[:2]
    difference = cell_index(offsets[None, :] - offsets[:, None], supercell_matrix)
    size = 3 * n_cells * n
    return compact[difference].transpose(0, 2, 4, 1, 3, 5).reshape(size, size)


def fold(full: np.ndarray, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """The inverse of `expand`; averages over the translations of the supercell."""
    offsets = cell_offsets(supercell_matrix)
    n_cells = len(offsets)
    n = full.shape[0] // (3 * n_cells)
    blocks = full.reshape(n_cells, n, 3, n_cells, n, 3).transpose(0, 3, 1, 4, 2, 5)
    first = np.arange(n_cells)
    return np.stack(
        [
            blocks[first, cell_index(offsets + shift, supercell_matrix)].mean(axis=0)
            for shift in offsets
        ]
    )


def fourier(compact: np.ndarray, supercell_matrix: SupercellMatrix, q: np.ndarray) -> np.ndarray:
    """Force constants at ``q`` (m, 3; fractions of the reciprocal vectors): sum_R C(R) exp(2 pi i
    q.R), (m, 3n, 3n)."""
    n = compact.shape[1]
    phase = np.exp(2j * np.pi * np.asarray(q) @ cell_offsets(supercell_matrix).T)
    return np.einsum("qr,rabij->qaibj", phase, compact, optimize=True).reshape(len(q), 3 * n, 3 * n)


def inverse_fourier(
    dynamical: np.ndarray, supercell_matrix: SupercellMatrix, q: np.ndarray
) -> np.ndarray:
    """The inverse of `fourier` on the q points of the supercell."""
    n = dynamical.shape[1] // 3
    phase = np.exp(-2j * np.pi * cell_offsets(supercell_matrix) @ np.asarray(q).T) / len(q)
    return np.einsum(
        "rq,qaibj->rabij", phase, dynamical.reshape(len(q), n, 3, n, 3), optimize=True
    ).real


def repeated(atoms: Atoms, supercell_matrix: SupercellMatrix) -> Atoms:
    """The supercell of a primitive cell, cell by cell in the order of `cell_offsets`."""
    offsets = cell_offsets(supercell_matrix)
    return Atoms(
        numbers=np.tile(atoms.numbers, len(offsets)),
        positions=(atoms.positions + (offsets @ atoms.cell.array)[:, None]).reshape(-1, 3),
        cell=shape_supercell_matrix(supercell_matrix) @ atoms.cell.array,
        masses=np.tile(atoms.get_masses(), len(offsets)),
        pbc=True,
    )


def variance(hbar_omega: np.ndarray, temperature: float) -> np.ndarray:
    """<Q^2> in A^2 amu of an oscillator with phonon energy hbar*omega (eV): hbar/(2 omega)
    coth(hbar omega / 2kT)."""
    zero_point = HBAR**2 / (2.0 * hbar_omega)
    if temperature == 0:
        return zero_point
    return zero_point * (1.0 / np.tanh(hbar_omega / (2.0 * KELVIN * temperature)))


def phonon_energy(squares: np.ndarray) -> np.ndarray:
    """hbar omega in eV of squared frequencies in eV/A^2/amu; negative where these are."""
    return np.sign(squares) * HBAR * np.sqrt(np.abs(squares))


def root_mass(atoms: Atoms) -> np.ndarray:
    """(3n,) square roots of the masses, amu^1/2, one per coordinate."""
    return np.sqrt(np.repeat(atoms.get_masses(), 3))


def oscillator_free_energy(hbar_omega: np.ndarray, temperature: float) -> np.ndarray:
    """hbar omega / 2 + kT ln(1 - exp(-hbar omega / kT)), eV."""
    if temperature == 0:
        return hbar_omega / 2.0
    thermal = KELVIN * temperature
    return hbar_omega / 2.0 + thermal * np.log1p(-np.exp(-hbar_omega / thermal))


def atom_order(supercell: Atoms, positions: np.ndarray) -> np.ndarray:
    """For every atom of another code's supercell, at ``positions`` (N, 3) A, its index in ours."""
    inverse = np.linalg.inv(supercell.cell.array)
    difference = (np.asarray(positions)[:, None] - supercell.positions[None]) @ inverse
    distance = np.abs(difference - np.round(difference)).max(axis=2)
    order = distance.argmin(axis=1)
    if distance.min(axis=1).max() > 1e-4 or len(set(order.tolist())) != len(supercell):
        raise SschaError("the other code's supercell and that of this package hold different atoms")
    return order


@dataclass(frozen=True)
class Modes:
    """Normal modes of the supercell without the three translations.

    hbar_omega : (m,) hbar*omega in eV; vectors : (3 n_supercell, m), orthonormal, mass weighted.
    """

    hbar_omega: np.ndarray
    vectors: np.ndarray

    @property
    def quantum(self) -> np.ndarray:
        """`hbar_omega` by its name of earlier versions, which scripts have."""
        return self.hbar_omega


@dataclass(frozen=True)
class SschaState:
    """Centroids and masses (``atoms``, one primitive cell), supercell, force constants (module
    docstring), K."""

    atoms: Atoms
    supercell_matrix: SupercellMatrix
    force_constants: np.ndarray
    temperature: float

    @property
    def n_cells(self) -> int:
        return n_cells(self.supercell_matrix)

    @property
    def masses(self) -> np.ndarray:
        """(n,) of the primitive cell, amu."""
        return self.atoms.get_masses()

    @cached_property
    def supercell(self) -> Atoms:
        """The centroids repeated, cell by cell, in the order of the force constants."""
        return repeated(self.atoms, self.supercell_matrix)

    @cached_property
    def full(self) -> np.ndarray:
        """Force constants of the supercell, (3 n_supercell, 3 n_supercell), eV/A^2."""
        return expand(self.force_constants, self.supercell_matrix)

    @cached_property
    def modes(self) -> Modes:
        """Normal modes; a mode with negative force constant has a negative phonon energy."""
        return normal_modes(self.full, self.supercell.get_masses())

    @property
    def patterns(self) -> np.ndarray:
        """(3 n_supercell, m) displacements of the modes, 1/amu^1/2."""
        return self.modes.vectors / root_mass(self.supercell)[:, None]

    @property
    def gamma(self) -> np.ndarray:
        """(3n, 3n) force constants for lattice-periodic displacements, eV/A^2 per primitive
        cell."""
        size = 3 * len(self.atoms)
        return self.force_constants.sum(axis=0).transpose(0, 2, 1, 3).reshape(size, size)

    @cached_property
    def covariance(self) -> np.ndarray:
        """<u u> of the auxiliary density matrix (Eq. 3 of the paper), A^2, (3 n_supercell, 3
        n_supercell)."""
        return self._from_modes(variance(self.modes.hbar_omega, self.temperature), -0.5)

    @cached_property
    def square_root(self) -> np.ndarray:
        """Matrix S with S S^T = covariance; unique, so that samples do not depend on the choice of
        eigenvectors."""
        return self._from_modes(
            np.sqrt(variance(self.modes.hbar_omega, self.temperature)), -0.5, 0.0
        )

    @cached_property
    def precision(self) -> np.ndarray:
        """Pseudo-inverse of the covariance (Upsilon), 1/A^2."""
        return self._from_modes(1.0 / variance(self.modes.hbar_omega, self.temperature), 0.5)

    def _from_modes(
        self, weights: np.ndarray, left: float, right: float | None = None
    ) -> np.ndarray:
        masses = np.repeat(self.supercell.get_masses(), 3)
        vectors = self.modes.vectors
        matrix = (vectors * weights) @ vectors.T
        return (
            masses[:, None] ** left * matrix * masses[None, :] ** (left if right is None else right)
        )

    @property
    def harmonic_free_energy(self) -> float:
        """Free energy of the auxiliary oscillators, eV per primitive cell."""
        return float(
            oscillator_free_energy(self.modes.hbar_omega, self.temperature).sum() / self.n_cells
        )

    def strained(self, strain: np.ndarray, shift: np.ndarray | float = 0.0) -> SschaState:
        """The state with cell and centroids deformed by the symmetric ``strain`` (3, 3), then moved
        by ``shift`` (n, 3) A."""
        atoms = self.atoms.copy()
        strain_cell(atoms, strain)
        atoms.positions += shift
        return replace(self, atoms=atoms)


def state_digest(state: SschaState) -> str:
    """Twelve hex digits that identify a state."""
    arrays = (state.atoms.cell.array, state.atoms.positions, state.force_constants)
    return digest(*(np.round(array, 6) + 0.0 for array in arrays))


def agree(one: SschaState, other: SschaState, *names: str, atol: float) -> bool:
    """Whether two states have the same supercell and, to ``atol``, the same attributes ``names``:
    force_constants (eV/A^2), atoms.positions, atoms.cell.array (A), masses (amu)."""
    if one.supercell_matrix != other.supercell_matrix or len(one.atoms) != len(other.atoms):
        return False
    return all(np.allclose(get(one), get(other), 0.0, atol) for get in map(attrgetter, names))


def same_gaussian(one: SschaState, other: SschaState) -> bool:
    """Whether configurations drawn from one state are as good as from the other: all that the
    density depends on agrees."""
    return one.temperature == other.temperature and agree(
        one, other, "force_constants", "masses", "atoms.cell.array", atol=1e-7
    )


def translations(masses: np.ndarray) -> np.ndarray:
    """(3n, 3) orthonormal mass-weighted translations of atoms with ``masses`` (n,)."""
    root = np.sqrt(masses)
    return np.kron((root / np.linalg.norm(root))[:, None], np.eye(3))


def without_zero_modes(gamma: np.ndarray, masses: np.ndarray, largest: float) -> np.ndarray:
    """A mass-weighted matrix of lattice-periodic displacements whose translations lie above
    everything else; ``largest`` : element of all matrices."""
    still = translations(masses)
    return gamma + still @ still.T * (10.0 * max(largest, 1e-12) * len(gamma))


def normal_modes(full: np.ndarray, masses: np.ndarray) -> Modes:
    """Modes of a force-constant matrix (eV/A^2) that obeys the acoustic sum rule; ``masses`` (n,)
    in amu."""
    root = np.sqrt(np.repeat(masses, 3))
    dynamical = full / np.outer(root, root)
    squares, vectors = np.linalg.eigh(
        without_zero_modes(dynamical, masses, np.abs(dynamical).max())
    )
    return Modes(phonon_energy(squares[:-3]), vectors[:, :-3])


def sum_rule(full: np.ndarray) -> np.ndarray:
    """The nearest symmetric matrix in which a translation of the crystal costs nothing."""
    n = full.shape[0] // 3
    projector = np.eye(3 * n) - np.tile(np.eye(3), (n, n)) / n
    projected = projector @ full @ projector
    return 0.5 * (projected + projected.T)


def sample(state: SschaState, n_configs: int, rng: np.random.Generator) -> np.ndarray:
    """Displacements (n_configs, n_supercell, 3) in A drawn from the state as pairs +u, -u next to
    each other."""
    normal = rng.standard_normal((n_configs // 2, state.full.shape[0]))
    half = normal @ state.square_root.T
    return np.stack([half, -half], axis=1).reshape(n_configs, -1, 3)


def displaced(state: SschaState, displacements: np.ndarray) -> list[Atoms]:
    """The supercell with each of the ``displacements`` (n_configs, n_supercell, 3), A."""
    structures = []
    for displacement in displacements:
        structure = state.supercell.copy()
        structure.positions += displacement
        structures.append(structure)
    return structures


MELTED = 0.3
"""Ratio beyond which a state is no crystal."""
THERMAL = 0.15
"""The same of the thermal part alone, beyond which a classical crystal has melted."""
CLOSE_PACKING = 2.0 ** (1.0 / 6.0)


def packing_distance(atoms: Atoms) -> float:
    """Of neighbours in a close packing of the same density, A."""
    return CLOSE_PACKING * (atoms.get_volume() / len(atoms)) ** (1.0 / 3.0)


def lindemann_ratios(state: SschaState) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ratio of every atom of the cell, and (n,) its thermal part: the root of what <|u|^2> is
    above that at 0 K."""
    modes, n_cells = state.modes, state.n_cells
    weights = (modes.vectors**2).reshape(n_cells, len(state.atoms), 3, -1).sum(axis=2).mean(
        axis=0
    ) / state.atoms.get_masses()[:, None]
    square = weights @ variance(modes.hbar_omega, state.temperature)
    at_rest = weights @ variance(modes.hbar_omega, 0.0)
    distance = packing_distance(state.atoms)
    return np.sqrt(square) / distance, np.sqrt(np.maximum(square - at_rest, 0.0)) / distance


def melted(state: SschaState) -> str:
    """Why the state is no crystal; empty when it may be one."""
    ratios, _ = lindemann_ratios(state)
    worst = int(np.argmax(ratios))
    if ratios[worst] <= MELTED:
        return ""
    atom = f"atom {worst + 1} ({state.atoms.symbols[worst]})"
    return f"melted: {atom} strays by {_distances(ratios[worst])} (limit {MELTED:g})"


def melting_warning(state: SschaState) -> str:
    """One sentence when thermal motion is that of a liquid, else an empty string."""
    _, thermal = lindemann_ratios(state)
    worst = int(np.argmax(thermal))
    if thermal[worst] <= THERMAL:
        return ""
    strays = f"{state.atoms.symbols[worst]} strays by {_distances(thermal[worst])}"
    return f"may have melted: {strays} by thermal motion alone (limit {THERMAL:g})"


def _distances(ratio: float) -> str:
    return f"{ratio:.2f} of the distance between atoms"


H2_BOND = 0.85
"""Angstrom; two hydrogen atoms closer than this are a molecule."""
CH_BOND = 1.25
"""Angstrom; hydrogen closer to carbon than this belongs to a CHn unit."""
LARGE_LIBRATION = 0.35
"""Radian (20 degrees), root mean square: the chord is then 6 % longer than the bond, more than any
stretch costs."""


def librations(state: SschaState) -> list[tuple[str, float, float]]:
    """Units of the first cell with their bond (Angstrom) and rms angle of libration (radian),
    largest angle first.

    The angle is sqrt(<|du|^2> / 2) / bond with du the part of the relative displacement of the two
    atoms across the bond, halved for its two directions, from the covariance of the state. One
    entry per bond of an H2 or a C-H unit.
    """
    supercell, n = state.supercell, len(state.supercell)
    bonds = neighbor_list("ijDd", supercell, {("H", "H"): H2_BOND, ("C", "H"): CH_BOND})
    covariance = state.covariance.reshape(n, 3, n, 3)
    found = []
    for i, j, vector, length in zip(*bonds, strict=True):
        unit = "C-H" if supercell.symbols[i] == "C" else "H2"
        if i >= len(state.atoms) or unit == "H2" and (supercell.symbols[j] == "C" or i >= j):
            continue
        relative = (
            covariance[i, :, i] + covariance[j, :, j] - covariance[i, :, j] - covariance[j, :, i]
        )
        along = vector / length
        across = np.trace(relative) - along @ relative @ along
        angle = float(np.sqrt(max(across, 0.0) / 2.0) / length)
        found.append((unit, float(length), angle))
    return sorted(found, key=lambda entry: -entry[2])


def rotation_warning(state: SschaState) -> str:
    """One sentence when a unit librates by more than `LARGE_LIBRATION`, else an empty string."""
    found = librations(state)
    if not found or found[0][2] < LARGE_LIBRATION:
        return ""
    unit, bond, angle = found[0]
    many = sum(entry[2] >= LARGE_LIBRATION for entry in found)
    return (
        f"rotating {unit} units ({many} bonds of {bond:.2f} A, libration {np.degrees(angle):.0f}"
        " degrees): G is too high"
    )


LARGEST_AMPLITUDE = 0.2
"""Most by which one mode moves neighbours against each other at the start, in their distances
(rms)."""
LARGEST_AMPLITUDE_LATER = 0.45
"""The same between two populations: a noisy minimisation can drive a mode to zero, and the next
ensemble would be lost."""
NEIGHBOURS = 1.15
"""Neighbours are this much further apart than in a close packing, at most."""


def nearest_neighbour(atoms: Atoms) -> np.ndarray:
    """(n,) distance of every atom to its nearest neighbour (periodic images included), Angstrom."""
    cutoff = (1.5 if len(atoms) == 1 else 1.0) * atoms.get_volume() ** (1 / 3)
    while True:
        first, distance = neighbor_list("id", atoms, cutoff)
        if len(np.unique(first)) == len(atoms):
            nearest = np.full(len(atoms), np.inf)
            np.minimum.at(nearest, first, distance)
            return nearest
        cutoff *= 1.4


def floor_modes(
    state: SschaState, symmetry: Symmetry, largest: float = LARGEST_AMPLITUDE
) -> SschaState:
    """Make the force constants positive definite; the state itself where nothing has to change.

    Imaginary modes keep the size of their frequency. Then every phonon energy is raised until no
    two neighbours move against each other, in this mode and as if all q points had its frequency
    (so that it does not depend on the supercell), by more than ``largest`` times their distance
    (rms). The atoms of a rigid unit that moves as a whole do not count: its neighbours do.
    """
    root, full = root_mass(state.supercell), state.full
    for attempt in range(10):
        modes = normal_modes(full, state.supercell.get_masses())
        limit = largest**2 / relative_motion(state, modes.vectors / root[:, None])
        smallest = _smallest_hbar_omega(limit, state.temperature)
        if np.all(modes.hbar_omega >= smallest * (1 - 1e-6)):
            if attempt == 0:
                return state
            break
        raised = np.maximum(np.abs(modes.hbar_omega), smallest)
        change = (raised**2 - np.sign(modes.hbar_omega) * modes.hbar_omega**2) / HBAR**2
        vectors = modes.vectors * root[:, None]
        full = sum_rule(full + (vectors * change) @ vectors.T)
        compact = symmetry.force_constants(fold(full, state.supercell_matrix))
        full = expand(compact, state.supercell_matrix)
    return replace(state, force_constants=fold(full, state.supercell_matrix))


def relative_motion(state: SschaState, patterns: np.ndarray) -> np.ndarray:
    """(m,) of the ``patterns`` (3 n_supercell, m): the largest n_cells |x_i - x_j|^2 / d_ij^2 of
    all neighbours, averaged over cells.

    Neighbours are the pairs closer than about those in a close packing of this density, and every
    atom's nearest ones.
    """
    atoms, n_cells = state.atoms, state.n_cells
    cutoff = max(NEIGHBOURS * packing_distance(atoms), 1.05 * float(nearest_neighbour(atoms).max()))
    first, second, shifts, distances = neighbor_list("ijSd", atoms, cutoff)
    offsets = cell_offsets(state.supercell_matrix)
    cells = patterns.reshape(n_cells, len(atoms), 3, -1)
    largest = np.full(patterns.shape[1], 1e-12)
    for i, j, shift, distance in zip(first, second, shifts, distances, strict=True):
        if i <= j:
            apart = cells[:, i] - cells[cell_index(offsets + shift, state.supercell_matrix), j]
            np.maximum(largest, (apart**2).sum(axis=(0, 1)) / distance**2, out=largest)
    return largest


def _smallest_hbar_omega(largest_variance: np.ndarray, temperature: float) -> np.ndarray:
    """Phonon energy in eV at which the variance (A^2 amu) equals ``largest_variance``; bisection in
    the logarithm."""
    low, high = np.full(len(largest_variance), 1e-8), np.full(len(largest_variance), 1e2)
    for _ in range(80):
        middle = np.sqrt(low * high)
        too_soft = variance(middle, temperature) > largest_variance
        low, high = np.where(too_soft, middle, low), np.where(too_soft, high, middle)
    return high
