"""The free energy F(R, cell) as a surface of its own: SSCHA as a labeler, models of its labels, and
that nobody takes one surface for the other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from exact_crystals import triclinic
from test_fixed_centroids import exactly

from magus_anharmonic import free_energy, load
from magus_anharmonic.energy_surface import FreeEnergySurface, surface_of_labels
from magus_anharmonic.errors import InputError, LabelerError
from magus_anharmonic.labelers import available, code_of, get_labeler
from magus_anharmonic.labelers.base import Label, Labeler
from magus_anharmonic.labelers.sscha import labels_of_run
from magus_anharmonic.labelers.worker import run_job
from magus_anharmonic.learning.dataset import LabelStore, labelled, plan_label, read_labels
from magus_anharmonic.learning.learn import _gather
from magus_anharmonic.learning.round import Round
from magus_anharmonic.paper.ensemble_errors import measure_locked
from magus_anharmonic.potential import checkpoint, loading
from magus_anharmonic.potential.finetune import finetune
from magus_anharmonic.potential.label_check import outliers
from magus_anharmonic.potential.labelled import weights_by_error
from magus_anharmonic.potential.train import TrainRecipe, train_file
from magus_anharmonic.ranking.evaluators import evaluator_of, open_evaluator
from magus_anharmonic.settings import (
    CalculatorSettings,
    LabelerSettings,
    LearningSettings,
    Settings,
)
from magus_anharmonic.structures import structure_id

ROOT = Path(__file__).parents[1]
MODEL = "h3s-gpaw-small"
ARGUMENTS = {"evaluator": MODEL, "temperature": 0, "supercell": [1, 1, 1], "n_configs": 40}


ONE_CELL = {"evaluator": MODEL, "supercell": [1, 1, 1]}
"""How ``sscha`` certifies models of `labels`."""


def h3s(seed, size=0.05):
    """About Im-3m at 140 GPa, in P1."""
    cell = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) * 1.54
    sites = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    atoms = Atoms("SH3", scaled_positions=sites, cell=cell, pbc=True)
    atoms.rattle(size, seed=seed)
    return atoms


def recipe_of(**changes):
    settings = LabelerSettings(calculator="sscha", arguments=ARGUMENTS | changes)
    return code_of("sscha").recipe(settings)


def job(atoms, recipe, folder):
    return run_job({"task": "label", "recipe": recipe, "atoms": atoms, "directory": str(folder)})


@pytest.fixture(scope="module")
def potential():
    return load(MODEL, device="cpu")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Four labels as they come out of a store."""
    store = LabelStore(tmp_path_factory.mktemp("labels"))
    recipe = recipe_of()
    for seed in range(4):
        atoms = h3s(seed)
        answer = job(atoms, recipe, tmp_path_factory.mktemp("scratch") / "run")
        assert answer["ok"], answer
        numbers = (answer[name] for name in ("energy", "free_energy", "forces", "stress"))
        found = Label(atoms, *numbers, recipe.settings_hash, 1.0, info=answer["info"])
        name = f"p-{seed}"
        keys = dict(generation=1, parent=name, family=name, side="train", kind="distorted")
        plan_label(atoms, **keys, distortion_seed="0")
        store.add(labelled(atoms, found))
    store.close_batch(1)
    return LabelStore(store.directory).labels()


@pytest.fixture(scope="module")
def model(labels, tmp_path_factory):
    """A model of the labels: three epochs from the potential."""
    out = tmp_path_factory.mktemp("model") / "f.pth"
    finetune(MODEL, labels[:3], labels[3:], {"epochs": 3}, out=out, seed=1, device="cpu")
    return load(out, device="cpu")


def test_a_label_is_the_run_at_fixed_centroids_with_its_errors(labels, potential):
    label = next(atoms for atoms in labels if atoms.info["parent"] == "p-0")
    key = [0, int(structure_id(h3s(0)), 16)]
    seed = int(np.random.default_rng(key).integers(2**31))
    run = free_energy(
        h3s(0), potential, supercell=(1, 1, 1), n_configs=40, centroids="fixed", seed=seed
    )
    assert label.get_potential_energy() == pytest.approx(4 * run.gibbs_raw, abs=1e-6)
    assert label.get_forces() == pytest.approx(run.force, abs=1e-6)
    assert label.get_stress(voigt=False) == pytest.approx(run.stress, abs=1e-8)
    assert label.info["label_energy_error"] == pytest.approx(4 * run.gibbs_error, rel=1e-6)
    assert label.info["finite_size"] == pytest.approx(run.finite_size, rel=1e-6)
    surface = surface_of_labels(labels)
    assert surface == FreeEnergySurface(
        0.0, {"H": 1.008, "S": 32.06}, [[1, 1, 1]][0], potential.model_id
    )


def test_the_hash_is_that_of_the_surface_and_holds_the_potential(potential, tmp_path):
    path = tmp_path / "elsewhere.pth"
    path.write_bytes(checkpoint.resolve(MODEL).read_bytes())
    first = recipe_of().settings_hash
    assert recipe_of(evaluator=str(path)).settings_hash == first
    assert recipe_of(temperature=300).settings_hash != first
    assert recipe_of(masses={"H": 2.014}).settings_hash != first
    module, _ = checkpoint.read(path)
    with_other = list(module.parameters())[0]
    with_other.data += 1e-3
    checkpoint.save(module, path)
    assert recipe_of(evaluator=str(path)).settings_hash != first


def test_settings_of_the_labeler_may_stand_in_one_block_and_wrong_ones_are_named(tmp_path):
    assert available("sscha")[0]
    block = {"calculator": "sscha", "timeout": 60, **ARGUMENTS, "nConfigs": 50}
    del block["n_configs"]
    settings = LabelerSettings.model_validate(block)
    assert settings.arguments == {**ARGUMENTS, "n_configs": 50} and settings.timeout == 60
    for change, words in (
        ({"evaluator": None}, "must be the checkpoint of a potential"),
        ({"temperature": [0, 300]}, "one temperature"),
        ({"n_config": 20}, "n_config: is no key of SSCHA labels"),
        ({"n_configs": 21}, "n_configs"),
    ):
        wrong = LabelerSettings(calculator="sscha", arguments=ARGUMENTS | change)
        with pytest.raises(InputError, match=words):
            get_labeler(wrong, tmp_path)


def test_a_structure_whose_run_does_not_end_has_no_label_and_a_reason(tmp_path):
    answer = job(h3s(0), recipe_of(max_populations=1), tmp_path / "run")
    assert not answer["ok"] and not answer["machine_error"]
    assert "SSCHA at fixed centroids unconverged: not converged after 1 pop" in answer["reason"]


def test_training_sees_well_known_labels_more_often(labels):
    known = [atoms.copy() for atoms in labels[:2]]
    assert weights_by_error([h3s(0)]) is None
    for atoms, error in zip(known, (4e-3, 0.0), strict=True):
        atoms.info["label_energy_error"] = error  # 1 meV/atom, and none
    assert weights_by_error(known) == pytest.approx([2 / 3, 4 / 3])


def test_forces_that_point_the_other_way_than_the_potential_s_are_sound(labels, potential):
    turned = []
    for atoms in labels:
        found = potential.evaluate([atoms])
        other = atoms.copy()
        numbers = dict(energy=atoms.get_potential_energy(), stress=atoms.get_stress())
        other.calc = SinglePointCalculator(other, forces=-found.forces[0], **numbers)
        turned.append(other)
    assert outliers(turned, potential) == {} == outliers(labels, potential)
    for atoms in turned:
        del atoms.info["surface"]
    with pytest.raises(InputError, match="sign"):
        outliers(turned, potential)


def in_setting_of(reference, atoms):
    """The same crystal with lattice vectors and images as those of ``reference``, near it."""
    change = np.rint(atoms.cell.array @ np.linalg.inv(reference.cell.array))
    atoms = atoms.copy()
    atoms.set_cell(np.linalg.inv(change) @ atoms.cell.array)
    apart = atoms.get_scaled_positions(wrap=False) - reference.get_scaled_positions(wrap=False)
    atoms.positions -= np.rint(apart - apart.mean(axis=0)) @ atoms.cell.array
    return atoms


class Finder(Labeler):
    """Makes nothing; finds what a run on the toy crystal has left."""

    settings_hash = "a1b2c3d4e5f6"

    def __init__(self, surface):
        self.surface = surface

    def found(self, folder, known=frozenset()):
        for result in folder.glob("**/result.json"):
            yield from labels_of_run(result.parent, self.surface, self.settings_hash, known)


def test_populations_of_a_relaxing_run_are_labels_where_their_force_constants_had_relaxed(tmp_path):
    crystal = triclinic()
    folder = tmp_path / "sscha" / "one"
    options = dict(supercell=(2, 1, 1), n_configs=400, seed=2, reference_spacing=0.5)
    run = free_energy(crystal.atoms, crystal, 3.0, directory=folder, **options)
    surface = FreeEnergySurface(0.0, {}, [2, 1, 1], crystal.model_id)
    found = list(Finder(surface).found(tmp_path))
    assert 1 < len(found) <= run.n_populations
    deviations = []
    for atoms, label in found:
        value, force, stress = exactly(crystal, in_setting_of(crystal.atoms, atoms), (2, 1, 1))
        assert np.abs(force).max() > 1e-4  # on the way
        deviations.append((label.energy - value) / label.info["label_energy_error"])
        deviations += list((label.forces - force).ravel() / label.info["label_force_error"])
        deviations += list((label.stress - stress).ravel() / label.info["label_stress_error"])
    assert 0.5 < np.sqrt(np.mean(np.square(deviations))) < 1.5
    assert np.abs(deviations).max() < 4.5
    store = LabelStore(tmp_path / "labels")
    settings = LearningSettings(labeler=LabelerSettings(calculator="sscha", arguments=ARGUMENTS))
    for _ in range(2):  # nothing twice
        _gather(Round(1, settings, store, 0), Finder(surface), tmp_path)
        assert len(store) == len(found)
    assert {atoms.info["kind"] for atoms in store.labels()} == {"population"}
    have = {structure_id(atoms) for atoms, _ in found}
    assert not list(Finder(surface).found(tmp_path, have))
    for name, value in (
        ("temperature", 300.0),
        ("supercell", [2, 2, 1]),
        ("masses", {"H": 2.014}),
        ("potential", "another"),
    ):
        assert not list(Finder(replace(surface, **{name: value})).found(tmp_path))


def test_a_model_is_a_stock_checkpoint_that_says_what_it_is_of(model, labels, potential):
    from mattersim.forcefield.potential import Potential as Stock

    stock = Stock.from_checkpoint(str(model.path), device="cpu", load_training_state=False)
    assert stock.model is not None
    content = checkpoint.read(model.path)[1]
    assert content["surface"]["potential"] == potential.model_id
    assert content["surface"]["finite_size"] == "not included"
    assert model.surface == surface_of_labels(labels) and model.double().surface == model.surface
    assert potential.surface is None


def refusals(model, labels, potential, folder):
    """What must be refused, and the words."""
    dft = []
    for atoms in labels:
        atoms = atoms.copy()
        del atoms.info["surface"]
        found = potential.evaluate([atoms])
        numbers = dict(energy=found.energy[0], forces=found.forces[0], stress=found.stress[0])
        atoms.calc = SinglePointCalculator(atoms, **numbers)
        dft.append(atoms)
    block = {"calculator": "mattersim", "checkpoint": str(model.path)}
    free, stage = {"surface": "free-energy"}, {"epochs": 1}
    heavy = h3s(0)
    heavy.set_masses([32.06, 2.014, 2.014, 2.014])
    lithium = labels[0].copy()
    lithium.info["surface"] = {**labels[0].info["surface"], "temperature": 300.0}
    lithium.calc = labels[0].calc
    other = checkpoint.read(checkpoint.resolve(MODEL))[0]
    list(other.parameters())[0].data += 1e-3
    checkpoint.save(other, folder / "other.pth")
    return {
        "SSCHA on it": (lambda: free_energy(h3s(0), model), "count twice"),
        "labels on it": (lambda: recipe_of(evaluator=str(model.path)), "count twice"),
        "errors of it": (
            lambda: measure_locked(None, model, None, folder, n_configs=2, seed=0),
            "count twice",
        ),
        "DFT labels": (
            lambda: finetune(model.path, dft, [], stage, out=folder / "a.pth", seed=0),
            "static .DFT. labels train a potential",
        ),
        "mixed labels": (
            lambda: finetune(MODEL, [labels[0], dft[1]], [], stage, out=folder / "a.pth", seed=0),
            "some static",
        ),
        "two temperatures": (
            lambda: finetune(MODEL, [labels[0], lithium], [], stage, out=folder / "a.pth", seed=0),
            "temperature 0.0 and 300.0",
        ),
        "another potential": (
            lambda: finetune(folder / "other.pth", labels, [], stage, out=folder / "a.pth", seed=0),
            "starts from that potential",
        ),
        "as a potential": (
            lambda: open_evaluator(CalculatorSettings(**block), "MainCalculator"),
            "add surface: free-energy",
        ),
        "a potential as it": (
            lambda: open_evaluator(CalculatorSettings(**block | {"checkpoint": MODEL} | free), "X"),
            "X.surface: free-energy: model",
        ),
        "other masses": (lambda: model.evaluate([heavy]), "mass of H 1.008 and 2.014 amu"),
        "another temperature": (lambda: model.surface.require([], 300.0), "0 and 300 K"),
    }


CASES = [
    "SSCHA on it",
    "labels on it",
    "errors of it",
    "DFT labels",
    "mixed labels",
    "two temperatures",
    "another potential",
    "as a potential",
    "a potential as it",
    "other masses",
    "another temperature",
]


@pytest.mark.parametrize("case", CASES)
def test_no_surface_is_taken_for_another(case, model, labels, potential, tmp_path):
    attempt, words = refusals(model, labels, potential, tmp_path)[case]
    with pytest.raises((InputError, LabelerError), match=words):
        attempt()


def test_the_right_uses_are_open(model, labels, tmp_path):
    block = {"calculator": "mattersim", "checkpoint": str(model.path), "surface": "free-energy"}
    opened = open_evaluator(CalculatorSettings(**block), "MainCalculator")
    assert opened.model_id == model.model_id
    again = finetune(model.path, labels, [], {"epochs": 1}, out=tmp_path / "again.pth", seed=0)
    assert load(again.path, device="cpu").surface == model.surface
    natural = h3s(0)
    natural.set_masses([32.06, 1.008, 1.008, 1.008])
    assert np.isfinite(model.evaluate([natural]).energy).all()


def test_a_structure_far_from_the_labels_is_said(model, caplog, monkeypatch):
    monkeypatch.setattr(loading, "_checked", set())
    with caplog.at_level("WARNING"):
        load(model.path, device="cpu")  # whose check evaluates tiny structures
        model.evaluate([h3s(0)])
    assert "far from its labels" not in caplog.text
    apart = h3s(0)
    apart.set_cell(apart.cell.array * 1.5, scale_atoms=True)
    with caplog.at_level("WARNING"):
        model.evaluate([h3s(1), apart])
    assert "1 of 2 structures are far from its labels" in caplog.text


def test_a_potential_that_changed_since_the_labels_began_is_refused():
    recipe = recipe_of()
    with pytest.raises(LabelerError, match="holds model .* now"):
        code_of("sscha").calculator(replace(recipe, files={"model": "0" * 12}), h3s(0), None)


def test_train_takes_labels_of_a_free_energy_like_others_and_refuses_them_for_another_model(
    labels, potential, tmp_path
):
    write(tmp_path / "labels.xyz", labels, format="extxyz")
    recipe = TrainRecipe(checkpoint=MODEL, stages=[{"epochs": 1}], split=(2, 1, 1))
    report = train_file([tmp_path / "labels.xyz"], tmp_path / "f.pth", recipe, device="cpu")
    assert not report.excluded
    assert load(report.path, device="cpu").surface == surface_of_labels(labels)
    other = checkpoint.read(checkpoint.resolve(MODEL))[0]
    list(other.parameters())[0].data += 1e-3
    checkpoint.save(other, tmp_path / "other.pth")
    recipe = recipe.model_copy(update={"checkpoint": str(tmp_path / "other.pth")})
    with pytest.raises(InputError, match="starts from that potential"):
        train_file([tmp_path / "labels.xyz"], tmp_path / "g.pth", recipe, device="cpu")


def test_an_input_that_asks_for_another_temperature_than_the_model_s_is_refused(model):
    block = {"calculator": "mattersim", "checkpoint": str(model.path), "surface": "free-energy"}
    settings = Settings(main_calculator=block, sscha={"temperature": 300, **ONE_CELL})
    with pytest.raises(InputError, match="temperature 0 and 300 K"):
        evaluator_of(settings)
    settings = Settings(main_calculator=block, sscha={"temperature": 0, **ONE_CELL})
    assert evaluator_of(settings)[0].model_id == model.model_id


def test_the_stored_labels_of_h3s_are_of_one_surface_of_the_shipped_potential(potential):
    stored = read_labels(ROOT / "inputs" / "h3s-free-energy" / "labels.xyz")
    surface = surface_of_labels(stored)
    assert surface is not None and surface.potential == potential.model_id
    assert weights_by_error(stored) is not None and not outliers(stored)


@pytest.mark.slow
def test_thirty_labels_give_f_its_gradient_and_stress_of_sixty_held_out_ones(monkeypatch):
    """H3S at 0 K, stored labels; the held-out ones are of other seeds, 42 of other families."""
    monkeypatch.syspath_prepend(ROOT / "inputs" / "h3s-free-energy")
    import evaluate
    import learn

    model, test = evaluate.trained_model(30, epochs=15)
    left = learn.minus(test, model)
    energy, force, stress = learn.errors(left)
    assert len(test) >= 60
    assert energy <= 3.0, "meV/atom"
    assert force <= 60.0, "meV/A"
    assert stress <= 1.05, "GPa; 1.00 where it was measured"
    assert 0.7 <= evaluate.calibration(model, test, left) <= 1.4
