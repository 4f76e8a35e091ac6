"""Time per structure of this package against stock MatterSim, in one run on one core: ``python tests/benchmarks/potential.py``.

H3S supercells of 32 atoms with random displacements, random weights (the time does not depend on them). Both sides are measured
at each batch size in turn, repeatedly, and the best batch size of one is compared with the best of the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from loguru import logger
from mattersim.datasets.utils.build import build_dataloader
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from mattersim.forcefield.potential import Potential as StockPotential

from magus_anharmonic.potential import checkpoint, load


def supercells(count: int, rng: np.random.Generator) -> list[Atoms]:
    """32-atom supercells of Im-3m H3S at about 150 GPa, displaced by 0.1 Angstrom."""
    a = 3.0
    cell = 0.5 * a * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    unit = Atoms("SH3", positions=0.5 * a * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), cell=cell, pbc=True)
    result = []
    for _ in range(count):
        atoms = unit.repeat((2, 2, 2))
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        result.append(atoms)
    return result


def seconds(function: Callable[[Sequence[Atoms]], object], structures: list[Atoms]) -> float:
    """CPU-friendly wall time per structure of one call."""
    begun = time.perf_counter()
    function(structures)
    return (time.perf_counter() - begun) / len(structures)


def compare(blocks: int, units: int, batches: Sequence[int], rounds: int, rng: np.random.Generator) -> str:
    """One line: milliseconds per structure at each batch size, and the ratios."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        checkpoint.save(M3Gnet(num_blocks=blocks, units=units, device="cpu"), path)
        ours = load(path, device="cpu")
        stock = StockPotential.from_checkpoint(str(path), device="cpu", load_training_state=False)

    def stock_call(structures: Sequence[Atoms]) -> object:
        loader = build_dataloader([atoms.copy() for atoms in structures], batch_size=len(structures), only_inference=True)
        return stock.predict_properties(loader, include_forces=True, include_stresses=True)

    structures = supercells(max(batches), rng)
    functions = {"stock": stock_call, "ours": ours.evaluate}
    for function in functions.values():
        function(structures[:1])
    times = {name: {size: [] for size in batches} for name in functions}
    for _ in range(rounds):
        for size in batches:
            for name, function in functions.items():
                times[name][size].append(seconds(function, structures[:size]))
    median = {name: {size: float(np.median(values)) for size, values in sizes.items()} for name, sizes in times.items()}
    parts = [f"batch {n}: {1e3 * median['stock'][n]:.0f} / {1e3 * median['ours'][n]:.0f} ms" for n in batches]
    best = min(median["stock"].values()) / min(median["ours"].values())
    largest = median["stock"][batches[-1]] / median["ours"][batches[-1]]
    return f"{blocks} blocks x {units} units: {', '.join(parts)} (stock / ours); best {best:.1f}x, batch {batches[-1]} {largest:.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logger.remove()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(7)
    for blocks, units in ((3, 128), (3, 64), (2, 32)):
        print(compare(blocks, units, options.batches, options.rounds, rng), flush=True)


if __name__ == "__main__":
    main()
