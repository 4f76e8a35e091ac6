"""States, symmetry, harmonic start and finite size: checked against phonopy and against crystals
with known phonons."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from crystals import NEON, PAIR
from harmonic_pair import HarmonicCrystal, springs
from sscha_models import EV, LatticeSprings, QuarticPair, cu3au, evaluated, harmonic_state

from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.sscha.cell import LARGEST_STRAIN, CellStiffness, static_response_to_strain
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.reciprocal import finite_size_term, interpolated_squares, reference_mesh
from magus_anharmonic.sscha.start import (
    harmonic_force_constants,
    harmonic_start,
    interpolate,
    relax_in_symmetry,
    relaxed_primitive,
)
from magus_anharmonic.sscha.state import (
    LARGEST_AMPLITUDE,
    SschaState,
    expand,
    floor_modes,
    fourier,
    nearest_neighbour,
    sample,
    variance,
)
from magus_anharmonic.sscha.symmetry import (
    Symmetry,
    choose_supercell_matrix,
    displacements_of,
    statistical_tolerance,
    symmetric_primitive,
)
from magus_anharmonic.structures import space_group
from magus_anharmonic.units import EV_PER_A3_IN_GPA, gpa_to_ev_per_a3


def distorted(seed=3):
    """Four atoms without any symmetry."""
    atoms = cu3au()
    atoms.set_cell(
        atoms.cell.array * [[1.0], [1.03], [0.98]] + [[0, 0.1, 0], [0, 0, 0.15], [0, 0, 0]],
        scale_atoms=True,
    )
    atoms.rattle(0.1, seed=seed)
    return atoms


def test_one_displaced_atom_of_each_kind_is_enough_to_know_all():
    atoms = cu3au(turned=True)
    symmetry = Symmetry(atoms, (2, 2, 2))
    identity = Symmetry(distorted(), (2, 2, 2))
    assert (len(symmetry), len(identity)) == (48, 1)
    assert symmetry.representatives() == [0, 1]
    assert identity.representatives() == [0, 1, 2, 3]
    by_symmetry = harmonic_force_constants(atoms, (2, 2, 2), symmetry, EV)
    identity.permutations, identity.rotations = np.arange(4)[None], np.eye(3)[None]
    one_by_one = harmonic_force_constants(atoms, (2, 2, 2), identity, EV)
    assert by_symmetry == pytest.approx(one_by_one, abs=1e-3 * np.abs(one_by_one).max())


IM3M = Atoms(
    "SH3",
    positions=1.5 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    cell=1.5 * (np.ones((3, 3)) - 2.0 * np.eye(3)),
    pbc=True,
)
R3M = Atoms(
    "SH3",
    positions=IM3M.positions + np.array([0.0, 0.1, 0.1, 0.1])[:, None] * (np.eye(4, 3, -1)),
    cell=IM3M.cell,
    pbc=True,
)
SITES = {
    "one direction for a cubic site": (IM3M, 2),
    "two for a polar one, and their opposites": (R3M, 6),
    "without inversion at the sites": (bulk("ZnO", "wurtzite", a=3.25, c=5.2), 4),
    "tetrahedral": (bulk("Si"), 1),
    "turned": (cu3au(turned=True), 2),
    "no symmetry": (distorted(), 24),
}


@pytest.mark.parametrize("name", SITES)
def test_what_symmetry_tells_is_not_evaluated_and_nothing_is_lost(name):
    """Random springs of the crystal's symmetry come back from the forces of few displacements."""
    atoms, count = SITES[name]
    supercell_matrix = (2, 2, 2)
    symmetry = Symmetry(atoms, supercell_matrix)
    found = [displacements_of(symmetry, atom) for atom in symmetry.representatives()]
    assert sum(map(len, found)) == count
    springs_ = springs(atoms, supercell_matrix, seed=1)
    crystal = HarmonicCrystal(
        SschaState(atoms, supercell_matrix, springs_, 0.0), np.zeros((len(atoms), 3))
    )
    found = harmonic_force_constants(atoms, supercell_matrix, symmetry, crystal)
    assert found == pytest.approx(springs_, abs=1e-9 * np.abs(springs_).max())


def test_samples_are_pairs_with_the_covariance_of_the_state():
    state = harmonic_state(cu3au(), (1, 1, 2), temperature=200.0)
    u = sample(state, 40000, np.random.default_rng(1))
    assert np.array_equal(u[0::2], -u[1::2])
    flat = u[0::2].reshape(20000, -1)
    scale = np.sqrt(np.outer(np.diag(state.covariance), np.diag(state.covariance)))
    assert np.abs(flat.T @ flat / 20000 - state.covariance).max() < 0.05 * scale.max()
    assert state.precision @ state.covariance @ state.precision == pytest.approx(
        state.precision, abs=1e-8 * np.abs(state.precision).max()
    )


def test_a_mode_of_low_frequency_is_raised_until_its_amplitude_is_small():
    atoms = PAIR
    state = harmonic_state(atoms, (1, 1, 1), as_evaluator(QuarticPair(k=-0.005)))
    assert np.all(state.modes.hbar_omega < 0)
    floored = floor_modes(state, Symmetry(atoms, (1, 1, 1)))
    assert np.all(floored.modes.hbar_omega > 0)
    patterns = floored.modes.vectors / np.sqrt(np.repeat(atoms.get_masses(), 3)[:, None])
    apart = np.linalg.norm((patterns[:3] - patterns[3:]), axis=0) * np.sqrt(
        variance(floored.modes.hbar_omega, 0.0)
    )
    assert apart.max() == pytest.approx(
        LARGEST_AMPLITUDE * nearest_neighbour(atoms).min(), rel=1e-3
    )
    stiff = harmonic_state(cu3au(), (2, 2, 2))
    assert floor_modes(stiff, Symmetry(stiff.atoms, (2, 2, 2))).force_constants == pytest.approx(
        stiff.force_constants, abs=1e-12
    )


def test_finite_size_term_of_a_crystal_with_short_range_forces_is_exact():
    calculator = LatticeSprings()
    atoms = NEON
    for temperature in (0.0, 150.0):
        state = harmonic_state(atoms, (3, 3, 3), as_evaluator(calculator), temperature)
        found = finite_size_term(state, spacing=0.05)
        assert found.mesh == reference_mesh(atoms, 0.05, (3, 3, 3)) == (7, 7, 7)
        assert found.imaginary == 0.0
        mass = atoms.get_masses()[0]
        raw = calculator.free_energy((3, 3, 3), mass, temperature)
        assert state.harmonic_free_energy == pytest.approx(raw, abs=1e-9)
        assert raw + found.term == pytest.approx(
            calculator.free_energy((7, 7, 7), mass, temperature), abs=1e-9
        )


def test_finite_size_term_makes_supercells_agree():
    small, large = (
        harmonic_state(cu3au(), supercell_matrix) for supercell_matrix in ((2, 2, 2), (3, 3, 3))
    )
    raw = large.harmonic_free_energy - small.harmonic_free_energy
    corrected = raw + finite_size_term(large, 0.02).term - finite_size_term(small, 0.02).term
    assert abs(corrected) < 0.2 * abs(raw)


def test_interpolation_gives_back_the_force_constants_on_the_points_of_the_supercell():
    state = harmonic_state(cu3au(), (2, 2, 2))
    q = np.array(list(np.ndindex(2, 2, 2))) / 2.0
    root = np.sqrt(np.repeat(state.atoms.get_masses(), 3))
    ours = interpolated_squares(state, q)
    matrices = fourier(state.force_constants, (2, 2, 2), q) / np.outer(root, root)
    assert ours == pytest.approx(np.linalg.eigvalsh(matrices), abs=1e-10)
    calculator = as_evaluator(LatticeSprings())
    atoms = NEON
    larger = interpolate(harmonic_state(atoms, (3, 3, 3), calculator), (4, 3, 5))
    assert larger == pytest.approx(
        harmonic_state(atoms, (4, 3, 5), calculator).force_constants, abs=1e-8
    )


def test_symmetrised_force_constants_are_symmetric_and_translations_cost_nothing():
    atoms = cu3au(turned=True)
    symmetry = Symmetry(atoms, (2, 2, 2))
    compact = symmetry.force_constants(np.random.default_rng(0).normal(size=(8, 4, 4, 3, 3)))
    assert symmetry.force_constants(compact) == pytest.approx(compact, abs=1e-12)
    full = expand(compact, (2, 2, 2))
    assert full == pytest.approx(full.T, abs=1e-12)
    assert np.abs(full.reshape(96, 32, 3).sum(axis=1)).max() < 1e-11


def test_symmetry_acts_on_real_forces_and_stresses_as_they_are():
    atoms = bulk("Cu", "hcp", a=2.6, c=4.3)
    atoms.positions[1] += atoms.cell.array[2] * 0.02
    atoms.rotate(20, (1, 1, 0), rotate_cell=True)
    symmetry = Symmetry(atoms, (2, 2, 1))
    found = EV.evaluate([atoms])
    assert len(symmetry) > 4
    assert symmetry.vectors(found.forces[0]) == pytest.approx(found.forces[0], abs=1e-8)
    assert symmetry.tensor(found.stress[0]) == pytest.approx(found.stress[0], abs=1e-8)
    assert symmetry.centroids().shape[1] == 1
    assert Symmetry(cu3au(), (2, 2, 2)).centroids().shape[1] == 0
    assert Symmetry(distorted(), (1, 1, 1)).centroids().shape[1] == 9


def test_a_supercell_that_breaks_the_symmetry_is_enlarged(caplog):
    caplog.set_level("INFO")
    atoms = cu3au()
    assert choose_supercell_matrix(atoms, (2, 2, 2), 1e-3) == (2, 2, 2)
    assert choose_supercell_matrix(atoms, (1, 1, 2), 1e-3) == (2, 2, 2)
    assert "(1, 1, 2)" in caplog.text
    assert choose_supercell_matrix(distorted(), (1, 1, 2), 1e-3) == (1, 1, 2)
    assert choose_supercell_matrix(atoms, {"min_length": 6.0}, 1e-3, diagonal=True) == (2, 2, 2)
    assert choose_supercell_matrix(
        bulk("Cu", "fcc", a=3.6), {"min_length": 6.0}, 1e-3, diagonal=True
    ) == (3, 3, 3)


def test_primitive_cell_is_exactly_symmetric_and_not_turned():
    conventional = bulk("Cu", "fcc", a=3.6, cubic=True)
    conventional.rotate(25, (1, 2, 0), rotate_cell=True)
    conventional.rattle(0.005, seed=2)
    found = symmetric_primitive(conventional, 0.05)
    assert len(found) == 1
    assert space_group(found, 1e-5) == "Fm-3m (225)"
    multiples = conventional.cell.array @ np.linalg.inv(found.cell.array)
    assert multiples == pytest.approx(np.round(multiples), abs=0.01)


def test_relaxation_before_the_start_meets_the_pressure_and_keeps_the_symmetry():
    atoms = symmetric_primitive(bulk("Cu", "hcp", a=2.45, c=4.3), 0.05)
    relaxed = relax_in_symmetry(atoms, EV, 30.0, variable_cell=True)
    found = EV.evaluate([relaxed])
    assert np.abs(found.stress[0] + np.eye(3) * gpa_to_ev_per_a3(30.0)).max() < gpa_to_ev_per_a3(
        0.06
    )
    assert np.abs(found.forces[0]).max() < 2e-3
    assert space_group(relaxed, 1e-4) == space_group(atoms, 1e-4)


def test_a_relaxation_that_gains_symmetry_is_reduced_once_more():
    """A doubled fcc cell whose two atoms are pushed apart relaxes back to fcc: one atom, not
    two."""
    atoms = bulk("Al", "fcc", a=4.0).repeat((2, 1, 1))
    atoms.positions[1] += [0.08, 0.03, -0.05]
    assert len(symmetric_primitive(atoms, 0.02)) == 2
    relaxed = relaxed_primitive(atoms, EV, 0.0, symprec=0.02, variable_cell=True)
    assert len(relaxed) == 1
    assert space_group(relaxed, 1e-3) == "Fm-3m (225)"


def test_strain_by_the_stiffness_brings_a_static_crystal_to_the_pressure():
    atoms = cu3au(turned=True)
    symmetry = Symmetry(atoms, (1, 1, 1))
    response = static_response_to_strain(atoms, EV)
    before = EV.evaluate([atoms]).stress[0]
    target = -float(np.trace(before)) / 3.0 / gpa_to_ev_per_a3(1.0) + 3.0
    state = harmonic_state(atoms, (1, 1, 1))

    def stiffness(pressure):
        return CellStiffness.of(response, state.gamma, atoms.get_volume(), symmetry, pressure)

    cell = stiffness(target)
    assert cell.strains.shape == (1, 3, 3), "cubic: the volume alone"
    after = EV.evaluate([state.strained(cell.strain(cell.step(cell.excess(before)))).atoms]).stress[
        0
    ]
    assert np.abs(after + np.eye(3) * gpa_to_ev_per_a3(target)).max() < gpa_to_ev_per_a3(0.3)
    far = stiffness(target + 500.0)
    assert np.abs(far.strain(far.step(far.excess(before)))).max() == pytest.approx(LARGEST_STRAIN)


def test_a_soft_axis_is_as_soft_as_it_is_and_a_stiff_one_does_not_change_that():
    matrix = np.diag([400.0, 4.0]) / EV_PER_A3_IN_GPA
    strains = np.stack([np.diag([1.0, 1.0, 0.0]) / np.sqrt(2.0), np.diag([0.0, 0.0, 1.0])])
    cell = CellStiffness(
        strains, np.zeros((2, 3)), np.zeros((2, 2)), matrix, np.zeros((2, 2, 2, 2)), 0.0
    )
    stress = np.diag([0.0, 0.0, 0.04]) / EV_PER_A3_IN_GPA
    assert cell.step(cell.excess(stress)) == pytest.approx([0.0, -0.01])


def test_the_stiffness_learns_from_what_a_step_did():
    atoms = cu3au(turned=True)
    symmetry = Symmetry(atoms, (1, 1, 1))
    state = harmonic_state(atoms, (1, 1, 1))
    cell = CellStiffness.of(
        static_response_to_strain(atoms, EV), state.gamma, atoms.get_volume(), symmetry, 0.0
    )
    step, noise = np.array([0.01]), np.eye(1) * 1e-10
    truth = 0.7 * cell.matrix
    learned = cell
    for _ in range(4):
        learned = learned.learned(step, truth @ step, noise)
    assert learned.matrix == pytest.approx(truth, rel=0.1)
    assert learned.misfit(step) < 0.5 * cell.misfit(step)
    blind = cell.learned(step, truth @ step, np.eye(1) * 1e3)
    assert blind.matrix == pytest.approx(cell.matrix, rel=1e-3), "noise teaches nothing"


def test_start_from_a_saddle_is_positive_definite_and_counts_its_evaluations():
    atoms = PAIR
    begin = harmonic_start(
        atoms,
        as_evaluator(QuarticPair()),
        temperature=0.0,
        supercell_matrix=(1, 1, 1),
        variable_cell=False,
    )
    assert np.all(begin.state.modes.hbar_omega > 0)
    assert begin.n_evaluations == 2, "one direction for each of two cubic sites"
    assert begin.response is None


def test_averages_of_a_harmonic_crystal_are_exact_for_any_ensemble():
    calculator = LatticeSprings()
    atoms = NEON
    state = harmonic_state(atoms, (2, 2, 2), as_evaluator(calculator), 100.0)
    found = average(
        state, evaluated(state, as_evaluator(calculator), 6), Symmetry(atoms, (2, 2, 2))
    )
    assert found.helmholtz == pytest.approx(
        calculator.free_energy((2, 2, 2), atoms.get_masses()[0], 100.0), abs=1e-8
    )
    assert found.helmholtz_error < 1e-8
    assert abs(found.predicted_decrease) < 1e-8


@pytest.fixture
def too_soft():
    """Evaluator, symmetry and state of a harmonic crystal, and the state with force constants that
    are a fifth too small."""
    evaluator = as_evaluator(LatticeSprings())
    exact = harmonic_state(NEON, (2, 2, 2), evaluator)
    soft = replace(exact, force_constants=0.8 * exact.force_constants)
    return evaluator, Symmetry(NEON, (2, 2, 2)), exact, soft


def test_predicted_decrease_is_what_is_gained_by_the_step(too_soft):
    evaluator, symmetry, exact, soft = too_soft
    found = average(soft, evaluated(soft, evaluator, 1500), symmetry)
    # to second order they are equal; the next order is 12 per cent here, the rest is noise
    assert found.predicted_decrease == pytest.approx(
        found.helmholtz - exact.harmonic_free_energy, rel=0.35
    )


def test_error_bar_takes_the_two_of_a_pair_as_one(too_soft):
    evaluator, symmetry, _, soft = too_soft
    rng = np.random.default_rng(0)
    found = [average(soft, evaluated(soft, evaluator, 12, rng), symmetry) for _ in range(60)]
    scatter = np.std([one.helmholtz for one in found], ddof=1)
    assert np.mean([one.helmholtz_error for one in found]) == pytest.approx(scatter, rel=0.3)


def test_tolerance_of_the_space_group_follows_the_error():
    assert statistical_tolerance(np.zeros((2, 3)), 0.0, 5.0) == 0.01
    assert statistical_tolerance(np.full((2, 3), 0.01), 0.001, 5.0) == pytest.approx(0.035)
    assert statistical_tolerance(np.full((2, 3), 1.0), 0.0, 5.0) == 0.1


def test_finite_differences_use_float64_where_the_potential_has_it(potential, h3s):
    from magus_anharmonic.sscha.start import in_double_precision

    double = in_double_precision(potential)
    assert double.model_id == potential.model_id
    atoms = h3s()
    atoms.rattle(0.05, seed=1)
    single, precise = potential.evaluate([atoms]), double.evaluate([atoms])
    assert precise.forces[0] == pytest.approx(single.forces[0], abs=1e-4)
    assert not np.array_equal(precise.forces[0], single.forces[0])
    assert str(potential.dtype) == "torch.float32"
    assert in_double_precision(EV) is EV
