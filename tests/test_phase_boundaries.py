"""Boundaries against a closed expression: inside the band, with the coverage that the band claims,
the right slope and isotope shift."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from two_phases import HIGH, LOW, Phase, boundary, changed, data, slope

from magus_anharmonic.phase_diagram.boundaries import (
    all_boundaries,
    isotope_shifts,
    lowest_probabilities,
    pair_boundary,
    phase_set,
    slope_check,
)
from magus_anharmonic.units import EV_PER_A3_IN_GPA

T = np.array([0.0, 150.0, 300.0, 450.0, 600.0])


def found(seed, temperatures=T, **options):
    points = data({"low": LOW, "high": HIGH}, seed, **options)
    return pair_boundary(
        phase_set(points, "natural", n_samples=400, seed=0), "low", "high", np.array(temperatures)
    )


def test_the_boundary_is_where_the_closed_expression_says_and_knows_which_phase_is_below():
    for one in found(11):
        assert (one.below, one.above) == ("low", "high")
        assert one.lower_95_GPa <= boundary(one.temperature_K) <= one.upper_95_GPa
        assert (
            one.lower_95_GPa
            < one.lower_68_GPa
            < one.pressure_GPa
            < one.upper_68_GPa
            < one.upper_95_GPa
        )
        assert one.stable and one.probability_inside == 1.0


def test_data_without_noise_give_the_boundary_and_its_slope():
    for one in found(
        None,
        temperatures=(0.0, 300.0, 450.0),
        gibbs_error=1e-6,
        volume_error=1e-5,
        entropy_error=1e-9,
    ):
        assert one.pressure_GPa == pytest.approx(boundary(one.temperature_K), abs=0.05)
        if one.temperature_K:
            assert one.slope_GPa_per_K == pytest.approx(slope(one.temperature_K), rel=0.02)
            assert one.entropy_change_eV_per_K_per_atom == pytest.approx(
                HIGH.s(one.temperature_K) - LOW.s(one.temperature_K), rel=0.02
            )
        assert one.volume_change_A3_per_atom == pytest.approx(HIGH.volume - LOW.volume, rel=0.02)


@pytest.mark.full
def test_the_bands_cover_the_truth_as_often_as_they_claim():
    """30 data sets at three temperatures; counts outside of these limits have probabilities below a few per
    thousand for an honest band."""
    inside_68 = inside_95 = total = 0
    slopes = []
    for seed in range(100, 130):
        for one in found(seed, temperatures=(0.0, 300.0, 600.0)):
            truth = boundary(one.temperature_K)
            inside_68 += one.lower_68_GPa <= truth <= one.upper_68_GPa
            inside_95 += one.lower_95_GPa <= truth <= one.upper_95_GPa
            total += 1
            if one.temperature_K:
                slopes.append(
                    (one.slope_GPa_per_K - slope(one.temperature_K)) / one.slope_error_GPa_per_K
                )
    assert total >= 85
    assert 0.5 < inside_68 / total < 0.86
    assert inside_95 / total > 0.85
    assert 0.6 < np.sqrt(np.mean(np.square(slopes))) < 1.5


def test_larger_errors_of_the_data_and_of_the_model_widen_the_band():
    sharp, rough = found(3, [300.0])[0], found(3, [300.0], gibbs_error=1e-3)[0]
    assert rough.error_GPa > sharp.error_GPa
    points = data({"low": LOW, "high": HIGH}, 3)
    wide = pair_boundary(
        phase_set(points, "natural", n_samples=400, offset_error=2e-3),
        "low",
        "high",
        np.array([300.0]),
    )[0]
    expected = math.hypot(sharp.error_GPa, math.sqrt(2.0) * 2e-3 / (0.1 / 160.2177))
    assert wide.error_GPa == pytest.approx(expected, rel=0.15)


def test_a_boundary_outside_of_the_points_is_not_made_up():
    assert found(3, pressures=(60.0, 90.0, 120.0)) == []
    (one,) = found(None, [0.0], pressures=(60.0, 100.0, 137.0))
    assert (
        0.3 < one.probability_inside < 0.9
        and not math.isfinite(one.upper_95_GPa)
        and one.lower_95_GPa > 60.0
    )


def test_phases_are_compared_only_where_both_have_points():
    points = [
        p for p in data({"low": LOW, "high": HIGH}, 3) if p.phase == "low" or p.temperature_K >= 300
    ]
    temperatures = {
        one.temperature_K for one in all_boundaries(phase_set(points, "natural", n_samples=400))
    }
    assert min(temperatures) == 300.0 and max(temperatures) == 600.0
    apart = [
        p
        for p in data({"low": LOW, "high": HIGH}, 3)
        if (p.phase == "low") == (p.temperature_K >= 300)
    ]
    assert all_boundaries(phase_set(apart, "natural", n_samples=400)) == []


def test_a_boundary_below_a_third_phase_is_called_metastable():
    deep = Phase(-0.05, 4.95, 900.0)
    points = data({"low": LOW, "high": HIGH, "deep": deep}, 3)
    lines = all_boundaries(phase_set(points, "natural", n_samples=400))
    mine = [one for one in lines if {one.below, one.above} == {"low", "high"}]
    assert mine and not any(one.stable for one in mine)


def test_the_probabilities_say_who_is_lowest_and_how_surely():
    phases = phase_set(data({"low": LOW, "high": HIGH}, 3), "natural", n_samples=400)
    assert lowest_probabilities(phases, 60.0, 0.0) == {"low": 1.0, "high": 0.0}
    assert lowest_probabilities(phases, 160.0, 0.0) == {"low": 0.0, "high": 1.0}
    middle = found(3, [0.0])[0].pressure_GPa
    assert 0.4 < lowest_probabilities(phases, middle, 0.0)["low"] < 0.6
    assert lowest_probabilities(phases, 300.0, 0.0) == {}


def test_clausius_and_clapeyron_agree_where_the_data_do_and_disagree_where_an_entropy_is_wrong():
    options = {"temperatures": (200.0, 400.0, 600.0), "gibbs_error": 1e-4, "volume_error": 1e-3}
    points = data({"low": LOW, "high": HIGH}, 4, **options)
    line = all_boundaries(phase_set(points, "natural", n_samples=300))
    check = slope_check(points, line)
    assert check is not None and check.deviation < 3.0
    assert check.by_gibbs == pytest.approx(slope(check.temperature), abs=4 * check.by_gibbs_error)
    swapped = [
        changed(
            p,
            entropy=float((LOW if p.phase == "high" else HIGH).s(p.temperature_K))
            - 2e-5 * (p.phase == "low"),
        )
        for p in points
    ]
    wrong = slope_check(swapped, line)
    assert wrong is not None and wrong.deviation > 3.0


def test_heavier_isotopes_move_the_boundary_by_their_zero_point_energies():
    """Frequencies fall by 1/sqrt(2); the difference of the zero-point energies with them, the
    static part stays."""
    heavy = {
        n: replace(p, theta=p.theta / math.sqrt(2.0)) for n, p in (("low", LOW), ("high", HIGH))
    }
    points = [*data({"low": LOW, "high": HIGH}, 5), *data(heavy, 6, isotopes="D")]
    lines = [
        one
        for name in ("natural", "D")
        for one in all_boundaries(phase_set(points, name, n_samples=400))
    ]
    shifts = isotope_shifts(lines, "natural")
    assert shifts and all(shift.isotopes == "D" for shift in shifts)
    for shift in shifts:
        t = shift.temperature_K
        exact = boundary(t, heavy["low"], heavy["high"]) - boundary(t)
        assert abs(shift.shift_GPa - exact) < 4.0 * shift.error_GPa


@pytest.mark.parametrize("kinds", ["G", "GV", "GS"])
def test_without_volumes_or_entropies_the_slope_is_not_checked_and_it_is_said_why(kinds):
    points = data({"low": LOW, "high": HIGH}, 4, kinds=kinds)
    line = [
        one
        for one in all_boundaries(phase_set(points, "natural", n_samples=200))
        if one.below == "low"
    ]
    check = slope_check(points, line)
    assert check is not None and "volume and an entropy" in check.reason


def test_two_phases_that_become_one_have_no_boundaries_where_only_noise_tells_them_apart():
    """As R3m and Im-3m of H3S: 6 meV/atom (20 GPa - P)^2 apart up to 20 GPa above the lowest
    pressure, and the same from there on."""
    wanted, further = 0, 0
    for seed in range(8):
        low = data({"low": LOW}, seed, pressures=(60.0, 80.0, 100.0, 120.0))
        duplicate = data({"high": LOW}, 100 + seed, pressures=(60.0, 80.0, 100.0, 120.0))
        slope = -2 * 0.006 / 20.0 * EV_PER_A3_IN_GPA
        high = [
            (
                changed(p, gibbs=p.gibbs + 0.006, volume=p.volume + slope)
                if p.pressure_GPa == 60.0
                else p
            )
            for p in duplicate
        ]
        boundaries = pair_boundary(
            phase_set([*low, *high], "natural", n_samples=200), "low", "high", T
        )
        assert all(
            one.lower_68_GPa <= one.pressure_GPa <= one.upper_68_GPa
            and one.probability_inside >= 0.5
            for one in boundaries
        )
        at = Counter(one.temperature_K for one in boundaries)
        wanted += len(at)
        further += sum(count - 1 for count in at.values())
    assert wanted > 20, "where the first phase becomes the second one"
    assert further <= 10, (
        "30 before noise was told from crossings; two standard errors are exceeded by chance now"
        " and then"
    )
