"""Which structures are labelled, and how they are distorted first.

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
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.hull import comparable
from magus_anharmonic.learning.families import (
    SIDES,
    Families,
    Fingerprint,
    fingerprint,
    sides_of_families,
)
from magus_anharmonic.structures import stripped

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
        tensor = random_strain(strain, rng)
        distorted.set_cell(atoms.cell.array @ (np.eye(3) + tensor), scale_atoms=True)
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
        At random: only asked for where no two candidates are undecided (`choose_ensembles` takes
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
