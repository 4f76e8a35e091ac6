"""The way from Im-3m to R3m at three pressures: V, F by SSCHA, and F by a model that has seen none
of it.

    python path.py label     adds what ``path.xyz`` lacks, about 10 s of one core each
    python path.py draw      the picture of docs/free-energy-surface.md

The cells are those of Im-3m at these pressures on F; every hydrogen is moved along its bond.
"""

import sys

import numpy as np
from ase import Atoms
from ase.io import read, write
from evaluate import trained_model
from label import ARGUMENTS, SURFACES
from learn import HERE, POTENTIAL

from magus_anharmonic import load
from magus_anharmonic.io import pictures
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.learning.dataset import labelled
from magus_anharmonic.settings import LabelerSettings

LABELS = HERE / "path.xyz"
FOLDER = HERE.parents[1] / "docs"
EDGES = {100: 3.19156, 130: 3.12056, 150: 3.08066}
"""A, of the cubic cell, by pressure in GPa."""
DISPLACEMENTS = (0.0, 0.06, 0.12, 0.18)
"""A."""


def structure(pressure: float, displacement: float) -> Atoms:
    """Four atoms of the cell for this pressure (GPa), every hydrogen moved by ``displacement``
    (A)."""
    cell = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) * EDGES[pressure] / 2
    sites = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    atoms = Atoms("SH3", scaled_positions=sites, cell=cell, pbc=True)
    bonds = atoms.positions[1:] / np.linalg.norm(atoms.positions[1:], axis=1)[:, None]
    atoms.positions[1:] += displacement * bonds
    name = f"path-{pressure}-{displacement:.2f}"
    atoms.info.update(id=name, pressure=pressure, displacement=displacement, kind="path")
    return atoms


def label() -> None:
    """Add the labels that are not there."""
    done = {atoms.info["id"] for atoms in read(LABELS, ":")} if LABELS.exists() else set()
    settings = LabelerSettings(calculator="sscha", arguments=ARGUMENTS | SURFACES["0K"][0])
    with get_labeler(settings, HERE / "scratch") as labeler:
        for pressure in EDGES:
            for displacement in DISPLACEMENTS:
                atoms = structure(pressure, displacement)
                if atoms.info["id"] not in done:
                    (found,) = labeler.label([atoms])
                    frame = labelled(atoms, found, seconds=round(found.seconds, 1))
                    write(LABELS, frame, format="extxyz", append=True)


def draw() -> None:
    """A panel for each pressure: energies of the cell above that of Im-3m on V, and by the model on
    F; what SSCHA says is shown above the same number as the model."""
    file = HERE / "scratch" / "labels-30.pth"
    model = load(file, device="cpu") if file.is_file() else trained_model(30)[0]
    potential, labels = load(POTENTIAL, device="cpu"), read(LABELS, ":")
    fine = np.linspace(0.0, 0.2, 41)
    with pictures.figure(len(EDGES)) as (figure, axes):
        for axis, pressure in zip(axes, EDGES, strict=True):
            way = [structure(pressure, displacement) for displacement in fine]
            static, free = (1e3 * one.evaluate(way).energy for one in (potential, model))
            own = [atoms for atoms in labels if atoms.info["pressure"] == pressure]
            found = np.array([1e3 * atoms.get_potential_energy() for atoms in own])
            errors = [1e3 * atoms.info["label_energy_error"] for atoms in own]
            moved = [atoms.info["displacement"] for atoms in own]
            axis.plot(fine, static - static[0], color=pictures.color(0), label="V")
            axis.plot(fine, free - free[0], color=pictures.color(1), label="F, model")
            bars = {"color": "black", "linestyle": "none", "label": "F, SSCHA"}
            pictures.points(axis, moved, found - free[0], errors, **bars)
            axis.axhline(0.0, color=pictures.GREY, linewidth=0.6)
            axis.set(title=f"{pressure} GPa", xlabel="H along its bond (A)", ylim=(-70, 190))
        axes[0].set_ylabel("energy above Im-3m (meV/cell)")
        axes[0].legend()
        pictures.save(figure, FOLDER, "free-energy-path")[1].unlink()  # the page shows the other


if __name__ == "__main__":
    {"label": label, "draw": draw}[sys.argv[1]]()
