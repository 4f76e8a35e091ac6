"""Successive elimination: the best are never thrown out, the hopeless stop early, and the odds are those of a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from magus_anharmonic.ranking.elimination import Rules, Standing, order_is_known, probability_lowest, verdicts

RULES = Rules(confidence=0.95, keep_best=1, max_populations=30)


def standing(gibbs: float, error: float = 1e-3, decrease: float = 0.0, fallen: float | None = 0.0, **more: object) -> Standing:
    return Standing(gibbs, error, decrease, fallen, **{"converged": False, "n_populations": 3, **more})


def test_a_candidate_far_above_stops_and_one_within_the_noise_goes_on() -> None:
    found = verdicts({"a": standing(0.0), "b": standing(0.1), "c": standing(0.002)}, RULES)
    assert list(found) == ["b"] and "not among the lowest" in found["b"]


def test_a_candidate_that_is_still_falling_is_never_thrown_out() -> None:
    far = {"a": standing(0.0, converged=True), "b": standing(0.1, decrease=0.04)}
    assert "b" not in verdicts(far, RULES), "three times the predicted decrease reaches the best"
    far["b"] = standing(0.1, decrease=0.001, fallen=0.2)
    assert "b" not in verdicts(far, RULES), "it fell by 0.2 with the last population"
    far["b"] = standing(5.0, fallen=None, n_populations=1)
    assert "b" not in verdicts(far, RULES), "one population says nothing about how far it falls"
    far["b"] = standing(0.1, decrease=0.001, fallen=0.01)
    assert "b" in verdicts(far, RULES)


def test_the_best_goes_on_until_it_has_converged() -> None:
    relaxing = {"a": standing(0.0, decrease=1e-3), "b": standing(0.5)}
    assert "a" not in verdicts(relaxing, RULES)
    assert verdicts(relaxing | {"a": standing(0.0, converged=True)}, RULES)["a"] == ""


def test_sampling_ends_where_the_model_cannot_tell_them_apart() -> None:
    tied = {"a": standing(0.0, 1e-3, converged=True), "b": standing(0.0005, 1e-3, converged=True)}
    assert verdicts(tied, RULES) == {}
    known = Rules(confidence=0.95, keep_best=1, max_populations=30, model_error=5e-3)
    assert verdicts(tied, known) == {"a": "", "b": ""}


def test_the_order_of_the_best_three_keeps_their_sampling_going() -> None:
    rules = Rules(confidence=0.95, keep_best=3, max_populations=30)
    names = {"a": 0.0, "b": 0.05, "c": 0.1, "d": 0.2}
    apart = {name: standing(g, converged=True) for name, g in names.items()}
    assert order_is_known(apart, rules, 3.0)
    close = apart | {"c": standing(0.0505, converged=True)}
    assert not order_is_known(close, rules, 3.0)
    assert set(verdicts(close, rules)) == {"d"}, "the other three are not told apart yet"


def test_more_candidates_widen_the_bounds() -> None:
    assert RULES.z(100) > RULES.z(10) > RULES.z(1) > 2.5


def test_the_bounds_hold_with_the_wanted_confidence() -> None:
    """100 candidates, the best 2 meV below the rest, every population with fresh noise: in at least 95 % the best survives."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([[0.0], np.linspace(2e-3, 50e-3, 99)])
    lost = 0
    for _ in range(200):
        alive = dict(enumerate(truth))
        for n in range(2, 12):
            measured = {str(i): standing(g + rng.normal(0.0, 2e-3), 2e-3, n_populations=n, converged=True) for i, g in alive.items()}
            stopped = {int(name) for name, reason in verdicts(measured, RULES, 100).items() if reason}
            alive = {i: g for i, g in alive.items() if i not in stopped}
        lost += 0 not in alive
    assert lost <= 10
    assert len(alive) < 30, "most of the others must have been stopped"


def test_odds_are_those_of_a_simulation() -> None:
    gibbs, errors = np.array([0.0, 0.5, 0.4, 3.0]), np.array([1.0, 0.3, 2.0, 1.0])
    draws = gibbs + errors * np.random.default_rng(1).normal(size=(400_000, 4))
    expected = np.bincount(draws.argmin(axis=1), minlength=4) / len(draws)
    assert np.allclose(probability_lowest(gibbs, errors), expected, atol=4e-3)


@pytest.mark.parametrize(("gibbs", "expected"), [([], []), ([1.0], [1.0]), ([0.0, 1.0], [1.0, 0.0]), ([0.0, 0.0], [0.5, 0.5])])
def test_odds_without_noise(gibbs: list[float], expected: list[float]) -> None:
    assert np.allclose(probability_lowest(gibbs, [0.0] * len(gibbs)), expected)


def test_lower_bound_of_a_single_population_is_open() -> None:
    assert standing(0.0, fallen=None).lower(3.0) == -math.inf
