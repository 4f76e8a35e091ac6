"""Errors of a model in an SSCHA ensemble, against closed expressions and against python-sscha."""

import numpy as np
import pytest
from harmonic_pair import labelled, pair

from magus_anharmonic.paper import gradient_errors as ge
from magus_anharmonic.paper.gradient_errors import gibbs_correction
from magus_anharmonic.sscha import python_sscha
from magus_anharmonic.sscha.ensemble import pair_means
from magus_anharmonic.sscha.state import fold, inverse_fourier
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import BOHR, RYDBERG


def without_translations(full):
    """Both sides projected onto displacements without a translation of the supercell."""
    n = full.shape[0] // 3
    projector = np.eye(3 * n) - np.tile(np.eye(3), (n, n)) / n
    return projector @ full @ projector


def test_the_error_of_the_centroid_gradient_is_the_force_of_the_shifted_minimum():
    model, reference = pair(0.3)
    found = ge.gradient_errors(labelled(model, reference, 4000))
    exact = reference.state.full @ np.tile(reference.shift, (reference.state.n_cells, 1)).ravel()
    assert found.centroid.systematic == pytest.approx(
        np.sqrt(np.mean(exact**2)), abs=4 * found.centroid.systematic_error
    )
    assert found.bo_centroid == pytest.approx(np.sqrt(np.mean(exact**2)), rel=1e-12)
    # springs differ linearly in u, so that a pair cancels that part and only rounding is left to
    # average
    assert found.centroid.statistical < 1e-9
    assert found.centroid.floor == pytest.approx(found.force / np.sqrt(4000))


def test_the_error_of_the_force_constant_gradient_is_the_difference_of_the_springs():
    model, reference = pair(0.3)
    errors = labelled(model, reference, 3000)
    found = ge.gradient_errors(errors).force_constants
    exact = without_translations(reference.state.full - model.state.full)
    assert found.systematic == pytest.approx(
        np.sqrt(np.mean(exact**2)), abs=4 * found.systematic_error
    )
    assert found.systematic_error < 0.1 * found.systematic
    symmetric = ge.gradient_errors(errors).symmetric_force_constants
    compact = reference.state.force_constants - model.state.force_constants
    assert symmetric.systematic == pytest.approx(
        np.sqrt(np.mean(compact**2)), abs=4 * symmetric.systematic_error
    )
    assert symmetric.statistical < found.statistical
    mean = [
        ge.mean_force_constant_gradient(errors, ensemble.forces)
        for ensemble in (errors.model, errors.reference)
    ]
    assert found.mean == pytest.approx(np.sqrt(np.mean((mean[0] - mean[1]) ** 2)), rel=1e-9)
    assert mean[0] - mean[1] == pytest.approx(exact, abs=6 * found.statistical)


def test_the_single_error_is_that_of_one_configuration_written_out():
    model, reference = pair(0.3)
    errors = labelled(model, reference, 20)
    d = ge.force_differences(errors).reshape(20, -1)
    w = errors.reference.displacements.reshape(20, -1) @ errors.state.precision
    each = np.einsum("ca,cb->cab", w, d)
    found = ge.gradient_errors(errors)
    assert found.force_constants.single == pytest.approx(np.sqrt(np.mean(each**2)), rel=1e-10)
    assert found.force_constants.mean == pytest.approx(
        np.sqrt(np.mean(each.mean(axis=0) ** 2)), rel=1e-10
    )
    assert found.force == pytest.approx(np.sqrt(np.mean(d**2)), rel=1e-12)


def test_systematic_and_statistical_part_are_told_apart_and_their_errors_hold():
    """Vectors of a known mean in known noise: 400 experiments."""
    rng = np.random.default_rng(3)
    n_pairs, size, noise = 30, 12, 0.5
    mean = rng.normal(size=size)
    squares, errors, statistical = [], [], []
    for _ in range(400):
        vectors = mean + noise * rng.normal(size=(n_pairs, size))
        found = ge.parts(ge.gram(vectors), 1.0, 2 * n_pairs)
        assert found.mean == pytest.approx(np.sqrt(np.mean(vectors.mean(axis=0) ** 2)))
        assert found.mean**2 == pytest.approx(found.systematic**2 + found.statistical**2)
        squares.append(found.systematic)
        errors.append(found.systematic_error)
        statistical.append(found.statistical)
    assert np.mean(squares) == pytest.approx(np.sqrt(np.mean(mean**2)), abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(squares), rel=0.1)
    assert np.mean(statistical) == pytest.approx(noise / np.sqrt(n_pairs), rel=0.02)


def test_noise_alone_has_no_systematic_part_and_reaches_the_floor():
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(200, 500))
    found = ge.parts(ge.gram(pair_means(vectors)), 1.0, 200)
    assert found.systematic < 2 * found.systematic_error
    assert found.mean == pytest.approx(found.floor, rel=0.1)


@pytest.mark.parametrize("strength", [0.05, 0.2])
def test_the_corrected_free_energy_is_the_one_of_the_reference(strength):
    """First and second order against the exact harmonic free energy; what is left is of third order
    and sampling."""
    model, reference = pair(strength)
    errors = labelled(model, reference, 8000)
    found = gibbs_correction(errors)
    n_atoms = len(model.state.atoms)
    exact = (reference.free_energy - model.free_energy) / n_atoms
    assert abs(found.second_order) > 5 * found.first_order_error or strength < 0.1
    assert found.first_order >= exact - 3 * found.first_order_error
    left = found.first_order + found.second_order - exact
    assert abs(left) < 4 * found.first_order_error + 0.25 * abs(found.first_order - exact)


def test_the_first_order_is_the_closed_average_and_its_error_is_honest():
    """E_ref - E_model averaged over the Gaussian, in 150 small ensembles."""
    model, reference = pair(0.2, noise=0.05)
    state = model.state
    difference = reference.state.full - state.full
    s = np.tile(reference.shift, (state.n_cells, 1)).ravel()
    k = np.zeros(3 * len(state.supercell))
    k[0], k[-2] = 40.0, 28.0
    wiggle = 0.05 * np.exp(-0.5 * k @ state.covariance @ k) * np.cos(k @ s)
    exact = (
        -0.1 * state.n_cells
        + 0.5 * np.sum(difference * state.covariance)
        + 0.5 * s @ reference.state.full @ s
        + wiggle
    ) / len(state.supercell)
    found = [gibbs_correction(labelled(model, reference, 40, seed)) for seed in range(150)]
    values, errors = np.array([(f.first_order, f.first_order_error) for f in found]).T
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / np.sqrt(150))
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.15)


def test_both_gradients_are_those_of_python_sscha_on_the_same_ensemble(tmp_path):
    model, reference = pair(0.3)
    errors = labelled(model, reference, 60)
    state = errors.state
    gradients, forces = [], []
    for ensemble in (errors.model, errors.reference):
        with python_sscha.quiet(tmp_path / "log"):
            loaded = python_sscha.to_ensemble(state, ensemble)
            gradients.append(np.array(loaded.get_preconditioned_gradient(True)) * RYDBERG / BOHR**2)
            forces.append(np.array(loaded.get_average_forces(False)) * RYDBERG)
            q = python_sscha.fractional_q(loaded.dyn_0)
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    theirs = symmetry.force_constants(
        inverse_fourier(gradients[0] - gradients[1], state.supercell_matrix, q)
    )
    mine = [
        ge.mean_force_constant_gradient(errors, ensemble.forces)
        for ensemble in (errors.model, errors.reference)
    ]
    ours = symmetry.force_constants(fold(mine[0] - mine[1], state.supercell_matrix))
    assert np.abs(theirs).max() > 0.1
    assert ours == pytest.approx(theirs, abs=1e-5 * np.abs(theirs).max())
    cells = ge.force_differences(errors).reshape(60, state.n_cells, -1, 3).mean(axis=(0, 1))
    assert symmetry.vectors(cells) == pytest.approx(
        symmetry.vectors(forces[0] - forces[1]), abs=1e-6
    )
