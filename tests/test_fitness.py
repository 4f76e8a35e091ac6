"""The fitness ``SSCHA`` and the estimate of free energies that were not computed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magus_anharmonic.ranking.fitness import fit_estimate, fitness_values

MODELS = st.sampled_from(["a", "b", "", None, 3])
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=2),
    st.lists(st.floats(), max_size=2),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.array),
)
ENERGY = st.floats(-50, 50)
INFO = st.fixed_dictionaries(
    {},
    optional={
        "enthalpy": ENERGY | ANYTHING,
        "gibbs": ENERGY | ANYTHING,
        "gibbs_error": st.floats(0, 1) | ANYTHING,
        "status": st.sampled_from(
            ["sscha", "unconverged", "estimated", "static", "failed", "saddle"]
        )
        | ANYTHING,
        "gibbs_model": MODELS,
        "model": MODELS,
    },
)


def computed(enthalpy, gibbs, model="m", of="m", status="sscha"):
    return {
        "enthalpy": enthalpy,
        "model": model,
        "gibbs": gibbs,
        "gibbs_error": 1e-3,
        "status": status,
        "gibbs_model": of,
    }


def plain(enthalpy):
    return {"enthalpy": enthalpy, "model": "m"}


@settings(max_examples=400, deadline=None)
@given(st.lists(INFO, max_size=8))
def test_fitness_is_a_finite_float_for_every_population(infos):
    values = fitness_values(infos)
    assert len(values) == len(infos)
    assert all(type(value) is float and math.isfinite(value) for value in values)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=6),
    st.lists(st.floats(-10, 10), max_size=6),
)
def test_order_of_computed_and_estimated(done, others):
    """Computed ones by G; estimated ones by enthalpy, strictly, and none above the best computed
    one."""
    infos = [computed(h, g) for h, g in done] + [plain(h) for h in others]
    values = fitness_values(infos)
    assert values[: len(done)] == [-g for _, g in done]
    estimated = values[len(done) :]
    for i, h in enumerate(others):
        assert estimated[i] < max(values[: len(done)])
        for j, other in enumerate(others):
            assert (estimated[i] > estimated[j]) == (h < other)


def test_without_any_free_energy_the_enthalpy_ranks():
    assert fitness_values([plain(-1.0), plain(-2.0), {"enthalpy": np.float32(-3.0)}]) == [
        1.0,
        2.0,
        3.0,
    ]


def test_a_free_energy_of_another_model_is_not_used():
    infos = [computed(-5.0, -4.9), computed(-5.1, -99.0, model="m", of="old")]
    fresh, stale = fitness_values(infos)
    assert fresh == 4.9
    assert stale < fresh


def test_estimates_are_not_taken_for_results():
    infos = [computed(-5.0, -4.8), computed(-5.2, -9.0, status="estimated")]
    assert fitness_values(infos)[1] < 4.8


def test_an_upper_bound_is_never_best_helps_where_it_is_low_and_harms_nobody():
    done = [computed(-5.0 + 0.01 * k, -4.8 + 0.01 * k) for k in range(3)]
    for bound, expected in ((-2.0, 4.85), (-4.86, 4.86), (-9.0, 5.0)):
        values = fitness_values([*done, computed(-5.05, bound, status="unconverged"), plain(-4.9)])
        assert values[3] < max(values[:3]) and values[3] > values[4]
        assert values[3] == pytest.approx(min(expected, 4.8), abs=1e-9), (
            "the estimate of its enthalpy, never above the best"
        )
    high = [*done, computed(-4.5, -4.29, status="unconverged")]
    assert fitness_values(high)[3] == pytest.approx(4.3), "above the line: the line counts"
    assert fitness_values([*done, computed(-4.5, -4.33, status="unconverged")])[3] == pytest.approx(
        4.33
    ), "below it: the bound"
    assert fitness_values([computed(-5.0, -4.7, status="unconverged"), plain(-5.1)]) == [
        5.0,
        5.1,
    ], "without any result the enthalpies"


def test_a_run_that_failed_counts_as_one_that_was_not_made():
    done = [computed(-5.0, -4.8), computed(-4.9, -4.7), computed(-4.8, -4.6)]
    for enthalpy in (-5.1, -4.95, -4.0):
        failed = fitness_values([*done, computed(enthalpy, float("nan"), status="failed")])
        assert failed == fitness_values([*done, plain(enthalpy)])
    assert fitness_values([computed(-5.1, float("nan"), status="failed"), plain(-5.0)]) == [
        5.1,
        5.0,
    ], "without any result the enthalpies"


def test_without_an_enthalpy_it_is_below_all_others():
    infos = [
        {**computed(-9.0, float("nan"), status="failed"), "enthalpy": float("nan")},
        {"model": "m"},
        plain(400.0),
        computed(1.0, 2.0),
    ]
    failed, empty, high, best = fitness_values(infos)
    assert failed == empty < high < best


def test_a_failure_with_an_older_model_is_forgotten():
    assert fitness_values(
        [computed(-9.0, float("nan"), of="old", status="failed"), plain(-8.0)]
    ) == [9.0, 8.0]


def test_the_line_is_found_and_the_margin_is_two_standard_deviations():
    h = np.linspace(-5.0, -4.0, 50)
    noise = np.random.default_rng(0).normal(0.0, 0.003, 50)
    estimate = fit_estimate(h, 0.4 + 1.05 * h + noise)
    slope, intercept = np.polyfit(h, 0.4 + 1.05 * h + noise, 1)
    assert estimate.slope == pytest.approx(slope)
    assert estimate.intercept == pytest.approx(intercept)
    assert estimate.margin == pytest.approx(2 * 0.003, rel=0.25)


def test_with_two_points_the_largest_shift_counts():
    estimate = fit_estimate([-5.0, -4.9], [-4.8, -4.68], [0.001, 0.002])
    assert estimate(-4.0) == pytest.approx(-4.0 + 0.22 + 0.004)


def test_points_close_in_enthalpy_do_not_tilt_the_line():
    """Three results within 1 meV whose G differ by 40 meV would give a slope of -40: everything
    high would look best."""
    estimate = fit_estimate([-5.0, -4.9995, -4.999], [-4.76, -4.78, -4.8])
    assert estimate.slope == 1.0
    assert estimate(-4.0) > estimate(-5.0)


def test_no_results_no_estimate():
    assert fit_estimate([], []) is None
