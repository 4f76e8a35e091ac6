"""Error cancellation measured (Figs. 7 and 8 of the paper): GPAW labels of an SSCHA ensemble against the model that made it.

Usage: python error_cancellation.py label FOLDER PHASE.cif|im-3m [options]     (run again, it goes on; can be stopped at any time)
       python error_cancellation.py analyse FOLDER [options]                   (whatever labels are there)

The SSCHA run is made first (FOLDER/sscha); GPAW's settings are the defaults of the labeler, those of the shipped label set.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ase import Atoms
from ase.io import read

from magus_anharmonic.analysis.labelled_ensemble import draw, label_ensemble
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.potential import load
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.result import SschaResult


def im3m(a: float = 3.0) -> Atoms:
    """Primitive cell of Im-3m H3S with lattice constant ``a`` (A)."""
    cell = [[-a / 2, a / 2, a / 2], [a / 2, -a / 2, a / 2], [a / 2, a / 2, -a / 2]]
    return Atoms("SH3", scaled_positions=[(0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)], cell=cell, pbc=True)


def sscha(options: argparse.Namespace) -> SschaResult:
    atoms = im3m() if options.phase == "im-3m" else read(options.phase)
    return free_energy(
        atoms,
        load(options.checkpoint),
        pressure=options.pressure,
        supercell=tuple(options.supercell),
        n_configs=500,
        max_populations=20,
        seed=0,
        directory=options.folder / "sscha",
    )


def label(options: argparse.Namespace) -> None:
    result = sscha(options)
    print(f"model {result.model_id}: {result.space_group}, G = {result.gibbs:.5f} +- {result.gibbs_error:.5f} eV/atom, {result.status}")
    labeler = get_labeler(LabelerSettings(calculator="gpaw", n_workers=1, timeout=36000.0), options.folder / "gpaw")
    try:
        label_ensemble(result.state, draw(result.state, options.n, seed=0), labeler, options.folder)
    finally:
        labeler.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["label"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("phase", nargs="?", default="im-3m", help="im-3m, or a structure file")
    parser.add_argument("--checkpoint", default="h3s-gpaw-small")
    parser.add_argument("--pressure", type=float, default=150.0, help="GPa")
    parser.add_argument("--supercell", type=int, nargs=3, default=[2, 2, 2])
    parser.add_argument("-n", type=int, default=60, help="configurations, in +u/-u pairs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    {"label": label}[options.task](options)


if __name__ == "__main__":
    main()
