"""Offspring: parents by rank, crossover and mutations from ase-ga.

ase-ga: L. B. Vilhelmsen, B. Hammer, J. Chem. Phys. 141, 044711 (2014), doi:10.1063/1.4886337.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import make_supercell
from ase.data import atomic_numbers

from magus_anharmonic.host_keys import HostKeys
from magus_anharmonic.search.generate import Geometry
from magus_anharmonic.search.population import Checker, cluster
from magus_anharmonic.structures import bare as without_results
from magus_anharmonic.structures import isotopes, standardized, with_isotopes

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
        self.shortest = {(atomic_numbers[a], atomic_numbers[b]): distance for (a, b), distance in geometry.distances.items()}

    def generate(self, parents: Sequence[Atoms], n: int, rng: np.random.Generator) -> list[Atoms]:
        """At most ``n`` checked children; fewer when the operators fail ``ATTEMPTS_PER_CHILD`` times in a row."""
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
        log.info("made %d of %d children (tried %s)", len(children), n, ", ".join(f"{k} {v}" for k, v in sorted(tried.items())))
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
            bare = self._operator(name, len(parents[0]), state).cross(*parents)
        elif name == "perm" and len(set(first.numbers)) < 2:
            return None
        else:
            bare = self._operator(name, len(first), state).mutate(first)
        if bare is None:
            return None
        child = Atoms(numbers=bare.numbers, positions=bare.positions, cell=bare.cell, pbc=True)
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
        # the Niggli cell is judged by the checker; here only flat cells, whose periodic images ase-ga would miss
        bounds = CellBounds({angle: [20, 160] for angle in ("phi", "chi", "psi")})
        if name == "cutandsplice":
            return CutAndSplicePairing(
                Atoms(pbc=True), n_atoms, self.shortest, number_of_variable_cell_vectors=3, cellbounds=bounds, rng=state
            )
        if name == "lattice":
            return StrainMutation(self.shortest, cellbounds=bounds, stddev=keys.lattice.sigma, rng=state)
        if name == "rattle":
            return RattleMutation(
                self.shortest,
                n_atoms,
                rattle_strength=keys.rattle.rattle_range,
                rattle_prop=keys.rattle.p,
                test_dist_to_slab=False,
                rng=state,
            )
        return PermutationMutation(n_atoms, probability=keys.perm.frac_swaps, test_dist_to_slab=False, blmin=self.shortest, rng=state)


class _Pool:
    """Parents and their probabilities: exp(-k dominators) x history_punish^(times used); pairs come from one cluster."""

    def __init__(self, parents: list[Atoms], keys: HostKeys, rng: np.random.Generator) -> None:
        self.parents, self.keys, self.rng = parents, keys, rng
        self.dominators = np.array([atoms.info["dominators"] for atoms in parents], dtype=float)
        self.used = np.zeros(len(parents))
        self.labels = cluster(parents, keys.n_cluster or keys.save_good)

    def draw(self) -> Atoms:
        return self._draw(np.arange(len(self.parents)))

    def partner(self, first: Atoms) -> Atoms:
        """A parent of the same composition whose size divides or is a multiple of the first one's, if possible of its cluster."""
        index = next(i for i, atoms in enumerate(self.parents) if atoms is first)
        fitting = np.array([i for i, atoms in enumerate(self.parents) if self._pairs(first, atoms)])
        if not self.keys.allow_self_cross and len(fitting) > 1:
            fitting = fitting[fitting != index]
        near = fitting[self.labels[fitting] == self.labels[index]]
        return self._draw(near if len(near) > 1 else fitting)

    def _draw(self, indices: np.ndarray) -> Atoms:
        weights = np.exp(-self.keys.k * (self.dominators[indices] - self.dominators[indices].min()))
        weights = weights * self.keys.history_punish ** (self.used[indices] - self.used[indices].min())
        index = int(self.rng.choice(indices, p=weights / weights.sum()))
        self.used[index] += 1
        return self.parents[index]

    @staticmethod
    def _pairs(a: Atoms, b: Atoms) -> bool:
        small, large = sorted((a, b), key=len)
        factor, rest = divmod(len(large), len(small))
        return rest == 0 and np.array_equal(np.sort(np.tile(small.numbers, factor)), np.sort(large.numbers))


def symmetrised(atoms: Atoms, symprec: float) -> Atoms:
    """The standardised cell with as many atoms as before; the structure itself when spglib finds none of that size."""
    for primitive in (False, True):
        standard = standardized(atoms, symprec, to_primitive=primitive)
        if standard is not None and len(atoms) % len(standard) == 0:
            return repeated(standard, len(atoms) // len(standard))
    return atoms


def repeated(atoms: Atoms, n: int) -> Atoms:
    """The ``n``-fold cell, doubled, tripled ... along the shortest vector each time; atoms sorted by element."""
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
