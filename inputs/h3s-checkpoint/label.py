"""GPAW labels of H3S by one rule for the k points that needs no correction afterwards.

converge  five volumes of Im-3m and of R3m and three random cells against k points twice as dense,
          into a table
label     the structures of a set, one at a time, into an extended XYZ file; labels that they have
          already are not looked at

Each goes on where it was stopped.

Usage: python label.py converge labels.xyz convergence.csv
       python label.py label labels.xyz new-labels.xyz
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write
from make_structures import cubic

from magus_anharmonic.errors import DamagedFile, LabelerError
from magus_anharmonic.io.files import replacing
from magus_anharmonic.io.tables import table_rows, write_table
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Failure, Label, Labeler, k_points
from magus_anharmonic.learning.dataset import label_digest, labelled, read_labels, with_digest
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.runs.record import record_failure
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.units import ev_per_a3_to_gpa

K_SPACING = 0.04  # 2 pi / Angstrom
ARGUMENTS = {"occupations": {"name": "marzari-vanderbilt", "width": 1.0}}  # width in eV
TIMEOUT = 6 * 3600.0  # seconds; ends what hangs, not a label on a busy machine
SEED = 20261130
AROUND_H3S = {"h3s4", "h3s8", "h3s16", "modes", "r3m", "thermal"}


def labeler(k_spacing: float, folder: Path) -> Labeler:
    """One GPAW process with the settings of the set and the given k spacing (2 pi / Angstrom)."""
    settings = LabelerSettings(
        calculator="gpaw", arguments=ARGUMENTS, k_spacing=k_spacing, n_workers=1, timeout=TIMEOUT
    )
    return get_labeler(settings, folder)


def in_order(structures: list[Atoms]) -> list[Atoms]:
    """The most useful first.

    Any beginning holds an equal share of every kind around H3S, and half that share of the others.
    """
    sizes, seen, keys = Counter(atoms.info["kind"] for atoms in structures), Counter(), {}
    for index in np.random.default_rng(SEED).permutation(len(structures)):
        kind = structures[index].info["kind"]
        keys[index] = (seen[kind] + 0.5) / sizes[kind] * (1 if kind in AROUND_H3S else 2)
        seen[kind] += 1
    return [structures[index] for index in sorted(keys, key=keys.__getitem__)]


def unlabelled(atoms: Atoms) -> Atoms:
    """The structure of a label, with its names alone."""
    info = {key: atoms.info[key] for key in ("id", "parent", "kind")}
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=True, info=info)


def read_checked(file: Path) -> list[Atoms]:
    """The labels of a file, none without one; raises ``DamagedFile`` for one that was changed."""
    labels = read_labels(file) if file.exists() else []
    for atoms in labels:
        if atoms.info["digest"] != f"d-{label_digest(atoms)}":
            raise DamagedFile(
                f"{file}: label {atoms.info['id']} was changed since it was made; "
                "bring back an undamaged copy"
            )
    return labels


def label(source: Path, target: Path) -> None:
    """Label what ``target`` lacks of ``source``; failures go into ``failures.jsonl`` beside it."""
    done = read_checked(target)
    known = {atoms.info["id"] for atoms in done}
    waiting = [
        atoms
        for atoms in in_order([unlabelled(atoms) for atoms in read(source, ":")])
        if atoms.info["id"] not in known
    ]
    with_labeler = labeler(K_SPACING, target.parent / "gpaw")
    if others := {atoms.info["settings_hash"] for atoms in done} - {with_labeler.settings_hash}:
        raise LabelerError(
            f"{target}: holds labels of other settings ({', '.join(sorted(others))}); "
            "give another file"
        )
    logging.info(
        "%d labels are there, %d to do: %s", len(done), len(waiting), with_labeler.description
    )

    def keep(index: int, result: Label | Failure) -> None:
        if isinstance(result, Failure):
            logging.warning("%s: %s", waiting[index].info["id"], result.reason)
            record_failure(target.parent, "label", result.reason, id=waiting[index].info["id"])
            return
        done.append(with_digest(labelled(waiting[index], result, seconds=round(result.seconds, 1))))
        with replacing(target) as temporary:
            write(temporary, done, format="extxyz")

    try:
        with_labeler.label(waiting, keep)
    finally:
        with_labeler.close()


def test_cells(labels: list[Atoms]) -> dict[str, Atoms]:
    """Five volumes of Im-3m and of R3m, two random cells of 4 atoms and one of 8.

    In R3m every H is 0.15 Angstrom off the middle of its bond.
    """
    constants = np.linspace(2.86, 3.22, 5)
    of_random = [atoms for atoms in labels if atoms.info["kind"] == "random"]
    fours = [atoms for atoms in of_random if len(atoms) == 4]
    eight = next(atoms for atoms in of_random if len(atoms) == 8)
    random = [unlabelled(atoms) for atoms in (eight, fours[0], fours[len(fours) // 2])]
    return {
        **{f"Im-3m {constant:.2f} A": cubic(constant) for constant in constants},
        **{atoms.info["id"]: atoms for atoms in random},
        **{f"R3m {constant:.2f} A": cubic(constant, 0.15) for constant in constants},
    }


COLUMNS = (
    "structure", "atoms", "volume_A3_per_atom", "grid", "dense_grid",
    "energy_difference_meV_per_atom", "max_force_difference_meV_per_A", "max_stress_difference_GPa",
    "seconds", "dense_seconds",
)  # fmt: skip


def converge(source: Path, target: Path) -> None:
    """Write how far each test cell is from k points twice as dense, row by row."""
    rows: list[list] = []
    if target.exists():
        with table_rows(target) as reader:
            rows = [list(row.values()) for row in reader]
    known = {row[0] for row in rows}
    usual, dense = (
        labeler(spacing, target.parent / f"gpaw-{spacing:g}")
        for spacing in (K_SPACING, K_SPACING / 2)
    )
    try:
        for name, atoms in test_cells(read(source, ":")).items():
            if name in known:
                continue
            (first,), (second,) = usual.label([atoms]), dense.label([atoms])
            for result in (first, second):
                if isinstance(result, Failure):
                    raise LabelerError(f"{name}: {result.reason}")
            grids = [
                "x".join(map(str, k_points(atoms, spacing)))
                for spacing in (K_SPACING, K_SPACING / 2)
            ]
            row = [
                name,
                len(atoms),
                f"{atoms.get_volume() / len(atoms):.3f}",
                *grids,
                *differences(first, second),
            ]
            rows.append([*row, round(first.seconds), round(second.seconds)])
            write_table(target, COLUMNS, rows)
            logging.info(", ".join(map(str, rows[-1])))
    finally:
        usual.close()
        dense.close()


def differences(first: Label, second: Label) -> list[str]:
    """``first`` minus ``second``: energy (meV/atom), largest force (meV/A) and stress (GPa)."""
    energy = 1e3 * (first.energy - second.energy) / len(first.structure)
    force = 1e3 * np.abs(first.forces - second.forces).max()
    stress = ev_per_a3_to_gpa(np.abs(first.stress - second.stress).max())
    return [f"{energy:.2f}", f"{force:.1f}", f"{stress:.2f}"]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    command, source, target = (
        {"converge": converge, "label": label}[sys.argv[1]],
        Path(sys.argv[2]),
        Path(sys.argv[3]),
    )
    with locked(target.absolute().parent, f"label.py {sys.argv[1]}", f"{target.stem}.lock.json"):
        command(source, target)
