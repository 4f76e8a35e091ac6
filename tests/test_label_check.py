"""Labels that cannot be right: found, named, and never learned from."""

import re

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from crystals import h3s

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.potential.label_check import outliers
from magus_anharmonic.units import BOHR, EV_PER_A3_IN_GPA, RYDBERG

MODEL = {"sigma": 1.0, "epsilon": 0.30, "rc": 3.0}
TRUTH = {"sigma": 1.0, "epsilon": 0.33, "rc": 3.0}


def label(atoms, *, energy=1.0, forces=1.0, stress=1.0, add=0.0):
    """A label by the truth, counted from other atoms than the model's energies are; factors and
    ``add`` (eV) make it wrong."""
    atoms = atoms.copy()
    atoms.calc = LennardJones(**TRUTH)
    zeros = float(np.sum(np.where(atoms.numbers == 1, 3.0, -7.0)))
    results = {
        "energy": energy * (atoms.get_potential_energy() + zeros) + add,
        "forces": forces * atoms.get_forces(),
        "stress": stress * atoms.get_stress(),
    }
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def structure(seed):
    rng = np.random.default_rng(seed)
    atoms = Atoms(
        ["S4", "S2H2", "SH3"][seed % 3],
        scaled_positions=[[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
        cell=1.7 * np.eye(3),
    )
    atoms.pbc = True
    atoms.set_cell(
        atoms.cell.array @ (np.eye(3) + rng.uniform(-0.05, 0.05, (3, 3))), scale_atoms=True
    )
    atoms.positions += rng.normal(0, 0.04, (4, 3))
    return atoms


@pytest.fixture(scope="module")
def model():
    return as_evaluator(LennardJones(**MODEL))


def labels(wrong, n=30):
    return [label(structure(i), **wrong.get(i, {})) for i in range(n)]


def test_sound_labels_of_another_code_with_other_zeros_of_energy_are_all_kept(model):
    assert outliers(labels({}), model) == {} == outliers(labels({}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"add": 30.0}, r"energy is \+7\.\d* eV/atom"),
        ({"add": -1e6}, "energy is -2.5e"),
        ({"energy": 0.0}, "the energy is 0"),
        ({"forces": 1000.0}, "its forces differ .* meV/A instead of eV/A"),
        ({"forces": -1000.0}, "its forces differ .* other sign"),
        ({"stress": EV_PER_A3_IN_GPA}, "its stress differ .*in GPa instead"),
        ({"forces": BOHR / RYDBERG}, "its forces differ .*in Ry/bohr instead"),
        ({"forces": 0.0}, "its forces differ .*0, as where they were left out"),
        ({"stress": 0.0}, "its stress differ .*0, as where they were left out"),
        ({"energy": 0.25}, "its energy is"),
    ],
)
def test_a_few_wrong_labels_are_found_and_no_other(model, fault, words):
    places = {3, 11, 22} if "energy" not in fault else {4}
    found = outliers(labels(dict.fromkeys(places, fault)), model)
    assert set(found) == places
    assert all(re.search(words, reason) for reason in found.values()), found


@pytest.mark.parametrize(("correlation", "places"), [(0.83, set()), (0.99, {5})])
def test_forces_that_the_model_has_at_twice_their_size_need_not_be_in_another_unit(
    monkeypatch, correlation, places
):
    """A random crystal far from everything that a model of 150 labels knew was left out of its
    test, as if pw.x had given its forces in eV/bohr."""
    monkeypatch.setitem(TRUTH, "epsilon", 0.0165)
    labelled, model = labels({}), as_evaluator(LennardJones(**MODEL | {"epsilon": 0.015}))
    forces = labelled[5].calc.results["forces"]
    other = np.random.default_rng(0).normal(size=forces.shape)
    other -= forces * np.sum(other * forces) / np.sum(forces**2)
    aside = np.linalg.norm(forces) / np.linalg.norm(other) * np.sqrt(correlation**-2 - 1)
    labelled[5].calc.results["forces"] = 0.5291772 * (forces + aside * other)
    assert set(outliers(labelled, model)) == places


def test_a_third_of_the_energies_may_be_absurd(model):
    places = {i for i in range(30) if i % 4 == 1} | {2, 12}
    assert set(outliers(labels({i: {"add": 30.0 * (1 + i % 2)} for i in places}), model)) == places


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"stress": -1.0}, "the stress of most of the 30 labels .*: of the other sign"),
        ({"stress": EV_PER_A3_IN_GPA}, "the stress .*: in GPa instead of eV/A"),
        ({"stress": -EV_PER_A3_IN_GPA}, "the stress .*: of the other sign than ASE's and in GPa"),
        ({"forces": -1.0}, "the forces .*: of the other sign"),
        ({"forces": 0.5291772}, "the forces .*: in eV/bohr"),
        ({"forces": 0.0}, "the forces of 30 of the 30 labels are 0"),
        ({"stress": 0.0}, "the stress of 30 of the 30 labels are 0"),
        ({"energy": 1 / RYDBERG}, "the energies .*: in Ry"),
        ({"energy": 0.5 / RYDBERG}, "the energies .*: in Ha"),
        ({"energy": -1.0}, "the energies .*: of the other sign"),
        ({"energy": 0.25}, "the energies .*: per atom instead of per structure"),
    ],
)
def test_what_all_labels_share_is_refused_with_its_likely_cause(model, fault, words):
    with pytest.raises(InputError, match=words):
        outliers(labels(dict.fromkeys(range(30), fault)), model)


@pytest.mark.parametrize(
    ("key", "order"), [("forces", [2, 1, 0]), ("forces", [1, 2, 0]), ("stress", [1, 0, 2, 4, 3, 5])]
)
def test_labels_along_other_axes_are_refused(model, key, order):
    frames = labels({})
    for atoms in frames:
        atoms.calc.results[key] = atoms.calc.results[key][..., order]
    named = "z, y, x" if order == [2, 1, 0] else "y, "
    with pytest.raises(InputError, match=f"the {key} of most .* along other axes .*: {named}"):
        outliers(frames, model)


def test_a_stress_per_cell_is_refused(model):
    frames = labels({})
    for atoms in frames:
        atoms.calc.results["stress"] = atoms.calc.results["stress"] * atoms.get_volume()
    with pytest.raises(InputError, match="that of the cell, in eV"):
        outliers(frames, model)


def test_a_calculation_that_says_it_did_not_converge_is_left_out(model):
    frames = labels({})
    wrong = {
        "scf_converged": False,
        "not_converged": True,
        "unconverged": "T",
        "electronic_convergence": "no",
        "converged_ionic": 0,
    }
    right = {"converged": True, "unconverged": False, "convergence": 1e-6, "converge": "no"}
    for number, (key, value) in enumerate([*wrong.items(), *right.items()]):
        frames[number].info[key] = value
    frames[20].info["converged"] = np.array([True, False])
    assert set(outliers(frames, model)) == {*range(len(wrong)), 20}


def test_absurd_energies_of_a_round_are_set_aside_and_a_model_is_still_kept(tmp_path):
    """+1e6 eV on some labels: no model was ever kept again; +30 eV: it was learned."""
    pytest.importorskip("mattersim")
    from magus_anharmonic.io.files import read_jsonl
    from magus_anharmonic.labelers import CallableLabeler
    from magus_anharmonic.learning.dataset import LabelStore
    from magus_anharmonic.learning.learn import learn
    from magus_anharmonic.potential import load
    from magus_anharmonic.settings import LearningSettings, parse

    potential = load("h3s-gpaw-small", device="cpu")

    def faulty(structures):
        found = potential.evaluate(structures)
        numbers = zip(found.energy, found.forces, found.stress, strict=True)
        results = [
            {"energy": float(e) + 0.002 * len(f), "forces": f, "stress": s} for e, f, s in numbers
        ]
        for place, fault in ((1, 30.0), (4, 1e6), (7, -1e6)):
            results[place]["energy"] += fault
        return results

    population = [h3s() for _ in range(8)]
    for n, atoms in enumerate(population):
        atoms.set_cell(atoms.cell.array * (1 + 0.025 * n), scale_atoms=True)
    settings = parse(
        LearningSettings,
        {"labeler": {"calculator": "gpaw"}, "n_sample": 6, "n_perturb": 2, "epochs": 1},
    )
    store = LabelStore(tmp_path / "labels")
    labeler = CallableLabeler(faulty, description="faulty", settings={})
    options = {
        "generation": 1,
        "potential": potential,
        "settings": settings,
        "labeler": labeler,
        "run_dir": tmp_path,
        "seed": 3,
    }
    found = learn(population, store=store, **options)
    assert found.n_labels == 9 and found.n_failures == 3
    reasons = [record["reason"] for record in read_jsonl(tmp_path / "failures.jsonl")]
    assert len(reasons) == 3 and all("eV/atom away" in reason for reason in reasons)
    assert max(found.metrics["old"][side]["energy_rmse"] for side in found.metrics["old"]) < 0.01
    (tmp_path / "metrics.jsonl").unlink()  # as a kill before the end of the round leaves it
    (tmp_path / "checkpoints" / "gen1.pth").unlink()
    resumed = learn(population, store=LabelStore(tmp_path / "labels"), **options)
    assert resumed.model_id == found.model_id and resumed.n_failures == 3
    again = LabelStore(tmp_path / "labels")
    assert len(again) == 12 and len(again.labels()) == 9, "kept, and never used"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({}, ""),
        ({"forces": 1000.0}, "its forces .* times those of the model .*meV/A instead"),
        ({"forces": -1.0}, "its forces .*other sign"),
        ({"stress": -1.0}, "its stress .*other sign"),
        ({"stress": EV_PER_A3_IN_GPA}, "its stress .*in GPa instead"),
        ({"stress": -10 * EV_PER_A3_IN_GPA}, "its stress .*other sign .*in kbar"),
    ],
)
def test_one_label_or_two_are_compared_with_the_model_alone(model, n, fault, words):
    """Fewer than three were not looked at."""
    frames = []
    for number in range(n):
        atoms = structure(number)
        atoms.set_cell(0.9 * atoms.cell.array, scale_atoms=True)
        frames.append(label(atoms, **fault))
    found = outliers(frames, model)
    assert sorted(found) == (list(range(n)) if words else [])
    assert all(re.search(words, reason) for reason in found.values()), found
