"""Random crystals by PyXtal, under MAGUS's keys.

PyXtal: S. Fredericks, K. Parrish, D. Sayre, Q. Zhu, Comput. Phys. Commun. 261, 107810 (2021),
    doi:10.1016/j.cpc.2020.107810.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from ase.geometry import get_duplicate_atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.search.keys import HostKeys, parse_host_keys
from magus_anharmonic.settings import Settings

if TYPE_CHECKING:
    from pyxtal.symmetry import Group
    from pyxtal.tolerance import Tol_matrix

log = logging.getLogger(__name__)

COORDINATE_ATTEMPTS = 10
"""Placements tried in one random lattice; more of them cost seconds where another lattice succeeds
at once."""

ROUNDS = 10
"""Rounds of ``max_n_try`` attempts without one structure after which the generator gives up."""

PRIMITIVE = {
    "P": np.eye(3),
    "A": np.array([[1, 0, 0], [0, 0.5, -0.5], [0, 0.5, 0.5]]),
    "C": np.array([[0.5, 0.5, 0], [-0.5, 0.5, 0], [0, 0, 1]]),
    "I": np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) / 2,
    "F": np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2,
    "R": np.array([[2, 1, 1], [-1, 1, 1], [-1, -2, 1]]) / 3,
}
"""Rows: primitive vectors in the conventional ones, by centring letter (International Tables A,
obverse setting for R)."""


class Geometry:
    """Radii, shortest distances and volumes that follow from the keys.

    distances : {(symbol, symbol): Angstrom}, both orders.
    """

    def __init__(self, keys: HostKeys, symbols: list[str]) -> None:
        self.keys, self.symbols = keys, symbols
        self.radius = np.array(
            keys.radius or [covalent_radii[atomic_numbers[symbol]] for symbol in symbols]
        )
        self.distances: dict[tuple[str, str], float] = {}
        for (i, a), (j, b) in itertools.product(enumerate(symbols), repeat=2):
            matrix = keys.distance_matrix
            self.distances[a, b] = (
                matrix[i][j] if matrix else keys.d_ratio * float(self.radius[i] + self.radius[j])
            )

    def counts(self, atoms: Atoms) -> np.ndarray:
        """(n_symbols,) atoms of each element."""
        return np.array([atoms.get_chemical_symbols().count(symbol) for symbol in self.symbols])

    def ball_volume(self, counts: np.ndarray) -> float:
        """Volume of the atoms' balls in A^3."""
        return float(4 * np.pi / 3 * self.radius**3 @ counts)

    def volume_range(self, counts: np.ndarray, ratio: float) -> tuple[float, float]:
        """Smallest and largest random cell volume in A^3."""
        keys, mean = self.keys, ratio * self.ball_volume(counts)
        low = keys.min_volume if keys.min_volume > 0 else keys.min_volume_ratio * mean
        high = keys.max_volume if keys.max_volume > 0 else keys.max_volume_ratio * mean
        return min(low, high), high

    def lattice_fits(self, cellpar: np.ndarray, counts: np.ndarray, largest_volume: float) -> bool:
        """Whether a, b, c (Angstrom) and the angles (degrees) lie within min_lattice and
        max_lattice."""
        low = [2 * self.radius[counts > 0].max()] * 3 + [45.0] * 3
        high = [3 * largest_volume ** (1 / 3)] * 3 + [135.0] * 3
        least, most = np.array(self.keys.min_lattice), np.array(self.keys.max_lattice)
        low, high = np.where(least > 0, least, low), np.where(most > 0, most, high)
        return bool((cellpar >= low).all() and (cellpar <= high).all())

    def too_close(self, atoms: Atoms) -> bool:
        """Whether any two atoms (periodic images too) are closer than allowed."""
        return len(neighbor_list("i", atoms, self.distances, max_nbins=100.0)) > 0


class RandomGenerator:
    """Draws space group, composition, lattice and coordinates until the keys are satisfied."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry, self.keys = geometry, geometry.keys
        self.pool = self.keys.atom_counts()
        self._open = list(self.keys.spacegroup)
        self._fits: dict[tuple[int, bool], np.ndarray] = {}

    def generate(self, n: int, volume_ratio: float, rng: np.random.Generator) -> list[Atoms]:
        """``n`` random structures; ``volume_ratio`` is the mean cell volume in units of the balls'
        volume.

        Raises
        ------
        InputError
            No space group of the list can hold any of the compositions.
        MagusAnharmonicError
            ``ROUNDS`` times ``max_n_try`` attempts in a row failed; the message counts the reasons.
        """
        self._open = list(self.keys.spacegroup)
        structures: list[Atoms] = []
        reasons: Counter[str] = Counter()
        while len(structures) < n:
            found = self._attempt(volume_ratio, rng)
            if isinstance(found, Atoms):
                structures.append(found)
                reasons.clear()
                continue
            reasons[found] += 1
            if reasons.total() % self.keys.max_n_try == 0:
                counted = ", ".join(
                    f"{count} x {reason}" for reason, count in reasons.most_common()
                )
                message = f"no random structure in {reasons.total()} attempts ({counted})"
                if reasons.total() >= ROUNDS * self.keys.max_n_try:
                    raise MagusAnharmonicError(
                        f"{message}; raise volume_ratio or max_n_try, lower d_ratio, or allow more"
                        " space groups or atoms"
                    )
                log.warning("%s; still trying", message)
        return structures

    def _draw(self, rng: np.random.Generator) -> tuple[int, bool, np.ndarray]:
        """Space group, whether the atoms are counted in its primitive cell, and a composition that
        its sites can hold."""
        while self._open:
            number, primitive = (
                self._open[rng.integers(len(self._open))],
                bool(rng.random() < self.keys.p_pri),
            )
            fitting = self._fitting(number, primitive)
            if len(fitting):
                return number, primitive, fitting[rng.integers(len(fitting))]
            if not any(
                len(self._fitting(number, mode))
                for mode, wanted in ((False, self.keys.p_pri < 1), (True, self.keys.p_pri > 0))
                if wanted
            ):
                self._open.remove(number)
        sizes = sorted({int(counts.sum()) for counts in self.pool})
        raise InputError(
            f"spacegroup: none of the {len(self.keys.spacegroup)} given space groups can hold"
            f" {sizes} atoms of formula {self.keys.formula}"
        )

    def _fitting(self, number: int, primitive: bool) -> np.ndarray:
        if (number, primitive) not in self._fits:
            group = _group(number)
            repeat = group.cellsize() if primitive else 1
            keep = [
                bool(group.check_compatible(counts[counts > 0] * repeat)[0]) for counts in self.pool
            ]
            self._fits[number, primitive] = self.pool[keep]
        return self._fits[number, primitive]

    def _attempt(self, volume_ratio: float, rng: np.random.Generator) -> Atoms | str:
        """One structure, or the reason why not."""
        number, primitive, counts = self._draw(rng)
        low, high = self.geometry.volume_range(counts, volume_ratio)
        group = _group(number)
        repeat = group.cellsize() if primitive else 1
        atoms = self._crystal(group, counts, repeat, float(rng.uniform(low, high)), rng)
        if isinstance(atoms, str):
            return atoms
        if not self.geometry.lattice_fits(atoms.cell.cellpar(), counts, repeat * high):
            return "lattice outside min_lattice and max_lattice"
        if primitive:
            atoms = _primitive(atoms, group.symbol[0])
        if (self.geometry.counts(atoms) != counts).any():
            return "primitive cell with other atoms"
        return "atoms too close" if self.geometry.too_close(atoms) else atoms

    def _crystal(
        self, group: Group, counts: np.ndarray, repeat: int, volume: float, rng: np.random.Generator
    ) -> Atoms | str:
        from pyxtal.lattice import Lattice
        from pyxtal.msg import VolumeError

        present = counts > 0
        symbols = [
            symbol for symbol, there in zip(self.geometry.symbols, present, strict=True) if there
        ]
        try:
            lattice = Lattice(group.lattice_type, repeat * volume, PBC=[1, 1, 1], random_state=rng)
        except VolumeError:
            return "no lattice of this volume"
        crystal = _one_lattice_crystal()(
            dim=3,
            group=group,
            species=symbols,
            numIons=counts[present] * repeat,
            lattice=lattice,
            tm=self._tolerances,
            random_state=rng,
        )
        if not crystal.valid:
            return "atoms too close or no free sites"
        coordinates = np.concatenate([site.coords for site in crystal.atom_sites])
        elements = [site.specie for site in crystal.atom_sites for _ in site.coords]
        atoms = Atoms(elements, scaled_positions=coordinates, cell=crystal.lattice.matrix, pbc=True)
        atoms.wrap()
        return atoms[np.argsort(atoms.numbers, kind="stable")]

    @functools.cached_property
    def _tolerances(self) -> Tol_matrix:
        from pyxtal.tolerance import Tol_matrix

        matrix = Tol_matrix(prototype="atomic")
        for (a, b), distance in self.geometry.distances.items():
            matrix.set_tol(a, b, distance)
        return matrix


@functools.lru_cache(maxsize=230)
def _group(number: int) -> Group:
    from pyxtal.symmetry import Group

    return Group(number)


@functools.cache
def _one_lattice_crystal() -> type[Any]:
    """PyXtal's random crystal, tried in the given lattice alone: the caller draws a new lattice,
    PyXtal would try 40."""
    from pyxtal import operations
    from pyxtal.crystal import random_crystal

    # it makes the table of all elements anew (94 x 94 in Python) at each look at images, also where
    # a distance is given
    operations.Tol_matrix = functools.cache(operations.Tol_matrix)

    class OneLatticeCrystal(random_crystal):
        def set_crystal(self) -> None:
            self.numattempts = 0
            self.set_volume()
            self.set_lattice(self.lattice0)
            for _ in range(COORDINATE_ATTEMPTS):
                self.atom_sites = self._set_coords()
                if self.atom_sites:
                    return
            self.valid = False

    return OneLatticeCrystal


def crystals_of(settings: Settings, seed: int, batch: int, n: int) -> list[Atoms]:
    """``n`` random crystals of a search for its first model, the same ones for the same ``seed``
    and ``batch``."""
    keys, _ = parse_host_keys(settings)
    rng = np.random.default_rng([seed, 0, batch])
    generator = RandomGenerator(Geometry(keys, settings.symbols))
    return generator.generate(n, keys.volume_ratio, rng)


def _primitive(atoms: Atoms, centring: str) -> Atoms:
    """The primitive cell of a conventional one, with the symmetry that was asked for (spglib might
    find more)."""
    atoms = atoms.copy()
    atoms.set_cell(PRIMITIVE[centring] @ atoms.cell.array, scale_atoms=False)
    atoms.wrap()
    get_duplicate_atoms(atoms, cutoff=1e-3, delete=True)
    return atoms
