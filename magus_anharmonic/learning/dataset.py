"""All labels of a search, on disk: each one saved the moment it is finished, none ever changed or
lost."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from magus_anharmonic.energy_surface import FreeEnergySurface
from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.gate import check_structures, isotope_hint
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import (
    append_jsonl,
    read_jsonl,
    readable,
    remove,
    replacing,
    set_aside,
)
from magus_anharmonic.labelers.base import Label
from magus_anharmonic.learning.choose import SIDES, Families
from magus_anharmonic.potential.labelled import side_of_name
from magus_anharmonic.structures import stripped, structure_id, with_isotopes

log = logging.getLogger(__name__)

SHIPPED_FOLDER = Path(__file__).resolve().parents[1] / "data"


def side(name: str, split: Sequence[int] = (8, 1, 1)) -> str:
    """``train``, ``validation`` or ``test``: by the hash of a parent's name, so that it is the same
    for ever."""
    return SIDES[side_of_name(name, split)]


def side_of(atoms: Atoms, split: Sequence[int] = (8, 1, 1)) -> str:
    """Side of a labelled structure: ``info['side']`` given when it was labelled, else by
    ``family``, ``parent`` or its own identity."""
    stored = atoms.info.get("side")
    if stored in SIDES:
        return str(stored)
    return side(
        str(atoms.info.get("family") or atoms.info.get("parent") or structure_id(atoms)), split
    )


def plan_label(
    atoms: Atoms,
    *,
    generation: int,
    parent: str,
    family: str,
    side: str,
    kind: str,
    distortion_seed: str,
    **more: str,
) -> None:
    """Write into ``info`` what identifies a label of a round and fixes its side for life."""
    atoms.info.update(
        id=f"g{generation}-{structure_id(atoms)}",
        generation=generation,
        parent=parent,
        family=family,
        side=side,
        kind=kind,
        **more,
        distortion_seed=distortion_seed,
    )


def labelled(structure: Atoms, label: Label, **info: Any) -> Atoms:
    """``structure`` with its label: energy, forces and stress attached; free energy, settings hash
    and ``info`` in ``info``. Where the label is of a free-energy surface, it has its masses."""
    surface = FreeEnergySurface.of(label.info, "label")
    masses = {} if surface is None else surface.other_masses(structure)
    atoms = with_isotopes(structure, masses)
    atoms.info.update(structure.info)
    atoms.info.update(label.info)
    atoms.info.update(info, settings_hash=label.settings_hash)
    if label.free_energy is not None:
        atoms.info["free_energy"] = label.free_energy
    atoms.calc = SinglePointCalculator(
        atoms, energy=label.energy, forces=label.forces, stress=label.stress
    )
    return atoms


class LabelStore:
    """The labels in ``directory`` (``results/anharmonic/labels``).

    ``gen003.xyz`` (then ``gen003-2.xyz``, ...) are finished batches and never change;
    ``pending/gen003/<id>.xyz`` are the labels of a batch that is not finished. Reading merges both;
    a label that is in both after a kill counts once. ``index.jsonl`` has the digest of every label,
    so that none can be lost or changed unnoticed; what a kill left without one (the last label)
    gets it here. ``families.jsonl`` says which chosen structures are one phase. One process writes.
    Raises ``DamagedFile`` when a label is missing or changed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.families = Families(self.directory / "families.jsonl")
        self.index = self.directory / "index.jsonl"
        self.outliers = self.directory / "quarantine.jsonl"
        self._quarantined = {
            str(line["id"]): str(line["reason"])
            for line in read_jsonl(self.outliers, ("id", "reason"))
        }
        self._frames: dict[str, Atoms] = {}
        self._sides_of_dataset: dict[str, str] = {}
        known = {
            str(line["id"]): line["digest"] for line in read_jsonl(self.index, ("id", "digest"))
        }
        for file in sorted(self.directory.glob("gen*.xyz")):
            self._take(file, known)
        pending = sorted(self.directory.glob("pending/*/*.xyz"))
        for file in pending:
            try:
                self._take(file, known)
            except DamagedFile as error:
                set_aside(file, str(error))
                known.pop(file.stem, None)  # it is made again
        lost = sorted(set(known) - set(self._frames))
        if lost:
            raise DamagedFile(
                f"{self.directory}: {len(lost)} labels are in {self.index.name} but in no file"
                f" ({', '.join(lost[:3])}): a file was cut or removed; bring it back, or delete"
                " their lines there to go on without them"
            )
        self._protect(
            [name for name in self._frames if name not in known], {file.stem for file in pending}
        )

    def _protect(self, names: Sequence[str], pending: set[str]) -> None:
        """Write the digests of labels that have none. In a finished batch no kill leaves such a
        one: that is said."""
        strange = [name for name in names if name not in pending]
        if strange:
            log.warning(
                "%s: %d labels of finished batches have no line in %s (%s): it was cut or changed; "
                "they are taken as they are now",
                self.directory,
                len(strange),
                self.index.name,
                ", ".join(strange[:3]),
            )
        for name in names:
            append_jsonl(self.index, {"id": name, "digest": label_digest(self._frames[name])})

    def _take(self, file: Path, known: Mapping[str, str]) -> None:
        """Take over the labels of one file; raises ``DamagedFile`` when one is not what it was when
        it was written."""
        for number, atoms in enumerate(read_labels(file), start=1):
            label_id = str(atoms.info.get("id"))
            complete = atoms.calc is not None and {"energy", "forces", "stress"} <= set(
                atoms.calc.results
            )
            if (
                not complete
                or not isinstance(atoms.info.get("generation"), int | np.integer)
                or label_id == "None"
            ):
                raise DamagedFile(
                    f"{file}: structure {number} ({label_id}) is no whole label; bring back an"
                    " undamaged copy"
                )
            if known.get(label_id, digest := label_digest(atoms)) != digest:
                raise DamagedFile(
                    f"{file}: label {label_id} is not what it was when it was made; bring back an"
                    " undamaged copy"
                )
            self._frames.setdefault(label_id, atoms)

    def __len__(self) -> int:
        return len(self._frames)

    def __contains__(self, label_id: str) -> bool:
        return label_id in self._frames

    def without_label(self, planned: Sequence[Atoms]) -> list[Atoms]:
        """Those of the ``planned`` structures whose ``info['id']`` has no label here, in order."""
        waiting = [atoms for atoms in planned if atoms.info["id"] not in self]
        if len(waiting) < len(planned):
            log.info("%d of %d labels are there already", len(planned) - len(waiting), len(planned))
        return waiting

    def check(self, settings_hash: str) -> None:
        """Raise ``InputError`` when a label here was made with other DFT settings than
        ``settings_hash``."""
        for atoms in self._frames.values():
            if atoms.info.get("settings_hash") != settings_hash:
                raise InputError(
                    f"learning.labeler: {self.directory} holds labels of other DFT settings"
                    f" ({atoms.info.get('settings_hash')}, now {settings_hash}); energies of two"
                    " settings must not be mixed: give the earlier settings, or start a new search"
                )

    def add(self, atoms: Atoms) -> None:
        """Save one label at once; ``info`` must hold ``id`` and ``generation``."""
        label_id, generation = str(atoms.info["id"]), int(atoms.info["generation"])
        file = self._pending(generation) / f"{label_id}.xyz"
        with replacing(file) as temporary:
            write(temporary, atoms, format="extxyz")
        # The digits of the file, not those in memory: a restarted search must train on the same
        # numbers.
        self._frames[label_id] = read_labels(file)[0]
        append_jsonl(self.index, {"id": label_id, "digest": label_digest(self._frames[label_id])})

    def close_batch(self, generation: int) -> Path | None:
        """Merge the pending labels of ``generation`` into one new file and return it; None when
        there are none."""
        folder = self._pending(generation)
        files = sorted(folder.glob("*.xyz"))
        if not files:
            with contextlib.suppress(OSError):  # killed just before it was removed
                folder.rmdir()
            return None
        done = {
            str(atoms.info["id"])
            for file in self.directory.glob(f"gen{generation:03d}*.xyz")
            for atoms in read_labels(file)
        }
        fresh = [
            atoms
            for file in files
            for atoms in read_labels(file)
            if str(atoms.info["id"]) not in done
        ]
        batch = self._next_file(generation) if fresh else None
        if batch is not None:
            with replacing(batch) as temporary:
                write(temporary, fresh, format="extxyz")
        for file in files:
            remove(file)
        with contextlib.suppress(OSError):  # a damaged file that was set aside stays
            folder.rmdir()
        return batch

    def labels(
        self, *, generation: int | None = None, before: int | None = None, quarantined: bool = False
    ) -> list[Atoms]:
        """Usable labels of one generation, of all ``before`` one, or all, in the order of their id.

        Labels kept with ``info['excluded']`` (a reason, e.g. unphysical forces) and those in
        quarantine (unless ``quarantined``) are left out.
        """
        chosen = [
            atoms
            for _, atoms in sorted(self._frames.items())
            if "excluded" not in atoms.info
            and (quarantined or atoms.info["id"] not in self._quarantined)
            and (generation is None or atoms.info["generation"] == generation)
            and (before is None or atoms.info["generation"] < before)
        ]
        return chosen

    def quarantine(self, label_id: str, reason: str) -> None:
        """Never use a label, which stays where it is; ``quarantine.jsonl`` says why."""
        if label_id not in self._quarantined:
            append_jsonl(self.outliers, {"id": label_id, "reason": reason})
            self._quarantined[label_id] = reason

    def n_quarantined(self, generation: int) -> int:
        """How many labels of a generation are in quarantine."""
        return sum(
            self._frames[name].info["generation"] == generation
            for name in self._quarantined
            if name in self._frames
        )

    def adopt(self, dataset: Sequence[Atoms], split: Sequence[int]) -> None:
        """Give labels of earlier work (``learning.dataset``) their families among those of this
        search, and one side to each family.

        Earlier labels know their parents by name alone: the first label of each stands for it.
        """
        self._sides_of_dataset = {}
        known = self.sides(split)
        parents = [
            str(atoms.info.get("parent") or atoms.info.get("id") or structure_id(atoms))
            for atoms in dataset
        ]
        for parent, atoms in zip(parents, dataset, strict=True):
            family = self.families.family(parent, stripped(atoms))
            known.setdefault(family, side_of(atoms, split))
            atoms.info.update(family=family, side=known[family])
            self._sides_of_dataset[family] = known[family]

    def sides(self, split: Sequence[int], before: int | None = None) -> dict[str, str]:
        """Side of every family that has labels here (of all generations, or of those ``before``
        one) or in the adopted dataset."""
        found = dict(self._sides_of_dataset)
        for _, atoms in sorted(self._frames.items()):
            if before is None or atoms.info["generation"] < before:
                family, mine = str(atoms.info.get("family")), side_of(atoms, split)
                # of a folder in which a family was on two sides: what was trained on cannot
                # validate
                found[family] = "train" if "train" in (mine, found.get(family)) else mine
        return found

    def get(self, label_id: str) -> Atoms:
        """The label with this id; KeyError when there is none."""
        return self._frames[label_id]

    def _pending(self, generation: int) -> Path:
        return self.directory / "pending" / f"gen{generation:03d}"

    def _next_file(self, generation: int) -> Path:
        file, number = self.directory / f"gen{generation:03d}.xyz", 2
        while file.exists():
            file, number = self.directory / f"gen{generation:03d}-{number}.xyz", number + 1
        return file


LABEL = ("energy", "forces", "stress")


def label_digest(atoms: Atoms) -> str:
    """Twelve hex digits over structure, energy, forces and stress of a label."""
    results = atoms.calc.results
    values = (atoms.cell.array, atoms.positions, *(results[name] for name in LABEL))
    arrays = (np.asarray(np.asarray(value, dtype=float) + 0.0) for value in values)
    return digest(np.asarray(atoms.numbers, dtype=np.int64), *arrays)


def with_digest(label: Atoms) -> Atoms:
    """The label with the digest of what its file will hold."""
    text = io.StringIO()
    write(text, label, format="extxyz")
    text.seek(0)
    label.info["digest"] = f"d-{label_digest(read(text, format='extxyz'))}"
    return label


def read_labels(file: str | Path) -> list[Atoms]:
    """Labelled structures of an extended XYZ file; raises ``InputError`` that names the file when
    it is none."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with readable(path, "extended XYZ", hint=isotope_hint):
        frames: Any = read(path, index=":", format="extxyz")
    if not frames:
        raise DamagedFile(f"{path}: holds no structure")
    check_structures(frames, f"{path}: ", crystal=False)
    for atoms in frames:
        # ASE reads this key as a result of the calculator, and then refuses to write it from both
        # places.
        if atoms.calc is not None and "free_energy" in atoms.calc.results:
            atoms.info["free_energy"] = float(atoms.calc.results.pop("free_energy"))
    return frames


def dataset_file(name: str | Path) -> Path:
    """File of ``learning.dataset``: a path, or the name of a shipped checkpoint (the labels that it
    was trained on)."""
    shipped = SHIPPED_FOLDER / f"{name}.labels.xyz"
    return shipped if shipped.is_file() and not Path(name).exists() else Path(name)


def read_dataset(name: str | Path, settings_hash: str) -> list[Atoms]:
    """Earlier labels (``learning.dataset``) of the same DFT settings; ``name`` as in
    `dataset_file`.

    Raises ``InputError`` when the file is missing, a label is incomplete, or the settings hash is
    missing or another one.
    """
    file = dataset_file(name)
    if not file.is_file():
        raise InputError(f"learning.dataset: {name}: no such file")
    frames = read_labels(file)
    for number, atoms in enumerate(frames, start=1):
        where = (
            f"learning.dataset: {file}: structure {number}"
            f" ({atoms.info.get('id', atoms.get_chemical_formula())})"
        )
        found = atoms.info.get("settings_hash")
        if found is None:
            raise InputError(
                f"{where}: has no settings_hash, so nothing says that its DFT settings are those of"
                f" learning.labeler. If they are, add settings_hash={settings_hash} to the second"
                " line of every structure (ASE: atoms.info['settings_hash'])"
            )
        if str(found) != settings_hash:
            raise InputError(
                f"{where}: was labelled with other DFT settings ({found}) than learning.labeler has"
                f" ({settings_hash}); energies of two settings must not be mixed: change"
                " learning.labeler or leave the file out"
            )
        if atoms.calc is None or not {"energy", "forces", "stress"} <= set(atoms.calc.results):
            raise InputError(f"{where}: energy, forces and stress are needed")
    if any("parent" not in atoms.info for atoms in frames):
        log.warning(
            "%s: structures without the key parent are split one by one: siblings may end up on two"
            " sides",
            file,
        )
    return frames


def on_side(frames: Iterable[Atoms], name: str, split: Sequence[int]) -> list[Atoms]:
    """Those of ``frames`` that are on the side ``name`` (train, validation, test)."""
    return [atoms for atoms in frames if side_of(atoms, split) == name]
