"""Which k points and which cutoff pw.x needs for AlH3: energies, forces and stresses of test cells
at several settings, against the densest.

One part of the settings is varied at a time. A cutoff shifts all energies alike, so that its error
is that of energy differences: the mean over the cells is taken out. Goes on where it was stopped.

Usage: python converge.py convergence.csv
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.spacegroup import crystal

from magus_anharmonic.errors import LabelerError
from magus_anharmonic.io.tables import table_rows, write_table
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Failure, Label
from magus_anharmonic.search.generate import crystals_of
from magus_anharmonic.settings import LabelerSettings, parse_settings
from magus_anharmonic.settings.campaign import load_campaign
from magus_anharmonic.units import ev_per_a3_to_gpa

HERE = Path(__file__).parent
PSEUDO = "/usr/share/espresso/pseudo"
COLUMNS = (
    "varied", "value", "reference", "cell", "atoms", "energy_difference_meV_per_atom",
    "max_force_difference_meV_per_A", "max_stress_difference_GPa", "seconds",
)  # fmt: skip
USUAL = {"k_spacing": 0.045, "ecutwfc": 40, "degauss": 0.05}
VARIED = {"k_spacing": ([0.085, 0.065, 0.05, 0.045], 0.035), "ecutwfc": ([30, 40], 60)}
"""Values and the reference: 2 pi / Angstrom, Ry (and Ry of cold smearing)."""


def pm3n(constant: float) -> Atoms:
    """Pm-3n AlH3 (A15), 8 atoms."""
    basis = [(0, 0, 0), (0.25, 0, 0.5)]
    return crystal(["Al", "H"], basis, spacegroup=223, cellpar=[constant] * 3 + [90] * 3)


def alpha(scale: float) -> Atoms:
    """R-3c, the phase of ambient pressure, compressed: 8 atoms in the primitive cell."""
    basis, cell = [(0, 0, 0), (0.628, 0, 0.25)], [4.449, 4.449, 11.804, 90, 90, 120]
    made = crystal(["Al", "H"], basis, spacegroup=167, cellpar=cell, primitive_cell=True)
    made.set_cell(made.cell * scale, scale_atoms=True)
    return made


def cells() -> dict[str, Atoms]:
    """Pm-3n at a volume, displaced and strained; R-3c; and a random crystal of the search."""
    displaced = pm3n(3.1)
    displaced.rattle(0.12, seed=1)
    displaced.set_cell(displaced.cell @ (np.eye(3) + 0.03 * np.triu(np.ones((3, 3)), 1)), True)
    settings = parse_settings(load_campaign(HERE / "campaign.yaml").learning_search(100, "scratch"))
    return {
        "Pm-3n displaced": displaced,
        "R-3c": alpha(0.80),
        "random": crystals_of(settings, 1, 1, 1)[0],
    }


def label(atoms: Atoms, folder: Path, **changed: float) -> Label:
    """One label at the settings of the table but for what is changed."""
    chosen = {**USUAL, **changed}
    system = {
        "ecutwfc": chosen["ecutwfc"],
        "occupations": "smearing",
        "smearing": "cold",
        "degauss": chosen["degauss"],
    }
    arguments = {
        "pseudo_dir": PSEUDO,
        "pseudopotentials": {"Al": "Al.pz-vbc.UPF", "H": "H.pz-vbc.UPF"},
        "input_data": {"system": system},
    }
    settings = LabelerSettings(
        calculator="espresso", arguments=arguments, k_spacing=chosen["k_spacing"], n_workers=1
    )
    with get_labeler(settings, folder) as labeler:
        (result,) = labeler.label([atoms])
    if isinstance(result, Failure):
        raise LabelerError(f"{changed}: {result.reason}")
    return result


def main(target: Path) -> None:
    rows: list[list] = []
    if target.exists():
        with table_rows(target) as reader:
            rows = [list(row.values()) for row in reader]
    done = {(row[0], float(row[1])) for row in rows}
    structures = cells()
    for varied, (values, reference) in VARIED.items():
        if all((varied, float(value)) in done for value in values):
            continue
        # the other one as cheap as can be: its error is the same on both sides
        fixed = {"ecutwfc": 30} if varied == "k_spacing" else {"k_spacing": 0.085}
        best = [
            label(atoms, target.parent / "pw", **fixed, **{varied: reference})
            for atoms in structures.values()
        ]
        logging.info("%s %g: %s s", varied, reference, [round(one.seconds, 1) for one in best])
        for value in values:
            if (varied, float(value)) in done:
                continue
            found = [
                label(atoms, target.parent / "pw", **fixed, **{varied: value})
                for atoms in structures.values()
            ]
            energies = [
                1e3 * (one.energy - exact.energy) / len(one.structure)
                for one, exact in zip(found, best, strict=True)
            ]
            mean = float(np.mean(energies)) if varied != "k_spacing" else 0.0
            for name, energy, one, exact in zip(structures, energies, found, best, strict=True):
                force = 1e3 * np.abs(one.forces - exact.forces).max()
                stress = ev_per_a3_to_gpa(np.abs(one.stress - exact.stress).max())
                rows.append(
                    [
                        varied,
                        f"{value:g}",
                        f"{reference:g}",
                        name,
                        len(one.structure),
                        f"{energy - mean:.2f}",
                        f"{force:.1f}",
                        f"{stress:.2f}",
                        f"{one.seconds:.1f}",
                    ]
                )
                logging.info(", ".join(map(str, rows[-1])))
            write_table(target, COLUMNS, rows)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(Path(sys.argv[1]))
