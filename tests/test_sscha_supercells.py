"""Supercells that are no repetitions: the same physics as the same atoms in a cell of their own,
phonopy, and how they are chosen."""

from itertools import product

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from hypothesis import given, settings
from hypothesis import strategies as st
from sscha_models import EV, cu3au, evaluated, harmonic_state, phonopy_of

from magus_anharmonic.errors import InputError
from magus_anharmonic.sscha import SschaResult, free_energy
from magus_anharmonic.sscha.engines import minimise
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.hessian import free_energy_hessian
from magus_anharmonic.sscha.qe_files import state_from_dyn, write_dyn
from magus_anharmonic.sscha.reciprocal import finite_size_term
from magus_anharmonic.sscha.result import read_population_file
from magus_anharmonic.sscha.state import SschaState, expand, fold, fourier, inverse_fourier
from magus_anharmonic.sscha.supercells import (
    adjugate,
    as_supercell_matrix,
    cell_index,
    cell_offsets,
    compatible,
    containing_mesh,
    determinant,
    dual,
    kept_sublattices,
    n_cells,
    q_index,
    q_points,
    shape_supercell_matrix,
    sublattices,
)
from magus_anharmonic.sscha.symmetry import Symmetry, choose_supercell_matrix

SLANTED = ((1, 1, 0), (-1, 2, 0), (0, 1, 1))
"""Three cells; q = -q holds at Gamma alone, so that everything is complex."""
CONVENTIONAL = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
"""The cubic cell of four primitive fcc cells."""


def pair(seed=3):
    """Two different atoms in a cell without symmetry."""
    atoms = Atoms(
        "CuAu",
        scaled_positions=[[0, 0, 0], [0.5, 0.45, 0.55]],
        cell=[[2.9, 0.1, 0], [0.2, 3.1, 0], [0, 0.3, 3.3]],
        pbc=True,
    )
    atoms.rattle(0.05, seed=seed)
    return atoms


def state_of(atoms, supercell_matrix, temperature=300.0):
    return harmonic_state(atoms, supercell_matrix, EV, temperature, raised=True)


def as_one_cell(state):
    """The supercell as a primitive cell of its own, repeated once: all there is to compare with,
    without a lattice inside."""
    n = len(state.supercell)
    blocks = state.full.reshape(n, 3, n, 3).transpose(0, 2, 1, 3)
    return SschaState(state.supercell.copy(), (1, 1, 1), blocks[None], state.temperature)


matrices = (
    st.lists(st.integers(-3, 3), min_size=9, max_size=9)
    .map(lambda v: np.array(v).reshape(3, 3))
    .filter(lambda m: determinant(m) != 0)
)


@settings(deadline=None, max_examples=40)
@given(matrices)
def test_cells_and_q_points_of_any_matrix(matrix):
    supercell_matrix = as_supercell_matrix(matrix)
    offsets, q = cell_offsets(supercell_matrix), q_points(supercell_matrix)
    assert len(offsets) == len(q) == n_cells(supercell_matrix) == round(abs(np.linalg.det(matrix)))
    assert np.array_equal(cell_index(offsets, supercell_matrix), np.arange(len(offsets)))
    assert np.array_equal(q_index(q + [3, -1, 2], supercell_matrix), np.arange(len(q)))
    for row in matrix:
        assert np.array_equal(
            cell_index(offsets + row, supercell_matrix), np.arange(len(offsets))
        ), "a vector of the supercell leads to the same cell"
    assert q @ matrix.T == pytest.approx(np.rint(q @ matrix.T), abs=1e-9)
    wave = np.exp(2j * np.pi * q @ offsets.T)
    assert wave @ wave.conj().T == pytest.approx(len(q) * np.eye(len(q)), abs=1e-6), (
        "the waves are complete and orthogonal"
    )
    mesh = q * containing_mesh(supercell_matrix)
    assert mesh == pytest.approx(np.rint(mesh), abs=1e-9)
    assert n_cells(dual(supercell_matrix)) == len(q)


def test_a_diagonal_matrix_is_three_repetitions_and_a_flat_one_nothing():
    assert as_supercell_matrix(np.diag([2, 3, 4])) == (2, 3, 4)
    with pytest.raises(ValueError, match="span"):
        cell_offsets(((1, 0, 0), (0, 1, 0), (1, 1, 0)))


@pytest.mark.parametrize("matrix", [(2, 3, 1), SLANTED], ids=["diagonal", "slanted"])
def test_fourier_and_folding_are_inverses(matrix):
    compact = np.random.default_rng(0).normal(size=(n_cells(matrix), 2, 2, 3, 3))
    q = q_points(matrix)
    assert fold(expand(compact, matrix), matrix) == pytest.approx(compact, abs=1e-14)
    back = inverse_fourier(fourier(compact, matrix, q), matrix, q)
    assert back == pytest.approx(compact, abs=1e-13)


@pytest.mark.parametrize(
    ("atoms", "supercell_matrix"),
    [
        (pair(), SLANTED),
        (bulk("Cu", "fcc", a=3.55), CONVENTIONAL),
        (cu3au(), (2, 2, 2)),
        (cu3au(turned=True), (2, 2, 2)),
    ],
    ids=["P1", "fcc", "along the axes", "turned"],
)
def test_harmonic_frequencies_equal_phonopy_with_the_same_matrix(atoms, supercell_matrix):
    state = harmonic_state(atoms, supercell_matrix)
    phonopy = phonopy_of(atoms, supercell_matrix)
    phonopy.generate_displacements(distance=0.015, is_plusminus=True)
    displaced = [
        Atoms(c.symbols, positions=c.positions, cell=c.cell, pbc=True)
        for c in phonopy.supercells_with_displacements
    ]
    phonopy.forces = np.array(EV.evaluate(displaced).forces)
    phonopy.produce_force_constants()
    phonopy.symmetrize_force_constants(level=3)
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    points = q_points(supercell_matrix)
    ours = np.linalg.eigvalsh(
        fourier(state.force_constants, supercell_matrix, points) / np.outer(root, root)
    )
    theirs = np.array([np.linalg.eigvalsh(phonopy.get_dynamical_matrix_at_q(q)) for q in points])
    assert ours == pytest.approx(theirs, abs=1e-3 * theirs.max())


@pytest.mark.parametrize(
    ("atoms", "supercell_matrix"),
    [(pair(), SLANTED), (bulk("Cu", "fcc", a=3.7), CONVENTIONAL)],
    ids=["P1", "fcc"],
)
def test_averages_minimisation_and_hessian_are_those_of_the_same_atoms_in_one_cell(
    atoms, supercell_matrix
):
    state = state_of(atoms, supercell_matrix)
    ensemble = evaluated(state, EV, 80)
    one, cells = as_one_cell(state), n_cells(supercell_matrix)
    symmetry, other = Symmetry(atoms, supercell_matrix), Symmetry(one.atoms, (1, 1, 1))
    assert len(other) == len(symmetry) * cells, "the one cell sees the lattice as operations"
    ours, theirs = average(state, ensemble, symmetry), average(one, ensemble, other)
    assert cells * ours.helmholtz == pytest.approx(theirs.helmholtz, abs=1e-9)
    assert cells * ours.predicted_decrease == pytest.approx(theirs.predicted_decrease, rel=1e-6)
    assert ours.stress == pytest.approx(theirs.stress, abs=1e-10)
    found, same = (
        minimise([(s, ensemble)], g, min_effective_sample=0.3)
        for s, g in ((state, symmetry), (one, other))
    )
    assert found.n_steps == same.n_steps > 1
    assert cells * found.decrease == pytest.approx(same.decrease, rel=1e-5)
    assert found.state.full == pytest.approx(same.state.full, abs=1e-6)
    assert found.state.supercell.positions == pytest.approx(same.state.atoms.positions, abs=1e-7)
    for include_v4 in (False, True):
        few = ensemble.part(slice(40)) if include_v4 else ensemble
        hessian, flat = (
            free_energy_hessian(s, few, g, include_v4=include_v4)
            for s, g in ((state, symmetry), (one, other))
        )
        assert expand(hessian.force_constants, supercell_matrix) == pytest.approx(
            expand(flat.force_constants, (1, 1, 1)), abs=1e-7
        )
        assert np.sort(hessian.squares.ravel()) == pytest.approx(flat.squares[0], abs=1e-10)
        assert hessian.status == flat.status


def test_the_error_bars_of_a_hessian_do_not_depend_on_how_the_cell_is_described():
    """Rows of another basis of the same lattice are the same supercell."""
    atoms, slanted = pair(), ((2, 0, 0), (2, 1, 0), (0, 1, 1))
    state = state_of(atoms, (2, 1, 1))
    other = SschaState(atoms, slanted, state.force_constants, state.temperature)
    ensemble = evaluated(state, EV, 40)
    one, two = (
        free_energy_hessian(s, ensemble, Symmetry(atoms, s.supercell_matrix))
        for s in (state, other)
    )
    assert two.squares == pytest.approx(one.squares, abs=1e-12) and two.errors == pytest.approx(
        one.errors, abs=1e-12
    )


def test_the_finite_size_term_brings_supercells_of_any_shape_together():
    atoms = bulk("Cu", "fcc", a=3.6)
    states = [
        state_of(atoms, supercell_matrix, 0.0)
        for supercell_matrix in (
            (2, 2, 2),
            tuple(tuple(2 * n for n in row) for row in CONVENTIONAL),
        )
    ]
    raw = [state.harmonic_free_energy for state in states]
    corrected = [
        value + finite_size_term(state, 0.03).term for value, state in zip(raw, states, strict=True)
    ]
    assert abs(corrected[1] - corrected[0]) < 0.25 * abs(raw[1] - raw[0])


def lattice_length(matrix, cell):
    """Shortest vector by brute force, A."""
    steps = np.array([v for v in product(range(-4, 5), repeat=3) if any(v)])
    return float(np.linalg.norm(steps @ matrix @ cell, axis=1).min())


@pytest.mark.parametrize(
    ("atoms", "length"),
    [
        (bulk("Cu", "fcc", a=3.6), 6.0),
        (bulk("Cu", "hcp", a=2.6, c=4.2), 4.4),
        (pair(), 6.5),
        (bulk("Fe", "bcc", a=2.9), 5.5),
    ],
    ids=["fcc", "hcp", "P1", "bcc"],
)
def test_a_length_takes_the_fewest_cells_that_keep_images_apart_and_the_symmetry(atoms, length):
    supercell_matrix = choose_supercell_matrix(atoms, {"min_length": length}, 1e-3)
    by_repetition = choose_supercell_matrix(atoms, {"min_length": length}, 1e-3, diagonal=True)
    assert n_cells(supercell_matrix) < n_cells(by_repetition)
    assert (
        lattice_length(shape_supercell_matrix(supercell_matrix), atoms.cell.array) >= length - 1e-6
    )
    assert (
        len(Symmetry(atoms, supercell_matrix))
        == len(Symmetry(atoms, by_repetition))
        == len(Symmetry(atoms, (1, 1, 1)))
    )


def test_known_choices():
    assert (
        n_cells(choose_supercell_matrix(bulk("Cu", "fcc", a=3.6), {"min_length": 6.0}, 1e-3)) == 16
    ), "a body-centred cell of 7.2 A"
    cubic = Atoms("Cu", cell=[3.0] * 3, pbc=True)
    assert choose_supercell_matrix(cubic, {"min_length": 6.0}, 1e-3) == (2, 2, 2), (
        "no centred cell is smaller"
    )
    assert choose_supercell_matrix(cubic, {"min_length": 3.0}, 1e-3) == (1, 1, 1)


def test_sublattices_by_prime_powers_are_those_of_all_that_the_rotations_keep():
    """Of high symmetry few of many thousand are kept, and a long cell needs hundreds of sizes."""
    slanted = Atoms("AlH", cell=[[3, 0, 0], [0, 4, 0], [1, 0, 3.5]], pbc=True)
    slanted.positions[1] = [1.2, 0.0, 0.7]
    for atoms in (bulk("Cu", "fcc", a=3.6), bulk("Mg"), slanted, pair()):
        rotations = Symmetry(atoms, (1, 1, 1)).fractional
        for size in (1, 7, 8, 12, 18, 30, 36):
            adjugates = adjugate(every := sublattices(size))
            turned = [np.all(every @ one.T @ adjugates % size == 0, (1, 2)) for one in rotations]
            kept = every[np.all(turned, axis=0)]
            assert np.array_equal(kept_sublattices(size, rotations), kept)
    assert len(sublattices(30)) == 7 * 13 * 31
    assert n_cells(choose_supercell_matrix(bulk("Cu"), {"min_length": 15.0}, 1e-3)) == 216


@pytest.mark.parametrize("length", [1e3, 1e9, 1e300])
def test_a_length_that_no_computer_holds_is_refused(length):
    with pytest.raises(InputError, match="min_length.*at most"):
        choose_supercell_matrix(bulk("Cu"), {"min_length": length}, 1e-3)


def test_a_matrix_that_breaks_the_symmetry_is_enlarged_to_one_that_does_not():
    atoms = bulk("Cu", "fcc", a=3.6)
    supercell_matrix = choose_supercell_matrix(atoms, ((1, 0, 0), (0, 1, 0), (0, 1, 2)), 1e-3)
    group = Symmetry(atoms, (1, 1, 1)).fractional
    assert all(compatible(rotation, supercell_matrix) for rotation in group)
    assert (
        choose_supercell_matrix(atoms, CONVENTIONAL, 1e-3) != (1, 1, 1)
        and n_cells(choose_supercell_matrix(atoms, CONVENTIONAL, 1e-3)) == 4
    )


def test_dynamical_matrices_of_a_slanted_supercell_come_back(tmp_path):
    state = state_of(pair(), SLANTED, 100.0)
    write_dyn(state, tmp_path / "dyn")
    back = state_from_dyn(tmp_path / "dyn", 100.0)
    assert n_cells(back.supercell_matrix) == 3
    q = q_points(SLANTED)
    assert sorted(q_index(q, back.supercell_matrix).tolist()) == [0, 1, 2], (
        "the same lattice, perhaps by other vectors"
    )
    assert fourier(back.force_constants, back.supercell_matrix, q) == pytest.approx(
        fourier(state.force_constants, SLANTED, q), abs=1e-6
    )


def test_a_population_of_a_slanted_supercell_is_read_back(tmp_path):
    """And so a run is taken up, and its random numbers are compared with another's."""
    atoms = bulk("Al", "fcc", a=4.0)
    options = dict(
        supercell=CONVENTIONAL, cell="fixed", n_configs=10, max_populations=1, directory=tmp_path
    )
    found = free_energy(atoms, EMT(), 5.0, 300.0, **options)
    state, ensemble = read_population_file(tmp_path / "population_001.npz")
    assert state.supercell_matrix == found.supercell and ensemble.forces.shape == (10, 4, 3)
    onward = free_energy(atoms, EMT(), 5.0, 300.0, **{**options, "max_populations": 2})
    assert onward.n_populations == 2 and not list(tmp_path.glob("*.damaged"))


@pytest.mark.slow
def test_a_run_with_a_length_ends_where_the_cubic_cell_does(tmp_path):
    """fcc Al by its primitive cell in a slanted supercell, and by four atoms repeated: one crystal,
    one G within the errors."""
    atoms = bulk("Al", "fcc", a=4.0)
    options = dict(n_configs=60, free_energy_tolerance=5e-4, reference_spacing=0.5)
    ours = free_energy(
        atoms, EMT(), 5.0, 300.0, supercell=CONVENTIONAL, directory=tmp_path / "run", **options
    )
    assert ours.converged and ours.n_atoms_supercell == 4
    again = free_energy(
        atoms, EMT(), 5.0, 300.0, supercell=CONVENTIONAL, directory=tmp_path / "run", **options
    )
    assert (
        again.gibbs == ours.gibbs and SschaResult.read(tmp_path / "run").supercell == ours.supercell
    )
    larger = free_energy(
        atoms, EMT(), 5.0, 300.0, supercell={"min_length": 6.0}, start=tmp_path / "run", **options
    )
    assert larger.n_atoms_supercell == 16 and larger.converged, (
        "started from the smaller supercell by interpolation"
    )
    onward = free_energy(
        atoms,
        EMT(),
        5.0,
        300.0,
        supercell=larger.supercell,
        start=str(tmp_path / "run" / f"dyn_pop{ours.n_populations}_"),
        **options,
    )
    assert onward.gibbs_raw == pytest.approx(
        larger.gibbs_raw, abs=4.0 * np.hypot(onward.gibbs_error, larger.gibbs_error) + 5e-4
    )


def test_python_sscha_repeats_cells_and_refuses_anything_else():
    atoms = bulk("Al", "fcc", a=4.0)
    with pytest.raises(InputError, match="not diagonal.*engine: native"):
        free_energy(atoms, EMT(), engine="python-sscha", supercell=CONVENTIONAL, n_configs=20)
    assert choose_supercell_matrix(atoms, {"min_length": 5.0}, 1e-3, diagonal=True) == (3, 3, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        ((1, 0, 0), (0, 1, 0), (1, 1, 0)),
        ((1, 0), (0, 1), (1, 1)),
        ((1, 0, 0.5), (0, 1, 0), (0, 0, 1)),
    ],
)
def test_rows_that_are_no_supercell_are_refused(wrong):
    with pytest.raises(InputError, match=r"sscha\.supercell"):
        free_energy(bulk("Al"), EMT(), supercell=wrong, n_configs=20)
