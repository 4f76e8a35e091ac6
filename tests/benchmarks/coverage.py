"""Does the error bar of G cover the exact minimum? Crystals of `exact_crystals`, many seeds; the
bars of docs/convergence.md.

Usage: python tests/benchmarks/coverage.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import binom, norm

HERE = Path(__file__).resolve().parent
# a script of this folder has the name of python-sscha's package
sys.path = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

from exact_crystals import CASES, Scha  # noqa: E402

from magus_anharmonic import free_energy  # noqa: E402


def cases(quick: bool) -> Iterator[tuple[str, float, str, int, str, int]]:
    """Name, K, cell, configurations, engine, seeds."""
    sizes, seeds = ((200,), 32) if quick else ((200, 400, 1000), 32)
    for name, temperature, cell, n_configs in product(
        CASES, (0.0, 300.0), ("variable", "fixed"), sizes
    ):
        yield name, temperature, cell, n_configs, "native", seeds
    for name, (temperature, cell) in product(CASES, ((0.0, "fixed"), (300.0, "variable"))):
        yield name, temperature, cell, 200, "python-sscha", seeds


def deviations(
    name: str, temperature: float, cell: str, n_configs: int, engine: str, seeds: int
) -> tuple[np.ndarray, list]:
    """(G - exact) in standard errors of the converged runs, and all runs."""
    case = CASES[name]
    crystal = case.make()
    truth = Scha(crystal, case.supercell_matrix, temperature, case.pressure, cell).solve().gibbs
    options = dict(
        pressure=case.pressure,
        temperature=temperature,
        supercell=case.supercell_matrix,
        cell=cell,
        n_configs=n_configs,
        engine=engine,
    )
    found = [
        free_energy(crystal.atoms.copy(), crystal, seed=seed, reference_spacing=0.5, **options)
        for seed in range(seeds)
    ]
    return np.array([(r.gibbs_raw - truth) / r.gibbs_error for r in found if r.converged]), found


def wrong_winners(seeds: int) -> tuple[int, int, int]:
    """Two phases 0.05 to 1 meV/atom apart: tests, those that a probability of 95 % decides, and
    wrong ones among them."""
    case = CASES["hcp"]
    tests = decided = wrong = 0
    for gap in (5e-5, 1e-4, 3e-4, 1e-3):
        low, high = case.make(), case.make().with_offset(gap)
        for seed in range(seeds):
            a, b = (
                free_energy(
                    c.atoms.copy(),
                    c,
                    case.pressure,
                    300.0,
                    case.supercell_matrix,
                    n_configs=400,
                    seed=2 * seed + i,
                    reference_spacing=0.5,
                )
                for i, c in enumerate((low, high))
            )
            p = float(norm.cdf((b.gibbs - a.gibbs) / np.hypot(a.gibbs_error, b.gibbs_error)))
            tests, decided, wrong = (
                tests + 1,
                decided + (max(p, 1 - p) >= 0.95),
                wrong + (1 - p >= 0.95),
            )
    return tests, decided, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 configurations alone")
    quick = parser.parse_args().quick
    pooled, sound = [], True
    for case in cases(quick):
        z, found = deviations(*case)
        one, two = np.mean(np.abs(z) < 1), np.mean(np.abs(z) < 2)
        inside = all(
            binom.interval(0.99, len(z), share)[0]
            <= np.sum(np.abs(z) < k)
            <= binom.interval(0.99, len(z), share)[1]
            for k, share in ((1, 0.683), (2, 0.954))
        )
        fine = inside and abs(z.mean()) < 0.7 and len(z) == len(found)
        sound &= fine
        pooled.append(z)
        error, populations = (
            1e3 * np.mean([r.gibbs_error for r in found]),
            np.mean([r.n_populations for r in found]),
        )
        print(
            f"{case[0]:16s} {case[1]:4.0f} K {case[2]:8s} {case[3]:5d} {case[4]:12s} within 1:"
            f" {one:4.0%}, 2: {two:4.0%}, mean z {z.mean():+.2f}, error {error:.3f} meV/atom,"
            f" {populations:4.1f} populations, converged {len(z)} of {len(found)}"
            + ("" if fine else "  <- outside"),
            flush=True,
        )
    z = np.concatenate(pooled)
    one, two, mean = np.mean(np.abs(z) < 1), np.mean(np.abs(z) < 2), z.mean()
    tests, decided, wrong = wrong_winners(10 if quick else 40)
    bars = [
        (f"all cases inside their own bounds: {sound}", sound),
        (f"pooled within 1 sigma {one:.1%} (bar 62 to 74)", 0.62 <= one <= 0.74),
        (f"pooled within 2 sigma {two:.1%} (bar 92 to 98)", 0.92 <= two <= 0.98),
        (f"pooled mean z {mean:+.3f} (bar 0.15)", abs(mean) <= 0.15),
        (
            f"wrong winners at 95 %: {wrong} of {tests}, {decided} decided (bar 7 %)",
            wrong <= 0.07 * tests,
        ),
    ]
    for text, holds in bars:
        print(("holds  " if holds else "FAILS  ") + text)
    return int(not all(holds for _, holds in bars))


if __name__ == "__main__":
    sys.exit(main())
