"""SSCHA of Pm-3n AlH3 in its 8-atom cell (fixed, 0 K): by a model, and by pw.x from the model's
state on.

Usage: python sscha_by_pw.py final.pth folder    # 40 labels, some ten minutes on one core

It goes on where it was stopped; what is finished is not labelled again.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ase.io import read

from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.potential import load
from magus_anharmonic.settings.campaign import load_campaign
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.units import ev_to_mev

HERE = Path(__file__).resolve().parent
PRESSURE = 110.0  # GPa, in G = F + P V at the volume of pm-3n.vasp
CELL = {"supercell": (1, 1, 1), "cell": "fixed"}


def log_result(name: str, found: SschaResult) -> None:
    """Two lines: G, and the modes of the auxiliary crystal at Gamma."""
    modes = ", ".join(f"{omega:.0f}" for omega in ev_to_mev(found.state.modes.hbar_omega))
    logging.info("%s: G = %.5f +- %.5f eV/atom", name, found.gibbs, found.gibbs_error)
    logging.info(
        "%s: %d evaluations, %s; modes (meV): %s", name, found.n_evaluations, found.status, modes
    )


def main(checkpoint: Path, folder: Path) -> None:
    """Run both, and log the results."""
    atoms, model = read(HERE / "pm-3n.vasp"), load(checkpoint)
    begin = free_energy(atoms, model, PRESSURE, n_configs=1000, directory=folder / "model", **CELL)
    log_result("model", begin)
    settings = load_campaign(HERE / "campaign.yaml").labeler
    with get_labeler(settings, folder / "labeling") as pw:
        found = free_energy(
            atoms,
            pw,
            PRESSURE,
            n_configs=20,
            max_populations=2,
            start=begin,
            directory=folder / "pw",
            **CELL,
        )
    log_result("pw.x", found)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
