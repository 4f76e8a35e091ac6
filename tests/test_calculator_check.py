"""ASE calculators whose numbers do not belong together are named at the start, and a fixed cell
asks for no stress."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from refusals import refused

from magus_anharmonic import free_energy
from magus_anharmonic.calculator_check import check_calculator
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import parse_settings

GPA = 160.21766208
HCP = bulk("Cu", "hcp", a=2.5, c=4.1)
CRYSTALS = {
    "fcc, without force or stress": bulk("Cu", a=3.59),
    "hcp": HCP,
    "compressed": bulk("Al", a=3.7),
    "stretched": bulk("Cu", a=3.9),
}


class Twisted(EMT):
    """EMT with its forces and stress times a factor, its stress perhaps times the volume, or
    without a stress."""

    def __init__(self, forces=1.0, stress=1.0, per_cell=False):
        super().__init__()
        self.by_forces, self.by_stress, self.per_cell = forces, stress, per_cell

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        self.results["forces"] = self.by_forces * self.results["forces"]
        if "stress" in self.results and self.by_stress is not None:
            self.results["stress"] = (
                self.by_stress
                * self.results["stress"]
                * (self.atoms.get_volume() if self.per_cell else 1.0)
            )

    def get_property(self, name, *arguments, **options):
        if name == "stress" and self.by_stress is None:
            raise PropertyNotImplementedError("no stress")
        return super().get_property(name, *arguments, **options)


@pytest.mark.parametrize("crystal", CRYSTALS)
@pytest.mark.parametrize(
    ("twist", "words"),
    [
        ({"stress": -1.0}, ["stress", "other sign"]),
        ({"stress": GPA}, ["stress", "in GPa"]),
        ({"stress": -GPA}, ["stress", "in GPa", "other sign"]),
        ({"stress": 10 * GPA}, ["stress", "in kbar"]),
        ({"per_cell": True}, ["stress", "of the cell, not divided by its volume"]),
        ({"stress": 0.0}, ["stress", "wrong"]),
        ({"forces": -1.0}, ["forces", "other sign"]),
        ({"forces": 0.529177}, ["forces", "bohr"]),
        ({"forces": 1 / 13.6057}, ["forces", "Ry"]),
        ({"forces": 0.0}, ["forces", "wrong"]),
        ({"stress": None}, ["no stress", "sscha.evaluator", "sscha.cell: fixed"]),
        ({}, []),
    ],
)
def test_what_is_wrong_is_named(crystal, twist, words):
    def check():
        check_calculator(CalculatorEvaluator(Twisted(**twist)), CRYSTALS[crystal], stress=True)

    if not words:
        check()
        return
    with refused(*words):
        check()


@pytest.mark.parametrize(
    "calculator",
    [EMT(), LennardJones(sigma=2.3, epsilon=0.3), MorsePotential(r0=2.6)],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("seed", range(3))
def test_sound_calculators_pass_in_and_out_of_equilibrium(calculator, seed):
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(
        atoms.cell.array @ (np.eye(3) + rng.uniform(-0.04, 0.04, (3, 3))), scale_atoms=True
    )
    atoms.rattle(0.1, rng=rng)
    check_calculator(CalculatorEvaluator(calculator), atoms, stress=True)


def test_structures_as_a_search_makes_them_raise_no_false_alarm():
    """Forces of some eV/A, whose parts cancel in the work of a random step."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        atoms = Atoms(
            "Cu4Al4",
            scaled_positions=rng.uniform(size=(8, 3)),
            cell=5.0 * np.eye(3) + rng.uniform(-0.5, 0.5, (3, 3)),
            pbc=True,
        )
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(8, 1)]
        if distances.min() > 1.2:
            check_calculator(CalculatorEvaluator(EMT()), atoms, stress=True)


class Shuffled(EMT):
    """EMT with its stress in another order or with shears times a factor, or with a constant
    force (3,) eV/A on every atom."""

    def __init__(self, order=range(6), shear=1.0, drift=(0.0, 0.0, 0.0)):
        super().__init__()
        self.order, self.shear, self.drift = list(order), shear, np.array(drift)

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        self.results["forces"] = self.results["forces"] + self.drift
        if "stress" in self.results:
            factors = np.repeat([1.0, self.shear], 3)
            self.results["stress"] = (factors * self.results["stress"])[self.order]


@pytest.mark.parametrize("crystal", CRYSTALS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"order": (0, 1, 2, 5, 4, 3)}, "in another order"),
        ({"order": (2, 1, 0, 3, 4, 5)}, "normal stresses are in another order"),
        ({"order": (1, 0, 2, 3, 4, 5)}, "normal stresses are in another order"),
        ({"order": (1, 2, 0, 3, 4, 5)}, "normal stresses are in another order"),
        ({"order": (0, 1, 2, 4, 5, 3)}, "in another order"),
        ({"order": (0, 5, 4, 1, 3, 2)}, "stress"),
        ({"shear": 2.0}, "twice what they should be"),
        ({"shear": 0.5}, "half what they should be"),
        ({"shear": -1.0}, "shear stresses"),
        ({"shear": 0.0}, "shear stresses"),
        ({"drift": (0.1, 0.0, 0.05)}, "do not add up to zero"),
    ],
)
def test_stresses_of_another_order_and_constant_forces_are_named(crystal, fault, words):
    """A strain along no axis hardly sees a shear, one of the volume not which normal stress is
    which, and displacements without a mean no drift."""
    evaluator = CalculatorEvaluator(Shuffled(**fault))
    with pytest.raises(InputError, match=words):
        check_calculator(evaluator, CRYSTALS[crystal], stress=True)


def test_a_force_that_the_energy_has_too_is_none_of_its_faults():
    """An external field: atoms that are shifted gain what the forces say."""

    class Field(EMT):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            self.results["energy"] -= 0.1 * self.atoms.positions[:, 0].sum()
            self.results["forces"] = self.results["forces"] + [0.1, 0.0, 0.0]

    check_calculator(CalculatorEvaluator(Field()), HCP, stress=False)


def test_every_way_to_a_calculator_asks(tmp_path):
    keys = parse_settings({"pressure": 0.0, "sscha": {"n_configs": 20}})
    for call in (
        lambda: free_energy(HCP, Twisted(stress=GPA), n_configs=20),
        lambda: relax(CalculatorEvaluator(Twisted(stress=GPA)), [HCP]),
        lambda: rank_structures([HCP], Twisted(stress=GPA), keys, tmp_path),
    ):
        with pytest.raises(InputError, match="stress is in GPa"):
            call()


@pytest.mark.parametrize("n", [1, 2])
def test_forces_of_another_number_of_atoms_are_refused(n):
    """One row was taken for every atom."""

    class Fewer(EMT):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            self.results["forces"] = self.results["forces"][:-1]

    with pytest.raises(InputError, match=rf"forces of shape \({2 * n - 1}, 3\) for {2 * n} atoms"):
        check_calculator(CalculatorEvaluator(Fewer()), HCP.repeat((n, 1, 1)), stress=True)


def test_it_is_asked_once_and_a_calculator_that_fails_is_left_to_who_uses_it():
    evaluator = CalculatorEvaluator(EMT())
    assert [check_calculator(evaluator, HCP, stress=False) for _ in range(2)] == [3, 0]
    assert [check_calculator(evaluator, HCP, stress=True) for _ in range(2)] == [9, 0]
    assert check_calculator(CalculatorEvaluator(EMT()), bulk("Fe"), stress=True) == 0
    molecule = Atoms("Cu2", positions=[[0, 0, 0], [2.3, 0, 0]])
    assert check_calculator(CalculatorEvaluator(EMT()), molecule, stress=True) == 3


def test_a_fixed_cell_needs_no_stress(tmp_path):
    options = {
        "temperature": 300.0,
        "cell": "fixed",
        "supercell": (2, 2, 1),
        "n_configs": 40,
        "max_populations": 6,
    }
    found = free_energy(HCP, Twisted(stress=None), directory=tmp_path / "a", **options)
    usual = free_energy(HCP, EMT(), **options)
    assert found.status == usual.status and found.gibbs == pytest.approx(usual.gibbs, abs=1e-10)
    assert np.isnan(found.stress).all() and np.isnan(found.pressure)
    assert (
        free_energy(HCP, Twisted(stress=None), directory=tmp_path / "a", **options).gibbs
        == found.gibbs
    ), "from the folder"
    keys = parse_settings(
        {"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": {**options, "supercell": [2, 2, 1]}}
    )
    (candidate,) = rank_structures(
        [HCP], Twisted(stress=None), keys, tmp_path / "b", relax=False, workers=1
    )
    assert candidate.gibbs is not None and candidate.status != "failed", candidate.reason
    with pytest.raises(InputError, match="no stress"):
        free_energy(HCP, Twisted(stress=None), **{**options, "cell": "variable"})


def test_a_relaxation_at_fixed_cell_needs_no_stress_and_one_of_the_cell_says_so():
    moved = HCP.copy()
    moved.positions[1] += 0.1
    (found,) = relax(CalculatorEvaluator(Twisted(stress=None)), [moved], relax_cell=False)
    assert found.converged and not found.failed and np.isnan(found.stress).all()
    with pytest.raises(InputError, match="no stress"):
        relax(CalculatorEvaluator(Twisted(stress=None)), [moved])


class LikePypolymlp(EMT):
    """Results as those of the ASE calculator of pypolymlp 0.22.1: its stress is eV per cell, with
    the other sign, and the shears in the order xy, yz, zx."""

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        if "stress" in self.results:
            shuffled = self.results["stress"][[0, 1, 2, 5, 3, 4]]
            self.results["stress"] = -self.atoms.get_volume() * shuffled


@pytest.mark.parametrize("a", [3.3, 3.5, 3.62, 3.8])
def test_what_is_wrong_with_the_stress_of_pypolymlp_is_named(a):
    """The shears, in another order too, must not hide the unit."""
    with pytest.raises(InputError, match="other sign.*of the cell, not divided by its volume"):
        check_calculator(CalculatorEvaluator(LikePypolymlp()), bulk("Cu", a=a), stress=True)
