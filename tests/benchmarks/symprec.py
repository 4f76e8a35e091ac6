"""How many crystals become Im-3m with SSCHA (Fig. 6 of the paper), against the tolerance at
which their symmetry is looked for.

Usage: python tests/benchmarks/symprec.py FOLDER [--candidates 8] [--n-configs 100]

The lowest of 200 random H3S crystals relaxed at 150 GPa with the shipped checkpoint (as `ranking.py
--h3s`), each run once per tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ranking import PRESSURE, h3s_candidates

from magus_anharmonic import free_energy
from magus_anharmonic.potential import load
from magus_anharmonic.structures import space_group

TOLERANCES = (0.005, 0.01, 0.02, 0.05, 0.1)
"""Angstrom."""
CUBIC = "Im-3m (229)"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--n-configs", type=int, default=100)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    potential = load("h3s-gpaw-small", device="cpu")
    structures = h3s_candidates(options.folder / "candidates.extxyz", potential)[
        : options.candidates
    ]
    ends: dict[float, list[str]] = {}
    for symprec in TOLERANCES:
        ends[symprec] = []
        for number, atoms in enumerate(structures):
            directory = options.folder / f"{number}-{symprec}"
            found = free_energy(
                atoms,
                potential,
                PRESSURE,
                n_configs=options.n_configs,
                symprec=symprec,
                seed=number,
                directory=directory,
            )
            ends[symprec].append(found.space_group)
            print(
                f"symprec {symprec:5.3f} A, crystal {number}: static"
                f" {space_group(atoms, symprec):>14s}, quantum {found.space_group:14s}"
                f" {found.status}, G {1e3 * found.numbers.gibbs:.2f} +- {1e3 * found.gibbs_error:.2f}"
                f" meV/atom, {found.n_evaluations} evaluations",
                flush=True,
            )
    counts = {symprec: groups.count(CUBIC) for symprec, groups in ends.items()}
    print(
        "quantum Im-3m of",
        len(structures),
        "crystals:",
        ", ".join(f"{count} at {symprec} A" for symprec, count in counts.items()),
    )
    same = len(set(counts.values())) == 1
    print(("holds  " if same else "FAILS  ") + "the count does not depend on symprec")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
