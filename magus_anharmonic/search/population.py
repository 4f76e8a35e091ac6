"""Populations as MAGUS keeps them: checks, duplicates, fitness, good, keep and best structures.

A population is a list of ``Atoms`` whose ``info`` holds MAGUS's keys.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import spglib
from ase import Atoms
from ase.build import niggli_reduce
from ase.neighborlist import neighbor_list
from scipy.cluster.hierarchy import fcluster, linkage

from magus_anharmonic.host_keys import HostKeys
from magus_anharmonic.hull import above_hull
from magus_anharmonic.ranking.fitness import copy_order, population_fitness
from magus_anharmonic.search.generate import Geometry
from magus_anharmonic.structures import kinds, spglib_cell, spglib_or_none

FINGERPRINT_CUTOFF = 6.0
"""Angstrom, range of the radial fingerprint that keep structures are clustered by."""


class Checker:
    """The checks that MAGUS makes before and after a relaxation."""

    def __init__(self, keys: HostKeys, geometry: Geometry) -> None:
        self.keys, self.geometry = keys, geometry
        self.compositions = {tuple(int(n) for n in row) for row in keys.atom_counts()}

    def problem(self, atoms: Atoms) -> str | None:
        """Why a structure is dropped, or None. Seeds pass unless ``check_seed``."""
        if atoms.info.get("origin") == "seed" and not self.keys.check_seed:
            return None
        counts = self.geometry.counts(atoms)
        if counts.sum() != len(atoms) or tuple(int(n) for n in counts) not in self.compositions:
            return "composition"
        if not self._cell_fits(atoms):
            return "cell shape"
        if self.geometry.too_close(atoms):
            return "distance"
        if "forces" in atoms.info and not np.max(np.abs(atoms.info["forces"])) < self.keys.max_forces:
            return "forces"
        if "enthalpy" in atoms.info and not atoms.info["enthalpy"] < self.keys.max_enthalpy:
            return "enthalpy"
        return None

    def _cell_fits(self, atoms: Atoms) -> bool:
        """Edge ratio, angles between edges, and angles between edges and faces (30 to 150 degrees) of the Niggli cell."""
        cell = atoms.copy()
        reduce_cell(cell)
        lengths, cosines = cell.cell.lengths(), np.cos(np.radians(cell.cell.angles()))
        edges = np.degrees(np.arccos(cosines))
        squared = np.sum(cosines**2) - 2 * np.prod(cosines) - cosines**2
        faces = np.degrees(np.arccos(np.sqrt(np.clip(squared, 0, None) / np.clip(1 - cosines**2, 1e-12, None)).clip(0, 1)))
        return bool(
            lengths.max() / lengths.min() < self.keys.max_length_ratio
            and (edges >= 30).all()
            and (edges <= 150).all()
            and (faces >= 30).all()
        )


def reduce_cell(atoms: Atoms) -> None:
    """Niggli-reduce the cell in place; a cell on which the reduction does not converge stays as it is."""
    try:
        reduced = atoms.copy()
        niggli_reduce(reduced)
    except RuntimeError:
        return
    atoms.set_cell(reduced.cell, scale_atoms=False)
    atoms.positions = reduced.positions


def find_space_group(atoms: Atoms, symprec: float) -> None:
    """Set ``spg`` (number, 1 when spglib finds none), ``priNum`` and ``priVol`` (A^3) as MAGUS does."""
    data = spglib_or_none(spglib.get_symmetry_dataset, spglib_cell(atoms), symprec=symprec)
    atoms.info["spg"] = int(data.number) if data is not None else 1
    primitive = spglib_or_none(spglib.standardize_cell, spglib_cell(atoms), to_primitive=True, symprec=symprec)
    lattice, _, numbers = primitive if primitive is not None else spglib_cell(atoms)
    atoms.info["priNum"] = np.array(numbers) % 1000
    atoms.info["priVol"] = float(abs(np.linalg.det(lattice)))


def same(a: Atoms, b: Atoms, keys: HostKeys) -> bool:
    """MAGUS's naive comparator: space group, primitive volume (relative, dV), one composition, and enthalpy per atom (eV, dE).

    MAGUS compares energies, which at 150 GPa differ by 1 meV for 0.001 A^3 that a relaxation leaves; enthalpies do not.
    """
    if a.info["spg"] != b.info["spg"] or _composition(a) != _composition(b):
        return False
    if abs(1 - a.info["priVol"] / b.info["priVol"]) > keys.dV:
        return False
    return abs(a.info["enthalpy"] - b.info["enthalpy"]) <= keys.dE


def set_dominators(population: Sequence[Atoms], fitness: Sequence[str]) -> None:
    """Set ``fitness`` (larger is better) and ``dominators``: how many others are at least as good in every fitness."""
    values = np.array([_FITNESS[name](population) for name in fitness]).reshape(len(fitness), len(population))
    for index, atoms in enumerate(population):
        at_least = (values >= values[:, index : index + 1]).all(axis=0)
        atoms.info["fitness"] = {name.lower(): float(values[row, index]) for row, name in enumerate(fitness)}
        atoms.info["dominators"] = int(at_least.sum()) - 1
        atoms.info["MOGArank"] = int(at_least.sum())
        atoms.info["sclDom"] = (int(at_least.sum()) - 1) / len(population)


def remove_duplicates(population: Sequence[Atoms], fitness: Sequence[str], keys: HostKeys) -> list[Atoms]:
    """The best copy of each structure (`copy_order`, of equals the oldest), sorted by dominators and age."""
    set_dominators(population, fitness)
    kept: list[Atoms] = []
    for atoms in sorted(population, key=lambda item: (copy_order(item.info), item.info["gen"])):
        if not any(same(atoms, other, keys) for other in kept):
            kept.append(atoms)
    return sorted(kept, key=lambda item: (item.info["dominators"], item.info["gen"]))


def replace_known(current: list[Atoms], known: Sequence[Atoms], keys: HostKeys) -> list[Atoms]:
    """``current`` with every structure that equals a known one, and is no better copy of it, replaced by that one.

    A child that relaxed back is its parent. One that got lower, or has a free energy where the known one has none, stays: MAGUS would
    throw it away.
    """

    def kept(atoms: Atoms) -> Atoms:
        copies = [other for other in known if same(atoms, other, keys)]
        return min([*copies, atoms], key=lambda item: copy_order(item.info))

    return [kept(atoms) for atoms in current]


def select_good(candidates: Sequence[Atoms], fitness: Sequence[str], keys: HostKeys) -> list[Atoms]:
    """The best ``pop_size`` distinct structures, best first."""
    kept = remove_duplicates(candidates, fitness, keys)
    set_dominators(kept, fitness)
    return sorted(kept, key=lambda item: item.info["dominators"])[: keys.pop_size]


def select_best(good: Sequence[Atoms]) -> list[Atoms]:
    """The structures with the fewest dominators."""
    fewest = min(atoms.info["dominators"] for atoms in good)
    return [atoms for atoms in good if atoms.info["dominators"] == fewest]


def select_keep(good: Sequence[Atoms], n: int) -> list[Atoms]:
    """The best structure of each of ``n`` clusters of ``good`` (copies)."""
    labels = cluster(good, n)
    chosen = []
    for label in dict.fromkeys(labels.tolist()):
        members = [atoms for atoms, own in zip(good, labels, strict=True) if own == label]
        chosen.append(copied(min(members, key=lambda item: item.info["dominators"])))
    return chosen


def copied(atoms: Atoms) -> Atoms:
    """A copy that shares nothing with the original, ``info`` included."""
    twin = atoms.copy()
    twin.info = copy.deepcopy(atoms.info)
    return twin


def cluster(population: Sequence[Atoms], n: int) -> np.ndarray:
    """(len(population),) cluster labels, at most ``n`` clusters of similar structures (average linkage, no randomness)."""
    if n >= len(population):
        return np.arange(len(population))
    elements = sorted({number for atoms in population for number in atoms.numbers})
    prints = np.array([fingerprint(atoms, elements) for atoms in population])
    return fcluster(linkage(prints, method="average"), n, criterion="maxclust")


def fingerprint(atoms: Atoms, elements: Sequence[int]) -> np.ndarray:
    """Radial distribution (broadened by 0.2 A, per atom, divided by r^2) of every pair of elements, one after the other."""
    grid = np.arange(0.5, FINGERPRINT_CUTOFF, 0.1)
    i, j, d = neighbor_list("ijd", atoms, FINGERPRINT_CUTOFF)
    parts = []
    for row, a in enumerate(elements):
        for b in elements[row:]:
            pair = (atoms.numbers[i] == a) & (atoms.numbers[j] == b)
            weights = 1.0 / (len(atoms) * d[pair] ** 2)
            parts.append(np.exp(-((grid[:, None] - d[pair]) ** 2) / (2 * 0.2**2)) @ weights)
    return np.concatenate(parts)


def hull_distance(population: Sequence[Atoms]) -> np.ndarray:
    """(n,) eV/atom above the lower convex hull of the population's own enthalpies over composition."""
    return above_hull([atoms.get_chemical_formula() for atoms in population], np.array([atoms.info["enthalpy"] for atoms in population]))


def _ehull(population: Sequence[Atoms]) -> list[float]:
    distances = hull_distance(population)
    for atoms, distance in zip(population, distances, strict=True):
        atoms.info["ehull"] = float(distance)
    return [-float(distance) for distance in distances]


_FITNESS = {
    "Enthalpy": lambda population: [-float(atoms.info["enthalpy"]) for atoms in population],
    "Ehull": _ehull,
    "SSCHA": population_fitness,
}


def _composition(atoms: Atoms) -> tuple[tuple[int, int], ...]:
    numbers, counts = np.unique(kinds(atoms), return_counts=True)
    return tuple(zip(numbers.tolist(), (counts // np.gcd.reduce(counts)).tolist(), strict=True))
