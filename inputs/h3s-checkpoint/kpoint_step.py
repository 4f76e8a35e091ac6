"""How far the k-point grids of the label set shift the energy of H3S, and labels with that shift
taken out.

The spacing 2 pi x 0.08 / A gives a whole number of k points per axis, and the energy of the metal
jumps where the number changes. `measure` computes Im-3m with every grid that occurs around Im-3m
and R3m (a supercell's grid times its size) at three volumes; `apply` subtracts, from the energy of
every label of those kinds, the mean shift of its grid against 6x6x6. Kinds with cells of another
shape (random, search) keep what GPAW gave: their grids say nothing about another cell's error.

Usage: python kpoint_step.py measure kpoint-step.json
       python kpoint_step.py apply kpoint-step.json raw-labels.xyz labels.xyz
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from make_structures import cubic

from magus_anharmonic.io.files import replacing

SPACING = 0.08  # 1/Angstrom, in units of 2 pi
REFERENCE = (6, 6, 6)
KINDS = {"h3s4", "h3s8", "h3s16", "modes", "r3m", "thermal"}
LATTICE_CONSTANTS = (
    2.90,
    2.98,
    3.06,
)  # Angstrom; the set goes over from 7x7x7 to 6x6x6 at about 2.99


def grid(atoms: Atoms) -> tuple[int, ...]:
    """Number of k points along each axis at the set's spacing."""
    return tuple(
        int(n) for n in np.ceil(np.linalg.norm(atoms.cell.reciprocal(), axis=1) / SPACING - 1e-9)
    )


def primitive_grid(atoms: Atoms) -> tuple[int, ...]:
    """The grid of a 1x1x1, 2x1x1 or 2x2x1 cell in terms of the 4-atom cell, sorted: axes that were
    doubled count twice."""
    numbers = sorted(grid(atoms))
    doubled = {4: 0, 8: 1, 16: 2}[len(atoms)]
    return tuple(sorted([2 * n for n in numbers[:doubled]] + numbers[doubled:]))


def energy(lattice_constant: float, size: tuple[int, ...]) -> float:
    """Energy of Im-3m H3S in eV/atom, extrapolated to zero smearing, with `size` k points."""
    from gpaw import GPAW, PW, FermiDirac

    atoms = cubic(lattice_constant)
    atoms.calc = GPAW(
        mode=PW(500),
        xc="PBE",
        occupations=FermiDirac(0.2),
        kpts={"size": size, "gamma": True},
        convergence={"energy": 2e-5, "density": 2e-5},
        txt=None,
    )
    return atoms.get_potential_energy() / len(atoms)


def measure(labels: Path, target: Path) -> None:
    """Shift of each grid against 6x6x6 in eV/atom at each lattice constant, and its mean."""
    grids = sorted(
        {primitive_grid(atoms) for atoms in read(labels, ":") if atoms.info["kind"] in KINDS}
        - {REFERENCE}
    )
    reference = {a: energy(a, REFERENCE) for a in LATTICE_CONSTANTS}
    rows = []
    for size in grids:
        shifts = [energy(a, size) - reference[a] for a in LATTICE_CONSTANTS]
        rows.append(
            {"grid": size, "shifts_eV_per_atom": shifts, "mean_eV_per_atom": float(np.mean(shifts))}
        )
        logging.info(
            "%s: %s", size, ", ".join(f"{1e3 * shift:+.1f}" for shift in shifts) + " meV/atom"
        )
        result = {"reference": REFERENCE, "lattice_constants_A": LATTICE_CONSTANTS, "grids": rows}
        with replacing(target) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def apply(step: Path, source: Path, target: Path) -> None:
    """Write the labels with the shift of their grid taken out; `info['energy_gpaw']` keeps what
    GPAW gave."""
    shift = {
        tuple(row["grid"]): row["mean_eV_per_atom"] for row in json.loads(step.read_text())["grids"]
    } | {REFERENCE: 0.0}
    corrected = []
    for atoms in read(source, ":"):
        raw = atoms.info.get("energy_gpaw", atoms.get_potential_energy())
        of_grid = shift[primitive_grid(atoms)] if atoms.info["kind"] in KINDS else 0.0
        new = atoms.copy()
        new.info["energy_gpaw"] = raw
        new.calc = SinglePointCalculator(
            new,
            energy=raw - of_grid * len(atoms),
            forces=atoms.get_forces(),
            stress=atoms.get_stress(voigt=False),
        )
        corrected.append(new)
    with replacing(target) as temporary:
        write(temporary, corrected, format="extxyz")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if sys.argv[1] == "measure":
        measure(Path("labels.xyz"), Path(sys.argv[2]))
    else:
        apply(*map(Path, sys.argv[2:5]))
