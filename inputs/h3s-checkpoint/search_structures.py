"""Structures that a random search with a checkpoint finds, distorted, for the labeler.

At each pressure random H3S cells of 4, 8 and 12 atoms are relaxed with the checkpoint; the lowest
in enthalpy that differ are distorted several times. All distortions of one structure share
``parent`` (one side of every split).

Usage: python search_structures.py CHECKPOINT PREFIX structures.xyz [--per-pressure 15]
    [--distortions 4] [--seed 1]
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
from ase import Atoms
from ase.io import write
from make_structures import displaced, strained

from magus_anharmonic.potential import load
from magus_anharmonic.search.generate import Geometry, RandomGenerator
from magus_anharmonic.search.keys import HostKeys
from magus_anharmonic.settings import parse
from magus_anharmonic.structures import space_group, structure_id

PRESSURES = (80.0, 115.0, 150.0, 190.0)  # GPa
KEYS = {
    "formula": [3, 1],
    "min_n_atoms": 4,
    "max_n_atoms": 12,
    "pop_size": 1,
    "save_good": 1,
    "d_ratio": 0.6,
}
SYMBOLS = ["H", "S"]
GENERATED = 60
VOLUME_RATIO = 2.7


def lowest_distinct(relaxed: list, count: int) -> list[Atoms]:
    """The lowest structures whose enthalpies differ by at least 3 meV/atom or whose volumes differ
    by 2 %."""
    chosen: list = []
    for item in sorted((r for r in relaxed if not r.failed), key=lambda r: r.enthalpy):
        volume = item.atoms.get_volume() / len(item.atoms)
        if all(
            abs(item.enthalpy - other.enthalpy) > 3e-3
            or abs(volume * len(other.atoms) / other.atoms.get_volume() - 1) > 0.02
            for other in chosen
        ):
            chosen.append(item)
    return [item.atoms for item in chosen[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prefix")
    parser.add_argument("output")
    parser.add_argument("--per-pressure", type=int, default=15)
    parser.add_argument("--distortions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    generator = RandomGenerator(Geometry(parse(HostKeys, KEYS), SYMBOLS))
    potential = load(options.checkpoint)
    frames = []
    for pressure in PRESSURES:
        start = generator.generate(GENERATED, VOLUME_RATIO, rng)
        found = lowest_distinct(
            potential.relax(start, pressure=pressure, max_steps=150), options.per_pressure
        )
        for structure in found:
            parent = f"{options.prefix}-{structure_id(structure)}"
            for index in range(options.distortions):
                atoms = displaced(
                    strained(structure.copy(), 0.03, rng), rng.uniform(0.02, 0.12), rng
                )
                atoms.wrap()
                atoms.info = {"id": f"{parent}-{index}", "parent": parent, "kind": "search"}
                frames.append(atoms)
        logging.info(
            "%g GPa: %d structures, %s",
            pressure,
            len(found),
            ", ".join(space_group(s, 0.1) for s in found),
        )
    write(options.output, [frames[i] for i in rng.permutation(len(frames))], format="extxyz")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
