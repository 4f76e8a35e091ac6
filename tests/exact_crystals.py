"""Crystals whose SCHA free energy is a closed expression: an oracle that shares no code with the
package's SSCHA.

The energy is a sum over links of one-dimensional functions p(d) of linear forms d = e . (sum_a c_a
x_a) - s0 with sum_a c_a = 0. A Gaussian of the atoms makes every d Gaussian, with mean m and
variance S, so that with p = k1 d + k2 d^2/2 + k3 d^3 + k4 d^4 + D (1 - exp(-a d))^2 the averages
<p>, <p'>, <p''> are elementary; F = F_0 + <V> - <V_0>, the forces on the centroids, the force
constants <d2V> and the stress follow (Errea et al., PRB 89, 064302 (2014),
doi:10.1103/PhysRevB.89.064302), and `Scha` iterates them to the minimum without sampling anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.sscha import free_energy

HBAR = 6.582119569e-16 * np.sqrt(1.602176634e-19 * 1e20 / 1.66053906660e-27)
"""eV for frequencies in sqrt(eV/A^2/amu)."""
KELVIN = 8.617333262e-5
GPA = 160.21766208
"""eV/A^3 in GPa."""


@dataclass(frozen=True)
class Link:
    """terms : (coefficient, atom, cell) with coefficients that add up to zero; direction : (3,);
    the function of the module's docstring."""

    terms: tuple[tuple[float, int, tuple[int, int, int]], ...]
    direction: np.ndarray
    k2: float = 0.0
    k3: float = 0.0
    k4: float = 0.0
    depth: float = 0.0
    steepness: float = 0.0


class ExactCrystal:
    """An `Evaluator` for supercells of ``atoms`` (primitive, at rest: every link has d = 0 there);
    ``offset`` in eV per cell."""

    def __init__(self, name, atoms, links, offset=0.0):
        self.atoms, self.links, self.offset, self.model_id = (
            atoms,
            links,
            offset,
            f"{name}{offset:+g}",
        )
        self.directions = np.array([link.direction for link in links])
        names = ("k2", "k3", "k4", "depth", "steepness")
        self.k2, self.k3, self.k4, self.depth, self.steepness = (
            np.array([getattr(link, name) for link in links]) for name in names
        )
        self.rest = np.einsum("lx,lx->l", self.directions, self.vectors(atoms))
        self.n_structures = 0

    def vectors(self, atoms):
        """(links, 3) sum_a c_a x_a of a primitive cell."""
        cell = atoms.cell.array
        return np.array(
            [
                sum(c * (atoms.positions[a] + np.array(t) @ cell) for c, a, t in link.terms)
                for link in self.links
            ]
        )

    def mean(self, atoms):
        """(links,) d of a primitive cell."""
        return np.einsum("lx,lx->l", self.directions, self.vectors(atoms)) - self.rest

    def averages(self, m, s):
        """<p>, <p'>, <p''> for Gaussians of mean m and variance s, (..., links)."""
        k2, k3, k4, depth, a = self.k2, self.k3, self.k4, self.depth, self.steepness
        one, two = np.exp(-a * m + a**2 * s / 2), np.exp(-2 * a * m + 2 * a**2 * s)
        value = (
            k2 * (m**2 + s) / 2
            + k3 * (m**3 + 3 * m * s)
            + k4 * (m**4 + 6 * m**2 * s + 3 * s**2)
            + depth * (1 - 2 * one + two)
        )
        slope = (
            k2 * m + 3 * k3 * (m**2 + s) + 4 * k4 * (m**3 + 3 * m * s) + 2 * depth * a * (one - two)
        )
        curvature = k2 + 6 * k3 * m + 12 * k4 * (m**2 + s) + 2 * depth * a**2 * (2 * two - one)
        return value, slope, curvature

    def evaluate(self, structures):
        """See `Evaluator`. Structures of one cell are named together, by their mean: one alone may
        be far from its sites."""
        self.n_structures += len(structures)
        groups = {}
        for number, atoms in enumerate(structures):
            groups.setdefault(atoms.cell.array.tobytes() + atoms.numbers.tobytes(), []).append(
                number
            )
        energy, stress, forces = (
            np.empty(len(structures)),
            np.empty((len(structures), 3, 3)),
            [np.zeros(0)] * len(structures),
        )
        for members in groups.values():
            found = self._batch(
                structures[members[0]],
                np.array([structures[number].positions for number in members]),
            )
            energy[members], stress[members] = found[0], found[2]
            for number, force in zip(members, found[1], strict=True):
                forces[number] = force
        return Evaluation(energy, forces, stress)

    def _batch(self, atoms, positions):
        """Energies, forces and stresses of ``positions`` (c, n, 3) in the cell of ``atoms``."""
        middle = atoms.copy()
        middle.positions = positions.mean(axis=0)
        index, coefficients, images = self._incidence(middle)
        vectors = np.einsum(
            "lk,clkx->clx",
            coefficients,
            positions[:, index] + images @ atoms.cell.array,
            optimize=True,
        )
        directions = np.tile(self.directions, (len(index) // len(self.links), 1))
        d = (
            np.einsum("clx,lx->cl", vectors, directions).reshape(
                len(positions), -1, len(self.links)
            )
            - self.rest
        )
        value, slope, _ = self.averages(d, np.zeros(1))
        slope = slope.reshape(len(positions), -1)
        forces = np.zeros_like(positions)
        for column in range(index.shape[1]):
            pull = -(slope * coefficients[:, column])[:, :, None] * directions
            np.add.at(forces, (slice(None), index[:, column]), pull)
        stress = (
            np.einsum("cl,lx,cly->cxy", slope, directions, vectors, optimize=True)
            / atoms.get_volume()
        )
        return (
            value.sum(axis=(1, 2)) + self.offset * d.shape[1],
            forces,
            0.5 * (stress + stress.transpose(0, 2, 1)),
        )

    @cached_property
    def _known(self):
        return {}

    def _incidence(self, atoms):
        """Atoms (m, k), coefficients and images (m, k, 3; in cells of ``atoms``) of all links of a
        supercell; displacements stay small."""
        base = self.atoms.cell.array
        matrix = np.rint(atoms.cell.array @ np.linalg.inv(base)).astype(int)
        # displacements and strain do not change which atom is which: name the sites in lattice
        # coordinates
        fractional = atoms.positions @ np.linalg.inv(atoms.cell.array) @ matrix
        offsets = fractional[:, None] - self.atoms.get_scaled_positions(wrap=False)[None]
        away = np.linalg.norm((offsets - np.rint(offsets)) @ base, axis=2)
        away[atoms.numbers[:, None] != self.atoms.numbers[None]] = np.inf
        site = away.argmin(axis=1)
        cells = np.rint(offsets[np.arange(len(atoms)), site]).astype(int)
        key = matrix.tobytes() + site.tobytes() + cells.tobytes()
        if key not in self._known:
            self._known[key] = self._links_of(matrix, site, cells)
        return self._known[key]

    def _links_of(self, matrix, site, cells):
        inverse, size = np.linalg.inv(matrix), round(abs(np.linalg.det(matrix)))

        def name(cell):
            return tuple(int(x) % size for x in np.rint(cell @ inverse * size))

        place = {(int(s), *name(c)): i for i, (s, c) in enumerate(zip(site, cells, strict=True))}
        assert len(place) == len(site), "two atoms on one site"
        width = max(len(link.terms) for link in self.links)
        firsts = cells[site == 0]
        shape = (len(firsts) * len(self.links), width)
        index, coefficients, images = (
            np.zeros(shape, dtype=int),
            np.zeros(shape),
            np.zeros((*shape, 3)),
        )
        for row, (cell, link) in enumerate((cell, link) for cell in firsts for link in self.links):
            for column, (c, a, t) in enumerate(link.terms):
                wanted = cell + np.array(t)
                i = place[(a, *name(wanted))]
                index[row, column], coefficients[row, column] = i, c
                images[row, column] = np.rint((wanted - cells[i]) @ inverse)
        return index, coefficients, images


class Scha:
    """Minimum of F + P V (``pressure`` in GPa) in a supercell: ``gibbs`` eV/atom, ``minimum`` the
    centroids."""

    def __init__(self, crystal, supercell_matrix, temperature=0.0, pressure=0.0, cell="fixed"):
        self.crystal, self.temperature, self.pressure, self.cell = (
            crystal,
            temperature,
            pressure,
            cell,
        )
        self.n = len(crystal.atoms)
        supercell = crystal.atoms.repeat(supercell_matrix)
        index, coefficients, _ = crystal._incidence(supercell)
        self.n_cells = len(supercell) // self.n
        directions = np.tile(crystal.directions, (self.n_cells, 1))
        self.incidence = np.zeros((len(index), len(supercell), 3))
        for column in range(index.shape[1]):
            np.add.at(
                self.incidence,
                (np.arange(len(index)), index[:, column]),
                coefficients[:, column, None] * directions,
            )
        self.incidence = self.incidence.reshape(len(index), -1)
        self.masses = np.repeat(np.tile(crystal.atoms.get_masses(), self.n_cells), 3)

    def modes(self, matrix):
        """Quanta (eV) and vectors over the root of the masses, translations left out."""
        root = np.sqrt(self.masses)
        translations = np.zeros((len(root), 3))
        for axis in range(3):
            translations[axis::3, axis] = root[axis::3]
        translations /= np.linalg.norm(translations, axis=0)
        squares, vectors = np.linalg.eigh(
            matrix / np.outer(root, root) + 1e6 * translations @ translations.T
        )
        return HBAR * np.sign(squares[:-3]) * np.sqrt(np.abs(squares[:-3])), vectors[:, :-3] / root[
            :, None
        ]

    def variance(self, hbar_omega):
        """<Q^2> of oscillators, A^2 amu."""
        thermal = (
            1.0
            if self.temperature == 0
            else 1.0 / np.tanh(hbar_omega / (2.0 * KELVIN * self.temperature))
        )
        return HBAR**2 / (2.0 * hbar_omega) * thermal

    def at(self, atoms, matrix):
        """F in eV per cell, <p'> and <p''> (n_cells, links) of centroids and force constants
        (eV/A^2, of the supercell)."""
        hbar_omega, vectors = self.modes(matrix)
        amplitude = self.variance(hbar_omega)
        spread = ((self.incidence @ vectors) ** 2 @ amplitude).reshape(self.n_cells, -1)
        value, slope, curvature = self.crystal.averages(self.crystal.mean(atoms)[None], spread)
        own = 0.5 * float(np.sum((matrix @ vectors) * vectors * amplitude))
        thermal = KELVIN * self.temperature
        free = hbar_omega.sum() / 2.0 + (
            thermal * np.log1p(-np.exp(-hbar_omega / thermal)).sum() if thermal else 0.0
        )
        return (
            (free + float(value.sum()) - own) / self.n_cells + self.crystal.offset,
            slope,
            curvature,
        )

    def solve(self, steps=4000, mixing=0.4, tolerance=1e-6):
        """Damped self-consistent steps of force constants, centroids and cell; raises
        ``AssertionError`` when they do not end."""
        crystal, atoms = self.crystal, self.crystal.atoms.copy()
        stiff = np.abs(crystal.k2 + 2.0 * crystal.depth * crystal.steepness**2)
        matrix = self._matrix(np.tile(np.maximum(stiff, 0.02 * stiff.max()), (self.n_cells, 1)))
        for _ in range(steps):
            _, slope, curvature = self.at(atoms, matrix)
            change, part = self._matrix(curvature) - matrix, mixing
            while self.modes(matrix + part * change)[0].min() <= 0.0:
                part *= 0.5
            matrix = matrix + part * change
            gamma = (
                matrix.reshape(self.n_cells, 3 * self.n, self.n_cells, 3 * self.n).sum(axis=(0, 2))
                / self.n_cells
            )
            force = -(slope.ravel() @ self.incidence).reshape(self.n_cells, -1).mean(axis=0)
            step = np.linalg.pinv(gamma, rcond=1e-9) @ force
            atoms.positions += part * np.clip(step, -0.1, 0.1).reshape(-1, 3)
            strain = self._strain(atoms, slope, curvature)
            atoms.set_cell(
                atoms.cell.array @ (np.eye(3) + part * np.clip(strain, -0.01, 0.01)),
                scale_atoms=True,
            )
            if max(np.abs(change).max(), np.abs(step).max(), np.abs(strain).max()) < tolerance:
                break
        else:
            raise AssertionError(f"{crystal.model_id}: no minimum found")
        self.minimum, self.matrix = atoms, matrix
        self.gibbs = (self.at(atoms, matrix)[0] + self.pressure / GPA * atoms.get_volume()) / self.n
        return self

    def _matrix(self, curvature):
        return (self.incidence * curvature.reshape(-1, 1)).T @ self.incidence

    def _strain(self, atoms, slope, curvature):
        if self.cell == "fixed":
            return np.zeros((3, 3))
        directions, vectors, volume = (
            self.crystal.directions,
            self.crystal.vectors(atoms),
            atoms.get_volume(),
        )
        stress = np.einsum("l,lx,ly->xy", slope.mean(axis=0), directions, vectors) / volume
        excess = 0.5 * (stress + stress.T) + np.eye(3) * self.pressure / GPA
        dyads = 0.5 * (
            np.einsum("lx,ly->lxy", directions, vectors)
            + np.einsum("lx,ly->lyx", directions, vectors)
        ).reshape(-1, 9)
        stiffness = (dyads * curvature.mean(axis=0)[:, None]).T @ dyads / volume
        return -(np.linalg.pinv(stiffness, rcond=1e-7) @ excess.ravel()).reshape(3, 3)


def springs(name, atoms, cutoff, spring):
    """Bonds up to ``cutoff`` (A): ``spring(a, b, unit, length)`` gives k2, k3, k4 along the bond
    and ``across`` for both ways across it."""
    links = []
    for a, b, shift, vector, length in zip(*neighbor_list("ijSDd", atoms, cutoff), strict=True):
        if (b - a, *shift) <= (0, 0, 0, 0):
            continue
        terms = ((1.0, int(b), tuple(int(x) for x in shift)), (-1.0, int(a), (0, 0, 0)))
        constants = spring(a, b, vector / length, length)
        across = constants.pop("across", 0.0)
        links.append(Link(terms, vector / length, **constants))
        if across:
            links += [
                Link(terms, unit, k2=across, k4=0.3 * across)
                for unit in np.linalg.svd(vector[None])[2][1:]
            ]
    return ExactCrystal(name, atoms, links)


def hcp():
    """Two light atoms, c/a free."""
    atoms = bulk("Mg", "hcp", a=3.0, c=4.85)
    atoms.numbers[:] = 4
    return springs(
        "hcp", atoms, 3.3, lambda a, b, unit, length: dict(k2=2.5, k3=-2.0, k4=3.0, across=0.15)
    )


def perovskite():
    """Cubic, five atoms, light anions."""
    places = [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    atoms = Atoms(numbers=[20, 6, 1, 1, 1], cell=[4.0] * 3, scaled_positions=places, pbc=True)

    def spring(a, b, unit, length):
        near = length < 2.5
        return dict(
            k2=3.0 if near else 0.8, k3=-2.0 if near else -0.4, k4=4.0 if near else 0.5, across=0.4
        )

    return springs("perovskite", atoms, 2.9, spring)


def triclinic():
    """Four atoms without any symmetry."""
    places = [[0, 0, 0], [1.5, 0.2, 0.3], [0.4, 1.7, 1.9], [2.0, 1.8, 2.5]]
    atoms = Atoms(
        "CHHN", cell=[[3.1, 0, 0], [0.4, 3.3, 0], [0.2, -0.5, 3.6]], positions=places, pbc=True
    )
    rng = np.random.default_rng(3)

    def spring(a, b, unit, length):
        return dict(
            k2=2.0 * rng.uniform(0.5, 1.5), k3=-1.5 * rng.uniform(0.5, 1.5), k4=2.0, across=0.4
        )

    return springs("triclinic", atoms, 2.9, spring)


def rock_salt():
    """LiH-like."""

    def spring(a, b, unit, length):
        near = length < 2.5
        return dict(
            k2=2.0 if near else 0.5, k3=-2.0 if near else -0.3, k4=3.0 if near else 0.2, across=0.25
        )

    return springs("rock salt", bulk("LiH", "rocksalt", a=4.1), 3.0, spring)


def heavy_light():
    """A heavy metal with hydrogen in it."""

    def spring(a, b, unit, length):
        return dict(k2=1.5 if length < 2.5 else 2.0, k3=-1.5, k4=3.0, across=0.35)

    return springs("heavy and light", bulk("PdH", "zincblende", a=4.3), 3.2, spring)


def layered():
    """Stiff sheets, weakly and anharmonically held: C11 about a hundred times C33."""
    places = [[0, 0, 0], [1 / 3, 2 / 3, 0]]
    atoms = Atoms(
        "C2",
        cell=[[2.46, 0, 0], [-1.23, 2.1304, 0], [0, 0, 3.4]],
        scaled_positions=places,
        pbc=True,
    )

    def spring(a, b, unit, length):
        if abs(unit[2]) < 0.1:
            return (
                dict(k2=40.0, k3=-20.0, k4=10.0, across=3.0)
                if length < 1.6
                else dict(k2=4.0, k3=-2.0, across=0.5)
            )
        return (
            dict(k2=0.12, k3=-0.25, k4=0.3, across=0.01)
            if length < 3.5
            else dict(k2=0.02, across=0.01)
        )

    return springs("layered", atoms, 3.75, spring)


def molecular(symbol="H", depth=4.6, steepness=1.95, lattice=0.004, turning=0.2):
    """Two molecules on an orthorhombic lattice: stiff Morse bonds, weak springs between centres,
    librations."""
    half, centre = 0.37, np.array([1.6, 1.7, 1.7])
    places = [[0, 0, -half], [0, 0, half], centre - [0, 0, half], centre + [0, 0, half]]
    atoms = Atoms(f"{symbol}4", positions=places, cell=[3.2, 3.4, 3.8], pbc=True)
    axes, here, links = np.eye(3), (0, 0, 0), []
    for first in (0, 2):
        bond = ((1.0, first + 1, here), (-1.0, first, here))
        links.append(Link(bond, axes[2], depth=depth, steepness=steepness))
        links += [Link(bond, axis, k2=turning, k4=0.3 * turning) for axis in axes[:2]]
    for cell in np.ndindex(2, 2, 2):
        there = tuple(int(x) - 1 for x in cell)
        vector = centre + np.array(there) @ atoms.cell.array
        apart = ((0.5, 2, there), (0.5, 3, there), (-0.5, 0, here), (-0.5, 1, here))
        links.append(
            Link(apart, vector / np.linalg.norm(vector), k2=lattice, k3=-0.3 * lattice, k4=lattice)
        )
        links += [Link(apart, axis, k2=0.3 * lattice, k4=0.1 * lattice) for axis in axes]
    for axis in range(3):
        there = tuple(int(x) for x in np.eye(3, dtype=int)[axis])
        for first in (0, 2):
            apart = (
                (0.5, first, there),
                (0.5, first + 1, there),
                (-0.5, first, here),
                (-0.5, first + 1, here),
            )
            links.append(
                Link(apart, axes[axis], k2=0.6 * lattice, k3=-0.2 * lattice, k4=0.5 * lattice)
            )
    return ExactCrystal(f"molecular {symbol}", atoms, links)


def nitrogen():
    """Heavier molecules in a firmer lattice."""
    return molecular("N", depth=9.9, steepness=2.7, lattice=0.02, turning=0.5)


@dataclass(frozen=True)
class Case:
    """A crystal with a supercell and a pressure (GPa) for the tests of coverage."""

    make: Callable[[], ExactCrystal]
    supercell_matrix: tuple[int, int, int]
    pressure: float

    def solve(self, temperature, cell):
        """Its minimum, without sampling."""
        return Scha(self.make(), self.supercell_matrix, temperature, self.pressure, cell).solve()

    def run(self, crystal, temperature, cell, n_configs, **options):
        """SSCHA of one ``crystal`` that it made."""
        return free_energy(
            crystal.atoms.copy(),
            crystal,
            pressure=self.pressure,
            temperature=temperature,
            supercell=self.supercell_matrix,
            cell=cell,
            n_configs=n_configs,
            reference_spacing=0.5,
            **options,
        )


CASES = {
    "hcp": Case(hcp, (2, 2, 2), 5.0),
    "perovskite": Case(perovskite, (2, 2, 2), 2.0),
    "triclinic": Case(triclinic, (2, 1, 1), 3.0),
    "rock salt": Case(rock_salt, (2, 2, 2), 5.0),
    "heavy and light": Case(heavy_light, (2, 2, 2), 5.0),
    "layered": Case(layered, (3, 3, 2), 0.0),
    "molecular": Case(molecular, (1, 1, 1), 0.0),
    "nitrogen": Case(nitrogen, (1, 1, 1), 0.0),
}
