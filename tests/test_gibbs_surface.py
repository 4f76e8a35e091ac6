"""One smooth G(P, T) from G, V and S: exact data come back, the identities hold, and error bars
mean what they say."""

import numpy as np
import pytest
from refusals import refused
from two_phases import LOW, Phase, changed, data

from magus_anharmonic.errors import InputError
from magus_anharmonic.phase_diagram.points import read_points, with_same_phase
from magus_anharmonic.phase_diagram.surface import fit_surface
from magus_anharmonic.units import EV_PER_A3_IN_GPA

P = np.array([60.0, 85.0, 120.0, 160.0])
T = np.array([150.0, 300.0, 480.0, 600.0])


def test_volume_and_entropy_are_the_derivatives_of_the_fitted_free_energy():
    surface = fit_surface(data({"A": LOW}, 3))
    volume = (surface.gibbs(P + 0.01, T) - surface.gibbs(P - 0.01, T)) / 0.02 * EV_PER_A3_IN_GPA
    entropy = -(surface.gibbs(P, T + 0.01) - surface.gibbs(P, T - 0.01)) / 0.02
    np.testing.assert_allclose(surface.volume(P, T), volume, rtol=1e-6)
    np.testing.assert_allclose(surface.entropy(P, T), entropy, rtol=1e-5)
    assert surface.entropy(100.0, 0.0) == 0.0


def test_data_without_noise_come_back_between_their_points():
    surface = fit_surface(data({"A": LOW}, None, temperatures=(0.0, 150.0, 300.0, 450.0, 600.0)))
    assert np.abs(surface.gibbs(P, T) - LOW.gibbs(P, T)).max() < 1e-4
    np.testing.assert_allclose(surface.volume(P, T), LOW.v(P), rtol=1e-4)
    np.testing.assert_allclose(surface.entropy(P, T), LOW.s(T), rtol=0.02)


def test_points_come_back_within_their_errors_and_the_error_bars_cover_the_truth():
    z_gibbs, z_volume = [], []
    for seed in range(12):
        surface = fit_surface(data({"A": LOW}, seed))
        samples = surface.sample(300, np.random.default_rng(seed)).values(P, T, "P")
        z_gibbs += list((surface.gibbs(P, T) - LOW.gibbs(P, T)) / surface.error(P, T))
        z_volume += list((surface.volume(P, T) - LOW.v(P)) / samples.std(axis=0))
    for z in (z_gibbs, z_volume):
        assert 0.55 < np.sqrt(np.mean(np.square(z))) < 1.5
        assert np.mean(np.abs(z) < 2) > 0.85


def test_volumes_and_entropies_make_the_error_of_the_free_energy_smaller_between_the_points():
    full = fit_surface(data({"A": LOW}, 1))
    alone = fit_surface(data({"A": LOW}, 1, kinds="G"))
    middle = (np.array([85.0, 135.0]), np.array([450.0, 450.0]))
    assert np.all(full.error(*middle) < alone.error(*middle))


def test_draws_scatter_as_the_error_says():
    surface = fit_surface(data({"A": LOW}, 2))
    sampled = surface.sample(4000, np.random.default_rng(0)).values(P, T)
    np.testing.assert_allclose(sampled.std(axis=0), surface.error(P, T), rtol=0.1)
    np.testing.assert_allclose(sampled.mean(axis=0), surface.gibbs(P, T), atol=5e-5)


def test_errors_that_are_too_small_are_found_out_and_made_larger():
    honest = fit_surface(data({"A": LOW}, 5, true_noise=1.0))
    boasting = fit_surface(data({"A": LOW}, 5, true_noise=6.0))
    assert honest.quality.inflation < 2.5
    assert boasting.quality.inflation > 8.0
    assert boasting.error(100.0, 300.0) > 2.0 * honest.error(100.0, 300.0)


def test_entropies_that_contradict_the_free_energies_show_in_the_residuals():
    wrong = [
        changed(p, entropy=1.5 * p.entropy) if p.temperature_K else p for p in data({"A": LOW}, 6)
    ]
    assert fit_surface(wrong).quality.inflation > 5.0


def test_outside_of_the_points_there_is_no_value():
    surface = fit_surface(data({"A": LOW}, 1))
    assert (
        surface.inside(60.0, 0.0) and surface.inside(160.0, 600.0) and surface.inside(101.3, 222.0)
    )
    assert not surface.inside(59.0, 300.0) and not surface.inside(100.0, 601.0)
    corner = [p for p in data({"A": LOW}, 1) if (p.pressure_GPa, p.temperature_K) != (160.0, 600.0)]
    assert not fit_surface(corner).inside(155.0, 580.0)


@pytest.mark.parametrize(
    ("pressures", "temperatures"),
    [
        ((100.0,), (300.0,)),
        ((100.0,), (0.0, 300.0)),
        ((60.0, 160.0), (300.0,)),
        ((80.0, 90.0), (0.0,)),
    ],
)
def test_thin_grids_give_their_points_back_and_nothing_beyond(pressures, temperatures):
    points = data({"A": LOW}, 4, pressures, temperatures)
    surface = fit_surface(points)
    for point in points:
        found = float(surface.gibbs(point.pressure_GPa, point.temperature_K))
        assert abs(found - point.gibbs) < 4 * point.gibbs_error
        assert surface.inside(point.pressure_GPa, point.temperature_K)
    assert not surface.inside(pressures[-1] + 1.0, temperatures[0])
    assert not surface.inside(pressures[0], temperatures[-1] + 1.0)


def test_the_finite_size_term_is_in_the_free_energy_and_leaves_the_identities_of_the_rest_alone():
    plain = data({"A": LOW}, None)
    shifted = [changed(p, finite_size=2e-3, gibbs=p.gibbs + 2e-3) for p in plain]
    a, b = fit_surface(plain), fit_surface(shifted)
    np.testing.assert_allclose(b.gibbs(P, T) - a.gibbs(P, T), 2e-3, atol=1e-7)
    assert b.quality.chi2 == pytest.approx(a.quality.chi2, abs=1e-6)
    sloped = [
        changed(p, finite_size=1e-5 * p.pressure_GPa, gibbs=p.gibbs + 1e-5 * p.pressure_GPa)
        for p in plain
    ]
    np.testing.assert_allclose(
        fit_surface(sloped).volume(P, T) - a.volume(P, T), 1e-5 * EV_PER_A3_IN_GPA, rtol=1e-3
    )


def test_points_that_failed_or_became_another_phase_do_not_enter():
    points = data({"A": LOW}, 1)
    spoilt = [
        *points,
        changed(
            points[0],
            pressure_GPa=200.0,
            gibbs=99.0,
            status="transformed",
            space_group="Im-3m (229)",
        ),
    ]
    np.testing.assert_array_equal(fit_surface(spoilt).gibbs(P, T), fit_surface(points).gibbs(P, T))
    with pytest.raises(InputError, match="no point"):
        fit_surface([changed(points[0], status="failed")])


def test_a_wide_range_of_temperatures_with_soft_and_hard_oscillators_is_followed():
    class Mixed(Phase):
        def gibbs(self, pressure, temperature):
            return super().gibbs(pressure, temperature) + Phase(0.0, 0.0, 250.0).gibbs(
                pressure, temperature
            )

        def s(self, temperature):
            return super().s(temperature) + Phase(0.0, 0.0, 250.0).s(temperature)

        def v(self, pressure):
            return super().v(pressure) + Phase(0.0, 0.0, 250.0).v(pressure)

    mixed = Mixed(0.0, 5.0, 2200.0)
    surface = fit_surface(data({"A": mixed}, 8, temperatures=(0.0, 100.0, 300.0, 600.0, 1000.0)))
    t = np.array([50.0, 200.0, 450.0, 800.0])
    assert np.abs((surface.gibbs(P, t) - mixed.gibbs(P, t)) / surface.error(P, t)).max() < 4.0
    assert surface.quality.inflation < 2.5


HEAD = "phase,pressure_GPa,temperature_K,gibbs_eV_per_atom,gibbs_error_eV_per_atom"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            HEAD.replace("pressure_GPa", "pressure_kbar") + "\nA,1,0,1,0.1",
            ["pressure_GPa is missing", "pressure_kbar", "pressure_GPa?"],
        ),
        (HEAD + "\nA,150e9,0,1,0.1", ["pressure_GPa", "Pa"]),
        (HEAD + "\nA,150,-1,1,0.1", ["temperature_K", "below 0"]),
        (HEAD + "\nA,150,0,one,0.1", ["line 2", "gibbs_eV_per_atom", "'one'"]),
        (HEAD + "\nA,150,0,1,", ["gibbs_error_eV_per_atom", "above 0"]),
        (HEAD + "\nA,150,0,1,0.1\nA,150,0,1,0.1", ["given twice"]),
        (HEAD, ["no points"]),
        (HEAD + ",volume_A3_per_atom\nA,150,0,1,0.1,4", ["volume_error_A3_per_atom"]),
    ],
)
def test_a_wrong_table_is_explained(tmp_path, text, words):
    (tmp_path / "g.csv").write_text(text + "\n")
    with refused(*words):
        read_points(tmp_path / "g.csv")


def test_a_point_that_became_another_phase_of_the_diagram_says_which():
    cubic = [changed(p, space_group="Im-3m (229)") for p in data({"Im-3m": LOW}, 1)]
    rhombic = [changed(p, phase="R3m", space_group="R3m (160)") for p in cubic]
    rhombic[-1] = changed(rhombic[-1], status="transformed", space_group="Im-3m (229)")
    found = with_same_phase([*cubic, *rhombic])
    assert found[-1].same_as == "Im-3m" and not any(p.same_as for p in found[:-1])
