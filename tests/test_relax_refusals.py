"""What a relaxation refuses, and what it says of what goes wrong inside it."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixedPlane

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator, Evaluation
from magus_anharmonic.potential import optimizers
from magus_anharmonic.potential.guards import n_pieces
from magus_anharmonic.potential.relax import relax

BOTH = pytest.mark.parametrize("optimizer", ["bfgs", "ase", "fire"])


class Loud:
    """EMT with forces (and stress) times ``factor`` for structures of two atoms."""

    model_id = "loud"

    def __init__(self, factor, only="forces"):
        self.factor, self.only = factor, only

    def evaluate(self, structures):
        found = CalculatorEvaluator(EMT()).evaluate(structures)
        loud = [len(atoms) == 2 for atoms in structures]
        forces = [
            np.full_like(f, self.factor) if two and self.only == "forces" else f
            for f, two in zip(found.forces, loud, strict=True)
        ]
        stress = np.where(
            np.array(loud)[:, None, None] & (self.only == "stress"), self.factor, found.stress
        )
        return Evaluation(found.energy, forces, stress)


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": None}, {"optimizer": [["ase"]]}, {"optimizer": ""}, {"optimizer": []}, {"optimizer": 3}, {"optimizer": "gd"}, {"max_steps": 0}, {"force_tolerance": 0},
        {"pressure": None}, {"pressure": "100"}, {"pressure": [100.0]}, {"pressure": 1e300}, {"pressure": -1e300}, {"pressure": 2001},
        {"max_steps": np.nan}, {"max_steps": np.inf}, {"max_steps": 2.5}, {"max_steps": None},
        {"perturbations": np.nan}, {"perturbations": 1.5}, {"perturbations": -1}, {"perturbations": None}, {"perturbations": 1, "fix_symmetry": True},
        {"force_tolerance": "0.1"}, {"force_tolerance": np.nan}, {"stress_tolerance": None}, {"max_move": [1]}, {"edges_in_flight": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_that_makes_no_sense_is_named_in_one_line(arguments):
    with pytest.raises(InputError, match=f"^{next(iter(arguments))} = ") as refused:
        relax(CalculatorEvaluator(EMT()), [bulk("Cu")], **arguments)
    assert len(refused.value.problems) == 1


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(InputError) as refused:
        relax(CalculatorEvaluator(EMT()), [], pressure=None, optimizer=None, max_steps=np.nan)
    assert [line.split(" = ")[0] for line in refused.value.problems] == [
        "max_steps",
        "pressure",
        "optimizer",
    ]


def test_numbers_of_numpy_and_a_tension_are_fine():
    (result,) = relax(
        CalculatorEvaluator(EMT()),
        [bulk("Cu")],
        np.float32(-1.0),
        max_steps=np.int64(9),
        force_tolerance=np.float64(1),
    )
    assert result.converged


@BOTH
@pytest.mark.parametrize(
    ("factor", "only", "reason"),
    [(1e200, "forces", "forces of 1.0e+200"), (1e80, "stress", "stress of 1.0e+80")],
)
def test_absurd_forces_or_stress_fail_one_structure_only(factor, only, reason, optimizer):
    results = relax(
        Loud(factor, only),
        [bulk("Cu"), bulk("Cu").repeat((2, 1, 1)), bulk("Al")],
        optimizer=optimizer,
    )
    assert [result.failed for result in results] == [False, True, False] and reason in results[
        1
    ].reason
    assert results[0].converged and results[2].converged


@pytest.mark.parametrize("method", ["step", "learn", "predicted_decrease"])
def test_a_step_rule_that_raises_fails_its_structure_only(method, monkeypatch):
    def raises(self, *arguments):
        if len(self.hessian) == 15:
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return original(self, *arguments)

    original = getattr(optimizers.Bfgs, method)
    monkeypatch.setattr(optimizers.Bfgs, method, raises)
    two = bulk("Cu", a=3.65).repeat((2, 1, 1))
    two.rattle(0.1, seed=1)
    perturbations = int(method == "predicted_decrease")
    results = relax(
        CalculatorEvaluator(EMT()),
        [bulk("Cu"), two, bulk("Al")],
        optimizer="bfgs",
        perturbations=perturbations,
    )
    assert (
        [result.failed for result in results] == [False, not perturbations, False]
        and results[0].converged
        and results[2].converged
    )
    if perturbations:
        assert results[1].converged, "the minimum before the perturbation is kept"
    else:
        assert results[1].reason == "the next step fails: Eigenvalues did not converge"
        assert not results[1].converged and np.isfinite(results[1].enthalpy)


def test_after_a_step_rule_that_raises_the_next_optimiser_has_its_turn(monkeypatch):
    def raises(self, gradient):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(optimizers.Bfgs, "step", raises)
    (result,) = relax(CalculatorEvaluator(EMT()), [bulk("Cu", a=3.7)], optimizer=["bfgs", "ase"])
    assert result.converged and not result.failed and result.reason == ""


def test_the_reason_of_a_structure_does_not_name_another_number(potential):
    unknown = Atoms("Cm", cell=[4] * 3, pbc=True)
    h3 = Atoms("H3", positions=[[0, 0, 0], [0, 0, 1], [0, 1, 0]], cell=[3] * 3, pbc=True)
    results = potential.relax([h3, h3, unknown], 100.0, max_steps=1)
    assert [result.failed for result in results] == [False, False, True]
    assert (
        results[2].reason.startswith("atomic number 96 is outside 1 to 94")
        and "structure" not in results[2].reason
    )


def test_an_evaluator_that_names_structure_0_elsewhere_in_its_words_means_the_structure():
    def evaluate(structures):
        raise ValueError("structure 0 (1 atoms) does not fit; structure 01 neither")

    (result,) = relax(SimpleNamespace(model_id="full", evaluate=evaluate), [bulk("Cu")])
    assert result.reason == "the structure (1 atoms) does not fit; structure 01 neither"


def test_a_constraint_that_cannot_be_kept_fails_its_structure_alone():
    planar, free = bulk("Cu"), bulk("Cu")
    planar.set_constraint(FixedPlane([0], (0, 0, 1)))
    failed, fine = relax(CalculatorEvaluator(EMT()), [planar, free], max_steps=30)
    assert (
        failed.failed
        and failed.reason
        == "the constraint FixedPlane cannot be kept, only FixAtoms can; take it out"
    )
    assert fine.converged


@BOTH
@pytest.mark.parametrize("periodic", [True, False], ids=["bulk", "slab"])
def test_held_atoms_stay_and_the_energy_is_that_of_the_structure_that_comes_back(
    optimizer, periodic
):
    """The fault: a slab relaxed whole, and was handed back with its lower half where it had been,
    under the energy of the other one."""
    start = bulk("Cu", cubic=True).repeat((1, 1, 2))
    if not periodic:
        start.center(vacuum=6.0, axis=2)
        start.pbc = (True, True, False)
    start.rattle(0.15, seed=3)
    start.set_constraint(FixAtoms([0, 1, 2]))
    evaluator = CalculatorEvaluator(EMT())
    end = relax(evaluator, [start], 2.0 if periodic else 0.0, optimizer=optimizer, max_steps=300)[0]
    assert end.converged and np.linalg.norm(end.forces[:3], axis=1).max() > 0.1, (
        "only the free atoms relax"
    )
    where = start.get_scaled_positions(wrap=False) @ end.atoms.cell.array
    moved = np.linalg.norm(end.atoms.positions - where, axis=1)
    assert moved[:3].max() < 1e-9 < 0.05 < moved[3:].max()
    assert end.energy == pytest.approx(evaluator.evaluate([end.atoms]).energy[0], abs=1e-9)


def test_a_relaxation_with_species_the_model_never_saw_says_so_even_where_it_converged():
    evaluator = CalculatorEvaluator(EMT())
    evaluator.species_seen = {13, 29}  # type: ignore[attr-defined]
    strained = bulk("Au").repeat((2, 1, 1))
    strained.rattle(0.2, seed=1)
    seen, unseen, open_end = relax(
        evaluator, [bulk("Cu"), bulk("Au"), strained], optimizer="bfgs", max_steps=3
    )
    assert seen.reason == ""
    assert (
        unseen.converged
        and unseen.reason == "the model was never trained on Au: its numbers mean nothing there"
    )
    assert (
        not open_end.converged
        and "not converged after 3 steps" in open_end.reason
        and "never trained on Au" in open_end.reason
    )


class Stretch:
    """Pushes the upper half of the atoms up along z (Angstrom) as far as ``end``, every atom with
    its neighbours in its half."""

    model_id = "stretch"

    def __init__(self, end):
        self.end = end

    def evaluate(self, structures):
        gap = [self.end - (a.positions[len(a) // 2, 2] - a.positions[0, 2]) for a in structures]
        forces = [
            np.outer(np.repeat([-1, 1], len(a) // 2), [0, 0, g])
            for a, g in zip(structures, gap, strict=True)
        ]
        return Evaluation(np.array(gap) ** 2, forces, np.zeros((len(gap), 3, 3)))


def pairs_of_molecules(distance):
    positions = [[0, 0, 0], [0.8, 0, 0], [0, 0, distance], [0.8, 0, distance]]
    return Atoms("H4", positions=positions, cell=[3.0, 3.0, 16.0], pbc=True)


@BOTH
@pytest.mark.parametrize(
    ("begin", "end", "dissolved"),
    [(2.5, 7.5, True), (2.5, 4.5, False), (4.5, 7.5, False), (7.5, 7.0, False)],
)
def test_pieces_that_drift_apart_are_called_dissolved_unless_they_began_so(
    begin, end, dissolved, optimizer
):
    (result,) = relax(
        Stretch(end),
        [pairs_of_molecules(begin)],
        optimizer=optimizer,
        relax_cell=False,
        max_steps=400,
    )
    assert result.failed == dissolved, result.reason
    assert ("falls into pieces that are more than 5 A" in result.reason) == dissolved


@pytest.mark.parametrize(
    ("cell", "pbc", "count"),
    [
        ([3, 3, 3], True, 1), ([3, 3, 6], True, 2), ([3, 6, 6], True, 4), ([6, 6, 6], True, 8),
        ([[3, 0, 0], [0, 3, 0], [300, 600, 3]], True, 1), ([3, 3, 6], [True, True, False], 1), ([6, 6, 6], [True, True, False], 4),
        (None, False, 1),
    ],
)  # fmt: skip
def test_layers_chains_and_molecules_of_one_per_cell_are_pieces_of_the_crystal(cell, pbc, count):
    assert (
        n_pieces(Atoms("H2", positions=[[0, 0, 0], [0.5, 0.5, 0]], cell=cell, pbc=pbc), 5.0)
        == count
    )
