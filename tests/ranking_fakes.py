"""Stand-ins for SSCHA with known answers, importable by worker processes."""

import multiprocessing
import os
import time
from types import SimpleNamespace

import crystals
import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT

from magus_anharmonic.errors import SschaError
from magus_anharmonic.evaluator import CalculatorEvaluator, Evaluation
from magus_anharmonic.io.files import append_jsonl
from magus_anharmonic.processes import MARK
from magus_anharmonic.sscha.record import FreeEnergy
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import primitive, space_group, stripped
from magus_anharmonic.units import gpa_to_ev_per_a3

ZERO_POINT = 0.2
"""eV/atom that the ions' motion adds in `shifted`."""


class Emt:
    """EMT as an evaluator; good for Al, Cu, Ag, Au, Ni, Pd, Pt. A calculator per call: a used one
    does not pickle."""

    def __init__(self, model_id="emt"):
        self.model_id = model_id

    def evaluate(self, structures):
        """See `Evaluator`."""
        return CalculatorEvaluator(EMT()).evaluate(structures)


class Flat:
    """Evaluator with E = depth per atom for every structure: only volume makes enthalpies
    differ."""

    def __init__(self, model_id="flat", depth=-1.0):
        self.model_id, self.depth = model_id, depth

    def evaluate(self, structures):
        """See `Evaluator`."""
        energy = np.array([self.depth * len(atoms) for atoms in structures])
        return Evaluation(
            energy,
            [np.zeros((len(atoms), 3)) for atoms in structures],
            np.zeros((len(structures), 3, 3)),
        )


def h3s(lattice=3.1, shift=0.0):
    """H3S in its 4-atom cell: Im-3m, or R3m with the three H moved off the bond centres by
    ``shift`` (Angstrom)."""
    return crystals.h3s(lattice, shift)


def centred(atoms):
    """R3m H3S of `h3s` (or a supercell of it) with the hydrogens moved to the nearest bond centres:
    Im-3m."""
    result = stripped(atoms)
    symbols = np.array(result.get_chemical_symbols())
    sulphur = result.positions[symbols == "S"]
    from itertools import product

    images = np.concatenate(
        [sulphur + np.array(n) @ result.cell.array for n in product(range(-2, 3), repeat=3)]
    )
    for index in np.flatnonzero(symbols == "H"):
        near = images[np.argsort(np.linalg.norm(images - result.positions[index], axis=1))[:2]]
        result.positions[index] = near.mean(axis=0)
    return result


class Result(SimpleNamespace):
    """An `SschaResult` that may be changed."""

    converged, numbers = FreeEnergy.converged, FreeEnergy.numbers


def sscha_result(atoms, centroids, gibbs, temperature, **changes):
    """A converged `SschaResult` in the fields that the ranking reads."""
    values = dict(
        vars(FreeEnergy(status="converged")),
        reason="",
        gibbs=gibbs,
        gibbs_error=1e-4,
        gibbs_raw=gibbs - 0.01,
        finite_size=0.01,
        volume=centroids.get_volume() / len(centroids),
        n_evaluations=200,
        n_atoms_supercell=8 * len(centroids),
        centroids=centroids,
        space_group_start=space_group(atoms),
        space_group=space_group(centroids),
        symmetry_tolerance=0.05,
        temperature=temperature,
        force_constants=None,
        predicted_decrease=0.0,
        n_populations=2,
    )
    return Result(**{**values, **changes})


def count_call(directory, atoms, temperature, start):
    """Leave a line per call beside the folder of the run."""
    append_jsonl(
        directory.parent.parent / "calls.jsonl",
        {
            "folder": directory.name,
            "natoms": len(atoms),
            "T": temperature,
            "started": start is not None,
            "pid": os.getpid(),
        },
    )


def shifted(atoms, evaluator, *, pressure, temperature, start, directory, **options):
    """G = H + 0.2 eV/atom - T * 1e-4 eV/(atom K); the structure stays as it is."""
    count_call(directory, atoms, temperature, start)
    cell = primitive(atoms)
    energy = float(evaluator.evaluate([cell]).energy[0])
    enthalpy = (energy + gpa_to_ev_per_a3(pressure) * cell.get_volume()) / len(cell)
    return sscha_result(cell, cell, enthalpy + ZERO_POINT - 1e-4 * temperature, temperature)


def symmetrising(atoms, evaluator, *, pressure, temperature, start, directory, **options):
    """Quantum H3S: hydrogens end at the bond centres. G depends on the cell that was run, as finite
    size makes it."""
    count_call(directory, atoms, temperature, start)
    cell = primitive(atoms)
    centroids = centred(cell)
    return sscha_result(cell, centroids, -1.0 + 0.001 * len(cell), temperature)


def failing_on_gold(atoms, evaluator, **options):
    """Like `shifted`, but gold dissociates, silver meets a defect and nickel kills its process."""
    symbol = atoms.get_chemical_symbols()[0]
    if symbol == "Au":
        raise SschaError("dissociated: two atoms are 7.1 A apart")
    if symbol == "Ag":
        raise OSError("no space left on device")
    elsewhere = MARK in os.environ or multiprocessing.parent_process() is not None
    if symbol == "Ni" and elsewhere:
        os._exit(9)
    return shifted(atoms, evaluator, **options)


def slow(atoms, evaluator, **options):
    """Like `shifted` after a minute; says that it has begun."""
    count_call(options["directory"], atoms, options["temperature"], None)
    time.sleep(60)
    return shifted(atoms, evaluator, **options)


def rotating(atoms, evaluator, **options):
    """As `shifted`, and the state holds one H2 molecule whose libration costs next to nothing."""
    result = shifted(atoms, evaluator, **options)
    molecule = Atoms(
        "H2", positions=[[1.0, 1.0, 1.0], [1.74, 1.0, 1.0]], cell=[4.0, 4.0, 4.0], pbc=True
    )
    spring = np.diag([30.0, 0.1, 0.1])
    block = np.stack([np.stack([spring, -spring]), np.stack([-spring, spring])])[None]
    result.force_constants, result.state = block, SschaState(molecule, (1, 1, 1), block, 0.0)
    return result


def falling(atoms, evaluator, *, max_populations, n_configs_start, n_configs, **options):
    """As `shifted`, reached from 0.08 eV/atom above in halves; converged below 0.2 meV/atom.
    Populations double in size."""
    result = shifted(atoms, evaluator, **options)
    n = next((n for n in range(2, max_populations + 1) if 0.08 * 0.5**n < 2e-4), max_populations)
    rest = 0.08 * 0.5**n
    sizes = [min(n_configs, n_configs_start * 2**k) for k in range(n)]
    result.gibbs, result.predicted_decrease, result.gibbs_error = (
        result.gibbs + rest,
        rest,
        1e-3 / np.sqrt(sizes[-1] / 100),
    )
    result.n_populations, result.n_evaluations = n, sum(sizes)
    if rest >= 2e-4:
        result.status, result.reason = "unconverged", "not converged"
    return result
