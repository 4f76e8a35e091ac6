"""A stored number is only reused for the energy surface that gave it; ids of ASE calculators."""

import logging
import pickle

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.calculators.morse import MorsePotential

from magus_anharmonic.evaluator import CalculatorEvaluator, as_evaluator, is_unnamed, probes

COPPER = bulk("Cu")


class Hidden(Calculator):
    """Springs to the origin whose constant stands in no parameter but in an attribute, or in a file
    that is read at every call."""

    implemented_properties = ("energy", "forces")

    def __init__(self, k=1.0, file=None, largest=np.inf, **parameters):
        super().__init__(**parameters)
        self.k, self.file, self.largest, self.calls = k, file, largest, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if len(self.atoms) > self.largest:
            raise ValueError("made for one structure")
        k = self.k if self.file is None else float(self.file.read_text())
        self.results = {
            "energy": 0.5 * k * (self.atoms.positions**2).sum(),
            "forces": -k * self.atoms.positions,
        }


def ids(*calculators):
    return {as_evaluator(calculator, [COPPER]).model_id for calculator in calculators}


class Other(Hidden):
    """The same numbers by another class."""


def test_calculators_of_other_parameters_weights_or_classes_have_other_ids():
    lj = [
        LennardJones(sigma=2.5, epsilon=0.1),
        LennardJones(sigma=2.5, epsilon=0.1001),
        LennardJones(sigma=2.5, epsilon=0.1, smooth=True),
    ]
    assert len(ids(*lj)) == 3 and len(ids(EMT(), EMT(asap_cutoff=True))) == 2
    assert len(ids(MorsePotential(r0=2.5), MorsePotential(r0=2.6))) == 2
    assert len(ids(Hidden(1.0), Hidden(1.001), Other(1.0), Hidden(1.0, charge=1))) == 4
    assert len(ids(SumCalculator([EMT(), Hidden(0.1)]), SumCalculator([EMT(), Hidden(0.2)]))) == 2
    for make in (
        EMT,
        Hidden,
        lambda: LennardJones(sigma=2.5),
        lambda: SumCalculator([EMT(), Hidden(0.1)]),
    ):
        assert len(ids(make(), make())) == 1


def test_an_id_follows_changes_in_place(tmp_path):
    calculator = LennardJones(sigma=2.5)
    evaluator = as_evaluator(calculator, [COPPER])
    before = evaluator.model_id
    calculator.set(epsilon=2.0)
    assert evaluator.model_id != before
    (tmp_path / "k.txt").write_text("1.0")
    (first,) = ids(Hidden(file=tmp_path / "k.txt"))
    (named,) = ids(Hidden(table=str(tmp_path / "k.txt")))
    (tmp_path / "k.txt").write_text("1.5")
    assert ids(Hidden(file=tmp_path / "k.txt")) != {first}
    assert ids(Hidden(table=str(tmp_path / "k.txt"))) != {named}
    (tmp_path / "moved.txt").write_text("1.0")
    assert ids(Hidden(table=str(tmp_path / "moved.txt"))) == {named}


def test_the_probe_leaves_the_calculator_as_it_is():
    fresh = EMT()
    assert ids(fresh) and fresh.atoms is None and fresh.results == {} and pickle.dumps(fresh)
    inner = Hidden()
    assert ids(SumCalculator([inner, Hidden()])) and inner.calls == 0 and inner.atoms is None
    used = COPPER.copy()
    used.calc = EMT()
    energy = used.get_potential_energy()
    known = used.calc.results
    assert ids(used.calc) == ids(EMT())
    assert used.calc.results is known and used.get_potential_energy() == energy


def test_probes_hold_every_pair_of_neighbours_of_two_elements_and_no_atoms_on_each_other():
    for atoms in probes(["S", "H"]):
        assert sorted(atoms.symbols) == ["H", "H", "S", "S"]
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(4, 1)]
        assert 1.0 < distances.min() < 4.0


def test_what_cannot_be_probed_has_no_id_and_nothing_is_reused(tmp_path, caplog):
    calculator = Hidden(0.1, largest=1)
    with caplog.at_level(logging.WARNING):
        one, two = as_evaluator(calculator, [COPPER]), as_evaluator(calculator, [COPPER])
        assert is_unnamed(one.model_id) and one.model_id == one.model_id != two.model_id
        assert pickle.loads(pickle.dumps(one)).model_id == one.model_id
    assert "no id can be made" in caplog.text and "made for one structure" in caplog.text
    assert is_unnamed(CalculatorEvaluator(EMT()).model_id)  # no elements
    calculator.model_id = "mine"
    assert ids(calculator) == {"mine"}


def test_a_machine_error_is_no_missing_id():
    class Full(Hidden):
        def calculate(self, *arguments, **more):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        ids(Full())


def test_two_checkpoints_behind_the_same_calculator_have_their_own_ids(tiny_checkpoint, tmp_path):
    import torch

    from magus_anharmonic import MatterSim

    content = torch.load(tiny_checkpoint, weights_only=True)
    content.pop("model_id", None)
    content.pop("error_model", None)
    name = next(
        name
        for name, value in content["model"].items()
        if value.is_floating_point() and value.numel() > 10
    )
    content["model"][name] = content["model"][name] * 1.01
    torch.save(content, tmp_path / "other.pth")
    first, second = (
        MatterSim(str(tiny_checkpoint), "cpu"),
        MatterSim(str(tmp_path / "other.pth"), "cpu"),
    )
    assert (
        as_evaluator(first).model_id
        == first.model_id
        != as_evaluator(second).model_id
        == second.model_id
    )
