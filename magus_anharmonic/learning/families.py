"""Which chosen structures are one and the same phase, so that their labels stay on one side of the
split.

A search finds the same phase again and again, in other settings and cells and with every new model.
Were each find hashed by itself, distortions of one phase would be both in training and in
validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import append_jsonl, read_jsonl
from magus_anharmonic.structures import structure_id

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
