"""Split labels into training, validation and test set by a hash of where they come from.

The side of a structure depends on its parent alone: all distortions of one structure stay together, and a label keeps its
side when the set grows.
"""

from __future__ import annotations

from collections.abc import Sequence

from ase import Atoms

from magus_anharmonic.files import digest
from magus_anharmonic.structures import structure_id


def parent_of(atoms: Atoms) -> str:
    """``info['parent']``, or else the identity of the structure itself."""
    return str(atoms.info.get("parent", structure_id(atoms)))


def side_of_name(name: str, split: Sequence[int] = (8, 1, 1)) -> int:
    """0, 1 or 2 (training, validation, test): by the hash of a parent's name, so that it is the same for ever."""
    position = int(digest(name), 16) / 16**12 * sum(split)
    return 0 if position < split[0] else 1 if position < split[0] + split[1] else 2


def split_by_parent(labelled: Sequence[Atoms], split: Sequence[int] = (8, 1, 1)) -> tuple[list[Atoms], list[Atoms], list[Atoms]]:
    """Training, validation and test set, expected to be in the ratio ``split`` (three numbers >= 0), order kept."""
    parts: tuple[list[Atoms], list[Atoms], list[Atoms]] = ([], [], [])
    for atoms in labelled:
        parts[side_of_name(parent_of(atoms), split)].append(atoms)
    return parts
