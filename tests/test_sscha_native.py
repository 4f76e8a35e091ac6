"""The native engine: the numbers of python-sscha on the same ensemble, exact minima, and error bars
that keep their word."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from crystals import PAIR
from scipy.stats import binom
from sscha_models import EV, AnharmonicCell, QuarticPair, evaluated, harmonic_state

from magus_anharmonic.errors import SschaError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha import engines, free_energy, python_sscha
from magus_anharmonic.sscha.engines import Pool, reweighted
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.reciprocal import Reciprocal, Spectrum, without_translations
from magus_anharmonic.sscha.result import RunFolder
from magus_anharmonic.sscha.run import SschaRun
from magus_anharmonic.sscha.start import sample_ensemble
from magus_anharmonic.sscha.state import SschaState, inverse_fourier
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import Task
from magus_anharmonic.units import HBAR, KELVIN, RYDBERG

SAMPLING_BOLTZMANN = 6.336857346553283e-06
"""Ry/K, in python-sscha's get_upsilon_matrix.f90; 5e-4 more than the one in its harmonic free
energy."""


def low_symmetry(supercell_matrix, temperature):
    """Three atoms of two elements without symmetry, with force constants that fit them roughly."""
    atoms = Atoms(
        "CuAu2",
        positions=[[0, 0, 0], [1.9, 1.8, 0.2], [0.1, 1.9, 2.0]],
        cell=[[3.8, 0, 0], [0.3, 3.9, 0], [0, 0.4, 4.0]],
        pbc=True,
    )
    symmetry = Symmetry(atoms, supercell_matrix)
    harmonic = harmonic_state(atoms, supercell_matrix).force_constants
    harmonic[0] += 4.0 * np.einsum("ab,ij->abij", np.eye(3), np.eye(3))
    return SschaState(atoms, supercell_matrix, symmetry.force_constants(harmonic), temperature)


def moved(state):
    """The state with force constants 3 per cent stiffer and centroids a little off."""
    atoms = state.atoms.copy()
    shift = 0.003 * np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.positions += shift - shift.mean(axis=0)
    return replace(state, atoms=atoms, force_constants=1.03 * state.force_constants)


def trial_of(pool, state):
    shift = state.atoms.positions - pool.reference.atoms.positions
    return pool.trial(shift, pool.reciprocal.matrices(state.force_constants))


@pytest.mark.parametrize("supercell_matrix", [(2, 2, 1), (1, 3, 2)], ids=["real", "complex"])
def test_modes_and_gaussian_in_reciprocal_space_are_those_of_the_supercell(supercell_matrix):
    state = low_symmetry(supercell_matrix, 300.0)
    reciprocal = Reciprocal(supercell_matrix)
    matrices = reciprocal.matrices(state.force_constants)
    spectrum = Spectrum.of(matrices, state.atoms.get_masses(), reciprocal, 300.0)
    each = np.repeat(
        spectrum.hbar_omega[spectrum.real],
        np.broadcast_to(reciprocal.weights[:, None], spectrum.real.shape)[spectrum.real].astype(
            int
        ),
    )
    assert reciprocal.weights.sum() == np.prod(supercell_matrix)
    assert np.sort(each) == pytest.approx(state.modes.hbar_omega, rel=1e-10)
    assert reciprocal.compact(matrices) == pytest.approx(state.force_constants, abs=1e-12)
    from magus_anharmonic.sscha.state import expand

    assert expand(reciprocal.compact(spectrum.precision), supercell_matrix) == pytest.approx(
        state.precision, abs=1e-9 * np.abs(state.precision).max()
    )
    assert spectrum.free_energy == pytest.approx(state.harmonic_free_energy, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 300.0])
def test_weights_free_energy_gradients_and_stress_equal_python_sscha(
    temperature, tmp_path, monkeypatch
):
    """With python-sscha's own constants: its bohr, and its two values of Boltzmann's (sampling and
    free energy)."""
    with python_sscha.quiet(tmp_path / "log"):
        import cellconstructor as CC
        import cellconstructor.Units
    bohr = 1.0 / CC.Units.A_TO_BOHR
    monkeypatch.setattr(python_sscha, "BOHR", bohr)
    monkeypatch.setattr(python_sscha, "AMU_IN_RYDBERG_MASS", RYDBERG * bohr**2 / HBAR**2)
    sampling = temperature * SAMPLING_BOLTZMANN * RYDBERG / KELVIN
    harmonic = temperature * CC.Units.K_B / CC.Units.RY_TO_EV * RYDBERG / KELVIN
    supercell_matrix = (2, 1, 2)
    state = low_symmetry(supercell_matrix, temperature)
    sampled = evaluated(state, EV, 60)
    target = moved(state)
    pool = Pool([(replace(state, temperature=sampling), sampled)])
    ours = pool.at(trial_of(pool, target))
    with python_sscha.quiet(tmp_path / "log"):
        loaded = python_sscha.to_ensemble(state, sampled)
        loaded.update_weights(python_sscha.to_phonons(target), temperature)
        energy = loaded.get_free_energy()
        gradient = np.array(loaded.get_preconditioned_gradient(True))
        force = loaded.get_average_forces(False)
        stress = python_sscha._reweighted_stress(loaded)
        q = python_sscha.fractional_q(loaded.dyn_0)
    # up to a factor: the determinant in python-sscha has a third Boltzmann constant
    assert ours.weights / ours.weights.sum() == pytest.approx(
        loaded.rho / loaded.rho.sum(), rel=1e-10
    )
    exchanged = (
        replace(target, temperature=harmonic).harmonic_free_energy
        - replace(target, temperature=sampling).harmonic_free_energy
    )
    expected = energy * RYDBERG / 4 + sampled.energies.mean() / 4
    assert ours.helmholtz + exchanged == pytest.approx(expected, abs=1e-10)
    assert force * RYDBERG == pytest.approx(ours.force, abs=1e-10)
    assert ours.stress == pytest.approx(stress, abs=1e-10)
    symmetry = Symmetry(state.atoms, supercell_matrix)
    theirs = symmetry.force_constants(
        inverse_fourier(gradient * RYDBERG / bohr**2, supercell_matrix, q)
    )
    mine = pool.reciprocal.compact(without_translations(ours.curvature))
    assert -mine == pytest.approx(theirs, abs=1e-10 * np.abs(theirs).max())


def test_reweighting_to_the_state_that_was_sampled_gives_the_plain_averages():
    state = low_symmetry((1, 3, 1), 300.0)
    sampled = evaluated(state, EV, 40)
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    pool = Pool([(state, sampled)])
    found, plain = pool.at(pool.own), average(state, sampled, symmetry)
    assert found.effective_sample == pytest.approx(40.0, rel=1e-10)
    assert found.helmholtz == pytest.approx(plain.helmholtz, abs=1e-11)
    assert symmetry.tensor(found.stress) == pytest.approx(plain.stress, abs=1e-12)
    assert symmetry.vectors(found.force) == pytest.approx(plain.force, abs=1e-11)


def test_two_populations_are_one_sample_of_their_mixture():
    """Weights of a mixture have the mean one for any state that the mixture covers, and reproduce
    moments of that state."""
    model = AnharmonicCell()
    first = model.start(0.0)
    second = moved(replace(first, force_constants=0.8 * first.force_constants))
    populations = [
        (state, sample_ensemble(state, 4000, [1, k], model, "test"))
        for k, state in enumerate((first, second))
    ]
    middle = replace(second, force_constants=0.9 * first.force_constants)
    pool = Pool(populations)
    together, alone = pool.at(trial_of(pool, middle)), Pool(populations[:1])
    alone_found = alone.at(trial_of(alone, middle))
    assert together.weights.mean() == pytest.approx(1.0, abs=0.05)
    assert together.effective_sample > 1.2 * alone_found.effective_sample
    fresh = average(
        middle,
        sample_ensemble(middle, 4000, [1, 2], model, "test"),
        Symmetry(middle.atoms, middle.supercell_matrix),
    )
    error = fresh.helmholtz_error * np.sqrt(4000 / together.effective_sample)
    assert together.helmholtz == pytest.approx(model.free_energy(middle), abs=4.0 * error)


@pytest.mark.parametrize("cubic", [False, True], ids=["P1", "cubic"])
@pytest.mark.parametrize("temperature", [0.0, 300.0])
def test_minimisation_ends_at_the_exact_minimum(cubic, temperature):
    model = AnharmonicCell(cubic)
    exact, best = model.minimum(temperature)
    state, populations = model.start(temperature), []
    symmetry = Symmetry(model.atoms, (1, 1, 1))
    for number in range(4):
        populations.append((state, sample_ensemble(state, 400, [3, number], model, "test")))
        found = engines.minimise(populations, symmetry, min_effective_sample=0.4)
        state = found.state
    assert found.converged and found.n_steps < 10
    excess = model.free_energy(state) - exact
    assert (
        0.0
        <= excess + 1e-12
        < 2e-3
        < 0.02
        < model.free_energy(model.start(temperature)) - exact + 0.015
    )
    assert state.modes.hbar_omega == pytest.approx(best.modes.hbar_omega, rel=0.1)
    assert symmetry.force_constants(state.force_constants) == pytest.approx(
        state.force_constants, abs=1e-10
    )


def test_both_engines_find_the_same_minimum_of_one_ensemble(tmp_path):
    model = AnharmonicCell()
    state = model.start(0.0)
    sampled = sample_ensemble(state, 600, [9], model, "test")
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    ours = engines.minimise([(state, sampled)], symmetry, min_effective_sample=0.1)
    theirs = python_sscha.minimise(
        [(state, sampled)], symmetry, min_effective_sample=0.1, log=tmp_path / "log"
    )
    assert ours.converged
    assert ours.state.force_constants == pytest.approx(
        theirs.state.force_constants, abs=0.06 * np.abs(ours.state.force_constants).max()
    )
    assert ours.fc_gradient < theirs.fc_gradient
    assert ours.n_steps < theirs.n_steps


def test_a_minimisation_goes_as_far_as_its_sample_reaches():
    model = AnharmonicCell()
    far = replace(model.start(0.0), force_constants=3.0 * model.start(0.0).force_constants)
    sampled = sample_ensemble(far, 200, [2], model, "test")
    found = engines.minimise(
        [(far, sampled)], Symmetry(far.atoms, far.supercell_matrix), min_effective_sample=0.5
    )
    assert not found.converged
    assert 0.5 <= found.effective_sample < 0.62
    assert model.free_energy(found.state) < model.free_energy(far)


def test_a_sample_that_collapses_with_every_step_is_an_error_with_a_reason():
    model = AnharmonicCell()
    state = model.start(0.0)
    sampled = sample_ensemble(state, 4, [2], model, "test")
    scaled = replace(sampled, forces=1e5 * sampled.forces)
    with pytest.raises(SschaError, match="sample size collapses"):
        engines.minimise(
            [(state, scaled)],
            Symmetry(state.atoms, state.supercell_matrix),
            min_effective_sample=0.9,
        )
    nan = replace(sampled, energies=sampled.energies, forces=np.full_like(sampled.forces, np.nan))
    with pytest.raises(SschaError, match="not a usable number"):
        engines.minimise(
            [(state, nan)], Symmetry(state.atoms, state.supercell_matrix), min_effective_sample=0.5
        )


@pytest.mark.full
@pytest.mark.parametrize("cubic", [False, True])
def test_the_true_value_lies_within_one_sigma_in_two_runs_of_three(cubic):
    """Whole runs, each from a poor start; in the fast suite test_exact_crystals has eight crystals."""
    model, n = AnharmonicCell(cubic), 200
    exact, _ = model.minimum(0.0)
    options = dict(
        cell="fixed",
        supercell=(1, 1, 1),
        n_configs=400,
        start=model.start(0.0),
        reference_spacing=1.0,
    )
    runs = [free_energy(model.atoms, model, seed=seed, **options) for seed in range(n)]
    pulls = np.array([(run.gibbs_raw - exact / 8) / run.gibbs_error for run in runs])
    assert all(run.converged for run in runs)
    low, high = binom.interval(0.98, n, 0.683)
    assert low <= np.sum(np.abs(pulls) < 1.0) <= high


def test_the_ensemble_of_the_minimisation_would_have_said_too_low_a_value():
    """Why a run ends with a sample that no minimisation has seen."""
    model = AnharmonicCell()
    exact, best = model.minimum(0.0)
    own = np.array([_own_ensemble(model, best, exact, seed) for seed in range(7)])
    assert own.mean() < -1.0
    assert np.mean(np.abs(own) < 1.0) < 0.5


def _own_ensemble(model, state, exact, seed):
    """(F - exact) / sigma as a minimisation reports it that begins at the exact minimum."""
    sampled = sample_ensemble(state, 400, [seed, 5], model, "test")
    found = engines.minimise(
        [(state, sampled)], Symmetry(state.atoms, state.supercell_matrix), min_effective_sample=0.3
    )
    about, weights = reweighted(state, sampled, found.state)
    averages = average(found.state, about, Symmetry(state.atoms, state.supercell_matrix), weights)
    return (averages.helmholtz - exact) / averages.helmholtz_error


def test_a_run_is_advanced_as_long_as_somebody_wants_and_then_finished(tmp_path):
    atoms = PAIR
    evaluator = as_evaluator(QuarticPair())
    settings = SschaSettings(cell="fixed", supercell=(1, 1, 1), n_configs=400)
    task = Task(atoms, 0.0, 0.0, settings, 0, None, None, evaluator.model_id)
    run = SschaRun(task, evaluator, RunFolder(tmp_path, task.identity(), kept=False))
    assert not run.converged and run.n_populations == 0
    rows = [run.advance(20), run.advance(20)]
    assert [row["population"] for row in rows] == [1, 2]
    spent = run.progress.n_evaluations
    while not run.converged:
        run.advance()
    error, state = run.averages.helmholtz_error, run.state
    run.advance(1600)
    result = run.finish()
    assert result.status == "converged" and result.n_evaluations >= spent + 1600
    assert np.array_equal(result.force_constants, state.force_constants), (
        "the numbers are of the state that was found"
    )
    assert result.gibbs_error * 2 < 0.6 * error, "both ensembles of that state count"
    masses = atoms.get_masses()
    exact = QuarticPair().scha_free_energy(masses.prod() / masses.sum(), 0.0) / 2.0
    assert result.gibbs_raw == pytest.approx(exact, abs=3.5 * result.gibbs_error)


def test_populations_on_the_way_are_small_and_never_the_result():
    atoms = PAIR
    result = free_energy(
        atoms, QuarticPair(), cell="fixed", supercell=(1, 1, 1), n_configs=600, max_populations=9
    )
    assert result.converged
    assert result.n_evaluations < 600 * result.n_populations
    short = free_energy(
        atoms, QuarticPair(), cell="fixed", supercell=(1, 1, 1), n_configs=600, max_populations=1
    )
    assert short.status == "unconverged" and short.n_evaluations < 600


SHEAR = np.array([[0.04, 0.0, 0.0], [0.0, -0.04, 0.03], [0.0, 0.03, 0.02]])
SLANT = np.array([[0.06, 0.04, 0.0], [0.04, -0.04, 0.02], [0.0, 0.02, 0.02]])
H3S_CELLS = {
    "Im-3m (229)": (0.0, None),
    "R3m (160)": (0.12, None),
    "C2/m (12)": (0.0, SHEAR),
    "P1 (1)": (0.05, SLANT),
}
"""Shift of the hydrogens from the bond centres (A) and strain; strained cells stay fixed, for they
would relax to Im-3m."""


@pytest.mark.full
@pytest.mark.parametrize("temperature", [0.0, 300.0])
@pytest.mark.parametrize("group", H3S_CELLS)
def test_both_engines_relax_h3s_to_the_same_free_energy_and_space_group(h3s, group, temperature):
    from magus_anharmonic.potential import load

    shift, strain = H3S_CELLS[group]
    potential, atoms = load("h3s-gpaw-small", device="cpu"), h3s(3.03, shift)
    options = dict(n_configs=60, max_populations=12, temperature=temperature)
    if strain is not None:
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        options |= dict(cell="fixed", max_populations=8, n_configs=100)
    ours, theirs = (
        free_energy(atoms, potential, 150.0, engine=engine, seed=seed, **options)
        for seed, engine in enumerate(("native", "python-sscha"))
    )
    assert (
        ours.space_group_start == theirs.space_group_start
        and ours.space_group == theirs.space_group
    )
    assert strain is None or ours.space_group_start == group, "of the structure that was asked for"
    assert ours.gibbs_raw == pytest.approx(
        theirs.gibbs_raw, abs=3.0 * np.hypot(ours.gibbs_error, theirs.gibbs_error) + 2e-4
    )
