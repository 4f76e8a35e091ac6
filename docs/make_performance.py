"""``docs/performance.svg``: time per atom against atoms, density and batch. ``python
docs/make_performance.py`` (a minute, one core)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from ase import Atoms

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tests" / "benchmarks"))

from evaluation import SIZES, model, supercells  # noqa: E402

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

ROUNDS = 3


def milliseconds_per_atom(size: str, structures: Sequence[Atoms]) -> float:
    """Of the process, the least of several."""
    evaluate = model(size)[0].evaluate
    evaluate(structures[:1])
    times = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        evaluate(structures)
        times.append(time.process_time() - begun)
    return 1e3 * min(times) / sum(map(len, structures))


def main() -> None:
    torch.set_num_threads(1)
    atoms = {4 * repeat**3: supercells(1, repeat=repeat) for repeat in (1, 2, 3, 4)}
    batch = {count: supercells(32, repeat=1)[:count] for count in (1, 2, 4, 8, 16, 32)}
    density = {}
    for factor in (0.95, 1.0, 1.1, 1.25, 1.5):
        scaled = supercells(1)[0]
        scaled.set_cell(factor * scaled.cell.array, scale_atoms=True)
        density[len(scaled) / scaled.cell.volume] = [scaled]
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained", sharey=True)
    panels = (
        ("atoms of one structure", atoms),
        ("atoms per cubic Angstrom", density),
        ("structures of 4 atoms in one call", batch),
    )
    for axis, (label, points) in zip(axes, panels, strict=True):
        for size in SIZES:
            values = [milliseconds_per_atom(size, structures) for structures in points.values()]
            axis.loglog(list(points), values, "o-", label=f"{size} parameters")
            print(
                label,
                size,
                [
                    (round(key, 3), round(value, 2))
                    for key, value in zip(points, values, strict=True)
                ],
                flush=True,
            )
        axis.set_xlabel(label)
        ticks = np.array(list(points), dtype=float)
        axis.set_xticks(ticks, [f"{tick:.2g}" if tick < 1 else f"{tick:.0f}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per atom, one core")
    axes[0].legend()
    figure.savefig(FOLDER / "performance.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
