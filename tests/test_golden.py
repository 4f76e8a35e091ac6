"""Answers of today. One that changes makes stored ones wrong: then `files.PHYSICS` is raised, and
``python tests/test_golden.py`` run.

Rounding of another processor or library stays below the tolerance.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from sscha_models import QuarticPair

from magus_anharmonic import free_energy, load
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.files import PHYSICS, write_json
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.ranking.fitness import fit_estimate
from magus_anharmonic.sscha.hessian import free_energy_hessian
from magus_anharmonic.sscha.result import final_ensemble
from magus_anharmonic.sscha.symmetry import Symmetry

FILE = Path(__file__).with_name("golden.json")
PAIR = Atoms("HF", positions=[[0, 0, 0], [1.5] * 3], cell=[3.0] * 3, pbc=True)
TOLERANCE = {"float32": 2e-5}
"""Relative, of numbers of the shipped model; 1e-6 of all others."""


def answers(folder: Path) -> dict[str, list[float]]:
    """Numbers of every kind that is stored, each from the code that stores it; eV, A, GPa."""
    pair = free_energy(
        PAIR,
        QuarticPair(),
        0.0,
        100.0,
        (1, 1, 1),
        "fixed",
        n_configs=60,
        max_populations=6,
        directory=folder / "pair",
    )
    ensemble = final_ensemble(folder / "pair", pair)
    assert ensemble is not None
    hessian = free_energy_hessian(
        pair.state, ensemble, Symmetry(pair.state.atoms, pair.state.supercell_matrix)
    )
    metal = free_energy(
        bulk("Al", "fcc", a=4.0), EMT(), 20.0, 300.0, n_configs=40, max_populations=2, seed=1
    )
    (relaxed,) = relax(CalculatorEvaluator(EMT()), [bulk("Cu", a=3.7)], 30.0, force_tolerance=1e-4)
    cell = 1.55 * np.array([[-1.0, 1, 1], [1, -1, 1], [1, 1, -1]])
    h3s = Atoms(
        "SH3",
        positions=[np.zeros(3), [1.5, 0, 0], [0, 1.55, 0], [0, 0.1, 1.55]],
        cell=cell,
        pbc=True,
    )
    found = load("h3s-gpaw-small", "cpu").evaluate([h3s])
    estimate = fit_estimate([0.0, 0.1, 0.2, 0.35], [0.21, 0.3, 0.43, 0.56])
    assert estimate is not None
    return {
        "free energy at fixed volume": [
            pair.gibbs,
            pair.gibbs_error,
            pair.gibbs_raw,
            float(pair.n_evaluations),
        ],
        "free energy at fixed pressure": [
            metal.gibbs,
            metal.gibbs_error,
            metal.finite_size,
            metal.volume,
            metal.pressure,
            metal.predicted_decrease,
        ],
        "Hessian": np.sort(hessian.squares[0])[-3:].tolist(),
        "relaxation": [relaxed.energy, relaxed.enthalpy, relaxed.atoms.get_volume()],
        "float32": [
            float(found.energy[0]),
            float(np.linalg.norm(found.forces[0])),
            float(np.trace(found.stress[0])),
        ],
        "estimate": [estimate.intercept, estimate.slope, estimate.margin],
    }


def test_stored_numbers_are_those_of_this_version(tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text())
    assert golden["physics"] == PHYSICS, (
        f"PHYSICS was raised: python {Path(__file__).name} writes the answers of now"
    )
    for name, numbers in answers(tmp_path).items():
        told = (
            f"{name}: stored numbers are no longer those of now: raise files.PHYSICS and run python"
            f" {Path(__file__).name}"
        )
        assert numbers == pytest.approx(
            golden["answers"][name], rel=TOLERANCE.get(name, 1e-6), abs=1e-9
        ), told


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_json(FILE, {"physics": PHYSICS, "answers": answers(Path(scratch))})
