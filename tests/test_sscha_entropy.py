"""Entropy of SSCHA states: against derivatives of the free energy, phonopy, and the scatter of
ensembles with a known answer."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from sscha_models import AnharmonicCell, LatticeSprings, evaluated, harmonic_state

from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.sscha.ensemble import (
    entropy,
    entropy_slope,
    entropy_with_error,
    oscillator_entropy,
)
from magus_anharmonic.sscha.state import oscillator_free_energy
from magus_anharmonic.units import HBAR


@pytest.mark.parametrize("temperature", [10.0, 300.0, 3000.0])
def test_the_entropy_of_an_oscillator_is_minus_the_slope_of_its_free_energy(temperature):
    hbar_omega, step = np.array([0.001, 0.02, 0.3]), 1e-3 * temperature
    slope = (
        oscillator_free_energy(hbar_omega, temperature + step)
        - oscillator_free_energy(hbar_omega, temperature - step)
    ) / (2 * step)
    np.testing.assert_allclose(
        oscillator_entropy(hbar_omega, temperature), -slope, rtol=1e-5, atol=1e-12
    )


def test_the_slope_of_the_entropy_is_its_derivative_and_the_third_law_holds():
    square, temperature = np.array([0.5, 8.0, 40.0]), 400.0
    up, down = (
        oscillator_entropy(HBAR * np.sqrt(square * (1 + e)), temperature) for e in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(
        entropy_slope(HBAR * np.sqrt(square), temperature), (up - down) / (2e-5 * square), rtol=1e-6
    )
    assert (
        not oscillator_entropy(np.array([0.1]), 0.0).any()
        and not entropy_slope(np.array([0.1]), 0.0).any()
    )


def test_phonopy_finds_the_same_entropy():
    phonopy = pytest.importorskip("phonopy")
    from phonopy.structure.atoms import PhonopyAtoms

    springs = LatticeSprings()
    cell = Atoms("Al", cell=[springs.a] * 3, pbc=True)
    supercell_matrix = (2, 2, 2)
    state = harmonic_state(cell, supercell_matrix, CalculatorEvaluator(springs), 250.0)
    theirs = phonopy.Phonopy(
        PhonopyAtoms(symbols=["Al"], cell=cell.cell.array, scaled_positions=[[0, 0, 0]]),
        np.diag(supercell_matrix),
    )
    order = [
        int(np.argmin(np.linalg.norm(state.supercell.positions - p, axis=1)))
        for p in theirs.supercell.positions
    ]
    full = state.full.reshape(8, 3, 8, 3).transpose(0, 2, 1, 3)
    theirs.force_constants = full[np.ix_(order, order)]
    theirs.run_mesh(supercell_matrix, is_gamma_center=True)
    theirs.run_thermal_properties(t_min=250, t_max=250, t_step=1)
    in_joule = 96485.33212 * entropy(state)
    assert in_joule == pytest.approx(
        float(theirs.get_thermal_properties_dict()["entropy"][0]), rel=1e-4
    )


def test_the_entropy_of_the_minimum_is_minus_the_slope_of_its_free_energy():
    """dF/dT of the relaxed free energy: what the force constants do with the temperature does not
    enter."""
    cell = AnharmonicCell()
    (low, _), (_, state), (high, _) = (cell.minimum(t) for t in (299.0, 300.0, 301.0))
    assert entropy(state) * 8 == pytest.approx(-(high - low) / 2.0, rel=1e-4)


def test_a_fresh_ensemble_takes_the_noise_of_the_force_constants_out_of_the_entropy():
    cell = AnharmonicCell()
    _, best = cell.minimum(300.0)
    exact = entropy(best)
    off = replace(best, force_constants=1.02 * best.force_constants)
    found = np.array(
        [entropy_with_error(off, evaluated(off, cell, 400, seed)) for seed in range(20)]
    )
    z = (found[:, 0] - exact) / found[:, 1]
    assert abs(found[:, 0].mean() - exact) < 0.5 * abs(entropy(off) - exact)
    scatter = found[:, 0].std(ddof=1)
    assert 0.6 < found[:, 1].mean() / scatter < 1.5
    assert np.sqrt(np.mean(z**2)) < 2.5
