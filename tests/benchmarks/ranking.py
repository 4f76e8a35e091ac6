"""Successive elimination against a fixed budget for everybody: ``python tests/benchmarks/ranking.py [--seeds 10]``.

Twenty anharmonic crystals with cells that may change (``tests/crystal_models.py``; their static order is not that of G), 2x2x2,
0 K. The reference is one long run per crystal; pairs closer than two standard errors of the reference are not counted. The last
line says how many bars hold, and the exit code is 0 only if all do. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# this folder holds a file with the name of python-sscha's package, and it comes first
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crystal_models import Crystal, Crystals, family  # noqa: E402

from magus_anharmonic.ranking.files import rank_structures  # noqa: E402
from magus_anharmonic.settings import parse_settings  # noqa: E402
from magus_anharmonic.sscha import free_energy  # noqa: E402
from magus_anharmonic.structures import structure_id  # noqa: E402

PAPER = 30 * 1000
"""Force evaluations of one candidate in the paper."""
BEST = 3
SPACING = 0.1
"""2 pi / A: the finite-size term costs time here and is not what is compared."""


@dataclass(frozen=True)
class Truth:
    """Reference G of the crystals and its standard error, eV/atom."""

    gibbs: np.ndarray
    errors: np.ndarray

    def agrees(self, order: list[int], n_best: int) -> bool:
        """Whether ``order`` (all crystals, lowest first) has the first ``n_best`` right, unclear pairs left out."""
        for place, first in enumerate(order[:n_best]):
            for later in order[place + 1 :]:
                doubt = 2.0 * np.hypot(self.errors[first], self.errors[later])
                if self.gibbs[first] - self.gibbs[later] > doubt:
                    return False
        return True


def reference(crystals: list[Crystal], n_configs: int) -> Truth:
    """Long runs with ``n_configs`` configurations per population."""
    found = []
    for number, one in enumerate(crystals):
        evaluator = Crystals(crystals)
        result = free_energy(
            one.atoms, evaluator, n_configs=n_configs, seed=10_000 + number, reference_spacing=SPACING, free_energy_tolerance=2e-5
        )
        if not result.converged:
            raise SystemExit(f"crystal {number}: no reference: {result.reason}")
        found.append((result.gibbs, result.gibbs_error))
        print(
            f"crystal {number:2d}: {result.space_group_start:>13s} -> {result.space_group:13s} static {one.depth / 2 * 1e3:6.1f}, "
            f"G {result.gibbs * 1e3:8.3f} +- {result.gibbs_error * 1e3:.3f} meV/atom, {result.n_populations} populations", flush=True,
        )  # fmt: skip
    gibbs, errors = np.array(found).T
    return Truth(gibbs, errors)


def ranked(crystals: list[Crystal], seed: int, allocation: str) -> tuple[list[int], int, str]:
    """Crystals in the order of the table (those with a G first), evaluations used, and who stopped how."""
    evaluator = Crystals(crystals)
    sscha = {"allocation": allocation, "keep_best": BEST, "reference_spacing": SPACING, "max_candidates": len(crystals)}
    settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": sscha})
    structures = [one.atoms for one in crystals]
    numbers = {structure_id(atoms): number for number, atoms in enumerate(structures)}
    with tempfile.TemporaryDirectory() as folder:
        table = rank_structures(structures, evaluator, settings, folder, seed=seed, relax=False, workers=1)
    sampled = sum(candidate.n_evaluations for candidate in table)
    order = sorted((c for c in table if c.gibbs is not None), key=lambda c: (c.status == "eliminated", c.gibbs))
    counts = {status: sum(c.status == status for c in table) for status in sorted({c.status for c in table})}
    if len(table) != len(crystals):
        raise SystemExit("two of the crystals were taken for one")
    return [numbers[c.id] for c in order], sampled, ", ".join(f"{n} {status}" for status, n in counts.items())


@dataclass(frozen=True)
class Races:
    """Force evaluations of the paper's way and of the dearest race, and in how many of the races winner and best three were right."""

    paper: int
    most: int
    mean: float
    n_seeds: int
    winners: int
    orders: int

    def bars(self) -> list[tuple[str, bool]]:
        """What is asked, and whether it holds."""
        needed = int(np.ceil(0.9 * self.n_seeds))
        return [
            ("evaluations at most 1/5 of the paper's", self.most * 5 <= self.paper),
            ("winner right in 9 of 10 seeds", self.winners >= needed),
            (f"order of the best {BEST} right in 9 of 10 seeds", self.orders >= needed),
        ]


def compare(n_seeds: int, n_reference: int, *, fixed: bool = False) -> Races:
    """Races with ``n_seeds`` seeds against the reference (``n_reference`` configurations per population); ``fixed`` for comparison."""
    crystals = family()
    truth = reference(crystals, n_reference)
    order = np.argsort(truth.gibbs).tolist()
    gaps = np.diff(truth.gibbs[order]) * 1e3
    static = np.argsort([one.depth for one in crystals]).tolist()
    print(f"reference order {order[:6]}..., gaps {np.round(gaps[:5], 2)} ... meV/atom, {gaps.sum():.0f} in all; static {static[:6]}...")
    pairs = [
        (i, j) for i, j in itertools.pairwise(order[: BEST + 1]) if truth.gibbs[j] - truth.gibbs[i] < 2 * np.hypot(*truth.errors[[i, j]])
    ]
    print(f"pairs not counted: {pairs}")
    if fixed:
        begun = time.monotonic()
        everything, n_fixed, _ = ranked(crystals, 0, "fixed")
        print(f"fixed, seed 0: {n_fixed} evaluations, best {everything[:BEST]}, {time.monotonic() - begun:.0f} s")
    winners, orders, used = [], [], []
    for seed in range(n_seeds):
        begun = time.monotonic()
        found, n, statuses = ranked(crystals, seed, "elimination")
        winners.append(truth.agrees(found, 1))
        orders.append(truth.agrees(found, BEST))
        used.append(n)
        print(
            f"elimination, seed {seed}: {n} evaluations, best {found[:BEST]}, winner {'right' if winners[-1] else 'WRONG'}, "
            f"order {'right' if orders[-1] else 'WRONG'}; {statuses}; {time.monotonic() - begun:.0f} s", flush=True,
        )  # fmt: skip
    return Races(len(crystals) * PAPER, max(used), float(np.mean(used)), n_seeds, sum(winners), sum(orders))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--reference", type=int, default=10_000, help="configurations per population of the reference")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    races = compare(options.seeds, options.reference, fixed=True)
    print(f"evaluations: {races.mean:.0f} on average, {races.most} at most; {races.paper} the paper's fixed budget")
    bars = races.bars()
    for what, holds in bars:
        print(f"{what}: {'holds' if holds else 'MISSED'}")
    print(f"{sum(holds for _, holds in bars)} of {len(bars)} bars hold")
    return 0 if all(holds for _, holds in bars) else 1


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # BLAS reads it when NumPy is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    sys.exit(main())
