"""Labels of the free energy F(R, cell) of H3S: SSCHA at fixed centroids on the shipped potential.

    python label.py N_TRAIN N_TEST [0K|300K|D3S]

Labels of D3S come from runs of H3S with more configurations (`KEPT`): reweighted, and
corrected for a polynomial, where enough of them count; else there is none.

Goes on where it was: ``labels.xyz`` (``labels-300K.xyz``, ``labels-D3S.xyz``) keeps every label the
moment it is made, ``failed.txt`` why one has none. Structures are four-atom cells between 90 and
170 GPa, none of them a minimum: about Im-3m, along the way to R3m, and rattled; those of the test
have other seeds, and more than half of them are of kinds that no training label is of (every
hydrogen moved along its own bond, to either side; the cell strained more).
"""

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write

from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Failure, Label
from magus_anharmonic.learning.dataset import labelled
from magus_anharmonic.settings import LabelerSettings

HERE = Path(__file__).resolve().parent
ARGUMENTS = {
    "evaluator": "h3s-gpaw-small",
    "supercell": [2, 2, 2],
    "n_configs": 100,
    "surrogate": "none",  # what D3S is reweighted from is of one level
}
SURFACES = {
    "0K": ({"temperature": 0.0}, "labels.xyz"),
    "300K": ({"temperature": 300.0}, "labels-300K.xyz"),
    "D3S": (
        {"masses": {"H": 2.014}, "surrogate": "polynomial", "max_populations": 1},
        "labels-D3S.xyz",
    ),
}
"""Arguments of the labeler, and the file of the labels; one population is never enough, so that
labels of D3S are reweighted or fail."""
KEPT = {"n_configs": 400, "runs": str(HERE / "scratch" / "runs")}
"""Arguments of the runs of H3S that labels of D3S come from, and of these."""
KINDS = ("im-3m", "r3m", "rattled")
VOLUMES = (13.9, 16.0)
"""A^3 of the cell."""


def structure(side: str, number: int) -> Atoms:
    """The structure with this number of ``train`` or ``test``; the same for ever."""
    rng = np.random.default_rng([{"train": 0, "test": 1}[side], number])
    kind = KINDS[number % 3]
    if side == "test" and number % 2:
        kind = "apart"
    elif side == "test" and number >= 35:
        kind = "strained"
    edge = (2.0 * rng.uniform(*VOLUMES)) ** (1 / 3)
    cell = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) * edge / 2
    sites = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    atoms = Atoms("SH3", scaled_positions=sites, cell=cell, pbc=True)
    bonds = atoms.positions[1:] / np.linalg.norm(atoms.positions[1:], axis=1)[:, None]
    if kind == "r3m":
        atoms.positions[1:] += rng.uniform(0.0, 0.18) * bonds
    if kind == "apart":
        atoms.positions[1:] += rng.uniform(-0.2, 0.2, (3, 1)) * bonds
    size = 0.12 if kind == "rattled" else 0.04
    atoms.positions += size * rng.normal(size=(4, 3)) / np.sqrt([[3.0]])
    strain = (0.05 if kind == "strained" else 0.03) * rng.uniform(-1, 1, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain + strain.T), scale_atoms=True)
    atoms.info.update(
        id=f"{side}-{number:03d}", parent=f"{side}-{number:03d}", kind=kind, side=side
    )
    return atoms


def main(n_train: int, n_test: int, surface: str = "0K") -> None:
    """Label what has no label yet, test and training in turn, one at a time."""
    own, name = SURFACES[surface]
    labels, failed = HERE / name, HERE / "failed.txt"
    done = {atoms.info["id"] for atoms in read(labels, ":")} if labels.exists() else set()
    reasons = [line.split() for line in failed.read_text().splitlines()] if failed.exists() else []
    done |= {words[1] for words in reasons if words[0] == surface}
    wanted = [("train", i, i / n_train) for i in range(n_train)]
    wanted += [("test", i, i / n_test) for i in range(n_test)]
    if "masses" in own:
        own = own | KEPT
    for side, number, _ in sorted(wanted, key=lambda entry: entry[2]):
        atoms = structure(side, number)
        if atoms.info["id"] in done:
            continue
        if "masses" in own:
            label_of(atoms, ARGUMENTS | KEPT)
        found = label_of(atoms, ARGUMENTS | own)
        if found.ok:
            frame = labelled(atoms, found, seconds=round(found.seconds, 1))
            write(labels, frame, format="extxyz", append=True)
        else:
            with failed.open("a") as file:
                file.write(f"{surface} {atoms.info['id']} {found.reason}\n")


def label_of(atoms: Atoms, arguments: dict) -> Label | Failure:
    """By the labeler with these arguments."""
    settings = LabelerSettings(calculator="sscha", arguments=arguments)
    with get_labeler(settings, HERE / "scratch") as labeler:
        return labeler.label([atoms])[0]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
