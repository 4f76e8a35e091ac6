"""Relaxation against the stock tools, in one run: ``python tests/benchmarks/relaxation.py``.

Random H3S cells of 4 to 16 atoms (PyXtal) at 100 GPa with the shipped checkpoint, every side to 0.05 eV/A:

* MAGUS's way: ASE's BFGS with FrechetCellFilter, one structure after the other, MatterSimCalculator;
* TorchSim's batched frechet_cell_fire with its own wrapper of stock MatterSim, where TorchSim 0.3 can be imported;
* ours: `Potential.relax`, all structures in one call.

``--stock 16`` measures all of them on every fourth structure alone, because stock takes minutes; they always relax the same structures.
``--minima 100`` instead counts in how many of 100 starts ours ends within 0.1 meV/atom of ASE's minimum, or lower.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.units import GPa
from loguru import logger
from mattersim.forcefield import MatterSimCalculator
from mattersim.forcefield.potential import Potential as StockPotential

import magus_anharmonic
from magus_anharmonic.host_keys import parse_host_keys
from magus_anharmonic.potential import Relaxation, load
from magus_anharmonic.search.generate import Geometry, RandomGenerator
from magus_anharmonic.settings import parse_settings

CHECKPOINT = Path(magus_anharmonic.__file__).parent / "data" / "h3s-gpaw-small.pth"
PRESSURE = 100.0  # GPa
FORCE = 0.05  # eV/A
STRESS = 1.0  # GPa; with 4 A^3/atom three such components are within ASE's 0.05 eV per row of the cell
MAX_STEPS = 300  # our default, three times MAGUS's
MAX_MOVE = 0.2  # Angstrom, ASE's default
SAME = 1e-4  # eV/atom
MINIMUM = 0.01  # eV/A; forces of 0.05 eV/A leave more than `SAME` in soft directions
MINIMUM_STEPS = 600
KICKS = 2


@dataclass(frozen=True)
class Stock:
    """One relaxation by ASE: enthalpy in eV/atom, evaluations."""

    enthalpy: float
    n_steps: int
    converged: bool


@dataclass(frozen=True)
class Spent:
    """Seconds per structure, by the clock and of the processor; on a shared machine the second is the fairer one."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.3f} s per structure ({self.cpu:.3f} s of the processor)"

    def times(self, other: Spent) -> str:
        """By how much ``other`` is faster."""
        return f"{self.wall / other.wall:.1f}x ({self.cpu / other.cpu:.1f}x in processor time)"


@contextmanager
def stopwatch(count: int) -> Iterator[list[Spent]]:
    """A list that holds the time spent for each of ``count`` structures once the block has ended."""
    spent: list[Spent] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent.append(Spent((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count))


def starts(count: int, seed: int) -> list[Atoms]:
    """Random H3S cells of 4 to 16 atoms, as a search at 100 GPa draws them."""
    keys = {
        "formulaType": "fix",
        "symbols": ["H", "S"],
        "formula": [3, 1],
        "min_n_atoms": 4,
        "max_n_atoms": 16,
        "pressure": PRESSURE,
        "popSize": 4,
        "saveGood": 1,
        "numGen": 1,
        "d_ratio": 0.6,
        "volume_ratio": 3,
        "pPri": 0.5,
        "MainCalculator": {"calculator": "mattersim", "checkpoint": str(CHECKPOINT)},
    }
    settings = parse_settings(keys)
    generator = RandomGenerator(Geometry(parse_host_keys(settings)[0], settings.symbols))
    return generator.generate(count, 3.0, np.random.default_rng(seed))


def relax_with_ase(atoms: Atoms, calculator: MatterSimCalculator, force_tolerance: float, max_steps: int) -> Stock:
    """MAGUS's way."""
    atoms = atoms.copy()
    atoms.calc = calculator
    optimizer = BFGS(FrechetCellFilter(atoms, scalar_pressure=PRESSURE * GPa), logfile=None, maxstep=MAX_MOVE)
    converged = optimizer.run(fmax=force_tolerance, steps=max_steps)
    enthalpy = (atoms.get_potential_energy() + PRESSURE * GPa * atoms.get_volume()) / len(atoms)
    return Stock(enthalpy, optimizer.nsteps + 1, bool(converged))


def relax_with_torchsim(structures: Sequence[Atoms], max_steps: int) -> Spent:
    """Time of TorchSim 0.3 with its own wrapper of stock MatterSim; all structures in one batch."""
    import torch_sim as ts
    from torch_sim.models.mattersim import MatterSimModel

    stock = StockPotential.from_checkpoint(str(CHECKPOINT), device="cpu", load_training_state=False)
    model = MatterSimModel(stock, device="cpu")
    with stopwatch(len(structures)) as spent:
        ts.optimize(
            system=[atoms.copy() for atoms in structures],
            model=model,
            optimizer=ts.frechet_cell_fire,
            convergence_fn=ts.generate_force_convergence_fn(FORCE, include_cell_forces=True),
            max_steps=max_steps,
            scalar_pressure=PRESSURE * GPa,
            autobatcher=ts.InFlightAutoBatcher(model, max_memory_scaler=1e9),
        )
    return spent[0]


def speed(count: int, stock_count: int, seed: int, threads: int, optimizers: Sequence[str] = ("bfgs", "fire")) -> Iterator[str]:
    """Lines with the ratios of the two rows of the table."""
    torch.set_num_threads(threads)
    structures = starts(count, seed)
    chosen = structures[:: max(count // stock_count, 1)][:stock_count]
    potential = load(CHECKPOINT, device="cpu")
    calculator = MatterSimCalculator(load_path=str(CHECKPOINT), device="cpu")
    potential.evaluate(structures[:1])

    with stopwatch(len(chosen)) as clock:
        stock = [relax_with_ase(atoms, calculator, FORCE, MAX_STEPS) for atoms in chosen]
    by_ase = clock[0]
    steps = sum(result.n_steps for result in stock) / len(stock)
    measured = f"{len(chosen)} of {count} structures measured"
    yield f"ASE BFGS, stock calculator: {by_ase}; {measured}, {steps:.0f} evaluations each"
    ours: list[Spent] = []
    for optimizer in optimizers:
        with stopwatch(len(chosen)) as clock:
            results = potential.relax(chosen, PRESSURE, optimizer=optimizer, **_options(FORCE, MAX_STEPS))
        ours += clock
        yield f"ours, {optimizer}: {clock[0]}; {_summary(results)}"
    best = min(ours, key=lambda spent: spent.cpu)
    yield f"relaxing {len(chosen)} random H3S cells, {threads} threads, against MAGUS's way: {by_ase.times(best)}, at least 10x"
    try:
        by_torchsim = relax_with_torchsim(chosen, MAX_STEPS)
    except ImportError as error:
        yield f"against TorchSim's FIRE: not measured, TorchSim 0.3 cannot be imported ({error})"
        return
    yield f"TorchSim FIRE, stock MatterSim: {by_torchsim}; {measured}"
    yield f"the same relaxations against TorchSim's batched FIRE: {by_torchsim.times(best)}, at least 4x"


def _options(force_tolerance: float, max_steps: int) -> dict[str, float]:
    return {"force_tolerance": force_tolerance, "stress_tolerance": STRESS, "max_steps": max_steps, "max_move": MAX_MOVE}


def _summary(results: Sequence[Relaxation]) -> str:
    steps = sum(result.n_steps for result in results) / len(results)
    return f"{steps:.0f} evaluations each, {sum(result.converged for result in results)} of {len(results)} converged"


def minima(count: int, seed: int, optimizer: str = "bfgs", kicks: int = KICKS) -> tuple[int, list[str]]:
    """In how many of ``count`` starts ours is as low as ASE's BFGS on the stock calculator, and a line for each other one."""
    structures = starts(count, seed)
    potential = load(CHECKPOINT, device="cpu")
    calculator = MatterSimCalculator(load_path=str(CHECKPOINT), device="cpu")
    options = _options(MINIMUM, (1 + kicks) * MINIMUM_STEPS) | {"stress_tolerance": 0.2, "kicks": kicks}
    ours = potential.relax(structures, PRESSURE, optimizer=optimizer, **options)
    lines = []
    for index, (atoms, result) in enumerate(zip(structures, ours, strict=True)):
        stock = relax_with_ase(atoms, calculator, MINIMUM, MINIMUM_STEPS)
        if result.failed or not result.enthalpy < stock.enthalpy + SAME:
            lines.append(
                f"start {index} ({len(atoms)} atoms): {1e3 * (result.enthalpy - stock.enthalpy):.2f} meV/atom above ASE {result.reason}"
            )
    return count - len(lines), lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=64)
    parser.add_argument("--stock", type=int, default=64, help="structures of these that are measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--optimizers", nargs="+", default=["bfgs", "fire"], help="ours; the fastest counts, and the first with --minima")
    parser.add_argument("--minima", type=int, default=0, metavar="COUNT", help="compare the minima of so many starts instead")
    parser.add_argument("--kicks", type=int, default=KICKS, help="of --minima")
    options = parser.parse_args()
    logger.remove()
    if options.minima:
        same, lines = minima(options.minima, options.seed, options.optimizers[0], options.kicks)
        print(*lines, f"{same} of {options.minima} starts end within 0.1 meV/atom of ASE's BFGS with the stock calculator", sep="\n")
        return
    for line in speed(options.structures, options.stock, options.seed, options.threads, options.optimizers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
