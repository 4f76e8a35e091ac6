"""The free-energy Hessian: python-sscha on the same ensemble, curvature of a free energy that is
known, honest error bars."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from crystals import NEON, PAIR
from scipy.linalg import solve_continuous_lyapunov
from scipy.optimize import minimize_scalar, root
from sscha_models import EV, LatticeSprings, evaluated, harmonic_state

from magus_anharmonic.errors import SschaError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.sscha.anharmonic import transformed
from magus_anharmonic.sscha.ensemble import Ensemble, static_response
from magus_anharmonic.sscha.hessian import (
    Hessian,
    Rows,
    contributions,
    free_energy_hessian,
    tensors,
)
from magus_anharmonic.sscha.reciprocal import Representation, samples, wavevectors
from magus_anharmonic.sscha.state import (
    SschaState,
    atom_order,
    expand,
    fold,
    inverse_fourier,
    oscillator_free_energy,
    sample,
    sum_rule,
    variance,
)
from magus_anharmonic.sscha.supercells import cell_offsets
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import BOHR, HBAR, KELVIN, RYDBERG

THEIR_BOHR = 1.0 / 1.889725989
THEIR_KELVIN = 2.0 * RYDBERG / 315774.65221921849
"""python-sscha's Boltzmann constant for the variances, eV/K."""


def hcp():
    """Compressed hcp Cu, turned out of every standard orientation."""
    atoms = bulk("Cu", "hcp", a=2.45, c=4.0)
    atoms.rotate(20, (1, 1, 0), rotate_cell=True)
    return atoms


def no_symmetry():
    """Three different atoms in general positions."""
    cell = [[3.1, 0.2, 0.0], [0.0, 3.3, 0.3], [0.25, 0.0, 3.6]]
    return Atoms(
        "CuAuAg",
        scaled_positions=[[0, 0, 0], [0.48, 0.45, 0.1], [0.1, 0.47, 0.55]],
        cell=cell,
        pbc=True,
    )


def start(atoms, supercell_matrix, temperature):
    """Harmonic state of EMT, imaginary modes raised."""
    return harmonic_state(atoms, supercell_matrix, EV, temperature, raised=True)


def with_their_constant(state):
    """The temperature at which we do what python-sscha does at that of ``state``."""
    return replace(state, temperature=state.temperature * THEIR_KELVIN / KELVIN)


def python_sschas(state, ensemble, log, include_v4=False):
    """Compact Hessian (eV/A^2) and third-order tensor (eV/A^3, our order of atoms) of python-sscha.

    Lengths are scaled so that they are the same in its bohr as in ours.
    """
    from magus_anharmonic.sscha import python_sscha

    scale = THEIR_BOHR / BOHR
    scaled = Ensemble(
        ensemble.displacements * scale,
        ensemble.energies,
        ensemble.forces / scale,
        ensemble.stresses,
    )
    with python_sscha.quiet(log):
        loaded = python_sscha.to_ensemble(state, scaled)
        order = atom_order(state.supercell, loaded.supercell_structure.coords)
        found, d3 = loaded.get_free_energy_hessian(include_v4=include_v4, return_d3=True)
        q = python_sscha.fractional_q(found)
    columns = (3 * np.argsort(order)[:, None] + np.arange(3)).ravel()
    tensor = d3[np.ix_(columns, columns, columns)] * RYDBERG / BOHR**3
    return inverse_fourier(
        np.array(found.dynmats) * RYDBERG / BOHR**2, state.supercell_matrix, q
    ), tensor


def third_order_of(state, ensemble, symmetry):
    modes = wavevectors(state)
    data = samples(state, ensemble, modes)
    tensor, _ = tensors(data, Representation(modes, symmetry), False)
    return real_space(tensor)


def real_space(tensor):
    """The tensor, eV/A^3: (3n, 3 n_supercell, 3 n_supercell), first index in the first cell."""
    modes = tensor.modes
    n_q, size = modes.hbar_omega.shape
    wave = np.exp(2j * np.pi * modes.q @ cell_offsets(modes.supercell_matrix).T)
    weights = modes.vectors * modes.root_mass[:, None]
    rows = np.zeros((size, n_q, size, n_q, size))
    for first in range(n_q):
        for second in range(n_q):
            triple = first, second, modes.third(first, second)
            block = transformed(tensor.block(first, second), [weights[q] for q in triple])
            phases = wave[second], wave[triple[2]]
            rows += np.einsum("r,s,xyz->xrysz", *phases, block, optimize=True).real
    return rows.reshape(size, n_q * size, n_q * size) / n_q**1.5


def cubic_forces(state, n_configs):
    """The harmonic forces of the state and a quadratic term without net force: enough for formulas,
    whatever the chemistry."""
    rng = np.random.default_rng(1)
    u = sample(state, n_configs, rng)
    pulls = -(u.reshape(n_configs, -1) @ state.full).reshape(u.shape)
    extra = 3.0 * u * np.roll(u, 1, axis=1)
    extra -= extra.mean(axis=1, keepdims=True)
    return Ensemble(u, np.zeros(n_configs), pulls + extra, np.zeros((n_configs, 3, 3)))


def compare(state, ensemble, log):
    """v3 and Hessian against python-sscha, to 1e-10 of the largest element of the tensor and of the
    correction."""
    theirs, their_tensor = python_sschas(state, ensemble, log)
    symmetry, own = Symmetry(state.atoms, state.supercell_matrix), with_their_constant(state)
    rows = third_order_of(own, ensemble, symmetry)
    assert rows == pytest.approx(their_tensor[: len(rows)], abs=1e-10 * np.abs(their_tensor).max())
    ours = free_energy_hessian(own, ensemble, symmetry, unbiased=False, errors=False)
    correction = np.abs(theirs - state.force_constants).max()
    assert correction > 1e-3
    assert ours.force_constants == pytest.approx(theirs, abs=1e-10 * correction)


def everywhere(*cases):
    """Both temperatures; one of each case in the fast suite."""
    return pytest.mark.parametrize(
        ("atoms", "supercell_matrix", "temperature"),
        [
            pytest.param(*case, t, marks=() if i % 2 == k else pytest.mark.full)
            for i, case in enumerate(cases)
            for k, t in enumerate((0.0, 300.0))
        ],
    )


@everywhere((no_symmetry(), (2, 1, 1)), (no_symmetry(), (3, 1, 1)), (hcp(), (3, 3, 1)))
def test_third_order_and_hessian_equal_python_sscha(atoms, supercell_matrix, temperature, tmp_path):
    state = start(atoms, supercell_matrix, temperature)
    compare(state, evaluated(state, EV, 40), tmp_path / "log")


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.full), 300.0])
def test_third_order_and_hessian_equal_python_sscha_for_cubic_h3s(h3s, temperature, tmp_path):
    atoms, supercell_matrix = h3s(), (2, 2, 2)
    symmetry = Symmetry(atoms, supercell_matrix)
    assert len(symmetry) == 48
    noise = np.random.default_rng(0).normal(0, 0.5, (8, 4, 4, 3, 3))
    full = expand(symmetry.force_constants(noise), supercell_matrix)
    full += (4.0 - np.linalg.eigvalsh(full)[0]) * sum_rule(np.eye(96))
    state = SschaState(
        atoms, supercell_matrix, symmetry.force_constants(fold(full, supercell_matrix)), temperature
    )
    compare(state, cubic_forces(state, 20), tmp_path / "log")


def at_its_minimum(state, ensemble):
    """Forces changed by a harmonic term so that the gradient of the force constants vanishes on
    this ensemble.

    python-sscha's <d4V> leaves out the terms that hold only with that gradient: only there may the
    two be compared.
    """
    n_configs = len(ensemble.energies)
    u = ensemble.displacements.reshape(n_configs, -1)
    v = u @ state.precision
    gradient = v.T @ (ensemble.forces.reshape(u.shape) + u @ state.full) / n_configs
    translations = np.tile(np.eye(3), (u.shape[1] // 3,) * 2) * 3 / u.shape[1]
    change = solve_continuous_lyapunov(v.T @ u / n_configs + translations, gradient + gradient.T)
    return replace(ensemble, forces=ensemble.forces - (u @ change).reshape(ensemble.forces.shape))


@everywhere((no_symmetry(), (1, 1, 1)), (hcp(), (2, 1, 1)), (hcp(), (1, 1, 3)))
def test_fourth_order_equals_python_sscha_without_its_tensor(
    atoms, supercell_matrix, temperature, tmp_path
):
    state = start(atoms, supercell_matrix, temperature)
    own = with_their_constant(state)
    ensemble = at_its_minimum(own, evaluated(state, EV, 400))
    theirs, _ = python_sschas(state, ensemble, tmp_path / "log", include_v4=True)
    symmetry = Symmetry(atoms, supercell_matrix)
    ours = free_energy_hessian(
        own, ensemble, symmetry, include_v4=True, unbiased=False, errors=False
    )
    without = free_energy_hessian(own, ensemble, symmetry, unbiased=False, errors=False)
    correction = np.abs(theirs - state.force_constants).max()
    assert np.abs(without.force_constants - theirs).max() > 1e-3 * correction
    assert ours.force_constants == pytest.approx(theirs, abs=1e-10 * correction)


class SkewPair:
    """Two atoms, v(d) = sum_i 1/2 k d_i^2 + b d_i^3 + c d_i^4 in the deviation d from half the body
    diagonal."""

    def __init__(self, a=3.0, k=-1.0, b=2.0, c=8.0):
        self.a, self.k, self.b, self.c = a, k, b, c

    def ensemble(self, state, n_configs, seed=0):
        """Drawn and evaluated, all configurations at once."""
        u = sample(state, n_configs, np.random.default_rng(seed))
        positions = state.supercell.positions + u
        d = positions[:, 1] - positions[:, 0] - self.a / 2.0
        pull = self.k * d + 3.0 * self.b * d**2 + 4.0 * self.c * d**3
        energies = (0.5 * self.k * d**2 + self.b * d**3 + self.c * d**4).sum(axis=1)
        return Ensemble(u, energies, np.stack([pull, -pull], axis=1), np.zeros((n_configs, 3, 3)))

    def free_energy(self, centroid, mass, temperature):
        """SCHA free energy of one coordinate at a fixed centroid, minimised over the spring, and
        that spring."""

        def value(log_spring):
            hbar_omega = HBAR * np.sqrt(np.exp(log_spring) / mass)
            a = variance(np.array([hbar_omega]), temperature)[0] / mass
            mean = 0.5 * self.k * (centroid**2 + a) + self.b * (centroid**3 + 3 * centroid * a)
            mean += self.c * (centroid**4 + 6 * centroid**2 * a + 3 * a**2)
            return float(
                oscillator_free_energy(np.array([hbar_omega]), temperature)[0]
                + mean
                - 0.5 * np.exp(log_spring) * a
            )

        found = minimize_scalar(
            value, bounds=(-3.0, 6.0), method="bounded", options={"xatol": 1e-12}
        )
        return float(found.fun), float(np.exp(found.x))

    def minimum(self, mass, temperature):
        """Centroid and spring of the SCHA minimum."""

        def gradients(x):
            d, spring = x
            a = variance(np.array([HBAR * np.sqrt(spring / mass)]), temperature)[0] / mass
            force = self.k * d + 3 * self.b * (d**2 + a) + 4 * self.c * (d**3 + 3 * d * a)
            return [force, self.k + 6 * self.b * d + 12 * self.c * (d**2 + a) - spring]

        begin = minimize_scalar(
            lambda d: self.free_energy(d, mass, temperature)[0],
            bounds=(-0.6, 0.6),
            method="bounded",
        ).x
        solved = root(gradients, [begin, self.free_energy(begin, mass, temperature)[1]], tol=1e-12)
        return float(solved.x[0]), float(solved.x[1])


def pair_state(model, temperature):
    """The SCHA minimum of the model as a state, and the reduced mass."""
    atoms = PAIR.copy()
    masses = atoms.get_masses()
    mass = masses.prod() / masses.sum()
    centroid, spring = model.minimum(mass, temperature)
    atoms.positions[1] += centroid
    compact = np.zeros((1, 2, 2, 3, 3))
    for a in range(2):
        for b in range(2):
            compact[0, a, b] = spring * np.eye(3) * (1 if a == b else -1)
    return SschaState(atoms, (1, 1, 1), compact, temperature), mass


@pytest.mark.parametrize("temperature", [0.0, 400.0])
def test_full_hessian_is_the_curvature_of_the_free_energy(temperature):
    """Second derivative, by differences, of min over the spring of F at fixed centroid: the
    definition of the Hessian."""
    model = SkewPair()
    state, mass = pair_state(model, temperature)
    centroid = model.minimum(mass, temperature)[0]
    step = 2e-3
    low, middle, high = (
        model.free_energy(centroid + shift, mass, temperature)[0] for shift in (-step, 0.0, step)
    )
    exact = (low - 2 * middle + high) / step**2 * HBAR**2 / mass
    ensemble = model.ensemble(state, 20000)
    symmetry = Symmetry(state.atoms, (1, 1, 1))
    full = free_energy_hessian(state, ensemble, symmetry, include_v4=True)
    bubble = free_energy_hessian(state, ensemble, symmetry)
    assert full.squares[0, 3:] == pytest.approx(
        np.full(3, exact), abs=4.0 * full.errors[0, 3:].max()
    )
    assert full.errors[0, 3:].max() < 0.05 * abs(exact)
    assert abs(bubble.squares[0, 3:].mean() - exact) > 4.0 * bubble.errors[0, 3:].max(), (
        "the fourth order matters here"
    )
    hbar_omega = state.modes.hbar_omega[:1]
    d3 = 6 * model.b + 24 * model.c * centroid
    expected = (
        hbar_omega[0] ** 2
        + HBAR**2 * d3**2 / mass**3 * static_response(hbar_omega, temperature)[0, 0]
    )
    assert bubble.squares[0, 3:] == pytest.approx(
        np.full(3, expected), abs=4.0 * bubble.errors[0, 3:].max()
    )


def optical(hessian):
    """Mean of the three squared frequencies that are no translations, and of their error bars."""
    moving = np.abs(hessian.squares[0]) > 1e-12
    assert moving.sum() == 3
    return float(hessian.squares[0, moving].mean()), float(hessian.errors[0, moving].mean())


@pytest.mark.parametrize(("include_v4", "runs"), [(False, 60), (True, 20)])
def test_error_bars_cover_and_the_noise_of_the_square_is_taken_out(include_v4, runs):
    """Ensembles of 400: the scatter is what the error bars say; without the two halves all is too
    soft."""
    model = SkewPair()
    state, _ = pair_state(model, 0.0)
    symmetry = Symmetry(state.atoms, (1, 1, 1))
    target, small = optical(
        free_energy_hessian(
            state, model.ensemble(state, 40000, 99), symmetry, include_v4=include_v4
        )
    )
    ensembles = [model.ensemble(state, 400, seed) for seed in range(runs)]
    found = [
        optical(free_energy_hessian(state, one, symmetry, include_v4=include_v4))
        for one in ensembles
    ]
    means, errors = np.array(found).T
    assert abs(means.mean() - target) < 3.5 * np.hypot(means.std() / np.sqrt(runs), small)
    # the auxiliary spring is exact here, so that its part of the error bar, most of it with the
    # fourth order, is not in the scatter
    assert (0.15 if include_v4 else 0.4) < (means - target).std() / errors.mean() < 1.2
    assert errors.mean() == pytest.approx(10.0 * small, rel=0.2), (
        "a hundred times the configurations, a tenth of the error"
    )
    if not include_v4:
        plain = [
            free_energy_hessian(state, one, symmetry, unbiased=False, errors=False)
            for one in ensembles
        ]
        assert np.all([hessian.squares[0].sum() / 3.0 for hessian in plain] < means)


@pytest.mark.parametrize("include_v4", [False, True])
def test_a_pair_moves_the_frequencies_as_the_error_bars_say(include_v4):
    """Leaving out a pair changes every squared frequency by minus its contribution over the number
    of the others."""
    model = SkewPair()
    state, _ = pair_state(model, 0.0)
    ensemble = model.ensemble(state, 8000)
    alone = Symmetry(state.atoms, (1, 1, 1))
    identity = np.array([np.array_equal(w, np.eye(3)) for w in alone.fractional])
    for name in ("rotations", "permutations", "fractional", "shifts", "targets"):
        setattr(alone, name, getattr(alone, name)[identity])
    options = dict(include_v4=include_v4, unbiased=False, errors=False)
    found = free_energy_hessian(state, ensemble, alone, **options)
    modes = wavevectors(state)
    data = samples(state, ensemble, modes)
    representation = Representation(modes, alone)
    rows = Rows(data, representation, include_v4)
    tensor, _ = tensors(data, representation, False)
    told = contributions(found, data, 0, rows.of(tensor, 0))[0][:12, 3:] * HBAR**2
    told -= contributions(found, data, 0, rows.of(tensor, 0))[0][:, 3:].mean(axis=0) * HBAR**2
    seen = []
    for pair in range(12):
        left = [
            np.delete(values, [2 * pair, 2 * pair + 1], axis=0)
            for values in vars(ensemble).values()
        ]
        without = free_energy_hessian(state, Ensemble(*left), alone, **options)
        seen.append(-(without.squares - found.squares)[0, 3:].sum() * 3999)
    assert told.sum(axis=1) == pytest.approx(np.array(seen), abs=0.1 * np.abs(seen).max())
    assert np.corrcoef(told.sum(axis=1), seen)[0, 1] > 0.99


def test_a_harmonic_crystal_has_its_own_frequencies_and_is_stable():
    calculator = as_evaluator(LatticeSprings())
    atoms = NEON
    symmetry = Symmetry(atoms, (3, 3, 3))
    state = harmonic_state(atoms, (3, 3, 3), calculator, 100.0)
    found = free_energy_hessian(state, evaluated(state, calculator, 20), symmetry)
    assert found.force_constants == pytest.approx(state.force_constants, abs=1e-9)
    assert found.hbar_omega == pytest.approx(
        np.sort(LatticeSprings().quanta(found.points, atoms.get_masses()[0]), axis=1), abs=2e-7
    )
    assert (found.status, found.probability_stable) == ("stable", 1.0)
    assert found.errors is not None and found.errors.max() < 1e-10


def test_symmetry_makes_equal_what_is_equal():
    state = start(hcp(), (3, 3, 1), 300.0)
    found = free_energy_hessian(
        state, evaluated(state, EV, 40), Symmetry(state.atoms, state.supercell_matrix)
    )
    for star in np.unique(found.star):
        members = np.flatnonzero(found.star == star)
        assert found.squares[members] == pytest.approx(
            np.tile(found.squares[members[0]], (len(members), 1)), abs=1e-10
        )
        assert found.errors[members] == pytest.approx(
            np.tile(found.errors[members[0]], (len(members), 1))
        )
    assert np.bincount(found.star).tolist() == [1, 6, 2], "Gamma, the six around it, and K"


def test_without_symmetry_a_mode_at_minus_q_is_the_one_at_q():
    state = start(no_symmetry(), (3, 1, 1), 300.0)
    found = free_energy_hessian(
        state, evaluated(state, EV, 20), Symmetry(state.atoms, state.supercell_matrix)
    )
    assert found.star.tolist() == [0, 1, 1]
    assert np.all(found.errors[1] > 0)
    assert found.errors[2] == pytest.approx(found.errors[1])


def made(squares, errors):
    """A Hessian of one atom and two q points with three given modes."""
    atoms = Atoms("H", cell=[2.0] * 3, pbc=True)
    state = SschaState(atoms, (2, 1, 1), np.zeros((2, 1, 1, 3, 3)), 0.0)
    values = np.array([[0.0, 0.0, 0.0], squares])
    bars = None if errors is None else np.array([[0.0, 0.0, 0.0], errors])
    points, vectors = np.array([[0.0, 0, 0], [0.5, 0, 0]]), np.zeros((2, 3, 3))
    return Hessian(
        state,
        state.force_constants,
        points,
        values,
        bars,
        vectors,
        np.array([0, 1]),
        10,
        False,
        True,
    )


@pytest.mark.parametrize(
    ("squares", "errors", "status", "probability"),
    [
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], "stable", 1.0),
        ([-1.0, 2.0, 3.0], [0.4, 0.1, 0.1], "saddle", 0.0062),
        ([-1.0, 2.0, 3.0], [0.6, 0.1, 0.1], "undecided", 0.0478),
        ([0.1, 2.0, 3.0], [0.1, 0.1, 0.1], "undecided", 0.8413),
        ([0.1, 0.2, 3.0], [0.1, 0.2, 0.1], "undecided", 0.8413**2),
        ([-0.1, 2.0, 3.0], None, "saddle", 0.0),
    ],
)
def test_a_verdict_needs_two_standard_errors(squares, errors, status, probability):
    found = made(squares, errors)
    assert found.status == status
    assert found.probability_stable == pytest.approx(probability, abs=1e-3)
    assert found.deciding[0] == 1


def test_a_state_with_imaginary_modes_is_refused():
    state, _ = pair_state(SkewPair(), 0.0)
    broken = replace(state, force_constants=-state.force_constants)
    with pytest.raises(SschaError, match="3 imaginary modes"):
        free_energy_hessian(broken, cubic_forces(state, 10), Symmetry(state.atoms, (1, 1, 1)))


def test_response_of_equal_and_of_nearly_equal_quanta_is_the_derivative_of_the_variance():
    hbar_omega = np.array([0.03, 0.03 * (1 + 1e-9), 0.05])
    for temperature in (0.0, 20.0, 3000.0):
        response = static_response(hbar_omega, temperature)
        step = 1e-4 * hbar_omega[0]
        a, b = (
            variance(np.array([hbar_omega[0] + shift]), temperature)[0] for shift in (-step, step)
        )
        slope = (b - a) / (((hbar_omega[0] + step) ** 2 - (hbar_omega[0] - step) ** 2) / HBAR**2)
        assert response[0, 0] == pytest.approx(0.5 * slope, rel=1e-6)
        assert response[0, 1] == pytest.approx(response[0, 0], rel=1e-7)
        one, other = variance(hbar_omega[[0, 2]], temperature)
        assert response[0, 2] == pytest.approx(
            0.5 * (one - other) / ((hbar_omega[0] ** 2 - hbar_omega[2] ** 2) / HBAR**2), rel=1e-9
        )
