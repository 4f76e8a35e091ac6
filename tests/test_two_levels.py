"""Averages over two levels: those of the truth, whatever the surrogate, with errors that keep their
word."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exact_crystals import CASES
from sscha_models import AnharmonicCell, averaged_anew, evaluated, harmonic_state
from test_surrogate import perturbed

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.sscha.engines import Pool, minimise
from magus_anharmonic.sscha.ensemble import (
    average,
    curvature_along,
    entropy_with_error,
    joined,
    matrix_decrease,
    pair_means,
    quadratic_decrease,
    standard_error,
)
from magus_anharmonic.sscha.hessian import free_energy_hessian
from magus_anharmonic.sscha.python_sscha import to_ensemble
from magus_anharmonic.sscha.reciprocal import samples, wavevectors
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.two_levels import (
    FEWEST,
    SOON,
    LearnsFirst,
    Sampler,
    SurrogateFailed,
    corrections,
    deviation,
    first_sample,
    left_by_forces,
)

DFT = Path(__file__).parents[1] / "inputs" / "h3s-dft-sscha"


class Wrong:
    """A surrogate made of the truth: ``factor`` times its deviations from a constant, its stress
    with ``sign``, and noise (eV, eV/A) that the positions alone decide."""

    model_id = "wrong"

    def __init__(self, truth, factor=0.9, sign=1.0, noise=0.0):
        self.truth, self.factor, self.sign, self.noise = truth, factor, sign, noise

    def evaluate(self, structures):
        found = self.truth.evaluate(structures)
        energy, forces = self.factor * found.energy + 3.0, np.array(found.forces) * self.factor
        for index, atoms in enumerate(structures):
            seed = zlib.crc32(np.round(atoms.positions, 6).tobytes())
            rng = np.random.default_rng(seed)
            energy[index] += self.noise * rng.normal()
            forces[index] += self.noise * rng.normal(size=forces[index].shape)
        return Evaluation(energy, list(forces), self.sign * self.factor * found.stress)


def two_levels(large, truth, surrogate):
    return joined([large, corrections(truth, surrogate)])


def both(state, truth, surrogate, n_large, n_small, seed):
    rng = np.random.default_rng(seed)
    large, small = evaluated(state, surrogate, n_large, rng), evaluated(state, truth, n_small, rng)
    return two_levels(large, small, again(state, surrogate, small))


def again(state, evaluator, ensemble):
    """The same configurations, of another evaluator."""
    from magus_anharmonic.sscha.start import evaluated as at

    return at(state, ensemble.displacements, evaluator, "test")


@pytest.fixture(scope="module")
def triclinic():
    crystal = CASES["triclinic"].make()
    state = harmonic_state(crystal.atoms, (2, 1, 1), crystal, 300.0, raised=True)
    return crystal, state, Symmetry(state.atoms, state.supercell_matrix)


def test_with_one_sample_for_both_levels_the_surrogate_drops_out_of_every_linear_average(triclinic):
    """<X_s> + <X_t - X_s> over the same configurations is <X_t>, to rounding: F, stress, forces,
    the reweighted minimisation of two populations, the third order of the Hessian, the entropy."""
    crystal, state, symmetry = triclinic
    wrong, rng = Wrong(crystal, 0.4, -1.0, 0.3), np.random.default_rng(0)
    plain = [evaluated(state, crystal, n, seed) for n, seed in ((40, 1), (24, 2))]
    twice = [two_levels(cheap := again(state, wrong, one), one, cheap) for one in plain]
    weights = rng.uniform(0.5, 1.5, 40)
    for given in (None, weights):
        ours = average(state, twice[0], symmetry, None if given is None else np.tile(given, 2))
        theirs = average(state, plain[0], symmetry, given)
        for name in ("helmholtz", "stress", "force", "shift"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-9), name
    entropies = [entropy_with_error(state, one[0])[0] for one in (twice, plain)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-10)
    further = state.strained(np.zeros((3, 3)), rng.normal(0, 0.01, (len(state.atoms), 3)))
    further = replace(further, force_constants=1.1 * state.force_constants)
    ours, theirs = (
        (pool := Pool([(state, one[0]), (further, one[1])])).at(pool.own) for one in (twice, plain)
    )
    for name in ("helmholtz", "force", "curvature", "stress"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-9), name
    assert ours.effective_sample == pytest.approx(2.0 * theirs.effective_sample)
    options = dict(unbiased=False, errors=False, include_v4=True)
    ours, theirs = (
        free_energy_hessian(state, one[0], symmetry, **options) for one in (twice, plain)
    )
    assert ours.squares == pytest.approx(theirs.squares, abs=1e-9)


SURROGATES = {
    "one of twice the energy": Wrong(AnharmonicCell(), 2.0),
    "noise": Wrong(AnharmonicCell(), 0.0, noise=1.0),
}


def numbers(state, ensemble, symmetry):
    """F, the decrease by the force constants, that by the centroids with the compliance of Phi
    alone, one stiffness times a force; the error of F."""
    found = average(state, ensemble, symmetry)
    u, residual = ensemble.residual(state)
    forces = residual.reshape(len(u), state.n_cells, -1, 3).mean(axis=1)
    pairs = pair_means(symmetry.vectors(forces), None, ensemble.level).reshape(len(u) // 2, -1)
    by_matrix, _ = matrix_decrease(state, u, residual, symmetry, None, ensemble.level)
    by_centroids, _ = quadratic_decrease(pairs, np.linalg.pinv(state.gamma, rcond=1e-9))
    return found.helmholtz, by_matrix, by_centroids, found.helmholtz_error


@pytest.mark.parametrize("name", SURROGATES)
def test_free_energy_and_its_decrease_are_unbiased_and_their_errors_are_those_of_the_scatter(name):
    """Of a closed expression; 120 draws of 24 configurations of the truth."""
    model = AnharmonicCell()
    state = model.start(0.0)
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    exact = np.array(numbers(state, evaluated(state, model, 5000, 99), symmetry)[:3])
    exact[0] = model.free_energy(state)
    found = np.array(
        [
            numbers(state, both(state, model, SURROGATES[name], 60, 24, seed), symmetry)
            for seed in range(120)
        ]
    )
    values, told = found[:, :3], found[:, 3]
    scatter = values.std(axis=0, ddof=1)
    assert np.all(np.abs(values.mean(axis=0) - exact) < 3.5 * scatter / np.sqrt(120.0))
    assert np.sqrt(np.mean(told**2)) == pytest.approx(scatter[0], rel=0.2)
    assert 0.56 < np.mean(np.abs(values[:, 0] - exact[0]) < told) < 0.8


def test_ten_pairs_of_the_truth_count_by_students_distribution():
    rng = np.random.default_rng(3)
    level = np.repeat([0, 1], [400, 20])
    draws = rng.normal(size=(4000, 420)) * np.where(level, 1.0, 0.02)
    pairs = [pair_means(one, level=level) for one in draws]
    z = np.array([one.mean() / standard_error(one, level) for one in pairs])
    assert np.mean(np.abs(z) < 1.0) == pytest.approx(0.683, abs=0.015)


@pytest.mark.parametrize("name", ["hcp", "triclinic"])
def test_the_forces_of_ten_pairs_tell_what_a_surrogate_leaves_as_two_hundred_energies_do(name):
    crystal = CASES[name].make()
    state = harmonic_state(crystal.atoms, (2, 1, 1), crystal, 300.0, raised=True)
    truth = evaluated(state, crystal, 400, 2)
    differences = corrections(truth, again(state, perturbed(crystal), truth))
    tens = [differences.part(slice(20 * k, 20 * k + 20)) for k in range(20)]
    told = np.array([left_by_forces(state, ten) for ten in tens])
    scatter = np.array([deviation(state, ten) for ten in tens])
    assert told.mean() == pytest.approx(deviation(state, differences), rel=0.12)
    assert told.std() / told.mean() < 0.2
    assert told.std() / told.mean() < 0.6 * scatter.std() / scatter.mean()


def test_energies_that_do_not_belong_to_the_forces_count_by_their_scatter(triclinic):
    crystal, state, _ = triclinic
    truth = evaluated(state, crystal, 40, 3)
    differences = corrections(truth, again(state, Wrong(crystal, 0.99), truth))
    noise = np.repeat(np.random.default_rng(4).normal(size=20), 2)
    noisy = replace(differences, energies=differences.energies + noise)
    assert left_by_forces(state, noisy) == deviation(state, noisy)


def test_a_sample_is_not_kept_because_its_scatter_is_small():
    """A surrogate whose corrections need about `SOON` configurations: a part of the samples is
    left to learn from, and those that are kept scatter as all do. Kept by their own scatter, they
    told 0.8 of their variance, and 62 of 100 errors were large enough."""
    model = AnharmonicCell()
    state = model.start(0.0)
    wrong = Wrong(model, 0.9)
    wrong.relative_cost = 0.05
    plain = evaluated(state, model, 4000, 0)
    exact = deviation(state, corrections(plain, again(state, wrong, plain))) ** 2
    kept, left = [], 0
    for seed in range(120):
        sampler = Sampler(state, model, [seed, 1], "test", wrong)
        try:
            ensemble, _ = first_sample(sampler, sampler.of_truth(FEWEST, 0), 80, None, SOON)
        except (LearnsFirst, SurrogateFailed):
            left += 1
        else:
            kept.append(deviation(state, ensemble.part(ensemble.level > 0)) ** 2 / exact)
    assert left > 20 and len(kept) > 40
    error = np.std(kept) / np.sqrt(len(kept))
    assert np.mean(kept) == pytest.approx(1.0, abs=2.5 * error)


def test_forty_evaluations_of_the_truth_are_worth_a_thousand_with_a_good_surrogate(triclinic):
    crystal, state, symmetry = triclinic
    plain = average(state, evaluated(state, crystal, 1000, 1), symmetry)
    ensemble = both(state, crystal, Wrong(crystal, 0.995), 1000, 40, 1)
    ours = average(state, ensemble, symmetry)
    assert (ensemble.n_truth, len(ensemble.energies)) == (40, 1040)
    for name in ("helmholtz_error", "position_error", "stress_error"):
        assert np.max(getattr(ours, name)) < 1.15 * np.max(getattr(plain, name)), name


def test_minimisation_hessian_and_curvature_on_two_levels_are_those_of_a_large_sample(triclinic):
    """The surrogate is a fifth too stiff: what it says alone is not within the errors."""
    crystal, state, symmetry = triclinic
    stiff = Wrong(crystal, 1.2)
    large, ensemble = evaluated(state, crystal, 4000, 5), both(state, crystal, stiff, 4000, 1000, 6)
    alone = evaluated(state, stiff, 4000, 5)
    unit = np.zeros((len(state.atoms), 3))
    unit[:2, 0] = np.sqrt(0.5), -np.sqrt(0.5)
    theirs, ours, wrong = (curvature_along(state, one, unit) for one in (large, ensemble, alone))
    assert ours[0] == pytest.approx(theirs[0], abs=4.0 * np.hypot(ours[1], theirs[1]))
    assert abs(wrong[0] - theirs[0]) > 6.0 * np.hypot(ours[1], theirs[1])
    theirs, ours = (free_energy_hessian(state, one, symmetry) for one in (large, ensemble))
    off = (ours.squares - theirs.squares)[0, 3:] / np.hypot(ours.errors, theirs.errors)[0, 3:]
    assert np.abs(off).max() < 4.0
    options = dict(min_effective_sample=0.5)
    theirs, ours, wrong = (
        minimise([(state, one)], symmetry, **options).state for one in (large, ensemble, alone)
    )
    exact = theirs.modes.hbar_omega
    assert ours.modes.hbar_omega == pytest.approx(exact, rel=0.04)
    assert np.abs(wrong.modes.hbar_omega / exact - 1.0).mean() > 0.06


def test_errors_of_the_hessian_are_those_of_the_scatter(triclinic):
    crystal, state, symmetry = triclinic
    found = [
        free_energy_hessian(
            state, both(state, crystal, Wrong(crystal, 0.9), 400, 80, seed), symmetry
        )
        for seed in range(12)
    ]
    scatter = np.std([one.squares for one in found], axis=0, ddof=1)[0, 3:]
    told = np.sqrt(np.mean([one.errors**2 for one in found], axis=0))[0, 3:]
    # the error of the auxiliary force constants is in what is told, not in the scatter
    assert np.all(scatter < 1.5 * told)


def test_python_sscha_takes_no_ensemble_of_two_levels(triclinic):
    crystal, state, _ = triclinic
    ensemble = both(state, crystal, Wrong(crystal), 20, 20, 0)
    with pytest.raises(InputError, match="two levels"):
        to_ensemble(state, ensemble)
    assert len(samples(state, ensemble, wavevectors(state)).part(slice(0, None, 2))) == 10


def test_forty_labels_and_a_surrogate_give_the_free_energy_of_dft_alone():
    gibbs, errors, labels = [], [], []
    for name in ("alone", "surrogate"):
        result, _, _ = averaged_anew(DFT / name)
        gibbs.append(result.gibbs_raw)
        errors.append(result.gibbs_error)
        labels.append(result.n_evaluations)
    assert labels[1] <= 40 < 3 * labels[1] < labels[0]
    assert max(errors) < 1.5e-3
    assert abs(gibbs[0] - gibbs[1]) < 2.0 * np.hypot(*errors)
