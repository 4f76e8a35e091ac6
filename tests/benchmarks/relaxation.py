"""Relaxation against the stock tools, in one run: ``python tests/benchmarks/relaxation.py``.

Random H3S cells of 4 to 16 atoms (PyXtal) at 100 GPa with the shipped checkpoint, every side to
0.05 eV/A:

* MAGUS's way: ASE's BFGS with FrechetCellFilter, one structure after the other,
  MatterSimCalculator;
* TorchSim's batched frechet_cell_fire with its own wrapper of stock MatterSim, where TorchSim 0.3
  can be imported;
* ours: `Potential.relax`, all structures in one call.

All of them relax the same structures: stock the first half, ours all in one call, stock the second
half. ``--stock 16`` takes every fourth structure alone, because stock takes minutes. ``--minima
100`` instead counts in how many of 100 starts ours, to ``--tolerance``, ends within 0.1 meV/atom of
ASE's minimum (to 0.01 eV/A), or lower; stock's enthalpies are kept in the file ``--references``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.units import GPa
from loguru import logger
from mattersim.forcefield import MatterSimCalculator
from mattersim.forcefield.potential import Potential as StockPotential

import magus_anharmonic
from magus_anharmonic.potential import load
from magus_anharmonic.search.generate import Geometry, RandomGenerator
from magus_anharmonic.search.keys import parse_host_keys
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.structures import structure_id

sys.path.insert(0, str(Path(__file__).parent))
from evaluation import one_by_one, stock_calculators

CHECKPOINT = Path(magus_anharmonic.__file__).parent / "data" / "h3s-gpaw-small.pth"
PRESSURE = 100.0  # GPa
FORCE = 0.05  # eV/A
STRESS = (
    1.0  # GPa; with 4 A^3/atom three such components are within ASE's 0.05 eV per row of the cell
)
MAX_STEPS = 300  # our default, three times MAGUS's
MAX_MOVE = 0.2  # Angstrom, ASE's default
SAME = 1e-4  # eV/atom
MINIMUM = 0.01  # eV/A; forces of 0.05 eV/A leave more than `SAME` in soft directions
MINIMUM_STEPS = 600
OURS = 0.005  # eV/A; the last tenths of a meV/atom in soft directions
OPTIMIZERS = ("ase", "bfgs", "fire")
PERTURBATION_SIZES = 12
COUNT = 64


@dataclass(frozen=True)
class Stock:
    """One relaxation by ASE: enthalpy in eV/atom, evaluations."""

    enthalpy: float
    n_steps: int
    converged: bool


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock and of the processor (of all threads); on a shared machine the second is
    the fairer one."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other):
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def __str__(self):
        return f"{self.wall:.1f} s, {self.cpu:.1f} s of the processor"

    def over(self, other):
        """By how much ``other`` is faster: of the processor with one thread; with several the
        smaller one of the two ratios, so that waiting for the machine favours nobody."""
        if torch.get_num_threads() == 1:
            return self.cpu / other.cpu
        return min(self.wall / other.wall, self.cpu / other.cpu)


@contextmanager
def stopwatch():
    """A list that holds the time spent once the block has ended."""
    spent = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent.append(Spent(time.perf_counter() - wall, time.process_time() - cpu))


@dataclass
class Side:
    """One of the tools: what it has done so far."""

    name: str
    spent: Spent = field(default_factory=Spent)
    n_structures: int = 0
    n_steps: int = 0
    enthalpy: float = 0.0
    n_converged: int = 0

    def add(self, spent, steps, enthalpies, converged):
        """The results of one piece."""
        self.spent += spent
        self.n_structures += len(steps)
        self.n_steps += sum(steps)
        self.enthalpy += sum(enthalpies)
        self.n_converged += sum(converged)

    def __str__(self):
        count = self.n_structures
        return (
            f"{self.name}: {self.spent}, {self.n_steps / count:.0f} evaluations each,"
            f" {self.n_converged} of {count} converged, mean enthalpy"
            f" {1e3 * self.enthalpy / count:.0f} meV/atom"
        )


def starts(count, seed):
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


def relax_with_ase(atoms, calculator, force_tolerance, max_steps):
    """MAGUS's way."""
    atoms = atoms.copy()
    atoms.calc = calculator
    optimizer = BFGS(
        FrechetCellFilter(atoms, scalar_pressure=PRESSURE * GPa), logfile=None, maxstep=MAX_MOVE
    )
    converged = optimizer.run(fmax=force_tolerance, steps=max_steps)
    enthalpy = (atoms.get_potential_energy() + PRESSURE * GPa * atoms.get_volume()) / len(atoms)
    return Stock(enthalpy, optimizer.nsteps + 1, bool(converged))


def relax_with_torchsim(structures, model, side):
    """TorchSim's batched FIRE, all structures in one batch, which they leave as they converge;
    evaluations are an average."""
    import torch_sim as ts

    evaluations = 0

    def counted(state):
        nonlocal evaluations
        evaluations += state.n_systems
        return forward(state)

    forward, model.forward = model.forward, counted
    with stopwatch() as clock:
        end = ts.optimize(
            system=[atoms.copy() for atoms in structures],
            model=model,
            optimizer=ts.frechet_cell_fire,
            convergence_fn=ts.generate_force_convergence_fn(FORCE, include_cell_forces=True),
            max_steps=MAX_STEPS,
            scalar_pressure=PRESSURE * GPa,
            autobatcher=ts.InFlightAutoBatcher(model, max_memory_scaler=1e9),
        )
    model.forward = forward
    ends = ts.io.state_to_atoms(end)
    volumes = [atoms.get_volume() for atoms in ends]
    enthalpies = [
        (float(e) + PRESSURE * GPa * v) / len(a)
        for e, v, a in zip(end.energy, volumes, ends, strict=True)
    ]
    largest = [
        float(end.forces[end.system_idx == index].norm(dim=1).max()) for index in range(len(ends))
    ]
    each = evaluations // len(structures)
    side.add(clock[0], len(structures) * [each], enthalpies, [force < FORCE for force in largest])


def torchsim_model():
    """TorchSim's own wrapper of stock MatterSim; in 0.3 it puts the batch on a GPU, also where
    there is none."""
    from torch_sim.models import mattersim

    mattersim.batch_to_dict = functools.partial(mattersim.batch_to_dict, device="cpu")
    stock = StockPotential.from_checkpoint(str(CHECKPOINT), device="cpu", load_training_state=False)
    return mattersim.MatterSimModel(stock, device="cpu")


def _ase(structures, calculator, side):
    with stopwatch() as clock:
        found = [relax_with_ase(atoms, calculator, FORCE, MAX_STEPS) for atoms in structures]
    side.add(
        clock[0],
        [one.n_steps for one in found],
        [one.enthalpy for one in found],
        [one.converged for one in found],
    )


def _ours(structures, potential, side, **options):
    with stopwatch() as clock:
        found = potential.relax(structures, PRESSURE, **_options(FORCE, MAX_STEPS), **options)
    side.add(
        clock[0],
        [one.n_steps for one in found],
        [one.enthalpy for one in found],
        [one.converged for one in found],
    )


def fastest_stock(structures, threads):
    """Name and calculator of the best of stock's settings, on these structures; what it compiles is
    compiled before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    spent = {}
    calculators = stock_calculators(CHECKPOINT)
    for _ in range(3):
        for name, calculator in calculators.items():
            with stopwatch() as clock:
                one_by_one(calculator)(structures)
            spent[name] = clock[0].cpu
    torch.set_num_threads(before)
    name = min(spent, key=spent.get)
    return name, calculators[name]


def against(stock, structures, threads, **options):
    """``stock`` ("ase" or "torchsim") and ours with ``options``, in the order of the docstring.
    Raises ImportError without TorchSim."""
    potential = load(CHECKPOINT, device="cpu")
    potential.evaluate(structures[:1])
    if stock == "ase":
        theirs = Side("ASE BFGS one by one")
        setting, model = fastest_stock(structures[:8], threads)
        theirs.name += f" ({setting})"
    else:
        theirs = Side("TorchSim FIRE")
        model = torchsim_model()
    ours = Side(", ".join(["ours", *(f"{name} {value}" for name, value in options.items())]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        half = len(structures) // 2
        stock_side = _ase if stock == "ase" else relax_with_torchsim
        stock_side(structures[:half], model, theirs)
        _ours(structures, potential, ours, **options)
        stock_side(structures[half:], model, theirs)
    finally:
        torch.set_num_threads(before)
    return theirs, ours


def row(stock, rounds):
    """Ratio of the times on 16 structures per round of the 64, so that four rounds take all of
    them; each side with as many threads as torch has."""
    structures = starts(COUNT, seed=7)
    chosen = [atoms for offset in range(min(rounds, 4)) for atoms in structures[offset::4]]
    try:
        theirs, ours = against(stock, chosen, torch.get_num_threads())
    except ImportError as error:
        return (
            None,
            (
                "relaxing against TorchSim's FIRE: not measured, TorchSim 0.3 cannot be imported"
                f" ({error})"
            ),
        )
    return theirs.spent.over(ours.spent), f"{theirs}; {ours}"


ROWS = {
    "relax-ase": (10.0, functools.partial(row, "ase")),
    "relax-torchsim": (4.0, functools.partial(row, "torchsim")),
}
"""Name -> (least ratio, measurement), for potential.py."""


def _options(force_tolerance, max_steps):
    return {
        "force_tolerance": force_tolerance,
        "stress_tolerance": STRESS,
        "max_steps": max_steps,
        "max_move": MAX_MOVE,
    }


def reference(atoms, calculator, known):
    """Enthalpy (eV/atom) of ASE's minimum; read from the file ``known``, or added to it."""
    key = structure_id(atoms)
    if known is not None and known.is_file():
        for line in known.read_text().splitlines():
            entry = json.loads(line)
            if entry["start"] == key:
                return float(entry["enthalpy"])
    enthalpy = relax_with_ase(atoms, calculator, MINIMUM, MINIMUM_STEPS).enthalpy
    if known is not None:
        with known.open("a") as file:
            print(json.dumps({"start": key, "enthalpy": enthalpy}), file=file)
    return enthalpy


def minima(
    count, seed, optimizers=OPTIMIZERS, perturbations=PERTURBATION_SIZES, known=None, tolerance=OURS
):
    """In how many of ``count`` starts ours is as low as ASE's BFGS on the stock calculator, and a
    line for each other one.

    Further paths and perturbations never end higher: those that are as low after the first path alone are
    spared them, the others start anew.
    """
    structures = starts(count, seed)
    potential = load(CHECKPOINT, device="cpu")
    calculator = MatterSimCalculator(load_path=str(CHECKPOINT), device="cpu")
    left = {index: "" for index in range(count)}
    for paths, n_perturbations in ((tuple(optimizers[:1]), 0), (tuple(optimizers), perturbations)):
        indices = list(left)
        options = _options(tolerance, len(paths) * (1 + n_perturbations) * MINIMUM_STEPS) | {
            "stress_tolerance": 20.0 * tolerance
        }
        begun = time.process_time()
        ours = potential.relax(
            [structures[index] for index in indices],
            PRESSURE,
            optimizer=paths,
            perturbations=n_perturbations,
            **options,
        )
        used, spent = sum(result.n_steps for result in ours), time.process_time() - begun
        for index, result in zip(indices, ours, strict=True):
            above = result.enthalpy - reference(structures[index], calculator, known)
            if not result.failed and above < SAME:
                del left[index]
            else:
                left[index] = (
                    f"start {index} ({len(structures[index])} atoms): {1e3 * above:.2f} meV/atom"
                    f" above ASE {result.reason}"
                )
        each = (
            f"{used / len(indices):.0f} evaluations for each of {len(indices)}, {spent:.0f} s of"
            " the processor"
        )
        print(
            f"{', '.join(paths)} with {n_perturbations} perturbations: {count - len(left)} of {count} as low;"
            f" {each}",
            flush=True,
        )
        if not left:
            break
    return count - len(left), list(left.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", type=int, default=COUNT)
    parser.add_argument(
        "--stock", type=int, default=COUNT, help="structures of these that are relaxed"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--optimizer",
        nargs="+",
        help="ours; default: bfgs, and of --minima " + " ".join(OPTIMIZERS),
    )
    parser.add_argument(
        "--against", nargs="+", choices=["ase", "torchsim"], default=["ase", "torchsim"]
    )
    parser.add_argument(
        "--minima",
        type=int,
        default=0,
        metavar="COUNT",
        help="compare the minima of so many starts instead",
    )
    parser.add_argument("--perturbations", type=int, default=PERTURBATION_SIZES, help="of --minima")
    parser.add_argument("--tolerance", type=float, default=OURS, help="of ours in --minima, eV/A")
    parser.add_argument(
        "--references",
        type=Path,
        metavar="FILE",
        help="of --minima: stock's enthalpies, read and added to",
    )
    options = parser.parse_args()
    logger.remove()
    if options.minima:
        paths = options.optimizer or OPTIMIZERS
        same, lines = minima(
            options.minima,
            options.seed,
            paths,
            options.perturbations,
            options.references,
            options.tolerance,
        )
        print(
            *lines,
            f"{same} of {options.minima} starts end within 0.1 meV/atom of ASE's BFGS with the"
            " stock calculator",
            sep="\n",
        )
        return
    structures = starts(options.structures, options.seed)[
        :: max(options.structures // options.stock, 1)
    ][: options.stock]
    for stock in options.against:
        theirs, ours = against(
            stock, structures, options.threads, optimizer=options.optimizer or "bfgs"
        )
        print(theirs, ours, f"{theirs.spent.over(ours.spent):.1f}x", sep="\n", flush=True)


if __name__ == "__main__":
    main()
