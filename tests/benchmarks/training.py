"""Time of a finetuning epoch, stock MatterSim against this package, in one run on one core:
``python tests/benchmarks/training.py``.

H3S supercells of 4 to 32 atoms with made-up labels (the time does not depend on them). Pieces of
the epoch are timed alternately on either side, each at its best batch size, in processor time,
because other programs may run; ``--structures`` says how many are used.
"""

import argparse
import copy
import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa
from loguru import logger
from mattersim.datasets.utils.build import build_dataloader
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from mattersim.forcefield.potential import Potential as StockPotential

from magus_anharmonic.potential.labelled import LabelledGraphs
from magus_anharmonic.potential.trainer import Trainer
from magus_anharmonic.settings import FinetuneSettings

sys.path.insert(0, str(Path(__file__).parent))
from evaluation import RIGHT_BATCHES

BARS = {(3, 128): 3.0, (2, 32): 8.0}
"""Blocks and units of the model, and the ratio that is claimed at least."""

BATCH_SIZES = (4, 8, 16)
SUPERCELL_MATRIX = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))


def labelled_supercells(count, rng):
    """``count`` displaced Im-3m H3S supercells of 4, 8, 16 and 32 atoms in turn, with random
    labels."""
    half = 1.5
    cell = half * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    unit = Atoms("SH3", positions=np.vstack([np.zeros(3), half * np.eye(3)]), cell=cell, pbc=True)
    result = []
    for index in range(count):
        atoms = unit.repeat(SUPERCELL_MATRIX[index % len(SUPERCELL_MATRIX)])
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        forces = rng.normal(0, 1.0, atoms.positions.shape)
        atoms.calc = SinglePointCalculator(
            atoms, energy=-2.5 * len(atoms), forces=forces, stress=rng.normal(0, 0.1, 6)
        )
        result.append(atoms)
    return result


def stock_epoch(module, structures, batch_size):
    """A call that does the steps of one stock epoch; graphs are made beforehand, as ``train_model``
    does."""
    stock = StockPotential(copy.deepcopy(module), device="cpu", lr=2e-4)
    stresses = [atoms.get_stress(voigt=False) / GPa for atoms in structures]
    energies, forces = (
        [atoms.get_potential_energy() for atoms in structures],
        [atoms.get_forces() for atoms in structures],
    )
    loader = build_dataloader(
        [atoms.copy() for atoms in structures],
        energies,
        forces,
        stresses,
        batch_size=batch_size,
        shuffle=True,
        **RIGHT_BATCHES,
    )
    loss = torch.nn.HuberLoss(delta=0.01)
    return lambda: stock.train_one_epoch(
        loader, 0, loss, True, True, True, 1.0, 0.1, None, mode="train", log=False
    )


def our_epoch(module, structures, batch_size):
    """The same by this package."""
    own = copy.deepcopy(module)
    data, trainer = (
        LabelledGraphs(structures, own),
        Trainer(own, FinetuneSettings(batch_size=batch_size)),
    )
    return lambda: [trainer.step(*batch) for batch in data.batches(batch_size)]


def measure(blocks, units, n_structures, piece, seed):
    """Ratio of the two epochs at their best batch sizes, and a line about it."""
    torch.manual_seed(seed)
    module = M3Gnet(num_blocks=blocks, units=units, device="cpu")
    structures = labelled_supercells(n_structures, np.random.default_rng(seed))
    pieces = [structures[start : start + piece] for start in range(0, n_structures, piece)]
    seconds = {"stock": {}, "ours": {}}
    for batch_size in BATCH_SIZES:
        for name in seconds:
            seconds[name][batch_size] = 0.0
        for part in pieces:
            for name, prepare in (("stock", stock_epoch), ("ours", our_epoch)):
                epoch = prepare(module, part, batch_size)
                begun = time.process_time()
                epoch()
                seconds[name][batch_size] += time.process_time() - begun
    best = {name: min(times.values()) for name, times in seconds.items()}
    ratio = best["stock"] / best["ours"]
    parameters = sum(value.numel() for value in module.parameters())
    detail = "; ".join(
        f"batch {size}: {seconds['stock'][size]:.1f} / {seconds['ours'][size]:.1f} s"
        for size in BATCH_SIZES
    )
    line = (
        f"training epoch, {n_structures} structures, {parameters / 1e3:.0f} k parameters:"
        f" {ratio:.1f}x (stock / ours: {detail})"
    )
    return ratio, line


def row(size, rounds):
    """Ratio for `potential.py`: 16 structures per round, at most 48."""
    return measure(*size, n_structures=16 * min(rounds, 3), piece=16, seed=7)


ROWS = {
    "epoch-890k": (BARS[3, 128], functools.partial(row, (3, 128))),
    "epoch-44k": (BARS[2, 32], functools.partial(row, (2, 32))),
}
"""Name -> (least ratio, measurement), for potential.py."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--structures",
        type=int,
        default=48,
        help="200 for the whole epoch of the claim (half an hour)",
    )
    options = parser.parse_args()
    logger.remove()
    torch.set_num_threads(1)
    held = 0
    for (blocks, units), bar in BARS.items():
        ratio, line = measure(blocks, units, options.structures, piece=16, seed=7)
        held += ratio >= bar
        print(f"{line}; bar {bar:g}x {'holds' if ratio >= bar else 'MISSED'}", flush=True)
    print(f"{held} of {len(BARS)} bars hold")
    return 0 if held == len(BARS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
