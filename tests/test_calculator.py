"""The ASE calculator ``MatterSim`` gives the numbers of stock ``MatterSimCalculator`` and can be
pickled."""

import copy
import pickle
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.optimize import BFGS
from mattersim.forcefield import MatterSimCalculator
from mattersim.forcefield import Potential as StockPotential

from magus_anharmonic.errors import CheckpointError, MagusAnharmonicError
from magus_anharmonic.potential.calculator import MatterSim


def structures(h3s):
    rattled = bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, 1))
    rattled.rattle(0.1, seed=5)
    return [h3s(2.9, 0.1), rattled, bulk("Si")]


def test_the_calculator_equals_stock_mattersim_to_1e_6_relative(tiny_checkpoint, h3s):
    stock_potential = StockPotential.from_checkpoint(
        str(tiny_checkpoint), device="cpu", load_training_state=False
    )
    for atoms in structures(h3s):
        ours, stock = atoms.copy(), atoms.copy()
        ours.calc = MatterSim(tiny_checkpoint, device="cpu")
        stock.calc = MatterSimCalculator(potential=stock_potential, device="cpu")
        assert ours.get_potential_energy() == pytest.approx(stock.get_potential_energy(), rel=1e-6)
        assert ours.get_potential_energy(force_consistent=True) == ours.get_potential_energy()
        for mine, theirs in (
            (ours.get_forces(), stock.get_forces()),
            (ours.get_stress(), stock.get_stress()),
        ):
            scale = np.abs(theirs).max()
            if scale > 1e-4:
                assert np.abs(mine - theirs).max() < 1e-5 * scale
            else:
                np.testing.assert_allclose(mine, theirs, atol=1e-8 + 1e-2 * scale)


def test_the_calculator_is_lazy_pickles_and_copies(tiny_checkpoint, h3s):
    lazy = MatterSim("no-such-file.pth", device="cpu")
    with pytest.raises(CheckpointError, match=r"no-such-file\.pth"):
        bulk("Cu").copy().get_positions(), lazy.get_potential_energy(bulk("Cu"))
    atoms = h3s(3.0, 0.05)
    atoms.calc = MatterSim(tiny_checkpoint, device="cpu")
    energy = atoms.get_potential_energy()
    for duplicate in (pickle.loads(pickle.dumps(atoms.calc)), copy.deepcopy(atoms.calc)):
        fresh = atoms.copy()
        fresh.calc = duplicate
        fresh.positions[0] += 0.0
        assert duplicate._potential is None
        assert duplicate.get_property("energy", h3s(3.0, 0.05)) == energy
        assert duplicate.model_id == atoms.calc.model_id
    assert len(pickle.dumps(atoms.calc)) < 5000


def test_the_calculator_notices_changes_and_offers_no_stress_without_a_cell(tiny_checkpoint):
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])
    atoms.calc = MatterSim(tiny_checkpoint, device="cpu", dtype="float64")
    before = atoms.get_potential_energy()
    atoms.positions[1, 2] = 0.9
    assert atoms.get_potential_energy() != before
    assert "stress" not in atoms.calc.results


def test_a_molecule_whose_cell_is_flat_has_energy_and_forces_and_no_stress(tiny_checkpoint):
    flat = Atoms(
        "H2", positions=[[0, 0, 0], [0, 0, 0.74]], cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]], pbc=False
    )
    free = Atoms("H2", positions=flat.positions)
    for atoms in (flat, free):
        atoms.calc = MatterSim(tiny_checkpoint, device="cpu")
    assert flat.get_potential_energy() == free.get_potential_energy()
    np.testing.assert_array_equal(flat.get_forces(), free.get_forces())
    assert "stress" not in flat.calc.results


def test_the_calculator_tells_the_expected_error_and_all_of_ase_still_takes_its_results(
    tmp_path, h3s
):
    atoms = h3s(3.0, 0.05)
    atoms.calc = MatterSim("h3s-gpaw-small", device="cpu")
    assert atoms.calc.energy_error is None
    energy = atoms.get_potential_energy()
    assert atoms.calc.energy_error == atoms.calc.potential.evaluate([atoms]).energy_error[0] > 0
    assert atoms.calc.export_properties()["energy"] == energy
    assert SinglePointCalculator(atoms, **atoms.calc.results).get_potential_energy() == energy
    for name in ("a.extxyz", "a.traj", "a.db", "a.json"):
        write(tmp_path / name, atoms)
        assert read(tmp_path / name).get_potential_energy() == pytest.approx(energy, abs=1e-6)
    error = atoms.calc.energy_error
    for duplicate in (pickle.loads(pickle.dumps(atoms.calc)), copy.deepcopy(atoms.calc)):
        assert duplicate.energy_error == error
    atoms.positions[1] += 0.05
    BFGS(atoms, trajectory=str(tmp_path / "relax.traj"), logfile=None).run(fmax=1e-3, steps=2)
    assert len(read(tmp_path / "relax.traj", ":")) == 3
    assert atoms.calc.energy_error != error
    atoms.calc.reset()
    assert atoms.calc.energy_error is None


def test_the_calculator_module_imports_no_torch():
    import subprocess

    code = (
        "import sys; from magus_anharmonic.potential.calculator import MatterSim; MatterSim('x');"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_properties_are_computed_once_and_in_ases_conventions(tiny_checkpoint, h3s, monkeypatch):
    atoms = h3s(3.0, 0.1)
    atoms.calc = MatterSim(tiny_checkpoint, device="cpu")
    calls = []
    evaluate = atoms.calc.potential.evaluate
    monkeypatch.setattr(
        atoms.calc.potential, "evaluate", lambda structures: calls.append(1) or evaluate(structures)
    )
    results = atoms.calc.get_property("energy", atoms), atoms.get_forces(), atoms.get_stress()
    assert results[2].shape == (6,) and len(calls) == 1
    np.testing.assert_allclose(
        atoms.get_stress(voigt=False), atoms.get_stress(voigt=False).T, atol=1e-7
    )
    found = evaluate([atoms])
    np.testing.assert_array_equal(results[1], found.forces[0])
    np.testing.assert_allclose(results[2][[0, 1, 2]], np.diag(found.stress[0]), atol=1e-9)
    results[1][:] = 0.0
    assert np.abs(atoms.get_forces()).max() > 0


def test_the_words_of_stock_mattersim_are_taken_and_mean_the_same(tiny_checkpoint, h3s):
    atoms = h3s(2.9, 0.1)
    stock = MatterSimCalculator.from_checkpoint(
        str(tiny_checkpoint), device="cpu", load_training_state=False, stress_weight=1.0
    )
    ours = MatterSim(
        load_path=tiny_checkpoint, device="cpu", load_training_state=False, stress_weight=1.0
    )
    theirs = stock.get_property("stress", atoms)
    np.testing.assert_allclose(ours.get_property("stress", atoms), theirs, rtol=1e-4, atol=1e-3)
    made = MatterSim(potential=ours.potential, compute_stress=False)
    assert made.potential is ours.potential and "stress" not in made.results
    assert made.get_property("energy", atoms) == ours.get_property("energy", atoms)
    with pytest.raises(NotImplementedError):
        made.get_stress(atoms)
    for both in ({"load_path": "a"}, {"potential": ours.potential}):
        with pytest.raises(TypeError, match="one of checkpoint, load_path and potential"):
            MatterSim("b", **both)
    with pytest.raises(TypeError, match="no model that load"):
        MatterSim(potential=object())


def test_energies_of_the_atoms_are_given_and_add_up(tiny_checkpoint, h3s, monkeypatch):
    atoms = h3s(3.0, 0.1)
    atoms.calc = MatterSim(tiny_checkpoint, device="cpu")
    energies = atoms.get_potential_energies()
    assert energies.shape == (len(atoms),)
    assert energies.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-5 * len(atoms))
    wrong = [energies + 1e-3]
    monkeypatch.setattr(atoms.calc.potential, "atomic_energies", lambda structures: wrong)
    atoms.positions[0] += 0.01
    with pytest.raises(MagusAnharmonicError, match="energies of the atoms add up to"):
        atoms.get_potential_energies()


@pytest.mark.parametrize("name", ["checkpont", "potentiel", "Device"])
def test_an_unknown_keyword_is_refused_instead_of_standing_for_the_foundation_model(
    name, tiny_checkpoint
):
    with pytest.raises(TypeError, match=f"unknown keyword {name}; did you mean"):
        MatterSim(**{name: str(tiny_checkpoint)})
    with pytest.raises(TypeError, match=name):
        MatterSim(str(tiny_checkpoint), "cpu").set(**{name: str(tiny_checkpoint)})


@pytest.mark.parametrize("how", ["set", "attribute"])
def test_another_checkpoint_gives_other_numbers_at_once(tiny_checkpoint, how):
    atoms = bulk("Cu")
    atoms.calc = MatterSim(str(tiny_checkpoint), "cpu", dtype="float64")
    before = atoms.get_potential_energy(), atoms.calc.model_id
    if how == "set":
        assert atoms.calc.set(checkpoint="h3s-gpaw-small", device="cpu") == {
            "checkpoint": "h3s-gpaw-small"
        }
    else:
        atoms.calc.checkpoint = "h3s-gpaw-small"
    fresh = bulk("Cu")
    fresh.calc = MatterSim("h3s-gpaw-small", "cpu", dtype="float64")
    assert atoms.get_potential_energy() == fresh.get_potential_energy() != before[0]
    assert atoms.calc.model_id == fresh.calc.model_id != before[1]
    named = atoms.calc.todict()
    assert named["checkpoint"] == "h3s-gpaw-small" and named["model_id"] == fresh.calc.model_id
    assert MatterSim(**named).model_id == fresh.calc.model_id
    with pytest.raises(CheckpointError, match="holds model"):
        MatterSim(**named | {"checkpoint": str(tiny_checkpoint)}).model_id  # noqa: B018
