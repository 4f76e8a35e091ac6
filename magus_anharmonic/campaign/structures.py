"""What the searches left: the pool, its merging, named phases.

Structures that searches left, read one population at a time; which named phase they are; the lowest
distinct ones.

Step ``merge``: one data set from all learning searches, every phase on one side of the split.
"""

from __future__ import annotations

import heapq
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms
from ase.io import iread, write

from magus_anharmonic.campaign.steps import Context, Outcome, Step
from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.gate import read_structures
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import readable, replacing
from magus_anharmonic.learning.choose import (
    SIDES,
    Families,
    Fingerprint,
    fingerprint,
    sides_of_families,
)
from magus_anharmonic.learning.dataset import LabelStore, read_dataset
from magus_anharmonic.paper.tables import Enthalpy
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings.campaign import PhaseSettings
from magus_anharmonic.structures import (
    formula,
    number_of,
    primitive,
    space_group,
    stripped,
    structure_id,
)
from magus_anharmonic.units import GPa

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
    """(generation, file) of every finished population of a search, stock MAGUS's or the embedded
    host's."""
    numbered = [
        (int(match[1]), file)
        for file in folder.glob("results/gen*.traj")
        if (match := re.fullmatch(r"gen(\d+)", file.stem))
    ]
    return sorted(numbered)


def relaxed_structures(folder: Path, origin: str) -> Iterator[Found]:
    """Every distinct structure of every generation of a search, each once; one structure in memory
    at a time."""
    seen: set[int] = set()
    for _, file in populations(folder):
        for atoms in _frames(file):
            enthalpy = atoms.info.get("enthalpy")
            # 64 bits of the identity: 8 bytes for each structure, not the structure
            mark = int(structure_id(atoms), 16)
            if enthalpy is None or not np.isfinite(enthalpy) or mark in seen:
                continue
            seen.add(mark)
            yield Found(stripped(atoms), float(enthalpy), origin)


def _frames(file: Path) -> Iterator[Atoms]:
    """One structure of a population after the other; raises ``DamagedFile``."""
    with readable(file, "a trajectory"):
        yield from iread(file, index=":", format="traj")


def n_relaxed(folder: Path) -> tuple[int, int]:
    """Structures that a search relaxed, duplicates included, and evaluations they took where the
    host wrote them down."""
    structures = evaluations = 0
    for file in folder.glob("results/raw*.traj"):
        for atoms in _frames(file):
            structures += 1
            evaluations += int(atoms.info.get("n_evaluations", 0))
    return structures, evaluations


def lowest_distinct(found: Iterable[Found], n: int, window: float | None = None) -> list[Found]:
    """The ``n`` lowest distinct structures, at most ``window`` (eV/atom) above the lowest, lowest
    first.

    Reads ``found`` once and keeps `POOL` times ``n`` of them; what is distinct is decided among
    these.
    """
    from magus_anharmonic.ranking.matcher import distinct

    pool = heapq.nsmallest(POOL * n, found, key=lambda item: (item.enthalpy, item.id))
    groups = distinct(
        [item.atoms for item in pool], [item.enthalpy for item in pool], symprec=SYMPREC
    )
    kept = [pool[group[0]] for group in groups[:n]]
    limit = np.inf if window is None or not kept else kept[0].enthalpy + window
    return [item for item in kept if item.enthalpy <= limit]


@dataclass(frozen=True)
class Phase:
    """A named phase as it is recognised: number of the space group and, if known, atoms of the
    primitive cell."""

    name: str
    number: int
    natoms: int | None
    atoms: Atoms | None

    def matches(self, number: int, natoms: int) -> bool:
        """Whether a structure with this space group and primitive cell is taken for the phase."""
        return number == self.number and self.natoms in (None, natoms)


def phases_of(given: Sequence[PhaseSettings]) -> list[Phase]:
    """The named phases with their structures read; raises ``InputError`` for a file that does not
    hold what is said of it."""
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
        raise InputError(
            f"{where}: has the space group {space_group(atoms, SYMPREC)}, not"
            f" {settings.space_group}"
        )
    return Phase(settings.name, number, settings.natoms or len(atoms), atoms)


def phase_name(phases: Sequence[Phase], atoms: Atoms, group: str) -> str:
    """Name of the phase that a structure with this space group is, or an empty string."""
    number = number_of(group)
    if not any(phase.number == number for phase in phases):
        return ""
    natoms = len(primitive(atoms, SYMPREC))
    return next((phase.name for phase in phases if phase.matches(number, natoms)), "")


def enthalpy_row(
    found: Found,
    phases: Sequence[Phase],
    pressure: GPa,
    model_id: str,
    source: Literal["produce", "relax", "foundation"],
    name: str = "",
) -> Enthalpy:
    """A row of ``enthalpies.csv``; ``name``: of the phase, where it is known."""
    atoms, group = found.atoms, space_group(found.atoms, SYMPREC)
    return Enthalpy(
        id=found.id,
        phase=name or phase_name(phases, atoms, group),
        formula=formula(atoms),
        natoms=len(atoms),
        space_group=group,
        pressure_GPa=float(pressure),
        volume_A3_per_atom=float(atoms.get_volume() / len(atoms)),
        enthalpy_eV_per_atom=found.enthalpy,
        model_id=model_id,
        source=source,
    )


log = logging.getLogger(__name__)

LABELS = "labels.xyz"


def merge(context: Context, step: Step) -> Outcome:
    """``labels.xyz`` with ``parent``, ``family``, ``side``, ``step`` and ``settings_hash`` of every
    label.

    Raises ``InputError`` when the searches were labelled with different DFT settings.
    """
    settings, folder = context.settings.merge, context.folder(step)
    stores = {
        name: LabelStore(SearchFolder.below(context.folder(name)).labels) for name in step.needs
    }
    labels = {name: store.labels() for name, store in stores.items()}
    settings_hash = one_settings_hash(labels)
    earlier = [] if settings.dataset is None else read_dataset(settings.dataset, settings_hash)
    rng = np.random.default_rng([context.settings.seed, step.cycle, 7])
    if settings.n_dataset is not None and len(earlier) > settings.n_dataset:
        earlier = [earlier[i] for i in sorted(rng.permutation(len(earlier))[: settings.n_dataset])]
    families = common_families({name: store.families for name, store in stores.items()}, earlier)
    merged = list(_tagged(labels, earlier, families))
    sides = merged_sides(merged, settings.split)
    for atoms in merged:
        atoms.info["side"] = sides[str(atoms.info["family"])]
    with replacing(folder / LABELS) as temporary:
        write(temporary, merged, format="extxyz")
    counts = {side: sum(atoms.info["side"] == side for atoms in merged) for side in SIDES}
    log.info(
        "merged %d labels of %d phases: %s",
        len(merged),
        len(sides),
        ", ".join(f"{n} {side}" for side, n in counts.items()),
    )
    return Outcome(n_structures=len(merged), output=digest(folder / LABELS))


def one_settings_hash(labels: Mapping[str, Sequence[Atoms]]) -> str:
    """The one hash of the DFT settings of all labels; raises ``InputError`` for two,
    ``MagusAnharmonicError`` for no labels."""
    found: dict[str, str] = {}
    for name, frames in labels.items():
        for atoms in frames:
            found.setdefault(str(atoms.info.get("settings_hash")), name)
    if not found:
        raise MagusAnharmonicError(
            f"merge: no label in {', '.join(labels)}: every label failed, see failures.jsonl there"
        )
    if len(found) > 1:
        (first, a), (second, b) = list(found.items())[:2]
        raise InputError(
            f"merge: labels of two different DFT settings: {first} in {a}, {second} in {b};"
            " energies of two settings must not be mixed: run one of the two again with the"
            f" settings of the other (campaign --only {b})"
        )
    return next(iter(found))


def common_families(
    searches: Mapping[str, Families], earlier: Sequence[Atoms]
) -> dict[tuple[str, str], str]:
    """(step, parent) -> family over all searches and earlier labels (step ``dataset``): the same
    phase found twice is one family.

    Earlier labels know their parents by name alone: the first label of each stands for it.
    """
    known: list[tuple[str, Fingerprint]] = []
    found: dict[tuple[str, str], str] = {}

    def add(step: str, parent: str, mine: Fingerprint) -> None:
        family = next((name for name, other in known if mine.similar(other)), f"{step}/{parent}")
        known.append((family, mine))
        found[step, parent] = family

    first: dict[str, Atoms] = {}
    for atoms in earlier:
        first.setdefault(parent_name(atoms), atoms)
    for parent, atoms in first.items():
        add("dataset", parent, fingerprint(atoms))
    for step, families in searches.items():
        for parent, mine in families.members():
            add(step, parent, mine)
    return found


def parent_name(atoms: Atoms) -> str:
    """Parent of an earlier label, or its own id."""
    return str(atoms.info.get("parent") or atoms.info.get("id"))


def _tagged(
    labels: Mapping[str, Sequence[Atoms]],
    earlier: Sequence[Atoms],
    families: Mapping[tuple[str, str], str],
) -> Iterator[Atoms]:
    for step, frames in [("dataset", earlier), *labels.items()]:
        for atoms in frames:
            parent = parent_name(atoms)
            atoms.info.update(
                step=step, parent=parent, family=families.get((step, parent), f"{step}/{parent}")
            )
            yield atoms


def merged_sides(merged: Sequence[Atoms], split: Sequence[int]) -> dict[str, str]:
    """Side of every family: those of earlier labels train, then the newest generation of the
    searches is shared out, then the others."""
    sides = {
        str(atoms.info["family"]): "train" for atoms in merged if atoms.info["step"] == "dataset"
    }
    found = [
        (int(atoms.info.get("generation", 0)), str(atoms.info["family"]))
        for atoms in merged
        if atoms.info["step"] != "dataset"
    ]
    newest = max((generation for generation, _ in found), default=0)
    for batch in (
        [family for generation, family in found if generation == newest],
        [family for _, family in found],
    ):
        sides |= sides_of_families(batch, split, sides)
    return sides


def labels_on_side(file: Path, side: str) -> list[Atoms]:
    """Merged labels on one side: train, validation or test."""
    from magus_anharmonic.learning.dataset import read_labels

    return [atoms for atoms in read_labels(file) if atoms.info["side"] == side]
