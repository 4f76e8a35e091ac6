"""The engine: same numbers as python-sscha on the same ensemble, its chatter in a file, dynamical
matrices as files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from crystals import NEON
from sscha_models import EV, LatticeSprings, evaluated, harmonic_state

from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.sscha import python_sscha
from magus_anharmonic.sscha.engines import ENGINES, engine
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.reciprocal import finite_size_term
from magus_anharmonic.sscha.state import (
    LARGEST_AMPLITUDE_LATER,
    floor_modes,
    fold,
    normal_modes,
    relative_motion,
    variance,
)
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import BOHR, HBAR, RYDBERG


@pytest.fixture(scope="module")
def hcp():
    """Compressed hcp Cu, two atoms, turned out of every standard orientation, with an evaluated
    ensemble at 300 K."""
    atoms = bulk("Cu", "hcp", a=2.45, c=4.0)
    atoms.rotate(20, (1, 1, 0), rotate_cell=True)
    symmetry = Symmetry(atoms, (2, 2, 1))
    state = harmonic_state(atoms, (2, 2, 1), temperature=300.0)
    state = replace(state, force_constants=1.1 * state.force_constants)
    return state, evaluated(state, EV, 100), symmetry


def test_free_energy_stress_and_error_equal_python_sscha(hcp, tmp_path):
    state, ensemble, _ = hcp
    nothing = Symmetry(state.atoms, state.supercell_matrix)
    nothing.rotations, nothing.permutations, nothing.targets = (
        np.eye(3)[None],
        np.arange(2)[None],
        nothing.targets[:1],
    )
    ours = average(state, ensemble, nothing)
    with python_sscha.quiet(tmp_path / "log"):
        loaded = python_sscha.to_ensemble(state, ensemble)
        energy, error = loaded.get_free_energy(return_error=True)
        stress = python_sscha._reweighted_stress(loaded)
        theirs, _ = loaded.get_stress_tensor()
        force = loaded.get_average_forces(False)
    shift = ensemble.energies.mean() / state.n_cells
    assert ours.helmholtz == pytest.approx(energy * RYDBERG / state.n_cells + shift, abs=2e-7)
    assert stress == pytest.approx(ours.stress, abs=1e-9)
    assert -np.trace(theirs) * RYDBERG / BOHR**3 == pytest.approx(np.trace(ours.stress), abs=1e-7)
    assert force * RYDBERG - np.mean(force * RYDBERG, axis=0) == pytest.approx(ours.force, abs=1e-8)
    # python-sscha counts the two of a pair as independent
    assert 0.5 < ours.helmholtz_error / (error * RYDBERG / state.n_cells) < 1.5 * np.sqrt(2)


def test_finite_size_term_equals_python_sschas_interpolation(hcp, tmp_path):
    state, ensemble, _ = hcp
    spacing = np.linalg.norm(np.linalg.inv(state.atoms.cell.array), axis=0) / [4, 4, 2]
    found = finite_size_term(state, float(spacing.max()) + 1e-9)
    with python_sscha.quiet(tmp_path / "log"):
        loaded = python_sscha.to_ensemble(state, ensemble)
        fine = loaded.get_free_energy_interpolating(found.mesh)
        coarse = loaded.get_free_energy() / state.n_cells
    assert found.term == pytest.approx((fine - coarse) * RYDBERG, rel=1e-5)


def test_gradient_in_q_space_is_python_sschas_own(hcp, tmp_path):
    state, ensemble, _ = hcp
    with python_sscha.quiet(tmp_path / "log"):
        loaded = python_sscha.to_ensemble(state, ensemble)
        fast = loaded.get_preconditioned_gradient_parallel(True, True)
        del loaded.__dict__["_get_gradient_qspace"]
        slow = loaded.get_preconditioned_gradient_parallel(True, True)
    for one, other in zip(fast, slow, strict=True):
        assert one == pytest.approx(other, abs=1e-12 * np.abs(other).max())


def test_minimisation_lowers_the_free_energy_and_keeps_the_symmetry(hcp, tmp_path):
    state, ensemble, symmetry = hcp
    found = python_sscha.minimise(
        [(state, ensemble)], symmetry, min_effective_sample=0.3, log=tmp_path / "log"
    )
    assert found.decrease > 0.0
    assert found.converged
    assert 0.3 < found.effective_sample <= 1.0
    fresh = average(found.state, evaluated(found.state, EV, 100, seed=1), symmetry)
    before = average(state, ensemble, symmetry)
    assert fresh.helmholtz < before.helmholtz
    assert fresh.predicted_decrease < 0.1 * before.predicted_decrease
    assert symmetry.force_constants(found.state.force_constants) == pytest.approx(
        found.state.force_constants, abs=1e-9
    )
    assert found.stress == pytest.approx(fresh.stress, abs=5 * fresh.stress_error.max() + 5e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_minimisation_finds_the_force_constants_of_a_harmonic_crystal(name, tmp_path):
    calculator = as_evaluator(LatticeSprings())
    atoms = NEON
    symmetry = Symmetry(atoms, (3, 3, 3))
    exact = harmonic_state(atoms, (3, 3, 3), calculator, 50.0)
    state = replace(exact, force_constants=0.97 * exact.force_constants)
    found = engine(name)(
        [(state, evaluated(state, calculator, 200))],
        symmetry,
        min_effective_sample=0.1,
        log=tmp_path / "log",
    )
    assert found.converged and found.state.modes.hbar_omega == pytest.approx(
        exact.modes.hbar_omega, rel=1e-3
    )


def test_an_effective_sample_below_its_minimum_ends_the_minimisation(hcp, tmp_path):
    state, _, symmetry = hcp
    soft = replace(state, force_constants=0.5 * state.force_constants)
    ensemble = evaluated(soft, EV, 100)
    found = python_sscha.minimise(
        [(soft, ensemble)], symmetry, min_effective_sample=0.8, log=tmp_path / "log"
    )
    assert not found.converged
    assert found.effective_sample > 0.5


def test_a_state_with_imaginary_modes_is_refused_with_a_reason(hcp, tmp_path, monkeypatch):
    state, ensemble, symmetry = hcp
    monkeypatch.chdir(tmp_path)
    broken = replace(state, force_constants=-state.force_constants)
    with pytest.raises(SschaError, match="python-sscha"):
        python_sscha.minimise(
            [(broken, ensemble)], symmetry, min_effective_sample=0.5, log=tmp_path / "log"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_dynamical_matrices_come_back_from_their_files(hcp, tmp_path):
    state, _, _ = hcp
    heavy = state.atoms.copy()
    heavy.set_masses([65.0, 65.0])
    state = replace(state, atoms=heavy)
    python_sscha.write_dynamical_matrices(state, tmp_path / "dyn_pop3_", tmp_path / "log")
    back = python_sscha.read_dynamical_matrices(tmp_path / "dyn_pop3_", 300.0, tmp_path / "log")
    assert back.supercell_matrix == state.supercell_matrix
    assert back.force_constants == pytest.approx(state.force_constants, abs=1e-6)
    assert back.atoms.positions == pytest.approx(state.atoms.positions, abs=1e-6)
    assert back.atoms.get_masses() == pytest.approx([65.0, 65.0], rel=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(InputError, match="no such file"):
        python_sscha.read_dynamical_matrices(tmp_path / "dyn_pop9_", 300.0, tmp_path / "log")


SCRIPT = """
import logging, os, sys
import numpy as np
from pathlib import Path
from ase import Atoms
from sscha_models import QuarticPair
from magus_anharmonic.sscha import free_energy
logging.basicConfig(level=logging.INFO, format="%(message)s")
print("before")
atoms = Atoms("HF", positions=[[0, 0, 0], [1.5] * 3], cell=[3.0] * 3, pbc=True)
options = dict(cell="fixed", supercell=(1, 1, 1), n_configs=40, max_populations=3, engine="python-sscha")
free_energy(atoms, QuarticPair(), directory=sys.argv[1], **options)
os.write(1, b"from the descriptor\\n")
print("after")
"""


def test_standard_output_belongs_to_the_user_and_progress_still_shows(tmp_path):
    here = Path(__file__).parent
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(here), str(here.parent)]), OMP_NUM_THREADS="1"
    )
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert sorted(run.stdout.split("\n")) == ["", "after", "before", "from the descriptor"]
    assert "population 1 of at most 3: G = " in run.stderr
    assert "KL" not in run.stderr
    assert (tmp_path / "run" / "sscha.log").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_standard_output_comes_back_after_an_exception(tmp_path, capfd):
    with pytest.raises(ZeroDivisionError), python_sscha.quiet(tmp_path / "log"):
        print("inside")
        os.write(1, b"inside too\n")
        raise ZeroDivisionError
    print("outside")
    os.write(1, b"outside too\n")
    captured = capfd.readouterr().out
    assert "outside" in captured and "outside too" in captured and "inside" not in captured
    assert (tmp_path / "log").read_text().count("inside") == 2


def test_a_mode_that_a_noisy_minimisation_drove_to_zero_is_raised_before_the_next_ensemble(hcp):
    state, _, symmetry = hcp
    masses = state.supercell.get_masses()
    soft = normal_modes(state.full, masses)
    root = np.sqrt(np.repeat(masses, 3))
    vector = soft.vectors[:, 0] * root
    emptied = state.full - 0.999999 * np.outer(vector, vector) * (soft.hbar_omega[0] / HBAR) ** 2
    lost = replace(
        state, force_constants=symmetry.force_constants(fold(emptied, state.supercell_matrix))
    )
    assert lost.modes.hbar_omega[0] < 0.9 * state.modes.hbar_omega[0]
    kept = floor_modes(lost, symmetry, LARGEST_AMPLITUDE_LATER)
    apart = relative_motion(kept, kept.modes.vectors / root[:, None]) * variance(
        kept.modes.hbar_omega, state.temperature
    )
    assert np.sqrt(apart.max()) <= LARGEST_AMPLITUDE_LATER * (1 + 1e-4)
    assert floor_modes(state, symmetry, LARGEST_AMPLITUDE_LATER) is state, "firm modes stay"
