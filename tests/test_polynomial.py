"""The polynomial potential: its derivatives, its invariances, and a surface that it contains."""

import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator, Evaluation
from magus_anharmonic.potential import kernels, moments
from magus_anharmonic.potential.polynomial import PolynomialPotential, fit


def configurations(n, seed=0, atoms=None, size=0.08):
    """Strained and displaced copies of one supercell."""
    rng = np.random.default_rng(seed)
    atoms = bulk("CuAu", "rocksalt", a=5.1, cubic=True) if atoms is None else atoms
    made = []
    for _ in range(n):
        copy = atoms.copy()
        strain = np.eye(3) + rng.normal(0, 0.01, (3, 3))
        copy.set_cell(copy.cell.array @ (0.5 * (strain + strain.T)), scale_atoms=True)
        copy.positions += rng.normal(0, size, copy.positions.shape)
        made.append(copy)
    return made


@pytest.fixture(scope="module")
def fitted():
    structures = configurations(30)
    return fit(structures, CalculatorEvaluator(EMT()).evaluate(structures))


def test_forces_and_stress_are_derivatives_of_the_energy(fitted):
    (atoms,) = configurations(1, seed=5)
    rng = np.random.default_rng(1)
    moves, strain = rng.normal(size=atoms.positions.shape), rng.normal(size=(3, 3))
    strain, step = strain + strain.T, 1e-5
    ends = []
    for sign in (1, -1):
        moved, strained = atoms.copy(), atoms.copy()
        moved.positions += sign * step * moves
        strained.set_cell(atoms.cell.array @ (np.eye(3) + sign * step * strain), scale_atoms=True)
        ends.append(fitted.evaluate([moved, strained]).energy)
    slopes = (ends[0] - ends[1]) / (2 * step)
    found = fitted.evaluate([atoms])
    assert slopes[0] == pytest.approx(-np.sum(found.forces[0] * moves), rel=1e-6)
    assert slopes[1] == pytest.approx(
        atoms.get_volume() * np.sum(found.stress[0] * strain), rel=1e-6
    )


def test_it_does_not_see_how_a_structure_is_written(fitted):
    """Turned, with its atoms in another order and cell, repeated: one by one and in a batch."""
    (atoms,) = configurations(1, seed=6)
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    other = atoms[np.random.default_rng(0).permutation(len(atoms))]
    other.positions += [0.3, 7.0, -0.4]
    other.set_cell(np.array([[1, 0, 0], [1, 1, 0], [0, -1, 1]]) @ atoms.cell.array)
    twice = atoms.repeat((2, 1, 1))
    energy = fitted.evaluate([atoms]).energy[0]
    assert fitted.evaluate([atoms, turned, other, twice]).energy == pytest.approx(
        np.array([energy, energy, energy, 2 * energy]), abs=1e-9
    )
    few = configurations(7, seed=8)
    together, alone = fitted.evaluate(few), [fitted.evaluate([one]) for one in few]
    for place, one in enumerate(alone):
        assert together.forces[place] == pytest.approx(one.forces[0], abs=1e-9)
        assert together.stress[place] == pytest.approx(one.stress[0], abs=1e-9)


def test_configurations_that_it_has_not_seen(fitted):
    """EMT is no polynomial: a tenth of its forces' size or less is left."""
    structures = configurations(10, seed=3)
    truth = CalculatorEvaluator(EMT()).evaluate(structures)
    found = fitted.evaluate(structures)
    left = np.std(np.array(found.forces) - truth.forces) / np.std(truth.forces)
    spread = np.std(found.energy - truth.energy) / np.std(truth.energy)
    stresses = np.std(found.stress - truth.stress) / np.std(truth.stress)
    assert left < 0.1 and spread < 0.1 and stresses < 0.1, (left, spread, stresses)


def test_a_surface_of_its_own_kind_is_found_again(fitted):
    structures = configurations(30, seed=9)
    again = fit(structures, fitted.evaluate(structures))
    fresh = configurations(5, seed=10)
    truth, found = fitted.evaluate(fresh), again.evaluate(fresh)
    assert np.abs(np.array(found.forces) - truth.forces).max() < 0.01
    assert found.energy == pytest.approx(truth.energy, abs=0.01)
    assert found.stress == pytest.approx(truth.stress, abs=5e-4)


def test_without_stresses_and_once_more_the_same_to_the_bit(fitted):
    structures = configurations(6)
    truth = CalculatorEvaluator(EMT()).evaluate(structures)
    none = Evaluation(truth.energy, truth.forces, np.full((6, 3, 3), np.nan))
    one, same = fit(structures, none), fit(structures, none)
    assert one.model_id == same.model_id != fitted.model_id
    assert np.isfinite(one.evaluate(structures).stress).all()
    copy = pickle.loads(pickle.dumps(fitted))
    assert isinstance(copy, PolynomialPotential) and copy.model_id == fitted.model_id
    assert np.array_equal(copy.evaluate(structures).forces, fitted.evaluate(structures).forces)


def test_what_it_cannot_do_is_refused(fitted):
    with pytest.raises(InputError, match="structure 1: .*29, 79.*Ag"):
        fitted.evaluate([bulk("Cu"), bulk("Ag")])
    structures = [bulk("Cu"), bulk("Au")]
    with pytest.raises(InputError, match="one composition"):
        fit(structures, fitted.evaluate(structures))
    pair = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 1e-5]], cell=4 * np.eye(3), pbc=True)
    with pytest.raises(InputError, match="coincide"):
        fitted.evaluate([pair])


@pytest.mark.parametrize("radial", [5, 7])
def test_the_compiled_sums_are_torchs(radial):
    compiled = kernels.library()
    if compiled is None:
        pytest.skip("no C compiler")
    for seed in range(3):
        assert moments.disagreement(compiled, seed, radial) < 1e-12


def test_wrong_compiled_sums_are_noticed():
    class Wrong:
        """Writes nothing."""

        @staticmethod
        def polynomial_evaluate(*_):
            return 0

        polynomial_features = polynomial_evaluate

    assert moments.disagreement(Wrong()) == pytest.approx(1.0)


def test_torch_alone_fits_and_gives_the_same_numbers(fitted, monkeypatch):
    """Strained, in a batch and alone, one atom in a small cell too."""
    structures = [*configurations(12), bulk("Cu"), *configurations(2, seed=4)]
    compiled = fitted.evaluate(structures)
    again = fit(structures[:12], fitted.evaluate(structures[:12]))
    monkeypatch.setattr(moments, "_checked_functions", lambda: None)
    alone = fitted.evaluate(structures)
    assert alone.energy == pytest.approx(compiled.energy, abs=1e-10)
    assert alone.stress == pytest.approx(compiled.stress, abs=1e-12)
    for one, other in zip(alone.forces, compiled.forces, strict=True):
        assert one == pytest.approx(other, abs=1e-11)
    by_torch = fit(structures[:12], fitted.evaluate(structures[:12]))
    near = structures[:12]
    assert by_torch.evaluate(near).energy == pytest.approx(again.evaluate(near).energy, abs=1e-4)


def test_no_result_depends_on_the_number_of_threads(fitted):
    structures, before, found = configurations(5), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(fitted.evaluate(structures))
    finally:
        torch.set_num_threads(before)
    one, three = found
    assert np.array_equal(one.energy, three.energy) and np.array_equal(one.forces, three.forces)
