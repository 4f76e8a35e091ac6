"""Free energies against crystals whose SCHA minimum is a closed expression: in soft directions too,
and the error bar covers the truth."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from exact_crystals import CASES, HBAR, ExactCrystal, Link, Scha, rock_salt
from saddle_model import HydrogenBond
from scipy.stats import binom

from magus_anharmonic import free_energy
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha import run as sscha_run
from magus_anharmonic.sscha.result import RunFolder
from magus_anharmonic.sscha.run import SschaRun
from magus_anharmonic.sscha.task import Task, gibbs_energy, open_issues
from magus_anharmonic.structures import UNDECIDED

SEEDS = {("rock salt", "fixed"): 32}
"""Runs of a case, else 16: of its first 16 five are within one error, which happens to one case in
a hundred."""


@cache
def exact(name, temperature, cell):
    return CASES[name].solve(temperature, cell)


@cache
def run_of(seed, name, temperature, cell, n_configs, engine="native"):
    case = CASES[name]
    return case.run(case.make(), temperature, cell, n_configs, engine=engine, seed=seed)


def runs(n, *case):
    return [run_of(seed, *case) for seed in range(n)]


def deviations(found, gibbs):
    """In standard errors. One run of a case may not come to its end (soft molecular crystals, by
    the seed and the machine's rounding): it says so, and its number is counted all the same."""
    assert sum(not result.converged for result in found) <= 1
    return np.array([(result.gibbs_raw - gibbs) / result.gibbs_error for result in found])


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_gives_forces_and_stress_of_its_energy(name):
    crystal = CASES[name].make()
    atoms = crystal.atoms.copy()
    atoms.rattle(0.05, seed=1)
    found, step = crystal.evaluate([atoms]), 1e-5
    ahead, behind = atoms.copy(), atoms.copy()
    ahead.positions[1, 2] += step
    behind.positions[1, 2] -= step
    low, high = crystal.evaluate([behind, ahead]).energy
    assert found.forces[0][1, 2] == pytest.approx(-(high - low) / (2 * step), abs=1e-6)
    for sign, one in ((1, ahead), (-1, behind)):
        one.set_cell(atoms.cell)
        one.positions = atoms.positions
        one.set_cell(
            atoms.cell.array @ (np.eye(3) + sign * step * np.diag([0, 0, 1])), scale_atoms=True
        )
    low, high = crystal.evaluate([behind, ahead]).energy
    assert found.stress[0][2, 2] * atoms.get_volume() == pytest.approx(
        (high - low) / (2 * step), abs=1e-5
    )


def test_the_oracle_is_exact_for_a_harmonic_crystal_and_lies_lowest_at_its_minimum():
    atoms = rock_salt().atoms
    bond = ((1.0, 1, (0, 0, 0)), (-1.0, 0, (0, 0, 0)))
    springs = ExactCrystal("oscillator", atoms, [Link(bond, axis, k2=3.0) for axis in np.eye(3)])
    masses = atoms.get_masses()
    hbar_omega = HBAR * np.sqrt(3.0 / (masses.prod() / masses.sum()))
    assert Scha(springs, (1, 1, 1)).solve().gibbs == pytest.approx(3 * hbar_omega / 2 / 2, abs=1e-9)
    found = Scha(CASES["triclinic"].make(), (1, 1, 1), 300.0).solve()
    lowest = found.at(found.minimum, found.matrix)[0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        moved = found.minimum.copy()
        moved.positions += rng.normal(0, 0.01, (4, 3))
        assert found.at(moved, found.matrix * rng.uniform(0.9, 1.1))[0] > lowest


COVERAGE = [
    *((name, 300.0, "variable", 200, "native") for name in CASES),
    *((name, 0.0, "fixed", 200, "native") for name in CASES),
    *((name, 0.0, "variable", 1000, "native") for name in ("hcp", "triclinic")),
    ("hcp", 300.0, "variable", 200, "python-sscha"),
]


OFTEN = [case for case in COVERAGE if case[3:] == (200, "native")]


def covered(z):
    """Inside the 99 % bounds of a Gaussian's 68 and 95 %."""
    for sigmas, share in ((1.0, 0.683), (2.0, 0.954)):
        low, high = binom.interval(0.99, len(z), share)
        assert low <= np.sum(np.abs(z) < sigmas) <= high


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["fixed", pytest.param("variable", marks=pytest.mark.full)])
def test_the_error_bars_of_all_crystals_cover_their_minima(cell):
    """Two seeds a case, together: sharper bounds than a case alone can have; no case is off by
    itself.

    The largest mean of two of all 16 cases is below 2.5 in 99 of a hundred.
    `test_the_error_bar_covers_the_minimum` has more of each.
    """
    z = [deviations(runs(2, *case), exact(*case[:3]).gibbs) for case in OFTEN if case[2] == cell]
    covered(np.concatenate(z))
    assert np.abs(np.mean(z, axis=1)).max() < 2.5


@pytest.mark.full
@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: "-".join(map(str, case)))
def test_the_error_bar_covers_the_minimum(case):
    z = deviations(runs(SEEDS.get((case[0], case[2]), 16), *case), exact(*case[:3]).gibbs)
    covered(z)
    assert abs(z.mean()) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 300.0])
def test_the_soft_axis_of_a_layered_crystal_relaxes_as_far_as_the_stiff_ones(temperature):
    truth = exact("layered", temperature, "variable").minimum
    static = CASES["layered"].make().atoms
    assert abs(truth.cell.array[2, 2] / static.cell.array[2, 2] - 1.0) > 0.005, (
        "there is something to relax"
    )
    for result in runs(2, "layered", temperature, "variable", 200):
        assert result.centroids.cell.array[2, 2] == pytest.approx(truth.cell.array[2, 2], rel=5e-3)
        assert result.centroids.cell.lengths()[0] == pytest.approx(
            truth.cell.lengths()[0], rel=5e-3
        )


@pytest.mark.slow
def test_lattice_modes_of_a_molecular_crystal_are_not_stiffened_by_its_short_bonds():
    truth = np.sort(
        Scha(CASES["molecular"].make(), (1, 1, 1))
        .solve()
        .modes(exact("molecular", 0.0, "fixed").matrix)[0]
    )[:3]
    found = np.mean(
        [
            np.sort(result.state.modes.hbar_omega)[:3]
            for result in runs(2, "molecular", 0.0, "fixed", 200)
        ],
        axis=0,
    )
    assert found == pytest.approx(truth, rel=0.1)


def test_a_limit_on_soft_modes_that_acts_is_said_and_the_run_has_not_converged(monkeypatch):
    monkeypatch.setattr(sscha_run, "LARGEST_AMPLITUDE_LATER", 0.02)
    case = CASES["rock salt"]
    crystal = case.make()
    result = free_energy(
        crystal.atoms,
        crystal,
        supercell=(1, 1, 1),
        cell="fixed",
        n_configs=100,
        max_populations=3,
        reference_spacing=0.5,
    )
    assert result.status == "unconverged"
    assert "soft modes were kept from moving neighbours" in result.reason


def hydrogen_bond(k, shift, **options):
    model = HydrogenBond(k)
    settings = (
        dict(cell="fixed", supercell=(1, 1, 1), n_configs=400, reference_spacing=0.5) | options
    )
    return free_energy(model.crystal(shift), model, **settings)


@pytest.mark.parametrize("shift", [0.05, 0.2])
def test_a_proton_that_the_motion_centres_ends_in_the_middle_from_wherever_it_starts(shift):
    result = hydrogen_bond(-1.0, shift)
    assert result.converged and result.space_group == "P4/mmm (123)"
    positions = result.centroids.positions[:, 2]
    assert positions[0] == pytest.approx(
        (positions[1] + positions[2]) / 2.0 - 2.5, abs=1e-6
    ) or positions[0] == pytest.approx((positions[1] + positions[2]) / 2.0, abs=1e-6)


@pytest.mark.parametrize("shift", [0.05, 0.2])
def test_a_proton_that_stays_off_the_middle_keeps_its_symmetry_without_more_populations(shift):
    result = hydrogen_bond(-6.0, shift)
    assert result.converged and result.space_group == "P4mm (99)" and result.n_populations <= 3


def test_what_noise_cannot_tell_is_not_decided():
    groups = [hydrogen_bond(-1.6, 0.05, n_configs=40, seed=seed).space_group for seed in range(4)]
    open_ = [group for group in groups if UNDECIDED in group]
    assert open_, groups
    assert all(
        group.startswith("P4mm (99) or P4/mmm (123): not decided, ") and group.endswith(" sigma")
        for group in open_
    )


def test_a_run_that_was_moved_onto_another_symmetry_is_taken_up_where_it_was(tmp_path):
    settings = SschaSettings(
        supercell=(1, 1, 1), cell="fixed", n_configs=400, reference_spacing=0.5
    )
    model = HydrogenBond(-1.0)
    task = Task(model.crystal(0.2), 0.0, 0.0, settings, 0, None, None, model.model_id)
    whole = sscha_run.SschaRun(task, model, RunFolder(tmp_path / "whole", task.identity()))
    while not whole.converged:
        whole.advance()
    assert whole.finish().space_group == "P4/mmm (123)"
    for _ in range(whole.n_populations):
        run = sscha_run.SschaRun(task, model, RunFolder(tmp_path / "pieces", task.identity()))
        run.advance()
    assert run.progress.rows == whole.progress.rows
    assert run.finish().as_dict() | {"seconds": 0} == whole.finish().as_dict() | {"seconds": 0}


def test_a_budget_given_out_population_by_population_decides_the_phase_too(tmp_path):
    """A race asks for one more population at a time: the end of each part is not the end of the
    question."""
    whole = hydrogen_bond(-1.0, 0.2)
    parts = []
    while len(parts) < 10 and (not parts or not parts[-1].converged or parts[-1].reason):
        parts.append(hydrogen_bond(-1.0, 0.2, max_populations=len(parts) + 1, directory=tmp_path))
    assert parts[-1].space_group == whole.space_group == "P4/mmm (123)"
    waiting = [part for part in parts if part.converged and part.reason]
    assert waiting and all(UNDECIDED in part.space_group for part in waiting)


def test_noise_that_hides_everything_is_no_convergence_and_no_correction(tmp_path):
    """Seen in C2/m H3S: 64 atoms, 100 configurations, "converged" with G = 2.49 +- 1.01 eV/atom and
    centroids known to 1.5 A."""
    case = CASES["hcp"]
    crystal = case.make()
    settings = SschaSettings(cell="fixed", supercell=case.supercell_matrix, n_configs=400)
    task = Task(crystal.atoms, case.pressure, 300.0, settings, 5, None, None, "hcp")
    run = SschaRun(task, crystal, RunFolder(tmp_path, task.identity()))
    while run.reason:
        run.advance()
    averages = run.averages
    assert open_issues(averages, averages.minimum_error / 2, 2, task) == []
    height = "the height above the minimum is known to"
    for noise, said in (
        ({"predicted_decrease": -1.7}, height),
        ({"minimum_error": 2.0}, height),
        ({"position_error": np.full((2, 3), 1.5)}, "centroids are known to 1.50 A only"),
        ({"strain": np.zeros(1), "strain_error": np.array([0.4])}, "the cell is known to 40 %"),
    ):
        noisy = replace(averages, **noise)
        assert said in "; ".join(open_issues(noisy, noisy.minimum_error / 2, 2, task))
        if said == height:
            found = gibbs_energy(run.state, noisy, case.pressure)[1]
            assert found == noisy.helmholtz_error / 2
