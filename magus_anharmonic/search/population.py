"""Duplicates, parents and operators.

Populations as MAGUS keeps them: checks, duplicates, fitness, good, keep and best structures.

A population is a list of ``Atoms`` whose ``info`` holds MAGUS's keys.

Offspring: parents by rank, crossover and mutations from ase-ga.

ase-ga: L. B. Vilhelmsen, B. Hammer, J. Chem. Phys. 141, 044711 (2014), doi:10.1063/1.4886337.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.build import make_supercell, niggli_reduce
from ase.data import atomic_numbers
from ase.neighborlist import neighbor_list
from scipy.cluster.hierarchy import fcluster, linkage

from magus_anharmonic.hull import above_hull
from magus_anharmonic.ranking.fitness import copy_order, population_fitness, third_party_fitness
from magus_anharmonic.search.generate import Geometry
from magus_anharmonic.search.keys import HostKeys
from magus_anharmonic.structures import (
    isotopes,
    kinds,
    spglib_cell,
    spglib_or_none,
    standardized,
    with_isotopes,
)
from magus_anharmonic.structures import stripped as without_results

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
        forces = atoms.info.get("forces", 0.0)
        if not np.max(np.abs(forces)) < self.keys.max_forces:
            return "forces"
        if "enthalpy" in atoms.info and not atoms.info["enthalpy"] < self.keys.max_enthalpy:
            return "enthalpy"
        return None

    def _cell_fits(self, atoms: Atoms) -> bool:
        """Edge ratio, angles between edges, and angles between edges and faces (30 to 150 degrees)
        of the Niggli cell."""
        cell = atoms.copy()
        reduce_cell(cell)
        lengths, cosines = cell.cell.lengths(), np.cos(np.radians(cell.cell.angles()))
        edges = np.degrees(np.arccos(cosines))
        squared = np.sum(cosines**2) - 2 * np.prod(cosines) - cosines**2
        sines = np.sqrt(np.clip(squared, 0, None) / np.clip(1 - cosines**2, 1e-12, None))
        faces = np.degrees(np.arccos(sines.clip(0, 1)))
        return bool(
            lengths.max() / lengths.min() < self.keys.max_length_ratio
            and (edges >= 30).all()
            and (edges <= 150).all()
            and (faces >= 30).all()
        )


def reduce_cell(atoms: Atoms) -> None:
    """Niggli-reduce the cell in place; a cell on which the reduction does not converge stays as it
    is."""
    try:
        reduced = atoms.copy()
        niggli_reduce(reduced)
    except RuntimeError:
        return
    atoms.set_cell(reduced.cell, scale_atoms=False)
    atoms.positions = reduced.positions


def find_space_group(atoms: Atoms, symprec: float) -> None:
    """Set ``spg`` (number, 1 when spglib finds none), ``priNum`` and ``priVol`` (A^3) as MAGUS
    does."""
    data = spglib_or_none(spglib.get_symmetry_dataset, spglib_cell(atoms), symprec=symprec)
    atoms.info["spg"] = int(data.number) if data is not None else 1
    primitive = spglib_or_none(
        spglib.standardize_cell, spglib_cell(atoms), to_primitive=True, symprec=symprec
    )
    lattice, _, numbers = primitive if primitive is not None else spglib_cell(atoms)
    atoms.info["priNum"] = np.array(numbers) % 1000
    atoms.info["priVol"] = float(abs(np.linalg.det(lattice)))


def same(a: Atoms, b: Atoms, keys: HostKeys) -> bool:
    """MAGUS's naive comparator: space group, primitive volume (relative, dV), one composition, and
    enthalpy per atom (eV, dE).

    MAGUS compares energies, which at 150 GPa differ by 1 meV for 0.001 A^3 that a relaxation
    leaves; enthalpies do not.
    """
    if a.info["spg"] != b.info["spg"] or _composition(a) != _composition(b):
        return False
    if abs(1 - a.info["priVol"] / b.info["priVol"]) > keys.dV:
        return False
    return abs(a.info["enthalpy"] - b.info["enthalpy"]) <= keys.dE


def set_dominators(population: Sequence[Atoms], fitness: Sequence[str]) -> None:
    """Set ``fitness`` (larger is better) and ``dominators``: how many others are at least as good
    in every fitness."""
    values = np.array([fitness_function(name)(population) for name in fitness]).reshape(
        len(fitness), len(population)
    )
    for index, atoms in enumerate(population):
        at_least = (values >= values[:, index : index + 1]).all(axis=0)
        atoms.info["fitness"] = {
            name.lower(): float(values[row, index]) for row, name in enumerate(fitness)
        }
        rank = int(at_least.sum())
        atoms.info |= {
            "MOGArank": rank,
            "dominators": rank - 1,
            "sclDom": (rank - 1) / len(population),
        }


def remove_duplicates(
    population: Sequence[Atoms], fitness: Sequence[str], keys: HostKeys
) -> list[Atoms]:
    """The best copy of each structure (`copy_order`, of equals the oldest), sorted by dominators
    and age."""
    set_dominators(population, fitness)
    kept: list[Atoms] = []
    for atoms in sorted(population, key=lambda item: (copy_order(item.info), item.info["gen"])):
        if not any(same(atoms, other, keys) for other in kept):
            kept.append(atoms)
    return sorted(kept, key=lambda item: (item.info["dominators"], item.info["gen"]))


def replace_known(current: list[Atoms], known: Sequence[Atoms], keys: HostKeys) -> list[Atoms]:
    """``current`` with every structure that equals a known one, and is no better copy of it,
    replaced by that one.

    A child that relaxed back is its parent. One that got lower, or has a free energy where the
    known one has none, stays: MAGUS would throw it away.
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
    duplicate = atoms.copy()
    duplicate.info = copy.deepcopy(atoms.info)
    return duplicate


def cluster(population: Sequence[Atoms], n: int) -> np.ndarray:
    """(len(population),) cluster labels, at most ``n`` clusters of similar structures (average
    linkage, no randomness)."""
    if n >= len(population):
        return np.arange(len(population))
    elements = sorted({number for atoms in population for number in atoms.numbers})
    prints = np.array([fingerprint(atoms, elements) for atoms in population])
    return fcluster(linkage(prints, method="average"), n, criterion="maxclust")


def fingerprint(atoms: Atoms, elements: Sequence[int]) -> np.ndarray:
    """Radial distribution (broadened by 0.2 A, per atom, divided by r^2) of every pair of elements,
    one after the other."""
    grid = np.arange(0.5, FINGERPRINT_CUTOFF, 0.1)
    i, j, d = neighbor_list("ijd", atoms, FINGERPRINT_CUTOFF)
    parts = []
    for row, a in enumerate(elements):
        for b in elements[row:]:
            pair = (atoms.numbers[i] == a) & (atoms.numbers[j] == b)
            weights = 1.0 / (len(atoms) * d[pair] ** 2)
            parts.append(np.exp(-((grid[:, None] - d[pair]) ** 2) / (2 * 0.2**2)) @ weights)
    return np.concatenate(parts)


def ehull_fitness(population: Sequence[Atoms]) -> list[float]:
    """Minus the distance (eV/atom) above the lower convex hull of the population's own enthalpies
    over composition; sets ``ehull``."""
    distances = above_hull(
        [atoms.get_chemical_formula() for atoms in population],
        np.array([atoms.info["enthalpy"] for atoms in population]),
    )
    for atoms, distance in zip(population, distances, strict=True):
        atoms.info["ehull"] = float(distance)
    return [-float(distance) for distance in distances]


_FITNESS: dict[str, Callable[[Sequence[Atoms]], list[float]]] = {
    "Enthalpy": lambda population: [-float(atoms.info["enthalpy"]) for atoms in population],
    "Ehull": ehull_fitness,
    "SSCHA": population_fitness,
}


def fitness_function(name: str) -> Callable[[Sequence[Atoms]], list[float]]:
    """The fitness of this name, ours or another package's; raises ``InputError``."""
    return _FITNESS.get(name) or third_party_fitness(name)


def _composition(atoms: Atoms) -> tuple[tuple[int, int], ...]:
    numbers, counts = np.unique(kinds(atoms), return_counts=True)
    return tuple(zip(numbers.tolist(), (counts // np.gcd.reduce(counts)).tolist(), strict=True))


log = logging.getLogger(__name__)

ATTEMPTS_PER_CHILD = 20
"""Failed attempts in a row after which the rest of the offspring is left to random structures."""

DESCRIPTORS = {
    "cutandsplice": "CutAndSplicePairing",
    "lattice": "LatticeMutation",
    "rattle": "RattleMutation",
    "perm": "PermMutation",
}
"""MAGUS's ``origin`` of a child by operator."""


class OffspringGenerator:
    """Draws operators and parents with MAGUS's probabilities and lets ase-ga make the children."""

    def __init__(self, keys: HostKeys, geometry: Geometry, checker: Checker) -> None:
        self.keys, self.geometry, self.checker = keys, geometry, checker
        self.probabilities = keys.offspring_creator.probabilities(len(geometry.symbols))
        self.shortest = {
            (atomic_numbers[a], atomic_numbers[b]): distance
            for (a, b), distance in geometry.distances.items()
        }

    def generate(self, parents: Sequence[Atoms], n: int, rng: np.random.Generator) -> list[Atoms]:
        """At most ``n`` checked children; fewer when the operators fail ``ATTEMPTS_PER_CHILD``
        times in a row."""
        if not parents or n < 1:
            return []
        # ase-ga calls RandomState methods (randint) that Generator lacks
        state = np.random.RandomState(np.random.PCG64(rng.integers(2**63)))
        pool = _Pool([self._prepared(atoms) for atoms in parents], self.keys, rng)
        names, probabilities = list(self.probabilities), list(self.probabilities.values())
        children: list[Atoms] = []
        tried: Counter[str] = Counter()
        failed = 0
        while len(children) < n and failed < ATTEMPTS_PER_CHILD:
            name = names[rng.choice(len(names), p=probabilities)]
            tried[name] += 1
            child = self._child(name, pool, state)
            failed = failed + 1 if child is None else 0
            if child is not None:
                children.append(child)
        log.info(
            "made %d of %d children (tried %s)",
            len(children),
            n,
            ", ".join(f"{k} {v}" for k, v in sorted(tried.items())),
        )
        return children

    def _prepared(self, atoms: Atoms) -> Atoms:
        """A symmetrised copy: the archive must keep the structure that its energy belongs to."""
        parent = without_results(atoms)
        if self.keys.add_sym:
            parent = symmetrised(parent, self.keys.symprec)
        parent = parent[np.argsort(parent.numbers, kind="stable")]
        parent.info = {key: atoms.info[key] for key in ("identity", "enthalpy", "dominators")}
        return parent

    def _child(self, name: str, pool: _Pool, state: np.random.RandomState) -> Atoms | None:
        first = pool.draw()
        parents = [first]
        if name == "cutandsplice":
            second = pool.partner(first)
            parents = [first, second]
            sizes = [len(atoms) for atoms in parents]
            if sizes[0] != sizes[1]:
                small, large = np.argsort(sizes)
                parents[small] = repeated(parents[small], sizes[large] // sizes[small])
            stripped = self._operator(name, len(parents[0]), state).cross(*parents)
        elif name == "perm" and len(set(first.numbers)) < 2:
            return None
        else:
            stripped = self._operator(name, len(first), state).mutate(first)
        if stripped is None:
            return None
        child = Atoms(
            numbers=stripped.numbers, positions=stripped.positions, cell=stripped.cell, pbc=True
        )
        child = with_isotopes(child, isotopes(first))
        child.wrap()
        child.info = {
            "symbols": list(self.geometry.symbols),
            "parents": [atoms.info["identity"] for atoms in parents],
            "parentE": float(np.mean([atoms.info["enthalpy"] for atoms in parents])),
            "pardom": float(np.mean([atoms.info["dominators"] for atoms in parents])),
            "origin": DESCRIPTORS[name],
        }
        return child if self.checker.problem(child) is None else None

    def _operator(self, name: str, n_atoms: int, state: np.random.RandomState) -> Any:
        from ase_ga.cutandsplicepairing import CutAndSplicePairing
        from ase_ga.standardmutations import PermutationMutation, RattleMutation, StrainMutation
        from ase_ga.utilities import CellBounds

        keys = self.keys.offspring_creator
        # the Niggli cell is judged by the checker; here only flat cells, whose periodic images
        # ase-ga would miss
        bounds = CellBounds({angle: [20, 160] for angle in ("phi", "chi", "psi")})
        if name == "cutandsplice":
            return CutAndSplicePairing(
                Atoms(pbc=True),
                n_atoms,
                self.shortest,
                number_of_variable_cell_vectors=3,
                cellbounds=bounds,
                rng=state,
            )
        if name == "lattice":
            return StrainMutation(
                self.shortest, cellbounds=bounds, stddev=keys.lattice.sigma, rng=state
            )
        if name == "rattle":
            return RattleMutation(
                self.shortest,
                n_atoms,
                rattle_strength=keys.rattle.rattle_range,
                rattle_prop=keys.rattle.p,
                test_dist_to_slab=False,
                rng=state,
            )
        return PermutationMutation(
            n_atoms,
            probability=keys.perm.frac_swaps,
            test_dist_to_slab=False,
            blmin=self.shortest,
            rng=state,
        )


class _Pool:
    """Parents and their probabilities: exp(-k dominators) x history_punish^(times used); pairs come
    from one cluster."""

    def __init__(self, parents: list[Atoms], keys: HostKeys, rng: np.random.Generator) -> None:
        self.parents, self.keys, self.rng = parents, keys, rng
        self.dominators = np.array([atoms.info["dominators"] for atoms in parents], dtype=float)
        self.used = np.zeros(len(parents))
        self.labels = cluster(parents, keys.n_cluster or keys.save_good)

    def draw(self) -> Atoms:
        return self._draw(np.arange(len(self.parents)))

    def partner(self, first: Atoms) -> Atoms:
        """A parent of the same composition whose size divides or is a multiple of the first one's,
        if possible of its cluster."""
        index = next(i for i, atoms in enumerate(self.parents) if atoms is first)
        fitting = np.array([i for i, atoms in enumerate(self.parents) if self._pairs(first, atoms)])
        if not self.keys.allow_self_cross and len(fitting) > 1:
            fitting = fitting[fitting != index]
        near = fitting[self.labels[fitting] == self.labels[index]]
        return self._draw(near if len(near) > 1 else fitting)

    def _draw(self, indices: np.ndarray) -> Atoms:
        dominators, used = self.dominators[indices], self.used[indices]
        weights = np.exp(-self.keys.k * (dominators - dominators.min()))
        weights = weights * self.keys.history_punish ** (used - used.min())
        index = int(self.rng.choice(indices, p=weights / weights.sum()))
        self.used[index] += 1
        return self.parents[index]

    @staticmethod
    def _pairs(a: Atoms, b: Atoms) -> bool:
        small, large = sorted((a, b), key=len)
        factor, rest = divmod(len(large), len(small))
        return rest == 0 and np.array_equal(
            np.sort(np.tile(small.numbers, factor)), np.sort(large.numbers)
        )


def symmetrised(atoms: Atoms, symprec: float) -> Atoms:
    """The standardised cell with as many atoms as before; the structure itself when spglib finds
    none of that size."""
    for primitive in (False, True):
        standard = standardized(atoms, symprec, to_primitive=primitive)
        if standard is not None and len(atoms) % len(standard) == 0:
            return repeated(standard, len(atoms) // len(standard))
    return atoms


def repeated(atoms: Atoms, n: int) -> Atoms:
    """The ``n``-fold cell, doubled, tripled ... along the shortest vector each time; atoms sorted
    by element."""
    large = atoms.copy()
    while n > 1:
        factor = next(i for i in range(2, n + 1) if n % i == 0)
        repeats = np.ones(3, dtype=int)
        repeats[np.argmin(large.cell.lengths())] = factor
        large = make_supercell(large, np.diag(repeats))
        n //= factor
    large = large[np.argsort(large.numbers, kind="stable")]
    large.info = dict(atoms.info)
    return large
