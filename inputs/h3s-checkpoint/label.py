"""Label structures with GPAW at the settings of the set, one file in, one file out; run again, it
goes on.

Usage: python label.py structures.xyz labels.xyz
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from magus_anharmonic.io.files import replacing
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Failure, Label
from magus_anharmonic.settings import LabelerSettings


def labelled(structure: Atoms, label: Label) -> Atoms:
    """The structure with its labels, in the format of the set."""
    atoms = structure.copy()
    atoms.info.update(free_energy=label.free_energy, settings_hash=label.settings_hash)
    atoms.calc = SinglePointCalculator(
        atoms, energy=label.energy, forces=label.forces, stress=label.stress
    )
    return atoms


def main(source: Path, target: Path) -> None:
    done = read(target, ":") if target.exists() else []
    known = {atoms.info["id"] for atoms in done}
    open_ = [atoms for atoms in read(source, ":") if atoms.info["id"] not in known]

    def keep(index: int, result: Label | Failure) -> None:
        if isinstance(result, Failure):
            logging.warning("%s: %s", open_[index].info["id"], result.reason)
            return
        done.append(labelled(open_[index], result))
        with replacing(target) as temporary:
            write(temporary, done, format="extxyz")

    with_labeler = get_labeler(LabelerSettings(calculator="gpaw"), target.parent / "gpaw")
    try:
        with_labeler.label(open_, keep)
    finally:
        with_labeler.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
