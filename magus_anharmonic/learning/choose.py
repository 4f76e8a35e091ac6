"""Which structures are labelled, how they are distorted first, and which of them are one phase.

A search finds the same phase again and again, in other settings and cells and with every new model.
Were each find hashed by itself, distortions of one phase would be both in training and in
validation; so the labels of a *family* stay on one side of the split.

``learning.select: sscha`` takes labels from the SSCHA ensembles of candidates whose order is
undecided. What a label is worth is how much it narrows the differences of G that are undecided:
G_DFT - G_model of a phase is the average of (E_DFT - E_model)/N over its ensemble
(`magus_anharmonic.paper.gradient_errors`), so that the squared error of its difference to the
lowest phase b is s_b^2/n_b + s_j^2/n_j for n pairs +u/-u with the spread s. Pairs are given out one
by one to the phase in which one more lowers sum_j p_j (s_b^2/n_b + s_j^2/n_j) most, p_j being the
probability that phase j is the lowest after all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.hull import comparable
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import append_jsonl, read_jsonl
from magus_anharmonic.structures import strain_cell, stripped, structure_id

if TYPE_CHECKING:
    from magus_anharmonic.potential import Potential


MAX_TRIES = 100

CLOSEST = 0.6

"""A distortion that brings two atoms nearer than this fraction of the shortest distance before is
drawn again."""

_XX_YY_ZZ_YZ_XZ_XY = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def random_directions(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3) unit vectors, uniform on the sphere."""
    vectors = rng.normal(size=(n, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_strain(limit: float, rng: np.random.Generator) -> np.ndarray:
    """Symmetric (3, 3) strain tensor; xx, yy, zz, yz, xz, xy (tensor, not engineering, shears)
    uniform in [-limit, limit]."""
    strain = np.zeros((3, 3))
    for (row, column), value in zip(_XX_YY_ZZ_YZ_XZ_XY, rng.uniform(-limit, limit, 6), strict=True):
        strain[row, column] = strain[column, row] = value
    return strain


def distort(
    atoms: Atoms, rng: np.random.Generator, *, atom_displacement: float, strain: float
) -> Atoms:
    """A stripped copy with random strain and displacements; the structure given is not changed.

    First the cell and the atoms with it are strained, cell -> cell (1 + strain); then every atom
    moves by exactly ``atom_displacement`` (Angstrom) in a direction of its own. Raises
    ``MagusAnharmonicError`` when every draw makes atoms overlap.
    """
    shortest = shortest_distance(atoms)
    for _ in range(MAX_TRIES):
        distorted = stripped(atoms)
        strain_cell(distorted, random_strain(strain, rng))
        distorted.positions += atom_displacement * random_directions(len(atoms), rng)
        if shortest_distance(distorted) >= CLOSEST * shortest:
            return distorted
    raise MagusAnharmonicError(
        f"{atoms.get_chemical_formula()}: {MAX_TRIES} random distortions (displacement"
        f" {atom_displacement:g} A, strain {strain:g}) all bring atoms nearer than"
        f" {CLOSEST * shortest:.2f} A; lower learning.atom_displacement or learning.strain"
    )


def shortest_distance(atoms: Atoms) -> float:
    """Shortest distance (Angstrom) between two atoms, periodic images of one atom included."""
    radius = 1.1 * (atoms.get_volume() / len(atoms)) ** (1 / 3)
    while True:
        distances = neighbor_list("d", atoms, radius)
        if len(distances):
            return float(distances.min())
        radius *= 1.5


log = logging.getLogger(__name__)

POOL = 10

"""``uncertain`` and ``diverse`` choose among the lowest distinct structures, this many times as
many as they choose."""


def choose(population: Sequence[Any], n: int, rng: np.random.Generator) -> list[int]:
    """Indices of ``n`` individuals, drawn uniformly without replacement; all of them when there are
    fewer.

    The population keeps its duplicates ("simple random selection while retaining duplicates in the
    population", Sec. III A): a phase found k times is k times as likely to be drawn, and may be
    drawn up to k times.
    """
    return [int(index) for index in rng.permutation(len(population))[:n]]


def select(
    population: Sequence[Atoms],
    n: int,
    rng: np.random.Generator,
    rule: str,
    potential: Potential,
    known: Sequence[Atoms] = (),
) -> list[int]:
    """Indices of the ``n`` individuals that ``rule`` (``learning.select``) chooses.

    random
        `choose`, as in the paper.
    uncertain
        Of the lowest distinct structures (`lowest_distinct`) those with the largest expected error
        of the forces, which ranks true errors better than that of the energy does. A model without
        an estimate, as a downloaded one in the first round, makes this round's choice random, with
        a line in the log.
    diverse
        Of the same structures those farthest from one another and from the labels ``known`` in the
        model's features.
    sscha
        At random: only asked for where no two candidates are undecided (`allocate` takes
        SSCHA ensembles then).

    A population that is not larger than ``n`` is taken whole. Same generator state, population and
    model: same choice.
    """
    if rule in ("random", "sscha") or len(population) <= n:
        return choose(population, n, rng)
    if rule == "uncertain" and potential.error_model is None:
        log.info(
            "learning.select: uncertain: model %s has no error estimate yet; this choice is random",
            potential.model_id,
        )
        return choose(population, n, rng)
    pool = lowest_distinct(population, POOL * n)
    structures = [stripped(population[index]) for index in pool]
    if rule == "diverse":
        picked = farthest_points(
            potential.mean_features(structures), n, rng, potential.mean_features(known)
        )
    else:
        found = potential.uncertainty(structures)
        errors = np.empty(0) if found is None else found.force_error
        picked = [int(position) for position in np.argsort(-errors, kind="stable")[:n]]
        log.info(
            "the %d most uncertain of %d structures: %.3f to %.3f eV/A",
            len(picked),
            len(pool),
            *errors[picked][[-1, 0]],
        )
    return [pool[position] for position in picked]


def quotas(n: int, split: Sequence[int]) -> dict[str, int]:
    """How many of ``n`` chosen structures the validation and the test side get at least: their
    share, one if there are so many.

    At least half of the structures trains; validation goes before test.
    """
    left, found = n // 2, {}
    for side, share in zip(SIDES[1:], split[1:], strict=True):
        found[side] = min(left, max(1, n * share // sum(split))) if share else 0
        left -= found[side]
    return found


def hold_back(
    population: Sequence[Atoms],
    chosen: Sequence[int],
    families: Families,
    known: Mapping[str, str],
    split: Sequence[int],
    rng: np.random.Generator,
) -> list[int]:
    """``chosen``, in which others of the ``population`` take the place of the last ones of a side
    that has more than enough, where validation or test would have less than their quota or training
    less than half.

    A structure can be held back when its family never trained (``known``: side of every family that
    has labels), so that no phase is on two sides. Where there are too few such structures, the
    sides stay short.
    """
    wanted = {**quotas(len(chosen), split), "train": len(chosen) - len(chosen) // 2}
    names = families.would_be([stripped(atoms) for atoms in population])
    picked, waiting = list(chosen), list(wanted)
    for _ in range(2 * len(chosen)):
        sides = sides_of_families([names[index] for index in picked], split, known)
        counts = Counter(sides[names[index]] for index in picked)
        short = next((side for side in waiting if counts[side] < wanted[side]), None)
        spare = max(wanted, key=lambda side: counts[side] - wanted[side])
        if short is None or counts[spare] <= wanted[spare]:
            break
        others = [
            i
            for i, name in enumerate(names)
            if i not in picked and known.get(name, sides.get(name, short)) == short
        ]
        if not others:
            waiting.remove(short)
            continue
        last = max(
            position for position, index in enumerate(picked) if sides[names[index]] == spare
        )
        picked[last] = others[int(rng.integers(len(others)))]
    return picked


def lowest_distinct(population: Sequence[Atoms], n: int) -> list[int]:
    """Indices of the ``n`` structures of lowest ``info['enthalpy']`` (unknown: last) no two of
    which are one phase.

    Of several compositions those nearest to the hull of the enthalpies.
    """
    enthalpies = [float(atoms.info.get("enthalpy", np.inf)) for atoms in population]
    heights = comparable([atoms.get_chemical_formula() for atoms in population], enthalpies)
    chosen: list[int] = []
    prints: list[Fingerprint] = []
    for index in np.argsort(heights, kind="stable"):
        mine = fingerprint(stripped(population[index]))
        if not any(mine.similar(other) for other in prints):
            chosen.append(int(index))
            prints.append(mine)
        if len(chosen) == n:
            break
    return chosen


def farthest_points(
    points: np.ndarray, n: int, rng: np.random.Generator, known: np.ndarray
) -> list[int]:
    """Indices of ``n`` of the ``points`` (m, u), each the farthest from those before it and from
    ``known`` (k, u).

    Without known points the first is drawn. Euclidean distances; Gonzalez,
    doi:10.1016/0304-3975(85)90224-5.
    """
    if len(points) == 0:
        return []
    distance = np.full(len(points), np.inf)
    for point in known:
        distance = np.minimum(distance, np.linalg.norm(points - point, axis=1))
    chosen: list[int] = []
    while len(chosen) < min(n, len(points)):
        index = (
            int(rng.integers(len(points))) if np.isinf(distance).all() else int(distance.argmax())
        )
        chosen.append(index)
        distance = np.minimum(distance, np.linalg.norm(points - points[index], axis=1))
        distance[chosen] = -1.0
    return chosen


@dataclass(frozen=True)
class Contender:
    """A candidate that may be the lowest, as its SSCHA run left it; the first of a list is the
    lowest one so far.

    centroids : one primitive cell, the parent of its configurations. configurations : of the
    supercell, +u and -u next to each other, of which the first pairs are taken. probability : of
    being the lowest. spread : eV/atom, expected standard deviation of the model's energy error
    among the pairs of the ensemble.
    """

    id: str
    centroids: Atoms
    configurations: Sequence[Atoms]
    probability: float
    spread: float


def allocate(
    spreads: Sequence[float],
    probability: Sequence[float],
    n_pairs: int,
    most: Sequence[int] | None = None,
) -> list[int]:
    """Pairs for every contender, the first being the lowest; at most ``most`` of each.

    Each gets one before any gets two (in the order of their worth, when there are fewer pairs than
    contenders).
    """
    weights = np.array(probability, dtype=float)
    weights[0] = weights[1:].sum()
    worth = np.maximum(weights, 1e-12) * np.maximum(
        np.square(np.asarray(spreads, dtype=float)), 1e-24
    )
    room = np.full(len(worth), n_pairs) if most is None else np.array(most)
    given = np.zeros(len(worth), dtype=int)
    for _ in range(min(n_pairs, int(room.sum()))):
        gain = np.where(given == 0, np.inf, worth / np.maximum(given * (given + 1), 1))
        gain[given >= room] = -np.inf
        first = np.flatnonzero(gain == gain.max())
        given[first[np.argmax(worth[first])]] += 1
    return given.tolist()


SIDES = ("train", "validation", "test")
SIMILARITY = 0.985
VOLUME_TOLERANCE = 0.05
_REACH, _WIDTH = 2.4, 0.06
_KEYS = ("parent", "family", "formula", "volume", "density")
_GRID = np.arange(0.3, _REACH, _WIDTH)


@dataclass(frozen=True)
class Fingerprint:
    """Invariant under rotation, choice of the cell and number of formula units.

    formula : reduced; volume : A^3/atom; density : smeared pair density per pair of species over
    distances in units of volume^(1/3), flattened and of norm 1.
    """

    formula: str
    volume: float
    density: np.ndarray

    def similar(self, other: Fingerprint) -> bool:
        """Whether the two are taken for one phase (scalar product above 0.985, volumes within 5
        %)."""
        return (
            self.formula == other.formula
            and self.density.shape == other.density.shape
            and abs(self.volume - other.volume) <= VOLUME_TOLERANCE * max(self.volume, other.volume)
            and float(self.density @ other.density) >= SIMILARITY
        )


def fingerprint(atoms: Atoms) -> Fingerprint:
    """Fingerprint of a periodic structure."""
    volume = atoms.get_volume() / len(atoms)
    length = volume ** (1 / 3)
    first, second, distance = neighbor_list("ijd", atoms, _REACH * length)
    numbers = atoms.numbers
    low, high = (
        np.minimum(numbers[first], numbers[second]),
        np.maximum(numbers[first], numbers[second]),
    )
    species = sorted(set(numbers.tolist()))
    parts = []
    for index, a in enumerate(species):
        for b in species[index:]:
            reduced = distance[(low == a) & (high == b)] / length
            smeared = np.exp(-0.5 * ((_GRID[:, None] - reduced) / _WIDTH) ** 2)
            parts.append(smeared @ (1 / np.maximum(reduced, 0.1) ** 2) / len(atoms))
    density = np.concatenate(parts)
    norm = np.linalg.norm(density)
    return Fingerprint(
        atoms.symbols.formula.reduce()[0].format("hill"),
        float(volume),
        density / norm if norm else density,
    )


class Families:
    """The families of all structures ever chosen, one line each in ``file``."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._members: list[tuple[str, str, Fingerprint]] = [
            _from_record(record) for record in read_jsonl(file, _KEYS) if _is_whole(record)
        ]

    def family(self, parent: str, atoms: Atoms) -> str:
        """Family of the structure ``parent``: that of the first similar structure chosen before,
        else its own name."""
        known = next((family for name, family, _ in self._members if name == parent), None)
        if known is not None:
            return known
        mine = fingerprint(atoms)
        found = next((family for _, family, other in self._members if mine.similar(other)), parent)
        record = _to_record(parent, found, mine)
        append_jsonl(self.file, record)
        self._members.append(_from_record(record))
        return found

    def would_be(self, structures: Sequence[Atoms]) -> list[str]:
        """Families that ``structures`` would get were they chosen in this order; none is."""
        known = [(family, other) for _, family, other in self._members]
        found = []
        for atoms in structures:
            mine = fingerprint(atoms)
            family = next(
                (family for family, other in known if mine.similar(other)), parent_name(atoms)
            )
            known.append((family, mine))
            found.append(family)
        return found

    def members(self) -> list[tuple[str, Fingerprint]]:
        """(parent, fingerprint) of every structure ever chosen, in the order of choice."""
        return [(parent, found) for parent, _, found in self._members]


def parent_name(atoms: Atoms) -> str:
    """Name of a chosen structure as the parent of its labels."""
    return f"p-{structure_id(atoms)}"


def sides_of_families(
    family_of_label: Sequence[str], split: Sequence[int], known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Side of every family of a batch: as near to the ratio ``split`` of its labels as whole
    families allow.

    Families in ``known`` keep their side, and count for it. While families are left, no side that
    ``split`` asks for stays empty; the largest one trains when none else does, or when it is more
    than half of the batch. The order is by a hash of the name, so that the same families give the
    same sides.
    """
    sizes, before = Counter(family_of_label), known or {}
    sides = {family: before.get(family, "") for family in sizes}
    free = sorted((f for f in sizes if not sides[f]), key=lambda name: digest(name, length=None))
    largest = max(free, key=lambda name: sizes[name], default="")
    if free and ("train" not in sides.values() or 2 * sizes[largest] > sizes.total()):
        free.remove(largest)
    for side, share in zip(SIDES[1:], split[1:], strict=True):
        wanted = sizes.total() * share / sum(split)
        got = sum(size for family, size in sizes.items() if sides[family] == side)
        waiting = [family for family in free if not sides[family]]
        small = [family for family in waiting if sizes[family] <= 1.5 * wanted]
        for family in small or sorted(waiting, key=lambda name: sizes[name])[:1]:
            left_for_the_test = side == "test" or any(not sides[f] for f in waiting if f != family)
            if share and (got == 0 or (left_for_the_test and got + sizes[family] / 2 <= wanted)):
                sides[family] = side
                got += sizes[family]
    return {family: side or "train" for family, side in sides.items()}


def _to_record(parent: str, family: str, found: Fingerprint) -> dict[str, Any]:
    density = np.round(found.density, 5)
    return {
        "parent": parent,
        "family": family,
        "formula": found.formula,
        "volume": round(found.volume, 5),
        "density": density,
    }


def _is_whole(record: dict[str, Any]) -> bool:
    numbers = record["density"]
    whole = isinstance(numbers, list) and all(isinstance(value, int | float) for value in numbers)
    return whole and isinstance(record["volume"], int | float)


def _from_record(record: dict[str, Any]) -> tuple[str, str, Fingerprint]:
    return (
        record["parent"],
        record["family"],
        Fingerprint(record["formula"], record["volume"], np.array(record["density"])),
    )
