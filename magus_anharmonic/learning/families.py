"""Which chosen structures are one and the same phase, so that their labels stay on one side of the split.

A search finds the same phase again and again, in other settings and cells and with every new model. Were each find hashed by
itself, distortions of one phase would be both in training and in validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from magus_anharmonic.files import append_jsonl, read_jsonl

SIMILARITY = 0.985
VOLUME_TOLERANCE = 0.05
_REACH, _WIDTH = 2.4, 0.06
_KEYS = ("parent", "family", "formula", "volume", "density")
_GRID = np.arange(0.3, _REACH, _WIDTH)


@dataclass(frozen=True)
class Fingerprint:
    """Invariant under rotation, choice of the cell and number of formula units.

    formula : reduced; volume : A^3/atom; density : smeared pair density per pair of species over distances in units of volume^(1/3),
    flattened and of norm 1.
    """

    formula: str
    volume: float
    density: np.ndarray

    def similar(self, other: Fingerprint) -> bool:
        """Whether the two are taken for one phase (scalar product above 0.985, volumes within 5 %)."""
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
    low, high = np.minimum(numbers[first], numbers[second]), np.maximum(numbers[first], numbers[second])
    species = sorted(set(numbers.tolist()))
    parts = []
    for index, a in enumerate(species):
        for b in species[index:]:
            reduced = distance[(low == a) & (high == b)] / length
            smeared = np.exp(-0.5 * ((_GRID[:, None] - reduced) / _WIDTH) ** 2)
            parts.append(smeared @ (1 / np.maximum(reduced, 0.1) ** 2) / len(atoms))
    density = np.concatenate(parts)
    norm = np.linalg.norm(density)
    return Fingerprint(atoms.symbols.formula.reduce()[0].format("hill"), float(volume), density / norm if norm else density)


class Families:
    """The families of all structures ever chosen, one line each in ``file``."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._members: list[tuple[str, str, Fingerprint]] = [
            _from_record(record) for record in read_jsonl(file, _KEYS) if _is_whole(record)
        ]

    def family(self, parent: str, atoms: Atoms) -> str:
        """Family of the structure ``parent``: that of the first similar structure chosen before, else its own name."""
        known = next((family for name, family, _ in self._members if name == parent), None)
        if known is not None:
            return known
        mine = fingerprint(atoms)
        found = next((family for _, family, other in self._members if mine.similar(other)), parent)
        record = _to_record(parent, found, mine)
        append_jsonl(self.file, record)
        self._members.append(_from_record(record))
        return found

    def members(self) -> list[tuple[str, Fingerprint]]:
        """(parent, fingerprint) of every structure ever chosen, in the order of choice."""
        return [(parent, found) for parent, _, found in self._members]


def _to_record(parent: str, family: str, found: Fingerprint) -> dict[str, Any]:
    density = np.round(found.density, 5)
    return {"parent": parent, "family": family, "formula": found.formula, "volume": round(found.volume, 5), "density": density}


def _is_whole(record: dict[str, Any]) -> bool:
    numbers = record["density"]
    whole = isinstance(numbers, list) and all(isinstance(value, int | float) for value in numbers)
    return whole and isinstance(record["volume"], int | float)


def _from_record(record: dict[str, Any]) -> tuple[str, str, Fingerprint]:
    return record["parent"], record["family"], Fingerprint(record["formula"], record["volume"], np.array(record["density"]))
