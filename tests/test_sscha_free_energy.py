"""``free_energy`` on energy surfaces with known answers; restart, seeds, isotopes, wrong input and
crystals that fall apart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.units import invcm
from crystals import NEON, PAIR
from records import csv_rows
from sscha_models import CountingCalculator, LatticeSprings, QuarticPair, evaluated

from magus_anharmonic.errors import InputError, NotConverged
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.io.files import read_json, write_json
from magus_anharmonic.sscha import SschaResult, free_energy
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.run import SAMPLING_TAG
from magus_anharmonic.sscha.state import fold
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import EV_PER_A3_IN_GPA, HBAR, KELVIN, gpa_to_ev_per_a3

ALUMINIUM = bulk("Al", "fcc", a=4.0)


ASKED = 3
"""Evaluations of `calculator_check`, once per ASE calculator; they are none of the run."""


def quartic(directory=None, **changes):
    """The cheapest run with something to relax."""
    options = dict(
        cell="fixed", supercell=(1, 1, 1), n_configs=60, max_populations=6, directory=directory
    )
    evaluator = changes.pop("evaluator", None) or QuarticPair()
    return free_energy(changes.pop("atoms", PAIR), evaluator, **{**options, **changes})


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """fcc Al at 20 GPa and 300 K, variable cell, from its conventional cell."""
    folder = tmp_path_factory.mktemp("al") / "run"
    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    return free_energy(atoms, EMT(), 20.0, 300.0, n_configs=100, directory=folder), folder


@pytest.mark.parametrize("temperature", [0.0, 100.0, 600.0])
def test_harmonic_crystal_has_its_analytic_free_energy(temperature):
    calculator = LatticeSprings()
    result = free_energy(
        NEON,
        calculator,
        temperature=temperature,
        supercell=(3, 3, 3),
        cell="fixed",
        n_configs=10,
        reference_spacing=0.05,
    )
    mass = NEON.get_masses()[0]
    assert result.converged and result.n_populations == 2
    assert result.gibbs_raw == pytest.approx(
        calculator.free_energy((3, 3, 3), mass, temperature), abs=1e-7
    )
    assert result.gibbs == pytest.approx(
        calculator.free_energy((7, 7, 7), mass, temperature), abs=1e-7
    )
    assert result.gibbs_error < 1e-7
    assert (result.space_group_start, result.space_group) == ("Pm-3m (221)", "Pm-3m (221)")


@pytest.mark.parametrize("temperature", [0.0, 300.0])
def test_quartic_double_well_has_the_free_energy_of_the_direct_integration(temperature):
    """Starts on the saddle between the wells: every harmonic mode is imaginary there."""
    calculator = QuarticPair()
    result = quartic(evaluator=calculator, temperature=temperature, n_configs=1000)
    masses = PAIR.get_masses()
    exact = calculator.scha_free_energy(masses.prod() / masses.sum(), temperature) / 2.0
    assert result.converged
    assert result.gibbs_error < 2e-3
    assert result.gibbs_raw == pytest.approx(exact, abs=3.5 * result.gibbs_error)


def exact_free_energy(calculator, mass, temperature):
    """Of three equal oscillators, eV per pair, by diagonalising the Hamiltonian on a grid (sinc
    functions)."""
    x = np.linspace(-1.6, 1.6, 161)
    difference = np.subtract.outer(np.arange(161), np.arange(161))
    with np.errstate(divide="ignore"):
        kinetic = np.where(
            difference == 0, np.pi**2 / 3.0, 2.0 * (-1.0) ** difference / difference**2.0
        )
    hamiltonian = HBAR**2 / (2.0 * mass * (x[1] - x[0]) ** 2) * kinetic + np.diag(
        0.5 * calculator.k * x**2 + calculator.c * x**4
    )
    levels = np.linalg.eigvalsh(hamiltonian)
    if temperature == 0:
        return 3.0 * levels[0]
    thermal = KELVIN * temperature
    return 3.0 * (levels[0] - thermal * np.log(np.exp(-(levels - levels[0]) / thermal).sum()))


@pytest.mark.parametrize(
    ("k", "gap", "temperature"),
    [(0.0, 0.004, 0.0), (-1.0, 0.008, 600.0), (-3.0, 0.03, 0.0), (-3.0, 0.03, 600.0)],
    ids=["quartic", "soft", "double well", "hot double well"],
)
def test_the_free_energy_is_an_upper_bound_of_the_diagonalised_one(k, gap, temperature):
    """Gibbs and Bogoliubov: never below, and the closer the less anharmonic; ``gap`` in eV/atom (a
    barrier of the double well: 0.1)."""
    calculator = QuarticPair(k=k, c=8.0)
    masses = PAIR.get_masses()
    exact = exact_free_energy(calculator, masses.prod() / masses.sum(), temperature) / 2.0
    result = quartic(
        evaluator=calculator, temperature=temperature, n_configs=400, max_populations=10
    )
    assert result.converged
    assert -3.0 * result.gibbs_error < result.gibbs_raw - exact < gap + 3.0 * result.gibbs_error


def test_variable_cell_meets_the_pressure_and_all_numbers_are_of_one_state(compressed):
    result, folder = compressed
    assert result.converged and result.reason == ""
    assert len(result.centroids) == 1 and result.n_atoms_supercell == 8
    assert np.abs(result.stress * EV_PER_A3_IN_GPA + 20.0 * np.eye(3)).max() < 0.5
    assert result.pressure == pytest.approx(20.0, abs=0.5)
    assert result.volume == pytest.approx(result.centroids.get_volume(), rel=1e-12)
    work = gpa_to_ev_per_a3(20.0) * result.volume
    assert result.gibbs == pytest.approx(result.helmholtz + work, abs=1e-12)
    assert result.gibbs == pytest.approx(result.gibbs_raw + result.finite_size, abs=1e-12)
    state = result.state
    number = result.n_populations

    with np.load(folder / f"population_{number:03d}.npz") as stored:
        energies = stored["energies"]
        assert stored["cell"] == pytest.approx(result.centroids.cell.array, abs=1e-12)
    again = evaluated(state, as_evaluator(EMT()), 100, seed=[0, number, SAMPLING_TAG])
    assert energies == pytest.approx(again.energies, abs=1e-8)
    averages = average(state, again, Symmetry(state.atoms, state.supercell_matrix))
    assert 0.0 <= result.predicted_decrease < 2e-4, (
        "what the state still lies above the minimum is small, and taken off"
    )
    assert averages.helmholtz + work == pytest.approx(
        result.gibbs_raw + result.predicted_decrease, abs=1e-6
    )
    assert averages.stress == pytest.approx(result.stress, abs=1e-8)


def test_gibbs_energy_has_its_minimum_at_the_volume_that_was_found(compressed):
    result, _ = compressed
    for factor in (0.99, 1.01):
        state = result.state.strained(np.eye(3) * (factor ** (1 / 3) - 1))

        averages = average(
            state,
            evaluated(state, as_evaluator(EMT()), 200, seed=3),
            Symmetry(state.atoms, state.supercell_matrix),
        )
        gibbs = averages.helmholtz + gpa_to_ev_per_a3(20.0) * state.atoms.get_volume()
        assert gibbs > result.gibbs_raw - 3.0 * np.hypot(
            averages.helmholtz_error, result.gibbs_error
        )


def test_every_evaluation_is_counted_and_tabulated(compressed):
    result, folder = compressed
    rows = csv_rows(folder / "convergence.csv")
    assert len(rows) == result.n_populations
    evaluated_in = [
        len(np.load(folder / f"population_{k:03d}.npz")["energies"])
        for k in range(1, len(rows) + 1)
    ]
    with np.load(folder / "start.npz") as start:
        assert result.n_evaluations == int(start["n_evaluations"]) + sum(evaluated_in)
    assert evaluated_in[-1] == 100
    assert float(rows[-1]["gibbs_eV_per_atom"]) == pytest.approx(result.gibbs_raw)
    assert float(rows[-1]["effective_sample"]) == 1.0
    assert (folder / f"dyn_pop{result.n_populations}_1").is_file()


def test_a_converged_run_draws_what_is_missing_for_the_wanted_error():
    rough = quartic(n_configs=200)
    assert rough.converged
    calculator = CountingCalculator(QuarticPair())
    fine = quartic(
        evaluator=calculator,
        n_configs=200,
        max_populations=40,
        error_tolerance=0.5 * rough.gibbs_error,
    )
    assert fine.converged and fine.gibbs_error <= 0.5 * rough.gibbs_error
    assert fine.n_evaluations + ASKED == calculator.count < 8 * rough.n_evaluations, (
        "four times the samples, not many times"
    )
    assert fine.gibbs_raw == pytest.approx(rough.gibbs_raw, abs=4.0 * rough.gibbs_error), (
        "of the same state"
    )


def test_same_seed_same_result_and_another_seed_another():
    first, second, other = quartic(seed=1), quartic(seed=1), quartic(seed=2)
    assert (first.gibbs, first.n_populations) == (second.gibbs, second.n_populations)
    assert np.array_equal(first.force_constants, second.force_constants)
    assert other.gibbs != first.gibbs


@pytest.mark.parametrize(
    "progress", [None, b"", b'{"rows": [{"popu', b'{"rows": [], "together": [[1]]}']
)
def test_a_killed_run_repeats_only_the_population_it_was_in(tmp_path, progress):
    """Also where its ``progress.json`` is damaged, which is set aside then."""
    whole = quartic(tmp_path / "whole")
    assert whole.n_populations >= 2
    start = whole.n_evaluations - 60 * whole.n_populations
    killed = CountingCalculator(QuarticPair(), stop_after=start + 60 + 30)
    with pytest.raises(KeyboardInterrupt):
        quartic(tmp_path / "killed", evaluator=as_evaluator_named(killed))
    assert not (tmp_path / "killed" / "result.json").exists()
    if progress is not None:
        (tmp_path / "killed" / "progress.json").write_bytes(progress)
    rest = CountingCalculator(QuarticPair())
    resumed = quartic(tmp_path / "killed", evaluator=as_evaluator_named(rest))
    assert rest.count == 60 * (whole.n_populations - 1)
    assert resumed.gibbs == pytest.approx(whole.gibbs, abs=1e-12)
    assert resumed.n_evaluations == whole.n_evaluations
    assert (tmp_path / "killed" / "progress.json.damaged").exists() == (progress is not None)


def test_a_finished_run_is_returned_without_work(tmp_path):
    first = quartic(tmp_path / "run")
    calculator = CountingCalculator(QuarticPair())
    again = quartic(tmp_path / "run", evaluator=as_evaluator_named(calculator))
    assert calculator.count == 0
    assert json.dumps(again.as_dict(), default=list) == json.dumps(
        first.as_dict(), default=lambda value: value.tolist()
    )
    assert np.array_equal(again.force_constants, first.force_constants)
    assert again.state.modes.hbar_omega == pytest.approx(first.state.modes.hbar_omega)


def test_more_populations_continue_an_unconverged_run(tmp_path):
    short = quartic(tmp_path / "run", max_populations=1)
    assert short.status == "unconverged" and "one population" in short.reason
    with pytest.raises(NotConverged, match=r"result\.numbers\.gibbs is its upper bound"):
        assert short.gibbs
    assert np.isfinite(short.numbers.gibbs) and "below" in repr(short)
    long = quartic(tmp_path / "run", max_populations=6)
    assert long.converged
    assert long.gibbs == pytest.approx(quartic(max_populations=6).gibbs, abs=1e-12)


def test_a_run_that_began_elsewhere_goes_on_where_its_start_does_not_matter(tmp_path):
    """Points of a phase diagram start from neighbours, which more populations change."""
    short = quartic(tmp_path / "run", max_populations=1)
    elsewhere = quartic(tmp_path / "other", temperature=50.0)
    with pytest.raises(InputError, match="different: start"):
        quartic(tmp_path / "run", start=elsewhere)
    long = quartic(tmp_path / "run", start=elsewhere, any_start=True, max_populations=6)
    assert not short.converged and long.converged
    assert long.gibbs == quartic(tmp_path / "whole", max_populations=6).gibbs
    with pytest.raises(InputError, match="another SSCHA run"):
        quartic(tmp_path / "run", start=elsewhere, any_start=True, seed=3)


@pytest.mark.parametrize(
    "change", [{"temperature": 50.0}, {"seed": 3}, {"n_configs": 62}, {"masses": {"H": 2.0}}]
)
def test_a_folder_of_another_run_is_refused(tmp_path, change):
    quartic(tmp_path / "run", max_populations=1)
    with pytest.raises(InputError, match="another SSCHA run"):
        quartic(tmp_path / "run", **change)


def test_a_folder_that_holds_the_run_of_another_potential_is_computed_anew_and_that_run_kept(
    tmp_path, caplog
):
    argon = bulk("Ar", "fcc", a=5.2)
    found = {}
    for directory, strengths in ((tmp_path / "run", (0.0104, 0.0208, 0.0104)), (None, (0.0208,))):
        for epsilon in strengths:
            model = LennardJones(sigma=3.4, epsilon=epsilon, rc=9.0, smooth=True)
            options = dict(
                supercell=(2, 2, 2),
                n_configs=20,
                max_populations=2,
                cell="fixed",
                directory=directory,
            )
            found.setdefault(epsilon, set()).add(free_energy(argon, model, 0.0, **options).gibbs)
    assert [len(gibbs) for gibbs in found.values()] == [1, 1] and found[0.0104] != found[0.0208]
    assert "held the run of another model, lennardjones-" in caplog.text
    assert [path.name[:16] for path in (tmp_path / "run").iterdir() if path.is_dir()] == [
        "of-lennardjones-"
    ] * 2


def test_a_result_of_another_version_is_refused(tmp_path):
    quartic(tmp_path / "run", max_populations=1)
    path = tmp_path / "run" / "result.json"
    write_json(path, read_json(path) | {"schema": 99})
    with pytest.raises(InputError, match="another version"):
        quartic(tmp_path / "run", max_populations=1)


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quartic()
    quartic(tmp_path / "only" / "here", max_populations=1)
    assert [path.name for path in tmp_path.iterdir()] == ["only"]


def exact_pair(hydrogen, temperature=0.0):
    """SSCHA free energy of the pair with that mass of H (amu), eV/atom."""
    masses = np.array([hydrogen, PAIR.get_masses()[1]])
    return QuarticPair().scha_free_energy(masses.prod() / masses.sum(), temperature) / 2.0


def test_isotopes_start_from_the_lighter_crystal_and_vibrate_less():
    hydrogen = quartic(n_configs=400)
    deuterium = quartic(masses={"H": 2.014}, start=hydrogen, n_configs=400)
    assert deuterium.gibbs_raw < hydrogen.gibbs_raw
    assert deuterium.gibbs_raw == pytest.approx(exact_pair(2.014), abs=4.0 * deuterium.gibbs_error)
    assert deuterium.n_evaluations == 400 * deuterium.n_populations
    assert deuterium.centroids.get_masses()[0] == 2.014


def test_force_constants_of_one_surface_start_a_run_on_another(compressed):
    """DFT-driven SSCHA: fixed cell and a labeler, from the potential's force constants."""
    result, folder = compressed
    labeler = LabelerOfEmt()
    prefix = folder / f"dyn_pop{result.n_populations}_"
    driven = free_energy(ALUMINIUM, labeler, 20.0, 300.0, cell="fixed", n_configs=20, start=prefix)
    assert labeler.calls == [20] * driven.n_populations
    assert driven.n_evaluations == 20 * driven.n_populations
    assert driven.model_id == "dft-0123456789ab"
    assert driven.volume == pytest.approx(result.volume, rel=1e-6)
    assert driven.gibbs == pytest.approx(result.gibbs, abs=5.0 * driven.gibbs_error + 1e-5)


def test_a_start_of_another_supercell_is_interpolated(compressed):
    result, _ = compressed
    larger = free_energy(
        ALUMINIUM, EMT(), 20.0, 300.0, supercell=(3, 3, 3), n_configs=40, start=result
    )
    assert larger.n_atoms_supercell == 27
    assert larger.converged and larger.n_populations <= 4
    assert larger.gibbs == pytest.approx(result.gibbs, abs=3e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_configs": 61}, "n_configs.*even"),
        ({"n_configs": 0}, "n_configs"),
        ({"supercell": (0, 1, 1)}, "supercell"),
        ({"supercell": (1, 1)}, "supercell"),
        ({"cell": "free"}, "cell"),
        ({"engine": "natif"}, "engine.*native.*python-sscha"),
        ({"temperature": -1.0}, "temperature"),
        ({"pressure": 1.5e11}, "Pa"),
        ({"pressure": -3.0}, "pressure"),
        ({"masses": {"He": 3.0}}, "masses.He"),
        ({"masses": {"H": -3.0}}, "masses.H"),
        ({"atoms": Atoms("HF", positions=[[0, 0, 0], [0, 0, 1]])}, "periodic cell"),
        ({"start": 3.0}, "start"),
        ({"start": "nowhere/dyn"}, "no such file"),
        ({"evaluator": "emt"}, "evaluator"),
        ({"atoms": NEON}, "larger supercell"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing_behind(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        quartic(tmp_path / "run", **change)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_start_of_another_composition_is_refused():
    with pytest.raises(InputError, match="start: is HF, the structure is Ne"):
        quartic(atoms=NEON, start=quartic(max_populations=1))


def test_a_crystal_that_falls_apart_is_a_failed_result_with_a_reason(tmp_path):
    class Repulsion(QuarticPair):
        """Nothing but a pressure of its own: the cell runs away."""

        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            self.results["energy"] -= self.atoms.get_volume()
            self.results["stress"] = np.array([-1.0, -1.0, -1.0, 0, 0, 0])

    result = quartic(tmp_path / "run", evaluator=Repulsion(), cell="variable", max_populations=3)
    assert result.status == "failed" and not result.converged
    assert "volume" in result.reason
    assert result.numbers.gibbs is None and "G = none" in repr(result)
    with pytest.raises(NotConverged, match="volume"):
        assert result.gibbs
    assert SschaResult.read(tmp_path / "run").reason == result.reason


def test_numbers_that_are_not_finite_end_in_a_reason():
    class Broken(RecordingEvaluator):
        def evaluate(self, structures):
            found = super().evaluate(structures)
            if len(structures) == 60:
                found.forces[7][0, 0] = np.nan
            return found

    result = quartic(evaluator=Broken())
    assert result.status == "failed"
    assert "1 of 60 configurations" in result.reason


def test_an_evaluator_that_dies_is_reported_and_may_be_tried_again(tmp_path):
    class Dying(RecordingEvaluator):
        def evaluate(self, structures):
            if len(structures) == 60:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return super().evaluate(structures)

    result = quartic(tmp_path / "run", evaluator=Dying())
    assert result.status == "failed" and "cannot be multiplied" in result.reason
    assert quartic(tmp_path / "run", evaluator=RecordingEvaluator()).converged


class RecordingEvaluator:
    """Remembers how many structures each call had."""

    model_id = "recording"

    def __init__(self):
        self.inner = as_evaluator(QuarticPair())
        self.sizes: list[int] = []

    def evaluate(self, structures):
        self.sizes.append(len(structures))
        return self.inner.evaluate(structures)


def as_evaluator_named(calculator):
    """The counting calculator under the model id of what it counts."""
    from magus_anharmonic.evaluator import CalculatorEvaluator

    return CalculatorEvaluator(calculator, model_id=calculator.inner.model_id)


class LabelerOfEmt:
    """A labeler as far as ``free_energy`` needs one."""

    settings_hash = "0123456789ab"

    def __init__(self):
        self.calls: list[int] = []

    def label(self, structures, on_result=None):
        from types import SimpleNamespace

        self.calls.append(len(structures))
        found = as_evaluator(EMT()).evaluate(structures)
        return [
            SimpleNamespace(ok=True, energy=energy, forces=forces, stress=stress)
            for energy, forces, stress in zip(found.energy, found.forces, found.stress, strict=True)
        ]


class Watched:
    """Keeps the positions of every structure that it is asked about."""

    def __init__(self, calculator, model_id):
        self.inner, self.model_id, self.positions = as_evaluator(calculator), model_id, []

    def evaluate(self, structures):
        self.positions += [atoms.positions.copy() for atoms in structures]
        return self.inner.evaluate(structures)


def test_a_new_model_evaluates_the_old_configurations_before_it_draws_new_ones(tmp_path):
    old, new = Watched(QuarticPair(), "old"), Watched(QuarticPair(c=9.0), "new")
    first = quartic(tmp_path / "old", evaluator=old)
    assert first.converged
    found = quartic(tmp_path / "new", evaluator=new, start=tmp_path / "old")
    assert np.array(new.positions[:20]) == pytest.approx(
        np.array(old.positions[-60:-40]), abs=1e-9
    ), "the very same configurations"
    assert found.converged and found.model_id == "new"
    assert found.n_evaluations == len(new.positions) == 20 + 60, (
        "no harmonic start; a few old ones for burn-in, one new population"
    )
    masses = PAIR.get_masses()
    exact = QuarticPair(c=9.0).scha_free_energy(masses.prod() / masses.sum(), 0.0) / 2.0
    assert found.gibbs_raw == pytest.approx(exact, abs=4.0 * found.gibbs_error)
    with np.load(tmp_path / "new" / "population_001.npz") as stored:
        one = stored["energies"]
    assert one != pytest.approx(old.inner.evaluate([PAIR]).energy[0], abs=1e-3)
    again = quartic(tmp_path / "new", evaluator=new, start=tmp_path / "old")
    assert again.gibbs == found.gibbs and len(new.positions) == found.n_evaluations, (
        "restarted: nothing is evaluated twice"
    )


def test_old_configurations_are_of_no_use_at_another_temperature_or_for_other_masses(tmp_path):
    old = Watched(QuarticPair(), "old")
    quartic(tmp_path / "old", evaluator=old)
    for change in ({"temperature": 300.0}, {"masses": {"H": 2.014}}):
        new = Watched(QuarticPair(c=9.0), "new")
        quartic(evaluator=new, start=tmp_path / "old", max_populations=1, **change)
        assert len(new.positions) == 20 and not np.allclose(
            new.positions, old.positions[-60:-40], atol=1e-3
        )


def test_a_run_that_is_taken_up_after_every_population_is_the_run_in_one_go(tmp_path, monkeypatch):
    from magus_anharmonic.settings import SschaSettings
    from magus_anharmonic.sscha import engines
    from magus_anharmonic.sscha.result import RunFolder
    from magus_anharmonic.sscha.run import SschaRun
    from magus_anharmonic.sscha.task import Task

    settings = SschaSettings(supercell=(2, 2, 2), n_configs=60, max_populations=3)
    source = as_evaluator(EMT())
    task = Task(ALUMINIUM, 20.0, 300.0, settings, 0, None, None, source.model_id)
    whole = SschaRun(task, source, RunFolder(tmp_path / "whole", task.identity()))
    for _ in range(3):
        whole.advance()
    calls = []
    minimise = engines.minimise
    monkeypatch.setattr(
        engines, "minimise", lambda *args, **options: calls.append(1) or minimise(*args, **options)
    )
    for _ in range(3):
        run = SschaRun(task, source, RunFolder(tmp_path / "pieces", task.identity()))
        row = run.advance()
    assert len(calls) <= 2, "no minimisation is done twice"
    assert not list(tmp_path.rglob("*.damaged*"))
    assert row == whole.progress.rows[-1] and run.progress.rows == whole.progress.rows
    assert run.finish().as_dict() | {"seconds": 0} == whole.finish().as_dict() | {"seconds": 0}


@pytest.mark.slow
def test_a_start_with_modes_near_zero_does_as_well_on_either_side_of_it():
    """Dynamical matrices of others have modes at +0.5 and -0.5 cm-1 alike; a sample of such
    amplitudes would be lost."""
    options = {
        "n_configs": 20,
        "max_populations": 2,
        "supercell": (2, 2, 2),
        "cell": "fixed",
        "seed": 3,
    }
    state = free_energy(ALUMINIUM, EMT(), 20.0, 0.0, **options).state
    symmetry, modes = Symmetry(state.atoms, state.supercell_matrix), state.modes
    vectors = modes.vectors * np.sqrt(np.repeat(state.supercell.get_masses(), 3))[:, None]
    lowest, found = np.isclose(modes.hbar_omega, modes.hbar_omega[0], rtol=1e-3), []
    for wavenumber in (0.5, -0.5, 1e-3, -3.0):
        hbar_omega = np.where(lowest, wavenumber * invcm, modes.hbar_omega)
        change = (np.sign(hbar_omega) * hbar_omega**2 - modes.hbar_omega**2) / HBAR**2
        softened = symmetry.force_constants(
            fold(state.full + (vectors * change) @ vectors.T, state.supercell_matrix)
        )
        start = replace(state, force_constants=softened)
        assert start.modes.hbar_omega[0] == pytest.approx(wavenumber * invcm, rel=1e-3, abs=1e-7)
        found.append(
            free_energy(state.atoms, EMT(), 20.0, 0.0, start=start, **options).numbers.gibbs
        )
    assert np.isfinite(found).all() and np.ptp(found) < 0.01
