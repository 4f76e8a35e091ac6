"""What a race costs besides its free energies: seconds for 50, 100, 200 and 400 candidates, and how
they grow.

Usage: python tests/benchmarks/candidates.py

Free energies are made up (`ranking_fakes.shifted`, four populations each), so that the rest is what
is measured: bounds, the store, tables. Ends with 0 when twice the candidates take at most 2.5 times
the processor time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ranking_fakes as fakes

from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.settings import parse_settings

LARGEST_GROWTH = 2.5


def crystals(n: int) -> list[Atoms]:
    """Two-atom crystals, each of another shape."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(n):
        cell = [4.0 + 0.01 * number, 4.1 + 0.003 * number, 4.3]
        found.append(
            Atoms(
                "AlCu",
                positions=[[0, 0, 0], [2, 2, 2]] + rng.normal(0, 0.15, (2, 3)),
                cell=cell,
                pbc=True,
            )
        )
    return found


def four_populations(atoms: Atoms, evaluator: Any, **options: Any) -> Any:
    """Converged with the fourth population."""
    result = fakes.shifted(atoms, evaluator, **options)
    n = min(options["max_populations"], 4)
    result.n_populations, result.n_evaluations, result.gibbs_error = n, 100 * n, 0.003 / np.sqrt(n)
    result.converged, result.status = n == 4, "converged" if n == 4 else "unconverged"
    return result


def seconds(n: int) -> float:
    """Processor time of one ranking of ``n`` candidates."""
    keys = parse_settings(
        {
            "pressure": 0,
            "Fitness": ["SSCHA"],
            "sscha": {"max_candidates": n, "keep_best": 3, "hessian": 0},
        }
    )
    structures = crystals(n)
    for atoms, energy in zip(structures, fakes.Emt().evaluate(structures).energy, strict=True):
        atoms.info |= {"energy": float(energy), "enthalpy": float(energy) / len(atoms)}
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        table = rank(
            structures,
            evaluator=fakes.Emt(),
            settings=keys,
            run_dir=Path(folder),
            free_energy=four_populations,
            workers=1,
        )
    if sum(candidate.free_energy.n_evaluations > 0 for candidate in table) != n:
        raise SystemExit("not every candidate ran")
    return time.process_time() - begun


def main() -> int:
    seconds(10)
    found = {n: seconds(n) for n in (50, 100, 200, 400)}
    for n, spent in found.items():
        print(f"{n:4d} candidates: {spent:6.2f} s, {1e3 * spent / n:5.1f} ms each")
    growth = max(found[2 * n] / found[n] for n in (50, 100, 200))
    sound = growth <= LARGEST_GROWTH
    print(
        f"{'holds ' if sound else 'FAILS '} twice the candidates take at most {growth:.2f} times as"
        f" long (bar {LARGEST_GROWTH})"
    )
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
