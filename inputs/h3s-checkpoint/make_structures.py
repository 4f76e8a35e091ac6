"""Structures around Im-3m and R3m H3S that the shared label set lacks, for the labeler.

Three families, all deterministic (one seed), none overlapping the shared set:

modes    4-atom Im-3m cells, hydrogen moved against sulfur along the zone-centre T1u pattern
         (stretching and bending amplitudes drawn apart), with little strain: the soft mode.
r3m      4-atom R3m cells (every H shifted along its bond) with small random displacements.
thermal  8- and 16-atom supercells with displacements as large as those of an SSCHA ensemble.

Usage: python make_structures.py structures.xyz
"""

from __future__ import annotations

import sys

import numpy as np
from ase import Atoms
from ase.io import write

SEED = 20261123
LATTICE_CONSTANTS = np.linspace(2.82, 3.28, 16)  # Angstrom: about 330 down to 80 GPa


def cubic(lattice_constant: float, bond_shift: float = 0.0) -> Atoms:
    """Primitive Im-3m H3S; ``bond_shift`` (Angstrom) moves each H along its bond, towards R3m."""
    half = lattice_constant / 2
    cell = half * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]], float)
    hydrogen = (half + bond_shift) * np.eye(3)
    return Atoms("SH3", positions=np.vstack([np.zeros(3), hydrogen]), cell=cell, pbc=True)


def strained(atoms: Atoms, amplitude: float, rng: np.random.Generator) -> Atoms:
    """Six independent components of a symmetric strain, uniform in +-amplitude."""
    strain = np.zeros((3, 3))
    strain[np.triu_indices(3)] = rng.uniform(-amplitude, amplitude, 6)
    strain = strain + np.triu(strain, 1).T
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def soft_mode(lattice_constant: float, rng: np.random.Generator) -> Atoms:
    """T1u pattern: along a direction d, hydrogen by its bond component and across it."""
    atoms = cubic(lattice_constant)
    direction = [np.eye(3)[2], np.ones(3) / np.sqrt(3), np.array([1, 1, 0]) / np.sqrt(2)][
        rng.integers(3)
    ]
    stretch, bend = rng.uniform(-0.22, 0.22), rng.uniform(-0.12, 0.12)
    for axis in range(3):
        shift = bend * direction
        shift[axis] = stretch * direction[axis]
        atoms.positions[1 + axis] += shift
    atoms.positions -= atoms.get_center_of_mass() - cubic(lattice_constant).get_center_of_mass()
    return strained(atoms, 0.01, rng)


def displaced(atoms: Atoms, hydrogen: float, rng: np.random.Generator) -> Atoms:
    """Gaussian displacements: ``hydrogen`` Angstrom per component for H, 0.35 of it for S."""
    width = np.where(atoms.numbers == 1, hydrogen, 0.35 * hydrogen)
    atoms.positions += width[:, None] * rng.normal(size=(len(atoms), 3))
    return atoms


def main(path: str) -> None:
    rng = np.random.default_rng(SEED)
    frames: list[Atoms] = []

    def add(atoms: Atoms, kind: str) -> None:
        atoms.wrap()
        name = f"{kind}-{sum(f.info['kind'] == kind for f in frames):04d}"
        atoms.info.update(id=name, parent=name, kind=kind)
        frames.append(atoms)

    for lattice_constant in LATTICE_CONSTANTS:
        add(cubic(lattice_constant), "modes")
        for _ in range(5):
            add(soft_mode(lattice_constant, rng), "modes")
        for _ in range(3):
            shift = rng.uniform(0.05, 0.32)
            add(
                displaced(
                    strained(cubic(lattice_constant, shift), 0.02, rng),
                    rng.uniform(0.01, 0.06),
                    rng,
                ),
                "r3m",
            )
        for repeat, count in (((2, 1, 1), 3), ((2, 2, 1), 2)):
            for _ in range(count):
                parent = cubic(lattice_constant, rng.uniform(0.0, 0.2)).repeat(repeat)
                add(
                    displaced(strained(parent, 0.015, rng), rng.uniform(0.03, 0.18), rng), "thermal"
                )
    order = np.random.default_rng(SEED + 1).permutation(len(frames))
    write(path, [frames[i] for i in order], format="extxyz")


if __name__ == "__main__":
    main(sys.argv[1])
