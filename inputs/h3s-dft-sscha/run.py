"""SSCHA of Im-3m H3S in its 4-atom cell on GPAW itself: by GPAW alone, and with the shipped
potential as surrogate.

Usage: python run.py alone    # 150 labels, about 40 minutes on one core
       python run.py surrogate

Each goes on where it was stopped; what is finished is not labelled again.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
from ase import Atoms

from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.potential import load
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.sscha import free_energy

HERE = Path(__file__).resolve().parent
LATTICE_CONSTANT = 3.00  # Angstrom, of the cubic cell
PRESSURE = 150.0  # GPa, in G = F + P V at this volume
CELL = {"supercell": (1, 1, 1), "cell": "fixed"}
LABELER = {"calculator": "gpaw", "n_workers": 1, "timeout": 6 * 3600.0}
"""With the settings of the labels that the shipped potential was trained on."""


def im3m() -> Atoms:
    """The primitive cell."""
    half = 0.5 * LATTICE_CONSTANT
    cell = half * np.array([[-1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
    return Atoms("SH3", cell=cell, pbc=True, positions=[[0, 0, 0], *(half * np.eye(3))])


def main(which: str) -> None:
    """Run, and log the result."""
    gpaw = get_labeler(LabelerSettings(**LABELER), HERE / "labeling")
    if which == "alone":
        options = {"n_configs": 100, "max_populations": 4}
    else:
        model = load("h3s-gpaw-small")
        begin = free_energy(im3m(), model, PRESSURE, n_configs=1000, **CELL)
        options = {"start": begin, "surrogate": model, "n_configs": 200, "error_tolerance": 1.5e-3}
    found = free_energy(im3m(), gpaw, PRESSURE, directory=HERE / which, **CELL, **options)
    logging.info(
        "%s: G = %.5f +- %.5f eV/atom from %d evaluations by GPAW",
        which,
        found.gibbs,
        found.gibbs_error,
        found.n_evaluations,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(sys.argv[1])
