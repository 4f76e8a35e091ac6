"""What the table says about how sure the order is."""

import math

import pytest
from ase import Atoms
from records import a_candidate

from magus_anharmonic.ranking.uncertainty import ModelTerm, with_probabilities


def candidate(name, gibbs, error=1e-3, finite=0.0, **more):
    values = {
        "status": "converged",
        "gibbs": gibbs,
        "gibbs_error": error,
        "finite_size": finite,
        **more,
    }
    return a_candidate(name, Atoms("H"), pressure=150.0, enthalpy=-1.0, model="model", **values)


def test_a_difference_has_three_errors():
    best, other = with_probabilities(
        [candidate("a", 0.0, 3e-3, 0.010), candidate("b", 0.02, 4e-3, 0.016)], model_error=0.01
    )
    assert (best.difference, best.difference_sampling_error, best.difference_model_error) == (
        0.0,
        0.0,
        0.0,
    )
    assert other.difference == pytest.approx(0.02)
    assert other.difference_sampling_error == pytest.approx(5e-3)
    assert other.difference_finite_size_error == pytest.approx(3e-3)
    assert other.difference_model_error == pytest.approx(0.01 * math.sqrt(2))


def test_what_sampling_decides_the_model_may_leave_open():
    first, second = with_probabilities(
        [candidate("a", 0.0), candidate("b", 0.01)], model_error=0.02
    )
    assert first.p_lowest_sampling == pytest.approx(1.0, abs=1e-6) and first.p_lowest_total < 0.8
    assert first.p_lowest_total + second.p_lowest_total == pytest.approx(1.0)
    unknown = with_probabilities([candidate("a", 0.0), candidate("b", 0.01)], model_error=None)
    assert unknown[0].p_lowest_total is None and unknown[1].difference_model_error is None


def test_the_model_error_of_a_structure_counts_before_that_of_the_validation_set():
    _, other = with_probabilities(
        [candidate("a", 0.0, model_error=0.003), candidate("b", 0.01, model_error=0.004)],
        model_error=0.02,
    )
    assert other.difference_model_error == pytest.approx(0.005)
    _, other = with_probabilities(
        [candidate("a", 0.0, model_error=0.03), candidate("b", 0.01)], model_error=0.04
    )
    assert other.difference_model_error == pytest.approx(0.05)


def test_twins_estimates_and_failures_take_no_part():
    others = [
        candidate("t", -1.0, same_as="a"),
        candidate("e", -1.0, status="estimated"),
        candidate("f", None, status="failed"),
    ]
    found = with_probabilities([candidate("a", 0.0), *others], model_error=0.01)
    assert [c.p_lowest_sampling for c in found] == [1.0, None, None, None]
    assert with_probabilities([], 0.01) == []


def test_a_measured_model_term_replaces_the_estimate_and_moves_the_probabilities():
    """The model puts a below b by 10 meV; labels say that its G of a is 30 meV too low, of b 5
    meV."""
    rows = [candidate("a", 0.0), candidate("b", 0.01)]
    measured = {"a": ModelTerm(0.030, 0.001), "b": ModelTerm(0.005, 0.002)}
    best, other = with_probabilities(rows, 0.02, measured)
    assert (best.id, best.difference) == ("a", 0.0)
    assert other.difference_model_error == pytest.approx(math.sqrt(0.001**2 + 0.002**2 + 0.025**2))
    assert (best.model_correction, best.model_correction_error) == (0.030, 0.001)
    assert other.p_lowest_total > 0.99 and other.p_lowest_sampling < 1e-6


def test_what_two_corrections_share_cancels():
    measured = {"a": ModelTerm(0.5, 0.001), "b": ModelTerm(0.5, 0.001)}
    _, other = with_probabilities([candidate("a", 0.0), candidate("b", 0.01)], 0.02, measured)
    assert other.difference_model_error == pytest.approx(0.001 * math.sqrt(2))
    assert other.p_lowest_total < 1e-3


def test_a_phase_without_labels_is_shifted_like_the_others_and_keeps_the_expected_error():
    _, other = with_probabilities(
        [candidate("a", 0.0), candidate("b", 0.01, model_error=0.004)],
        0.02,
        {"a": ModelTerm(0.5, 0.003)},
    )
    assert other.difference_model_error == pytest.approx(0.005)
    assert other.model_correction is None


def test_a_space_group_names_a_phase_where_it_is_the_only_one_of_it():
    measured = {"Im-3m": ModelTerm(0.1, 0.001)}
    rows = [
        candidate("a", 0.0, space_group="Im-3m (229)"),
        candidate("b", 0.01, space_group="R3m (160)"),
    ]
    assert [c.model_correction for c in with_probabilities(rows, 0.02, measured)] == [0.1, None]
    rows = [
        candidate("a", 0.0, space_group="Im-3m (229)"),
        candidate("b", 0.01, space_group="Im-3m (229)"),
    ]
    assert [c.model_correction for c in with_probabilities(rows, 0.02, measured)] == [None, None]
