"""SSCHA at fixed centroids and cell: F, its gradient and its stress at structures that are no
minimum of anything, against closed expressions, direct integration, finite differences and
python-sscha."""

import numpy as np
import pytest
from ase import Atoms
from exact_crystals import CASES, Scha, triclinic
from sscha_models import AnharmonicCell, LatticeSprings, QuarticPair

from magus_anharmonic import free_energy
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha import SschaResult, engines, python_sscha
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.start import sample_ensemble
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR, RYDBERG

OPTIONS = dict(centroids="fixed", n_configs=400, reference_spacing=0.5)


def exactly(crystal, atoms, supercell_matrix, temperature=0.0):
    """F (eV per cell), forces on the centroids and stress of the best force constants at ``atoms``,
    in closed form: the self-consistent equation alone, nothing else moves."""
    scha = Scha(crystal, supercell_matrix, temperature)
    matrix = scha._matrix(np.tile(np.full(len(crystal.links), 3.0), (scha.n_cells, 1)))
    for _ in range(2000):
        value, slope, curvature = scha.at(atoms, matrix)
        change, part = scha._matrix(curvature) - matrix, 0.5
        while scha.modes(matrix + part * change)[0].min() <= 0.0:
            part *= 0.5
        matrix = matrix + part * change
        if np.abs(change).max() < 1e-8:
            break
    else:
        raise AssertionError("no self-consistent force constants")
    force = -(slope.ravel() @ scha.incidence).reshape(scha.n_cells, -1, 3).mean(axis=0)
    stress = np.einsum(
        "l,lx,ly->xy", slope.mean(axis=0), crystal.directions, crystal.vectors(atoms)
    )
    return value, force, 0.5 * (stress + stress.T) / atoms.get_volume()


def away(crystal, seed, amplitude=0.12, strain=0.03):
    """The crystal's atoms off their sites in a strained cell: P1, and no minimum."""
    atoms, rng = crystal.atoms.copy(), np.random.default_rng(seed)
    shape = np.eye(3) + strain * rng.uniform(-1, 1, (3, 3))
    atoms.set_cell(atoms.cell.array @ (0.5 * (shape + shape.T)), scale_atoms=True)
    atoms.positions += amplitude * rng.uniform(-1, 1, (len(atoms), 3))
    return atoms


def pulls(found, exact, n):
    """Deviations in standard errors: of F, and of all independent forces and stresses."""
    value, force, stress = exact
    upper = np.triu_indices(3)
    return np.concatenate(
        [
            [(found.gibbs_raw * n - value) / (found.gibbs_error * n)],
            ((found.force - force) / found.force_error).ravel(),
            ((found.stress - stress) / found.stress_error)[upper],
        ]
    )


@pytest.mark.parametrize(("name", "temperature"), [("triclinic", 0.0), ("rock salt", 300.0)])
def test_free_energy_gradient_and_stress_are_those_of_the_closed_form_off_every_minimum(
    name, temperature
):
    case = CASES[name]
    crystal, found = case.make(), []
    for seed in range(4):
        atoms = away(crystal, seed)
        result = free_energy(
            atoms,
            crystal,
            temperature=temperature,
            supercell=case.supercell_matrix,
            seed=seed,
            **OPTIONS,
        )
        assert result.converged, result.reason
        assert np.array_equal(result.centroids.positions, atoms.positions)
        assert np.array_equal(result.centroids.cell.array, atoms.cell.array)
        exact = exactly(crystal, atoms, case.supercell_matrix, temperature)
        assert np.abs(exact[1]).max() > 0.2  # eV/A: no minimum
        found.append(pulls(result, exact, len(atoms)))
    found = np.array(found)
    assert np.abs(found[:, 0]).max() < 3.0
    assert np.abs(found).max() < 4.0  # of 52 to 76 numbers
    assert 0.6 < np.sqrt(np.mean(found**2)) < 1.4


def direct(well, d, mass):
    """F (eV) and dF/dd (eV/A) of a mean distance ``d`` (3,) from the middle, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    widths = np.sqrt(np.geomspace(1e-3, 0.3, 8001))
    x = d[:, None, None] + widths[:, None] * nodes
    potential = (0.5 * well.k * x**2 + well.c * x**4) @ weights / weights.sum()
    # zero-point energy of the auxiliary oscillator and its own potential: hbar^2 / (8 m <x^2>)
    total = HBAR**2 / (8.0 * mass * widths**2) + potential
    best = total.argmin(axis=1)
    slope = (well.k * x + 4.0 * well.c * x**3) @ weights / weights.sum()
    return total.min(axis=1).sum(), slope[np.arange(3), best]


def test_a_quartic_well_has_its_minimum_where_the_static_surface_has_a_maximum():
    well = QuarticPair(k=-1.0, c=8.0)
    values = []
    for displaced in (0.0, 0.15):
        d = np.array([displaced, 0.6 * displaced, 0.0])
        atoms = Atoms("H2", positions=[[0, 0, 0], 1.5 + d], cell=[3.0] * 3, pbc=True)
        found = free_energy(
            atoms, well, supercell=(1, 1, 1), centroids="fixed", n_configs=600, seed=4
        )
        assert found.converged, found.reason
        value, slope = direct(well, d, atoms.get_masses()[0] / 2.0)
        assert found.gibbs_raw * 2 == pytest.approx(value, abs=3 * found.gibbs_error * 2)
        allowed = 3 * found.force_error + 1e-6
        assert np.all(np.abs(found.force[1] + slope) <= allowed[1])
        assert np.all(np.abs(found.force[0] - slope) <= allowed[0])
        static = well.get_potential_energy(atoms)
        values.append((found.gibbs_raw * 2, static, found.force[1], well.get_forces(atoms)[1]))
    (middle, static_middle, *_), (aside, static_aside, pull, static_pull) = values
    assert static_aside < static_middle and static_pull[0] > 0.0  # away from the middle
    assert aside > middle + 0.01 and pull[0] < -0.1  # back to it


def test_differences_of_the_free_energy_are_its_gradient_and_its_stress():
    crystal, n = triclinic(), 4
    start = away(crystal, 5)

    def run(atoms):
        found = free_energy(
            atoms, crystal, supercell=(2, 1, 1), seed=1, **OPTIONS | {"n_configs": 1200}
        )
        assert found.converged, found.reason
        return found

    def along(step, strain):
        atoms = start.copy()
        atoms.set_cell(start.cell.array @ (np.eye(3) + step * strain), scale_atoms=True)
        atoms.positions += step * shift
        return atoms

    rng = np.random.default_rng(2)
    shift, none = rng.normal(size=(n, 3)), np.zeros((3, 3))
    strain = rng.normal(size=(3, 3))
    middle = run(start)
    for move, deform, h in ((shift, none, 0.05), (0.0 * shift, strain + strain.T, 0.01)):
        shift = move
        three = [run(along(-h, deform)), middle, run(along(h, deform))]
        slopes = np.array(
            [
                np.sum(one.stress * deform @ np.linalg.inv(np.eye(3) + step * deform))
                * one.centroids.get_volume()
                - np.sum(one.force * move)
                for one, step in zip(three, (-h, 0.0, h), strict=True)
            ]
        )
        error = np.hypot(
            n * np.hypot(three[0].gibbs_error, three[2].gibbs_error),
            2 * h * np.linalg.norm(middle.force_error * move)
            + 2 * h * np.linalg.norm(middle.stress_error * deform) * start.get_volume(),
        )
        difference = n * (three[2].gibbs_raw - three[0].gibbs_raw)
        assert abs(difference) > 10 * error
        assert difference == pytest.approx(h / 3.0 * (slopes @ [1, 4, 1]), abs=3 * error)


def test_python_sscha_without_its_structure_finds_the_same_on_one_ensemble(tmp_path):
    model = AnharmonicCell()
    state = model.start(0.0)
    state.atoms.positions[:] += 0.05 * np.random.default_rng(0).normal(size=(8, 3))
    sampled = sample_ensemble(state, 1000, [9], model, "test")
    symmetry = Symmetry(state.atoms, state.supercell_matrix, movable=False)
    populations, few = [(state, sampled)], dict(min_effective_sample=0.1)
    ours = engines.minimise(populations, symmetry, **few)
    theirs = python_sscha.minimise(populations, symmetry, log=tmp_path / "log", **few)
    for found in (ours, theirs):
        assert found.state.atoms.positions == pytest.approx(state.atoms.positions, abs=1e-7)
    assert ours.converged and ours.centroid_gradient == 0.0
    assert model.free_energy(ours.state) == pytest.approx(model.free_energy(theirs.state), abs=2e-4)
    assert model.free_energy(ours.state) < model.free_energy(state) - 0.01
    assert ours.state.force_constants == pytest.approx(
        theirs.state.force_constants, abs=0.06 * np.abs(ours.state.force_constants).max()
    )
    with python_sscha.quiet(tmp_path / "log"):
        loaded = python_sscha.to_ensemble(state, sampled)
        value, forces = loaded.get_free_energy(), loaded.get_average_forces(False)
    averages = average(state, sampled, symmetry)
    assert averages.helmholtz == pytest.approx(
        value * RYDBERG + sampled.energies.mean(), abs=1e-5
    )  # constants of nature with as many digits
    assert averages.force == pytest.approx(forces * RYDBERG, abs=1e-5)


def test_a_cell_that_is_not_primitive_stays_as_it_is_given_and_has_the_same_free_energy(tmp_path):
    case = CASES["rock salt"]
    crystal = case.make()
    double = crystal.atoms.repeat((2, 1, 1))[[3, 0, 2, 1]]
    double.positions[1, 0] += 0.03
    run = dict(supercell=(1, 2, 2), seed=3, directory=tmp_path, **OPTIONS)
    moved = free_energy(double, crystal, **run)
    stored = SschaResult.read(tmp_path)
    for name in ("force", "force_error", "stress", "stress_error"):
        assert np.array_equal(getattr(stored, name), getattr(moved, name))
    double.positions[1, 0] -= 0.03
    found = free_energy(double, crystal, **run | {"directory": None})
    assert found.gibbs_raw < moved.gibbs_raw and moved.force[1, 0] < -0.01  # back to its site
    assert np.array_equal(found.centroids.positions, double.positions)
    assert np.array_equal(found.centroids.numbers, double.numbers)
    value, *_ = exactly(crystal, crystal.atoms, (2, 2, 2))
    assert found.gibbs_raw == pytest.approx(value / 2, abs=3 * found.gibbs_error)
    assert np.abs(found.force).max() < 1e-6  # by symmetry


def test_what_is_no_crystal_at_its_sites_fails_with_a_reason():
    loose = LatticeSprings(longitudinal=3e-4, transverse=3e-4)
    atoms = Atoms("H", cell=[3.0] * 3, pbc=True)
    found = free_energy(atoms, loose, supercell=(2, 2, 2), **OPTIONS | {"n_configs": 100})
    assert found.status == "failed" and "melted" in found.reason
    bottomless = QuarticPair(k=-1.0, c=0.0)
    pair = Atoms("H2", positions=[[0, 0, 0], [1.6] * 3], cell=[3.0] * 3, pbc=True)
    found = free_energy(pair, bottomless, supercell=(1, 1, 1), **OPTIONS | {"max_populations": 4})
    assert found.status != "converged" and found.reason


def test_fixed_centroids_leave_no_freedom_to_anything_else():
    fixed = SschaSettings.model_validate({"centroids": "fixed", "cell": "variable"})
    assert (fixed.cell, fixed.hessian, fixed.seed_back) == ("fixed", 0, False)
    assert fixed.identity()["centroids"] == "fixed"
    assert "centroids" not in SschaSettings().identity()  # earlier runs keep their names
