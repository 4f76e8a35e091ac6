"""Structures that searches left, read one population at a time; which named phase they are; the lowest distinct ones."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import iread

from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.files import raise_trouble
from magus_anharmonic.gate import read_structures
from magus_anharmonic.settings.campaign import PhaseSettings
from magus_anharmonic.structures import bare, formula, number_of, primitive, space_group, structure_id

SYMPREC = 0.05
POOL = 10
"""Lowest structures kept per distinct one that is wanted, while a search is read."""


@dataclass(frozen=True)
class Found:
    """A relaxed structure of a search: enthalpy in eV/atom, ``origin`` the step."""

    atoms: Atoms
    enthalpy: float
    origin: str

    @property
    def id(self) -> str:
        """Identity of the structure."""
        return structure_id(self.atoms)


def populations(folder: Path) -> list[tuple[int, Path]]:
    """(generation, file) of every finished population of a search, stock MAGUS's or the embedded host's."""
    numbered = [(int(match[1]), file) for file in folder.glob("results/gen*.traj") if (match := re.fullmatch(r"gen(\d+)", file.stem))]
    return sorted(numbered)


def relaxed_structures(folder: Path, origin: str) -> Iterator[Found]:
    """Every distinct structure of every generation of a search, each once; one structure in memory at a time."""
    seen: set[int] = set()
    for _, file in populations(folder):
        for atoms in _frames(file):
            enthalpy = atoms.info.get("enthalpy")
            # 64 bits of the identity: 8 bytes for each structure, not the structure
            mark = int(structure_id(atoms), 16)
            if enthalpy is None or not np.isfinite(enthalpy) or mark in seen:
                continue
            seen.add(mark)
            yield Found(bare(atoms), float(enthalpy), origin)


def _frames(file: Path) -> Iterator[Atoms]:
    """One structure of a population after the other; raises ``DamagedFile``."""
    try:
        yield from iread(file, index=":", format="traj")
    except Exception as error:  # whatever ASE trips over in a damaged file
        raise_trouble(error, file)
        raise DamagedFile(f"{file}: damaged or not readable as a trajectory ({type(error).__name__}: {error})") from None


def n_relaxed(folder: Path) -> tuple[int, int]:
    """Structures that a search relaxed, duplicates included, and evaluations they took where the host wrote them down."""
    structures = evaluations = 0
    for file in folder.glob("results/raw*.traj"):
        for atoms in _frames(file):
            structures += 1
            evaluations += int(atoms.info.get("n_evaluations", 0))
    return structures, evaluations


def lowest_distinct(found: Iterable[Found], n: int, window: float | None = None) -> list[Found]:
    """The ``n`` lowest distinct structures, at most ``window`` (eV/atom) above the lowest, lowest first.

    Reads ``found`` once and keeps `POOL` times ``n`` of them; what is distinct is decided among these.
    """
    from magus_anharmonic.ranking.matcher import distinct

    pool = heapq.nsmallest(POOL * n, found, key=lambda item: (item.enthalpy, item.id))
    groups = distinct([item.atoms for item in pool], [item.enthalpy for item in pool], symprec=SYMPREC)
    kept = [pool[group[0]] for group in groups[:n]]
    limit = np.inf if window is None or not kept else kept[0].enthalpy + window
    return [item for item in kept if item.enthalpy <= limit]


@dataclass(frozen=True)
class Phase:
    """A named phase as it is recognised: number of the space group and, if known, atoms of the primitive cell."""

    name: str
    number: int
    natoms: int | None
    atoms: Atoms | None

    def matches(self, number: int, natoms: int) -> bool:
        """Whether a structure with this space group and primitive cell is taken for the phase."""
        return number == self.number and self.natoms in (None, natoms)


def phases_of(given: Sequence[PhaseSettings]) -> list[Phase]:
    """The named phases with their structures read; raises ``InputError`` for a file that does not hold what is said of it."""
    return [_phase(settings) for settings in given]


def _phase(settings: PhaseSettings) -> Phase:
    if settings.structure is None:
        return Phase(settings.name, int(settings.space_group or 1), settings.natoms, None)
    structures = read_structures(settings.structure)
    where = f"phases.{settings.name}.structure: {settings.structure}"
    if len(structures) != 1:
        raise InputError(f"{where}: holds {len(structures)} structures; give one")
    atoms = primitive(structures[0], SYMPREC)
    number = number_of(space_group(atoms, SYMPREC))
    if settings.space_group is not None and settings.space_group != number:
        raise InputError(f"{where}: has the space group {space_group(atoms, SYMPREC)}, not {settings.space_group}")
    return Phase(settings.name, number, settings.natoms or len(atoms), atoms)


def phase_name(phases: Sequence[Phase], atoms: Atoms, group: str) -> str:
    """Name of the phase that a structure with this space group is, or an empty string."""
    number = number_of(group)
    if not any(phase.number == number for phase in phases):
        return ""
    natoms = len(primitive(atoms, SYMPREC))
    return next((phase.name for phase in phases if phase.matches(number, natoms)), "")


def enthalpy_row(found: Found, phases: Sequence[Phase], pressure: float, model_id: str, source: str) -> tuple[object, ...]:
    """A row of ``enthalpies.csv``."""
    atoms, group = found.atoms, space_group(found.atoms, SYMPREC)
    name_of_compound = formula(atoms)
    volume = atoms.get_volume() / len(atoms)
    name = phase_name(phases, atoms, group)
    return (found.id, name, name_of_compound, len(atoms), group, float(pressure), float(volume), found.enthalpy, model_id, source)
