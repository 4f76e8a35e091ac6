"""Errors of a model that several structures share: expected from its features, and found in DFT
labels that it has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from records import a_candidate, stored_run

from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.generation import expected_spread
from magus_anharmonic.potential import load
from magus_anharmonic.potential.labelled import labels_of, split_by_parent
from magus_anharmonic.potential.uncertainty import ErrorModel
from magus_anharmonic.ranking.store import FreeEnergyStore, Key
from magus_anharmonic.ranking.uncertainty import ModelTerm, model_errors, with_probabilities

INPUTS = Path(__file__).parents[1] / "inputs"


def signed_errors(potential, labelled):
    """E(DFT) - E(model) of each structure, eV/atom."""
    known = np.array([labels_of(atoms)[0] / len(atoms) for atoms in labelled])
    return known - potential.evaluate(labelled).energy / [len(atoms) for atoms in labelled]


def pairs_of_like_volume(potential, labelled):
    """Differences of energy (eV/atom) between all structures whose volumes are within 5 %.

    Their true errors, those expected with what both errors share, and those expected of independent
    errors.
    """
    signed, vectors = (
        signed_errors(potential, labelled),
        potential.error_model.vectors(potential.mean_features(labelled)),
    )
    volumes = np.array([atoms.get_volume() / len(atoms) for atoms in labelled])
    one, other = np.triu_indices(len(labelled), 1)
    alike = np.abs(volumes[one] / volumes[other] - 1) < 0.05
    one, other = one[alike], other[alike]
    levels = np.linalg.norm(vectors, axis=1)
    shared = np.linalg.norm(vectors[one] - vectors[other], axis=1)
    return np.abs(signed[one] - signed[other]), shared, np.hypot(levels[one], levels[other])


@pytest.fixture(scope="module")
def potential():
    """The shipped model, with the error estimate that was fitted when it was trained."""
    return load("h3s-gpaw-small", device="cpu")


# ------------------------------------------------------------------ the estimate


def test_the_product_of_error_vectors_is_the_covariance_of_a_random_readout(potential):
    """Readouts drawn from N(0, alpha^2 (C + ridge)^-1), by its Cholesky factor: covariance of their
    energies over 200,000 draws."""
    error_model = potential.error_model
    assert error_model is not None
    structures = read(INPUTS / "h3s-checkpoint" / "labels.xyz", ":6")
    features = potential.mean_features(structures)
    whitening = error_model.whitening.double().numpy()
    inverse = whitening.T @ whitening
    factor = np.linalg.cholesky(inverse + 1e-15 * np.trace(inverse) * np.eye(len(inverse)))
    readouts = (
        error_model.energy_scale
        * np.random.default_rng(0).normal(size=(200_000, len(inverse)))
        @ factor.T
    )
    found = np.cov((readouts @ features.T).T)
    vectors = error_model.vectors(features)
    np.testing.assert_allclose(vectors @ vectors.T, found, atol=0.01 * np.abs(found).max())
    np.testing.assert_allclose(
        np.linalg.norm(vectors, axis=1), potential.uncertainty(structures).energy_error, rtol=1e-3
    )


def test_an_error_that_all_share_is_no_spread_and_one_that_changes_sign_in_a_pair_neither(
    potential,
):
    error_model = potential.error_model
    assert isinstance(error_model, ErrorModel)
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, error_model.whitening.shape[0]))
    assert error_model.spread(np.tile(one, (6, 1))) == pytest.approx(0.0, abs=1e-9)
    opposite = np.array([one + sign * size * other for size in (0.1, 0.2, 0.3) for sign in (1, -1)])
    assert error_model.spread(opposite, group_size=2) == pytest.approx(0.0, abs=1e-9)
    assert error_model.spread(opposite) > 0.0
    with pytest.raises(ValueError, match="at least two"):
        error_model.spread(opposite[:2], group_size=2)


def test_without_an_estimate_all_ensembles_are_alike():
    from ase.calculators.lj import LennardJones

    assert expected_spread(CalculatorEvaluator(LennardJones()), [Atoms("H"), Atoms("H")] * 4) == 1.0


# ------------------------------------------------------------------ against DFT


def test_expected_errors_of_differences_are_those_found_in_labels_that_the_model_has_not_seen(
    potential,
):
    """The test side of the shipped label set: all pairs of structures of like volume."""
    test = split_by_parent(read(INPUTS / "h3s-checkpoint" / "labels.xyz", ":"))[2]
    true, expected, independent = pairs_of_like_volume(potential, test)
    assert len(true) > 1000
    ratio = np.sqrt(np.mean((true / expected) ** 2))
    assert 0.7 < ratio < 1.3
    assert abs(np.log(ratio)) < abs(np.log(np.sqrt(np.mean((true / independent) ** 2))))
    near = np.argsort(expected)[: len(expected) // 5]
    assert np.sqrt(np.mean(true[near] ** 2)) < 0.6 * np.sqrt(np.mean(true**2)), (
        "pairs that look alike differ less"
    )


def test_the_ensemble_whose_labels_are_worth_more_is_known_before_they_are_made(potential):
    """GPAW labels of two SSCHA ensembles at 60 GPa: standard deviation of the error among pairs
    +u/-u, expected and found."""
    expected, found = {}, {}
    for phase in ("im-3m", "r3m"):
        folder = INPUTS / "h3s-error-cancellation" / f"{phase}-60GPa"
        assert (
            json.loads((folder / "sscha" / "result.json").read_text())["model_id"]
            == potential.model_id
        )
        labelled = sorted(read(folder / "labels.xyz", ":"), key=lambda atoms: atoms.info["number"])
        ensemble = [atoms for atoms in labelled if atoms.info["number"] >= 0]
        assert len(ensemble) == 60
        expected[phase] = expected_spread(potential, ensemble)
        found[phase] = signed_errors(potential, ensemble).reshape(-1, 2).mean(axis=1).std(ddof=1)
    assert found["im-3m"] > 2.0 * found["r3m"]
    assert expected["im-3m"] > 1.3 * expected["r3m"]
    assert expected["im-3m"] == pytest.approx(found["im-3m"], rel=0.3)
    assert expected["r3m"] == pytest.approx(found["r3m"], rel=0.8)


# ------------------------------------------------------------------ the ranking


def candidate(name, gibbs, vector, **more):
    return a_candidate(
        name,
        Atoms("H"),
        pressure=150.0,
        enthalpy=-1.0,
        model="model",
        status="converged",
        gibbs=gibbs,
        gibbs_error=1e-4,
        error_vector=vector,
        **more,
    )


def test_what_two_phases_share_leaves_their_order_certain():
    """Both errors are 50 meV/atom, of which 3 are not shared."""
    rows = [candidate("a", 0.0, (0.050, 0.0)), candidate("b", 0.010, (0.050, 0.003))]
    best, other = with_probabilities(rows, model_error=0.05)
    assert best.difference_model_error == 0.0
    assert other.difference_model_error == pytest.approx(0.003)
    assert (
        best.p_lowest_total > 0.998
        and best.p_lowest_total + other.p_lowest_total == pytest.approx(1.0)
    )
    apart = with_probabilities(
        [candidate("a", 0.0, (0.050, 0.0)), candidate("b", 0.010, (0.0, 0.050))], model_error=0.05
    )
    assert apart[1].difference_model_error == pytest.approx(0.05 * np.sqrt(2))
    assert 0.5 < apart[0].p_lowest_total < 0.6


def test_the_probabilities_of_phases_that_share_errors_are_those_of_the_joint_gaussian():
    """Two phases: the probabilities are one normal distribution of the difference."""
    from scipy.stats import norm

    first, _ = with_probabilities(
        [candidate("a", 0.0, (0.03, 0.01)), candidate("b", 0.005, (0.03, -0.002))], model_error=None
    )
    expected = norm.cdf(0.005 / np.sqrt(0.012**2 + 2 * 1e-4**2))
    assert first.p_lowest_total == pytest.approx(expected, abs=0.01)


def test_a_phase_without_an_estimate_is_independent_of_the_others():
    _, other = with_probabilities(
        [candidate("a", 0.0, (0.03,)), candidate("b", 0.01, None, model_error=0.04)],
        model_error=None,
    )
    assert other.difference_model_error == pytest.approx(0.05)
    unknown = with_probabilities(
        [candidate("a", 0.0, (0.03,)), candidate("b", 0.01, None)], model_error=None
    )
    assert [c.p_lowest_total for c in unknown] == [None, None] and unknown[
        1
    ].difference_model_error is None


def test_a_phase_without_labels_shares_the_shift_of_the_measured_one_as_far_as_it_looks_like_it():
    rows = [candidate("a", 0.0, (0.05, 0.0)), candidate("b", 0.01, (0.05, 0.004))]
    errors = model_errors(rows, [ModelTerm(0.04, 0.001), None], None)
    assert errors.of_difference(1, 0) == pytest.approx(np.hypot(0.004, 0.001))
    _, other = with_probabilities(rows, None, {"a": ModelTerm(0.04, 0.001)})
    assert other.difference_model_error == pytest.approx(np.hypot(0.004, 0.001))


def test_the_error_vector_of_a_run_is_kept_in_the_database(tmp_path):
    key, vector = (
        Key("0123456789ab", 150.0, 0.0, "settings"),
        tuple(np.random.default_rng(0).normal(size=64).tolist()),
    )
    store = FreeEnergyStore(tmp_path / "free_energies.db")
    for name, what in (("a" * 12, vector), ("b" * 12, None)):
        store.put(
            stored_run(
                name,
                key,
                Atoms("H", cell=[1, 1, 1], pbc=True),
                "converged",
                gibbs=0.0,
                error_vector=what,
                budget_spent=None,
            )
        )
    again = FreeEnergyStore(tmp_path / "free_energies.db")
    assert again.get("a" * 12, key).free_energy.error_vector == vector
    assert again.get("b" * 12, key).free_energy.error_vector is None
