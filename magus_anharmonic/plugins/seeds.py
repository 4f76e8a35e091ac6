"""SSCHA centroids as seeds of the next round, in the file where MAGUS looks for seeds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms
from ase.io import read, write

from magus_anharmonic.files import remove, replacing
from magus_anharmonic.structures import bare, structure_id

logger = logging.getLogger(__name__)

MARK = "seeded_by"
OWN = "magus-anharmonic"


def seed_file(folder: str | Path, generation: int) -> Path:
    """``Seeds/seeds_{generation}.traj``, which MAGUS reads before it starts that generation."""
    return Path(folder) / f"seeds_{generation}.traj"


def write_seeds(folder: str | Path, generation: int, structures: Sequence[Atoms]) -> int:
    """Put ``structures`` into the seed file of ``generation``; the info they carry is kept.

    The user's own frames stay, first and unchanged (the file as it was is kept beside it as ``.user``); frames of an
    earlier, interrupted attempt are replaced; a structure that an earlier generation was given already is left out.
    Returns how many seeds of ours the file holds.
    """
    file = seed_file(folder, generation)
    known = _earlier(Path(folder), generation)
    new = {structure_id(atoms): atoms for atoms in structures}
    ours = [_seed(atoms) for key, atoms in new.items() if key not in known]
    present = _frames(file)
    users = [atoms for atoms in present if atoms.info.get(MARK) != OWN]
    if not ours and len(users) == len(present):
        return 0
    if users and len(users) == len(present):
        shutil.copy2(file, file.with_name(file.name + ".user"))
    _replace(file, users + ours)
    if ours:
        logger.info("%d SSCHA centroids are seeds of round %d (%s)", len(ours), generation, file)
    return len(ours)


def clear_seeds(folder: str | Path) -> None:
    """Take the seeds of an earlier search out of every seed file; a new search starts without them, the user's own stay."""
    for file in sorted(Path(folder).glob("seeds_*.traj")):
        present = _frames(file)
        users = [atoms for atoms in present if atoms.info.get(MARK) != OWN]
        if len(users) < len(present):
            _replace(file, users)


def _replace(file: Path, frames: list[Atoms]) -> None:
    if not frames:
        remove(file)
        return
    with replacing(file) as temporary:
        write(temporary, frames, format="traj")


def _seed(atoms: Atoms) -> Atoms:
    seed = bare(atoms)
    seed.info = {**atoms.info, MARK: OWN}
    return seed


def _frames(file: Path) -> list[Atoms]:
    if not file.exists() or file.stat().st_size == 0:
        return []
    return read(file, index=":", format="traj")


def _earlier(folder: Path, generation: int) -> set[str]:
    """Ids of the structures that we seeded into generations before this one."""
    found: set[str] = set()
    for file in folder.glob("seeds_*.traj"):
        number = file.stem.removeprefix("seeds_")
        if number.isdigit() and int(number) < generation:
            found |= {structure_id(atoms) for atoms in _frames(file) if atoms.info.get(MARK) == OWN}
    return found
