"""Common random numbers: the error of a difference is smaller than its parts, and what is said
about it is true."""

import math

import numpy as np
import pytest
from crystal_models import Crystals, crystal
from records import standing

from magus_anharmonic.ranking.elimination import Rules, Stop, verdicts
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.ranking.uncertainty import (
    CommonNumbers,
    Samples,
    covariance,
    difference_error,
)
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.ensemble import average, pair_means
from magus_anharmonic.sscha.start import sample_ensemble
from magus_anharmonic.sscha.symmetry import Symmetry

ALIKE = [
    crystal((3.0,) * 3, 1.0, 0.2, -0.3, 1.0),
    crystal((3.2,) * 3, 0.95, 0.22, -0.28, 1.1, depth=0.004),
]
MODEL = Crystals(ALIKE)


@pytest.fixture(scope="module")
def states():
    return [
        free_energy(one.atoms, MODEL, n_configs=200, reference_spacing=0.1, seed=k).state
        for k, one in enumerate(ALIKE)
    ]


def helmholtz(state, seed, n_configs=60):
    """F and its error in eV/atom, and the draws, of one ensemble."""
    ensemble = sample_ensemble(state, n_configs, [seed], MODEL, "test")
    found = average(state, ensemble, Symmetry(state.atoms, state.supercell_matrix))
    u = ensemble.displacements.reshape(n_configs, -1)
    excess = pair_means(ensemble.energies - 0.5 * np.einsum("ci,ci->c", u @ state.full, u)) / len(
        state.supercell
    )
    return found.helmholtz / 2.0, found.helmholtz_error / 2.0, Samples({1: excess}, u.shape[1])


def test_the_scatter_of_a_difference_is_what_its_error_bar_says(states):
    """Over 40 seeds; with numbers of their own the differences scatter several times as much."""
    common, own, predicted = [], [], []
    for seed in range(40):
        (f1, e1, d1), (f2, e2, d2) = (helmholtz(state, seed) for state in states)
        common.append(f1 - f2)
        own.append(f1 - helmholtz(states[1], 1000 + seed)[0])
        predicted.append(difference_error(e1, e2, covariance(d1, d2)))
    assert np.std(common) == pytest.approx(np.mean(predicted), rel=0.3)
    assert np.std(common) < 0.4 * np.std(own)


def test_a_damaged_file_of_a_finished_run_costs_at_most_what_cancels_and_never_the_ranking(
    tmp_path, caplog
):
    for name, one in zip("ab", ALIKE, strict=True):
        free_energy(
            one.atoms,
            MODEL,
            n_configs=60,
            reference_spacing=0.1,
            seed=0,
            directory=tmp_path / name,
            max_populations=2,
        )
    shared = CommonNumbers(tmp_path).covariance("a", "b")
    assert shared > 0
    file = tmp_path / "a" / "progress.json"
    file.write_bytes(file.read_bytes()[:50])
    assert CommonNumbers(tmp_path).covariance("a", "b") == pytest.approx(shared), (
        "the state of the result says which populations"
    )
    assert (tmp_path / "a" / "progress.json.damaged").is_file()
    for file in (tmp_path / "b").glob("population_*.npz"):
        file.write_bytes(file.read_bytes()[:500])
    assert (
        CommonNumbers(tmp_path).covariance("a", "b") == 0.0
        and "taken as independent" in caplog.text
    )


def test_runs_without_common_numbers_share_nothing(states):
    _, _, one = helmholtz(states[0], 1)
    _, _, other = helmholtz(states[1], 2)
    shared = [
        covariance(helmholtz(states[0], k)[2], helmholtz(states[1], 500 + k)[2]) for k in range(20)
    ]
    assert sum(value > 0 for value in shared) <= 3, "a correlation within the noise counts as none"
    assert covariance(one, Samples(one.excess, one.size + 3)) == 0.0 == covariance(one, None)
    assert covariance(one, Samples({2: other.excess[1]}, other.size)) == 0.0, (
        "another population is another sample"
    )
    assert covariance(one, one) == pytest.approx(helmholtz(states[0], 1)[1] ** 2, rel=1e-6), (
        "with itself: the square of the error"
    )
    assert difference_error(1.0, 1.0, 1.0) == 0.0 and difference_error(3.0, 4.0, 0.0) == 5.0


def test_a_race_ends_earlier_where_the_errors_cancel():
    rules = Rules(confidence=0.95, keep_best=1, max_populations=30)
    tied = {name: standing(gibbs, converged=True) for name, gibbs in {"a": 0.0, "b": 0.002}.items()}
    assert verdicts(tied, rules) == {}
    assert verdicts(tied, rules, common=lambda one, other: 0.98e-6) == {"a": Stop(), "b": Stop()}
    assert verdicts(tied, rules, common=lambda one, other: 0.2e-6) == {}


@pytest.mark.slow
def test_the_table_shows_the_error_of_the_difference_with_what_cancels(tmp_path):
    block = {
        "n_configs": 200,
        "reference_spacing": 0.1,
        "keep_best": 2,
        "hessian": 0,
        "allocation": "fixed",
    }
    settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": block})
    table = rank_structures(
        [one.atoms for one in ALIKE], MODEL, settings, tmp_path, relax=False, workers=1
    )
    best, second = table[:2]
    shared = CommonNumbers(tmp_path / "sscha").covariance(best.sscha_folder, second.sscha_folder)
    apart = math.hypot(best.gibbs_error, second.gibbs_error)
    assert shared > 0 and second.difference_sampling_error < 0.7 * apart
    assert second.difference_sampling_error == pytest.approx(
        difference_error(best.gibbs_error, second.gibbs_error, shared)
    )
