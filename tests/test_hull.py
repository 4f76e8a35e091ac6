"""The hull of free energies over composition: geometry with known answers, probabilities from sampling, end
members that fit."""

import numpy as np
import pytest
from refusals import refused
from scipy.optimize import linprog
from scipy.stats import norm

from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import end_member_fractions, hull_entries, lower_hull, parse_formula

FORMULAS = ["H", "H3S", "H2S", "S"]
ENERGIES = np.array([0.0, -0.10, -0.05, 0.0])


def entries(energies=ENERGIES, sigma=0.0, formulas=FORMULAS, end_members=(), seed=0, n=4000):
    noise = sigma * np.random.default_rng(seed).standard_normal((n, len(energies)))
    return hull_entries(
        [f"phase {f}" for f in formulas],
        formulas,
        np.array(energies),
        np.array(energies) + noise,
        end_members,
    )


def test_distance_and_formation_energy_of_a_binary_system_by_hand():
    found = {one.formula: one for one in entries()}
    assert found["H3S"].formation == pytest.approx(-0.10) and found["H3S"].distance == 0.0
    assert found["H2S"].formation == pytest.approx(-0.05)
    line = -0.10 * (1 - 1 / 3) / (1 - 1 / 4)
    assert found["H2S"].distance == pytest.approx(-0.05 - line) and found[
        "H2S"
    ].margin == pytest.approx(found["H2S"].distance)
    assert found["H3S"].margin == pytest.approx(-0.10 - -0.05 * (1 / 4) / (1 / 3))
    assert found["H"].fractions == (1.0, 0.0) and found["H3S"].fractions == pytest.approx(
        (0.75, 0.25)
    )


def test_compounds_can_be_end_members():
    """H3S = H2S + 1/2 H2: by atoms 3/4 of H2S and 1/4 of H."""
    found = {
        one.formula: one
        for one in entries(
            [-0.05, 0.0, -0.06], formulas=["H2S", "H", "H3S"], end_members=["H2S", "H"]
        )
    }
    assert found["H3S"].fractions == pytest.approx((0.75, 0.25))
    assert found["H3S"].formation == pytest.approx(-0.06 + 0.75 * 0.05)
    assert found["H3S"].distance == 0.0 and found["H2S"].formation == pytest.approx(0.0, abs=1e-12)


def test_the_probabilities_of_being_on_the_hull_are_those_of_the_normal_distribution():
    """One compound between two end members: the margin is Gaussian with variance s^2 (1 + 1/4 +
    1/4)."""
    sigma, margin = 4e-3, 3e-3
    found = entries([0.0, margin, 0.0], sigma, formulas=["H", "HS", "S"], n=8000)[1]
    assert found.margin == pytest.approx(margin) and found.distance == pytest.approx(margin)
    assert found.error == pytest.approx(sigma * np.sqrt(1.5), rel=0.05)
    assert found.p_on_hull == pytest.approx(norm.cdf(-margin / (sigma * np.sqrt(1.5))), abs=0.02)


def test_a_ternary_system_and_a_single_composition():
    found = {
        one.formula: one
        for one in entries(
            [0.0, 0.0, 0.0, -0.3, -0.05], formulas=["H", "S", "Li", "HSLi", "HS"], n=50
        )
    }
    assert found["HSLi"].distance == 0.0 and found["HSLi"].formation == pytest.approx(-0.3)
    assert found["HS"].distance == 0.0
    alone = hull_entries(
        ["a", "b"], ["H3S", "H3S"], np.array([0.0, 0.01]), np.zeros((10, 2)) + [0.0, 0.01], ["H3S"]
    )
    assert [one.distance for one in alone] == [0.0, 0.01]


@pytest.mark.parametrize("seed", range(20))
def test_hulls_agree_with_a_linear_programme(seed):
    """Few or many phases of cells of up to 24 atoms, not all compositions within reach, energies
    over up to 10 eV."""
    rng = np.random.default_rng(seed)
    d = int(rng.integers(2, 5))
    counts, wanted = (rng.integers(0, 9, (n, d)) for n in (int(rng.integers(1, 12)), 6))
    fractions, at = (
        some[some.sum(axis=1) > 0] / some.sum(axis=1)[some.sum(axis=1) > 0, None]
        for some in (counts, wanted)
    )
    energy = rng.normal(size=len(fractions)) * 10 ** rng.uniform(-3, 1)
    at = np.vstack([fractions, at])
    found = [linprog(energy, A_eq=fractions.T, b_eq=x, bounds=(0, None)) for x in at]
    exact = [one.fun if one.status == 0 else np.inf for one in found]
    np.testing.assert_allclose(lower_hull(fractions, energy, at), exact, atol=1e-9)


@pytest.mark.parametrize(
    ("formulas", "end_members", "words"),
    [
        (["H", "H3S"], (), ["no phase of S", "end_members"]),
        (["H", "H3S", "H2S"], ("H2S", "O"), ["no phase of O"]),
        (["H", "H3S", "H2S", "S"], ("H2S", "H"), ["S", "cannot be made of"]),
        (["H", "H3S", "H2S", "S"], ("H", "S", "H2S"), ["made of the others"]),
    ],
)
def test_end_members_that_do_not_fit_are_explained(formulas, end_members, words):
    with refused(*words):
        entries(np.zeros(len(formulas)), formulas=formulas, end_members=end_members, n=10)


def test_formulas():
    assert parse_formula("H3S") == {"H": 3, "S": 1} and parse_formula("LiH2Li") == {"Li": 2, "H": 2}
    assert parse_formula("Ca(OH)2") == {"Ca": 1, "O": 2, "H": 2}
    for bad in ("H3s", "", "3H", "Xx", "H-S", "H0", "H2 S", "TiO2+"):
        with pytest.raises(InputError, match="formula"):
            parse_formula(bad)
    np.testing.assert_allclose(end_member_fractions(["H6S2"], ["H", "S"]), [[0.75, 0.25]])
