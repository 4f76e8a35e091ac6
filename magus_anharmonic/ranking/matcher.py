"""Which structures are the same: composition, space group, volume, enthalpy and all interatomic
distances.

A search that looks for phases which differ by a small distortion must not merge them: MAGUS's
default compares energies within 10 meV/atom. Here two structures are one only if everything agrees
that SSCHA would start from. The distances are compared as pointwise distance distributions
(Widdowson et al., MATCH 87, 529 (2022)): per atom the sorted distances to its nearest neighbours of
each species, invariant under rotation, reflection, choice of cell and order.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile

import numpy as np
from ase import Atoms
from scipy.optimize import linear_sum_assignment

from magus_anharmonic.structures import kinds, primitive, space_group, stripped, structure_id
from magus_anharmonic.units import ev_to_mev

log = logging.getLogger(__name__)

ENERGY_TOLERANCE = 1e-3
"""eV/atom."""
VOLUME_TOLERANCE = 0.01
"""Relative."""
DISTANCE_TOLERANCE = 0.05
"""Angstrom; the same as the tolerance with which the symmetry of an SSCHA start is found."""
PHASE_TOLERANCE = 0.1
"""Angstrom, for SSCHA centroids, which carry statistical noise."""
N_NEIGHBOURS = 60


class Fingerprint:
    """What is compared of one structure; the expensive parts are worked out when first needed."""

    def __init__(self, atoms: Atoms, symprec: float = DISTANCE_TOLERANCE) -> None:
        self.atoms = stripped(atoms)
        self.symprec = symprec
        self.volume = atoms.get_volume() / len(atoms)
        counts = Counter(kinds(atoms).tolist())
        units = math.gcd(*counts.values())
        self.composition = tuple(sorted((z, n // units) for z, n in counts.items()))

    @cached_property
    def space_group(self) -> str:
        return space_group(self.atoms, self.symprec)

    @cached_property
    def distances(self) -> list[tuple[int, np.ndarray]]:
        """Per atom of the primitive cell its kind (`kinds`) and the sorted distances (Angstrom),
        species by species."""
        return pointwise_distances(primitive(self.atoms, self.symprec), self.composition)


def pointwise_distances(
    atoms: Atoms, composition: Sequence[tuple[int, int]]
) -> list[tuple[int, np.ndarray]]:
    """Per atom: its kind and its nearest-neighbour distances (Angstrom), about `N_NEIGHBOURS` in
    all."""
    total = sum(n for _, n in composition)
    wanted = {z: max(6, round(N_NEIGHBOURS * n / total)) for z, n in composition}
    density = len(atoms) / atoms.get_volume()
    cutoff = 1.1 * (3.0 * N_NEIGHBOURS / (4.0 * np.pi * density)) ** (1.0 / 3.0)
    while True:
        rows = _neighbour_rows(atoms, cutoff, wanted)
        if rows is not None:
            return rows
        cutoff *= 1.25


def _neighbour_rows(
    atoms: Atoms, cutoff: float, wanted: dict[int, int]
) -> list[tuple[int, np.ndarray]] | None:
    """None when the cutoff (Angstrom) is too small for some atom."""
    from vesin import NeighborList  # it loads torch, which reading settings and tables need not

    neighbours = NeighborList(cutoff=cutoff, full_list=True)
    first, second, distance = neighbours.compute(
        points=atoms.positions, box=atoms.cell.array, periodic=True, quantities="ijd"
    )
    own_kinds = kinds(atoms)
    species = own_kinds[second]
    rows = []
    for index, own in enumerate(own_kinds):
        mine = first == index
        parts = []
        for z, count in wanted.items():
            found = np.sort(distance[mine & (species == z)])
            if found.size < count:
                return None
            parts.append(found[:count])
        rows.append((int(own), np.concatenate(parts)))
    return rows


def largest_difference(a: Fingerprint, b: Fingerprint, rescale: bool = False) -> float:
    """Largest difference (Angstrom) between corresponding distances, under the best matching of the
    atoms.

    ``rescale`` brings both to the same volume per atom first. Infinite when the compositions
    differ.
    """
    if a.composition != b.composition:
        return math.inf
    mean = math.sqrt(a.volume * b.volume)
    scales = [(mean / f.volume) ** (1.0 / 3.0) if rescale else 1.0 for f in (a, b)]
    rows = [
        [(z, row * scale) for z, row in f.distances]
        for f, scale in zip((a, b), scales, strict=True)
    ]
    return table_difference(*rows)


def table_difference(
    rows_a: Sequence[tuple[int, np.ndarray]], rows_b: Sequence[tuple[int, np.ndarray]]
) -> float:
    """Largest difference (Angstrom) of two tables of `pointwise_distances` of one composition,
    under the best matching of the atoms."""
    size = math.lcm(len(rows_a), len(rows_b))
    worst = 0.0
    for z in sorted({own for own, _ in rows_a}):
        table_a = np.array([row for own, row in rows_a if own == z])
        table_b = np.array([row for own, row in rows_b if own == z])
        cost = np.abs(table_a[:, None, :] - table_b[None, :, :]).max(axis=2)
        cost = np.repeat(np.repeat(cost, size // len(rows_a), axis=0), size // len(rows_b), axis=1)
        # A high power makes the matching of least sum that of the least largest difference.
        order = linear_sum_assignment(cost**4)
        worst = max(worst, float(cost[order].max()))
    return worst


def same(a: Fingerprint, b: Fingerprint) -> bool:
    """True when the two structures are one as starts of SSCHA (the enthalpies are compared by the
    caller)."""
    if a.composition != b.composition or abs(a.volume - b.volume) > VOLUME_TOLERANCE * min(
        a.volume, b.volume
    ):
        return False
    return a.space_group == b.space_group and largest_difference(a, b) <= DISTANCE_TOLERANCE


def same_phase(a: Fingerprint, b: Fingerprint) -> bool:
    """True when the two are one phase, perhaps at another volume: a centroid and its statically
    relaxed copy."""
    if a.composition != b.composition or abs(a.volume - b.volume) > 0.15 * min(a.volume, b.volume):
        return False
    return (
        a.space_group == b.space_group and largest_difference(a, b, rescale=True) <= PHASE_TOLERANCE
    )


def distinct(
    structures: Sequence[Atoms],
    enthalpies: Sequence[float],
    energy_tolerance: float = ENERGY_TOLERANCE,
    symprec: float = DISTANCE_TOLERANCE,
) -> list[list[int]]:
    """Groups of indices that are one structure; the lowest of each group first, the groups by
    enthalpy (eV/atom).

    Members are compared with the lowest of their group, not with each other, so that no chain of
    small steps merges two ends. What was merged is logged.
    """
    order = sorted(range(len(structures)), key=lambda i: (enthalpies[i], i))
    prints = [Fingerprint(atoms, symprec) for atoms in structures]
    groups: list[list[int]] = []
    for index in order:
        near = _within(groups, enthalpies, enthalpies[index] - energy_tolerance)
        match = next((group for group in near if same(prints[group[0]], prints[index])), None)
        if match is None:
            groups.append([index])
        else:
            match.append(index)
    _log_merged(structures, enthalpies, groups)
    return groups


def _within(
    groups: list[list[int]], enthalpies: Sequence[float], lowest: float
) -> Iterator[list[int]]:
    """The groups whose first member is not below ``lowest`` (eV/atom), the highest first."""
    return takewhile(lambda group: enthalpies[group[0]] >= lowest, reversed(groups))


def _log_merged(
    structures: Sequence[Atoms], enthalpies: Sequence[float], groups: list[list[int]]
) -> None:
    for group in groups:
        if len(group) > 1:
            others = ", ".join(
                f"{structure_id(structures[i])}"
                f" ({ev_to_mev(enthalpies[i] - enthalpies[group[0]]):+.3f})"
                for i in group[1:]
            )
            log.info(
                "%s stands for %d more (meV/atom above it): %s",
                structure_id(structures[group[0]]),
                len(group) - 1,
                others,
            )
