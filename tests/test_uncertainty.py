"""Error estimates: calibrated, larger where the model was not trained, kept with the checkpoint,
and used to choose labels."""

import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from crystals import h3s
from records import csv_rows

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator, set_energy_errors
from magus_anharmonic.learning.choose import farthest_points, lowest_distinct, select
from magus_anharmonic.potential import Potential, checkpoint, load, uncertainty
from magus_anharmonic.potential.finetune import finetune
from magus_anharmonic.potential.labelled import labels_of
from magus_anharmonic.potential.trainer import Architecture, from_scratch
from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.ranking.uncertainty import ensemble_trust
from magus_anharmonic.settings import FinetuneSettings, Settings, parse

SHAPE = Architecture(num_blocks=1, units=8, cutoff=4.0, threebody_cutoff=3.0)


def crystal(rng, rattle, a=3.0):
    """Im-3m H3S, every atom moved by normal displacements of ``rattle`` Angstrom."""
    atoms = h3s(a)
    atoms.positions += rattle * rng.normal(size=(4, 3))
    return atoms


def lj_labels(structures):
    """Lennard-Jones energies, forces and stresses in the place of DFT's."""
    for number, atoms in enumerate(structures):
        atoms.calc = LennardJones(sigma=1.25, epsilon=0.3, rc=3.6, smooth=True)
        results = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["parent"] = f"p{number}"
    return structures


@pytest.fixture(scope="module")
def labels():
    """Training and validation sets of mostly small displacements, and held-out ones from small to
    large."""
    rng = np.random.default_rng(5)
    spread = rng.permutation(np.linspace(0.02, 0.2, 40))
    return {
        "train": lj_labels([crystal(rng, 0.05) for _ in range(16)]),
        "validation": lj_labels([crystal(rng, 0.05) for _ in range(8)]),
        "held out": lj_labels([crystal(rng, rattle) for rattle in spread]),
    }


@pytest.fixture(scope="module")
def trained(labels, tmp_path_factory):
    """A checkpoint of a small model trained on 16 labels."""
    out = tmp_path_factory.mktemp("trained") / "model.pth"
    settings = FinetuneSettings(epochs=25, learning_rate=1e-2, batch_size=4, ema_decay=0.9)
    finetune(
        from_scratch(labels["train"], SHAPE, seed=0),
        labels["train"],
        labels["validation"],
        settings,
        out=out,
        seed=0,
    )
    return out


@pytest.fixture(scope="module")
def potential(trained):
    return load(trained, device="cpu")


def true_errors(potential, labelled):
    found, known = potential.evaluate(labelled), [labels_of(atoms) for atoms in labelled]
    energy = [abs(e - k[0]) / len(a) for e, k, a in zip(found.energy, known, labelled, strict=True)]
    return np.array(energy), np.array(
        [np.sqrt(np.mean((f - k[1]) ** 2)) for f, k in zip(found.forces, known, strict=True)]
    )


# ------------------------------------------------------------------ the numbers


def test_errors_on_the_validation_labels_are_on_average_those_expected(potential, labels):
    expected = potential.uncertainty(labels["validation"])
    energy, forces = true_errors(potential, labels["validation"])
    assert np.mean((energy / expected.energy_error) ** 2) == pytest.approx(1.0, rel=1e-3)
    assert np.mean((forces / expected.force_error) ** 2) == pytest.approx(1.0, rel=1e-3)


def test_larger_expected_errors_go_with_larger_true_ones(potential, labels):
    """Rank correlation on labels that the model has not seen, tested against chance."""
    from scipy.stats import spearmanr

    expected = potential.uncertainty(labels["held out"])
    for estimate, true in zip(
        (expected.energy_error, expected.force_error),
        true_errors(potential, labels["held out"]),
        strict=True,
    ):
        found = spearmanr(estimate, true, alternative="greater")
        assert found.statistic > 0.4 and found.pvalue < 1e-3


def test_far_from_the_training_data_the_expected_error_is_larger(potential, labels):
    known = potential.uncertainty(labels["train"])
    rng = np.random.default_rng(0)
    far = [crystal(rng, 0.05, a) for a in (2.4, 4.0)] + [crystal(rng, 0.5)]
    found = potential.uncertainty(far)
    assert found.energy_error.min() > known.energy_error.max()
    assert found.force_error.min() > 2 * np.median(known.force_error)


def test_estimates_are_finite_and_not_negative_for_everything(potential):
    strange = [
        Atoms("H", cell=[20, 20, 20], pbc=True),
        Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.4]]),
        Atoms("U", cell=[1.2, 1.2, 1.2], pbc=True),
        Atoms("OS", positions=[[0, 0, 0], [0, 0, 1.5]], cell=[4, 4, 15], pbc=[True, True, False]),
        crystal(np.random.default_rng(1), 0.05).repeat((3, 2, 2)),
    ]
    found = potential.uncertainty(strange)
    for values in (found.energy_error, found.force_error):
        assert values.shape == (5,) and np.isfinite(values).all() and (values >= 0).all()
    assert potential.uncertainty([]).energy_error.shape == (0,)
    with pytest.raises(InputError, match="structure 1: has no atoms"):
        potential.uncertainty([strange[0], Atoms()])


def test_an_energy_comes_with_the_same_estimate_alone_and_in_a_batch(potential, labels):
    mixed = [labels["train"][0], labels["held out"][0].repeat((2, 1, 1)), labels["held out"][1]]
    with_energies = potential.evaluate(mixed).energy_error
    np.testing.assert_allclose(with_energies, potential.uncertainty(mixed).energy_error, rtol=1e-4)
    np.testing.assert_allclose(
        with_energies,
        [potential.uncertainty([atoms]).energy_error[0] for atoms in mixed],
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        potential.double().uncertainty(mixed).energy_error, with_energies, rtol=1e-2
    )


def test_a_supercell_is_as_uncertain_per_atom_as_its_cell(potential, labels):
    cell = labels["held out"][0]
    found = potential.uncertainty([cell, cell.repeat((2, 2, 1))])
    assert found.energy_error[1] == pytest.approx(found.energy_error[0], rel=1e-3)
    assert found.force_error[1] == pytest.approx(found.force_error[0], rel=1e-3)


def test_the_covariance_is_that_of_the_training_atoms(potential, labels):
    """Against the formula of the docstring in plain NumPy, atom by atom."""
    model = potential.error_model
    single = Atoms("S", cell=[2.2, 2.3, 2.4], pbc=True)
    (v,) = potential.mean_features([single])
    per_atom = [value for atoms in labels["train"] for value in atom_features(potential, atoms)]
    covariance = sum(np.outer(value, value) for value in per_atom)
    ridge = uncertainty.RIDGE * np.linalg.eigvalsh(covariance)[-1]
    expected = model.energy_scale * np.sqrt(v @ np.linalg.solve(covariance + ridge * np.eye(8), v))
    assert potential.uncertainty([single]).energy_error[0] == pytest.approx(expected, rel=1e-2)


def atom_features(potential, atoms):
    (graph,) = [graph for graph in potential._graphs([atoms])]
    return potential.model.atom_features(graph).double().numpy()


# ------------------------------------------------------------------ kept with the weights


def test_the_estimate_survives_saving_and_loading(trained, potential, labels):
    again = load(trained, device="cpu")
    a, b = (model.uncertainty(labels["held out"]) for model in (potential, again))
    assert (a.energy_error == b.energy_error).all() and (a.force_error == b.force_error).all()
    content = torch.load(trained, weights_only=True)
    assert content["error_model"]["whitening"].dtype == torch.float32
    assert (
        content["error_model"]["calibrated_on"] == "validation"
        and content["error_model"]["n_training"] == 16
    )


def test_stock_mattersim_loads_the_checkpoint(trained, potential):
    from mattersim.forcefield.potential import Potential as Stock

    stock = Stock.from_checkpoint(str(trained), device="cpu", load_training_state=False)
    for name, value in stock.model.state_dict().items():
        assert (value == potential.module.state_dict()[name]).all()


def test_a_checkpoint_without_an_estimate_says_so_once(tmp_path, potential, labels, caplog):
    checkpoint.save(potential.module, tmp_path / "plain.pth")
    plain = load(tmp_path / "plain.pth", device="cpu")
    caplog.set_level(logging.INFO)
    assert plain.uncertainty(labels["train"]) is None and plain.uncertainty(labels["train"]) is None
    assert plain.evaluate(labels["train"]).energy_error is None
    assert sum("without an error estimate" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("stored", [{"whitening": torch.zeros(3, 3)}, "nonsense"])
def test_an_estimate_that_does_not_fit_is_left_out_with_a_warning(stored, caplog):
    assert uncertainty.error_model_of({"error_model": stored}, 8) is None
    assert "not readable" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "x", None, True])
@pytest.mark.parametrize(
    "key", ["energy_scale", "force_scale", "usual_energy_error", "usual_force_error", "n_training"]
)
def test_an_estimate_with_a_wrong_number_is_left_out_with_a_warning(key, value, potential, caplog):
    stored = potential.error_model.as_dict()
    units = len(stored["whitening"])
    assert uncertainty.error_model_of({"error_model": stored}, units) is not None
    assert uncertainty.error_model_of({"error_model": {**stored, key: value}}, units) is None
    assert "holds wrong numbers" in caplog.text


def test_without_validation_labels_the_training_set_calibrates_and_a_warning_says_so(
    potential, labels, caplog
):
    found = uncertainty.fit(potential.module, labels["train"])
    assert found is not None and found.calibrated_on == "training"
    assert "calibrated on the training set, and too small" in caplog.text
    assert (
        found.force_scale
        < uncertainty.fit(potential.module, labels["train"], labels["held out"]).force_scale
    )


def test_one_label_is_enough_for_finite_estimates(potential, labels):
    found = uncertainty.fit(potential.module, labels["train"][:1], labels["validation"][:1])
    alone = Potential(potential.module, error_model=found).uncertainty(labels["held out"])
    assert np.isfinite(alone.energy_error).all() and (alone.energy_error >= 0).all()


def test_a_model_that_is_not_finite_gets_no_estimate(potential, labels, caplog):
    broken = from_scratch(labels["train"], SHAPE, seed=1)
    broken.normalizer.shift.fill_(float("nan"))
    assert uncertainty.fit(broken, labels["train"], labels["validation"]) is None
    assert "no error estimate" in caplog.text


# ------------------------------------------------------------------ where users see it


def test_enthalpies_carry_the_error_and_lose_it_with_a_model_that_has_none(potential, labels):
    atoms = labels["train"][0].copy()
    settings = parse(Settings, {"pressure": 150.0})
    reevaluate([atoms], potential, settings)
    assert atoms.info["energy_error"] == pytest.approx(
        potential.uncertainty([atoms]).energy_error[0], rel=1e-4
    )
    reevaluate([atoms], CalculatorEvaluator(LennardJones(rc=3.0)), settings)
    assert "energy_error" not in atoms.info
    set_energy_errors(potential, [atoms])
    assert atoms.info["energy_error"] > 0
    set_energy_errors(CalculatorEvaluator(LennardJones()), [atoms])
    assert "energy_error" not in atoms.info


class Walked:
    """What the ranking reads of an SSCHA result whose centroids are Im-3m H3S and whose ensemble is
    this wide."""

    def __init__(self, force_constant):
        from magus_anharmonic.sscha.state import SschaState

        every_pair = force_constant * (4 * np.eye(4) - np.ones((4, 4)))
        self.force_constants = every_pair[None, :, :, None, None] * np.eye(3)
        self.state = SschaState(
            crystal(np.random.default_rng(0), 0.0), (1, 1, 1), self.force_constants, 0.0
        )


def test_an_ensemble_wider_than_the_training_set_is_not_trusted(potential):
    near, far = (
        ensemble_trust(Walked(spring), potential, np.random.default_rng(0))
        for spring in (60.0, 0.02)
    )
    assert near.warning == "" and near.force_error < near.usual
    assert far.force_error > near.force_error and "where the model was not trained" in far.warning
    assert far == ensemble_trust(Walked(0.02), potential, np.random.default_rng(0))


def test_without_an_estimate_or_a_state_nothing_is_said_about_the_ensemble(potential):
    rng = np.random.default_rng(0)
    assert ensemble_trust(Walked(1.0), CalculatorEvaluator(LennardJones()), rng) is None
    failed = Walked(1.0)
    failed.force_constants = None
    assert ensemble_trust(failed, potential, rng) is None


def test_the_ranking_shows_both_errors_and_warns_of_an_ensemble_that_walked_away(
    potential, tmp_path, caplog
):
    import ranking_fakes as fakes

    def walks(atoms, evaluator, *, temperature, **options):
        result = fakes.sscha_result(atoms, atoms, -1.0, temperature)
        walked = Walked(0.02)
        result.state, result.force_constants = walked.state, walked.force_constants
        return result

    settings = parse(Settings, {"pressure": 150.0, "sscha": {}})
    atoms = crystal(np.random.default_rng(0), 0.0)
    reevaluate([atoms], potential, settings)
    for _ in range(2):  # the second time from the store
        (candidate,) = rank(
            [atoms],
            evaluator=potential,
            settings=settings,
            run_dir=tmp_path,
            free_energy=walks,
            workers=1,
        )
        assert (
            candidate.status == "converged"
            and "where the model was not trained" in candidate.reason
        )
        (row,) = csv_rows(tmp_path / "ranking.csv")
        assert float(row["model_error_eV_per_atom"]) == pytest.approx(
            atoms.info["energy_error"], abs=1e-6
        )
        assert float(row["ensemble_error_eV_per_A"]) > potential.error_model.usual_force_error
    assert caplog.text.count("G is not to be trusted") == 1


# ------------------------------------------------------------------ choosing labels


@pytest.fixture(scope="module")
def population():
    """Ten different structures, each twice; the enthalpy grows with the number, the displacements
    fall."""
    rng = np.random.default_rng(11)
    found = []
    for number in range(10):
        atoms = crystal(rng, 0.4 - 0.036 * number)
        atoms.info["enthalpy"] = 0.01 * number
        found += [atoms, atoms.copy()]
    return found


def test_the_most_uncertain_distinct_structures_are_chosen(potential, population):
    chosen = select(population, 3, np.random.default_rng(0), "uncertain", potential)
    pool = lowest_distinct(population, 30)
    errors = potential.uncertainty([population[i] for i in pool]).force_error
    assert chosen == [pool[i] for i in np.argsort(-errors)[:3]]
    assert len({index // 2 for index in chosen}) == 3, (
        "the second copy of a structure is not worth a label"
    )


def test_only_low_enthalpies_are_worth_a_label(population):
    assert lowest_distinct(population, 5) == [0, 2, 4, 6, 8]
    upside_down = [atoms.copy() for atoms in population]
    for number, atoms in enumerate(upside_down):
        atoms.info["enthalpy"] = -number
    assert lowest_distinct(upside_down, 1) == [19]


def test_a_model_without_an_estimate_chooses_at_random_and_says_so(potential, population, caplog):
    caplog.set_level(logging.INFO)
    plain = Potential(potential.module)
    chosen, at_random = (
        select(population, 4, np.random.default_rng(7), rule, plain)
        for rule in ("uncertain", "random")
    )
    assert chosen == at_random and "has no error estimate yet; this choice is random" in caplog.text


def test_farthest_points_cover_the_corners():
    corners = np.array([[0.0, 0], [0, 9], [9, 0], [9, 9]])
    points = np.vstack([corners + 0.1 * k for k in range(5)])
    chosen = farthest_points(points, 4, np.random.default_rng(0), np.empty((0, 2)))
    assert {tuple(np.round(points[i] / 9).astype(int)) for i in chosen} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }
    away = farthest_points(points, 1, np.random.default_rng(0), np.array([[0.0, 0]]))
    assert np.round(points[away[0]] / 9).tolist() == [1, 1]
    assert sorted(farthest_points(points[:3], 9, np.random.default_rng(0), corners)) == [0, 1, 2]


def test_the_shipped_checkpoint_knows_its_errors():
    """H3S at 150 GPa is among its labels; molecular hydrogen is not."""
    shipped = load("h3s-gpaw-small", device="cpu")
    inside = shipped.uncertainty([crystal(np.random.default_rng(0), 0.05)])
    outside = shipped.uncertainty(
        [Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.75]], cell=[4, 4, 4], pbc=True)]
    )
    assert inside.force_error[0] < shipped.error_model.usual_force_error < outside.force_error[0]
    assert (
        shipped.error_model.calibrated_on == "validation"
        and shipped.error_model.n_calibration == 107
    )


def test_what_labels_are_wrong_by_themselves_is_no_error_of_the_model():
    """Errors drawn with a known scale and known noise; where noise hides all, no zero."""
    rng = np.random.default_rng(0)
    distances, noise = rng.uniform(0.5, 2.0, 4000), rng.uniform(0.0, 3.0, 4000)
    own = 0.7 * distances * rng.normal(size=4000)
    errors = own + noise * rng.normal(size=4000)
    found = uncertainty.error_scale(errors, distances, noise)
    assert found == pytest.approx(0.7, rel=0.08)
    assert uncertainty.error_scale(own, distances, 0 * noise) == pytest.approx(0.7, rel=0.05)
    few = slice(0, 6)
    hidden = uncertainty.error_scale(1e-6 * errors[few], distances[few], 2.0 + 0 * noise[few])
    assert 0.0 < hidden <= 1e-5
    alone = uncertainty.error_scale(noise[few], distances[few], noise[few])
    assert 0.0 < alone < np.sqrt(np.mean((noise[few] / distances[few]) ** 2))
