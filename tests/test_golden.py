"""Numbers of today, stored in ``golden/``: a change that should not change the physics leaves them as they are.

``golden/physics.json`` stands for what is in stores of free energies: where that changes, `digests.PHYSICS` is raised, and
``python tests/test_golden.py`` run. The other files are the numbers of whole commands, written by ``golden/make.py``: by value, on the
machine that wrote them to the last digits, on another one within what its rounding does.
"""

import json
import math
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from crystals import PAIR
from golden import make
from kill_harness import Server, outcome, prepare
from sscha_models import QuarticPair

from magus_anharmonic import free_energy, load
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.io import pictures
from magus_anharmonic.io.digests import PHYSICS
from magus_anharmonic.io.files import write_json
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.ranking.fitness import fit_estimate
from magus_anharmonic.sscha.hessian import free_energy_hessian
from magus_anharmonic.sscha.result import final_ensemble
from magus_anharmonic.sscha.symmetry import Symmetry

RENAMED = {
    "sscha": "converged",
    "decrease": "predicted_decrease",
    "hessian_lowest": "hessian_deciding",
    "hessian_lowest_cm1": "hessian_deciding_cm1",
    "n_became Im-3m 100 GPa": "n_transformed Im-3m 100 GPa",
    "n_became_best": "n_transformed_best",
    "odds": "probability",
    "odds_inside": "probability_inside",
    "repeats": "supercell_matrix",
}
"""Column, key, file or word of the stored numbers -> its name of now; None: it is gone on purpose.
"""

TIGHT = (1e-9, 1e-12)
"""Relative and absolute, on the machine that wrote the numbers."""
ELSEWHERE = {
    "finetuning": (1e-3, 1e-5),
    "model_relaxations": (1e-3, 1e-3),
    "phase_diagram": (0.25, 2e-6),
    "rankings": (0.1, 2e-4),
}
"""On another machine, measured with other kernels of BLAS, numpy and torch. Single precision
amplifies rounding in training and relaxation, SSCHA does so along the soft modes of bcc Al, and the
samples behind confidence bands are others where an eigenvector has the other sign."""
ROUNDED = (1e-6, 2e-6)
"""The others there; tables have six decimals, and the last may be rounded the other way."""
OF_BITS = {"id", "model", "model_id", "new_model", "old_model", "parent_id"}
"""Digests of rounded or single-precision numbers: not compared on another machine."""


# --- whole commands -------------------------------------------------------------------------------


def differences(golden, found, tolerance, ignored, where=""):
    """What is stored and not found, or found with another value; what is new does not count."""
    if isinstance(golden, dict):
        for name, value in golden.items():
            now = RENAMED.get(name, name)
            if now is None or name in ignored:
                continue
            if not isinstance(found, dict) or now not in found:
                yield f"{where}/{now} is missing"
            else:
                yield from differences(value, found[now], tolerance, ignored, f"{where}/{now}")
    elif isinstance(golden, list):
        if not isinstance(found, list) or len(found) != len(golden):
            yield f"{where}: {len(golden)} values stored, found {len(found) if isinstance(found, list) else found!r}"
            return
        for index, pair in enumerate(zip(golden, found, strict=True)):
            yield from differences(*pair, tolerance, ignored, f"{where}[{index}]")
    elif is_number(golden) and is_number(found):
        same = math.isclose(golden, found, rel_tol=tolerance[0], abs_tol=tolerance[1])
        if not same and not (math.isnan(golden) and math.isnan(found)):
            yield f"{where}: stored {golden!r}, found {found!r}"
    elif golden != found and not (
        isinstance(golden, str) and golden in RENAMED and RENAMED[golden] == found
    ):
        yield f"{where}: stored {golden!r}, found {found!r}"


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def compare(name, numbers):
    golden, found = make.stored(name), json.loads(json.dumps(numbers))
    stored = golden["numbers"]
    here = golden["machine"] == make.machine()
    if not here and name in ROBUST:
        stored, found = ROBUST[name](stored), ROBUST[name](found)
    tolerance = TIGHT if here else ELSEWHERE.get(name, ROUNDED)
    different = list(differences(stored, found, tolerance, set() if here else OF_BITS))
    assert not different, (
        f"{len(different)} numbers of {name} are no longer those of golden/{name}.json:\n"
        + "\n".join(different[:20])
    )


def robust_search(numbers):
    """Relaxations in single precision end elsewhere on another machine, and all that follows:
    which tables and columns there are.
    """
    return {
        name: dict.fromkeys(table)
        if isinstance(table, dict)
        else [dict.fromkeys(record) for record in table]
        for name, table in numbers.items()
    }


def robust_relaxations(numbers):
    """The steps may be others there, the minimum is the same; enthalpy is the flattest function
    of where a relaxation ends.
    """
    return {
        "ends": [
            {name: end[name] for name in ("enthalpy", "converged", "failed")}
            for end in numbers["ends"]
        ]
    }


def robust_finetuning(numbers):
    """The model before training; three epochs in single precision reach another best one there."""
    return {"before": numbers["result"]["before"], "epoch 0": numbers["history"][0]}


def robust_sscha(numbers):
    """With one atom per cell, where the crystal as a whole lies is decided by rounding."""
    names = {"centroids", "positions"}
    return {
        file: {name: one for name, one in table.items() if name not in names}
        for file, table in numbers.items()
    }


def robust_rankings(numbers):
    """To which side a saddle point is left, and so the sample of the Hessian, is decided by
    rounding.
    """
    return {
        file: {
            name: one
            for name, one in table.items()
            if not (file.startswith("saddle/") and name.startswith(("hessian_", "p_stable")))
        }
        for file, table in numbers.items()
    }


ROBUST = {
    "rankings": robust_rankings,
    "finetuning": robust_finetuning,
    "sscha": robust_sscha,
    "demonstration": robust_search,
    "learning": robust_search,
    "model_relaxations": robust_relaxations,
}
"""What is compared on another machine where the whole is chaotic."""


@pytest.mark.slow
@pytest.mark.parametrize("name", make.CASES)
def test_numbers_of_a_case_are_the_stored_ones(name, tmp_path, monkeypatch):
    """Numbers alone: what pictures look like is not stored, and drawing takes longer."""

    def not_drawn(made, folder, name):
        paths = [folder / f"{name}.svg", folder / f"{name}.png"]
        for path in paths:
            path.touch()
        return paths

    monkeypatch.setattr(pictures, "save", not_drawn)
    compare(name, make.CASES[name](tmp_path))


needs_fork = pytest.mark.skipif(
    sys.platform != "linux", reason="the harness forks and pins its searches to one core"
)


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@needs_fork
@pytest.mark.slow
def test_numbers_of_the_demonstration_are_the_stored_ones(server, tmp_path):
    compare("demonstration", make.search("demonstration", tmp_path / "search", server))


@needs_fork
@pytest.mark.slow
def test_a_search_killed_in_each_part_ends_in_the_numbers_of_the_one_that_was_not(server, tmp_path):
    """The stored numbers are those of a search that nobody killed."""
    folder = prepare(tmp_path / "killed")
    killed = [
        server.search(folder, restart=i > 0, step=step)
        for i, step in enumerate(
            (
                "rename results/raw1.traj",
                "rename results/anharmonic/checkpoints/gen1.pth",
                "rename results/raw2.traj",
            )
        )
    ]
    assert [ended.code for ended in killed] == 3 * [-signal.SIGKILL]
    assert server.search(folder, restart=True).code == 0
    compare("learning", make.searched(folder))
    if make.stored("learning")["machine"] != make.machine():
        whole = prepare(tmp_path / "whole")
        assert server.search(whole).code == 0
        assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize(
    ("found", "n"),
    [
        ({"a": [1.0, 2.0], "b": "word", "new": 1}, 0),
        ({"a": [1.0, 2.0 + 1e-7], "b": "word"}, 1),
        ({"a": [1.0], "b": "other"}, 2),
        ({"b": "word"}, 1),
        ({"a": [1.0, math.nan], "b": "word"}, 1),
    ],
)
def test_a_difference_is_seen(found, n):
    assert len(list(differences({"a": [1.0, 2.0], "b": "word"}, found, TIGHT, set()))) == n


def test_a_renamed_column_is_read_by_its_old_name(monkeypatch):
    monkeypatch.setitem(RENAMED, "odds", "probability")
    monkeypatch.setitem(RENAMED, "gone", None)
    golden = {"odds": [0.5], "gone": [1.0], "kind": "odds"}
    assert not list(
        differences(golden, {"probability": [0.5], "kind": "probability"}, TIGHT, set())
    )
    assert len(list(differences(golden, {"odds": [0.5], "kind": "other"}, TIGHT, set()))) == 2


# --- what is in stores of free energies -----------------------------------------------------------

FILE = Path(__file__).with_name("golden") / "physics.json"
TOLERANCE = {"float32": 2e-5}
"""Relative, of numbers of the shipped model; 1e-6 of all others."""


def answers(folder):
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


def test_stored_numbers_are_those_of_this_version(tmp_path):
    golden = json.loads(FILE.read_text())
    assert golden["physics"] == PHYSICS, (
        f"PHYSICS was raised: python {Path(__file__).name} writes the answers of now"
    )
    for name, numbers in answers(tmp_path).items():
        told = (
            f"{name}: stored numbers are no longer those of now: raise digests.PHYSICS and run python"
            f" {Path(__file__).name}"
        )
        assert numbers == pytest.approx(
            golden["answers"][name], rel=TOLERANCE.get(name, 1e-6), abs=1e-9
        ), told


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_json(FILE, {"physics": PHYSICS, "answers": answers(Path(scratch))})
