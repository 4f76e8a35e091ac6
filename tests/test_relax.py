"""Relaxation reaches ASE's minimum, one structure does not disturb another, and every failure has
its reason."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE
from ase.units import GPa
from threadpoolctl import threadpool_info, threadpool_limits

from magus_anharmonic.evaluator import CalculatorEvaluator, Evaluation
from magus_anharmonic.potential import optimizers as optimizers_module
from magus_anharmonic.potential import relax as relax_module
from magus_anharmonic.potential.calculator import MatterSim
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.potential.relaxation import FREE_STEPS
from magus_anharmonic.structures import space_group

TIGHT = {"force_tolerance": 5e-3, "stress_tolerance": 0.02}


class Counted:
    """EMT, with the number of structures of each batch."""

    model_id = "emt"

    def __init__(self):
        self.batches = []

    def evaluate(self, structures):
        self.batches.append(len(structures))
        return CalculatorEvaluator(EMT()).evaluate(structures)


class Pair:
    """A pair potential of the distance alone, in a fixed big cell: ``slope`` > 0 drives atoms
    apart."""

    model_id = "pair"

    def __init__(self, slope):
        self.slope = slope

    def evaluate(self, structures):
        energy, forces = [], []
        for atoms in structures:
            vector = atoms.get_distance(0, 1, vector=True)
            length = np.linalg.norm(vector)
            energy.append(-self.slope * length)
            forces.append(self.slope / length * np.array([-vector, vector]))
        return Evaluation(np.array(energy), forces, np.zeros((len(energy), 3, 3)))


class Recorder:
    """EMT, or another evaluator, that remembers where it was asked."""

    model_id = "recorder"

    def __init__(self, evaluator=None):
        self.evaluator = evaluator or CalculatorEvaluator(EMT())
        self.visited, self.energies = [], []

    def evaluate(self, structures):
        found = self.evaluator.evaluate(structures)
        self.visited += [atoms.copy() for atoms in structures]
        self.energies += list(found.energy)
        return found

    def enthalpies(self, pressure):
        """Per atom, in eV, of every structure that was evaluated; pressure in eV/A^3."""
        return [
            (e + pressure * a.cell.volume) / len(a)
            for e, a in zip(self.energies, self.visited, strict=True)
        ]


def strained(symbol, repeat, seed):
    rng = np.random.default_rng(seed)
    atoms = bulk(symbol).repeat(repeat)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.06, (3, 3))), scale_atoms=True)
    atoms.rattle(0.2, rng=rng)
    return atoms


BOTH = pytest.mark.parametrize("optimizer", ["bfgs", "ase", "fire"])


@pytest.mark.parametrize(("pressure", "optimizer"), [(0.0, "bfgs"), (50.0, "bfgs"), (50.0, "fire")])
def test_a_batch_of_metals_reaches_the_enthalpies_of_ase(pressure, optimizer):
    structures = [
        strained("Cu", (2, 1, 1), 1),
        strained("Al", (2, 1, 1), 2),
        strained("Au", (2, 2, 1), 3),
    ]
    before = [atoms.positions.copy() for atoms in structures]
    results = relax(CalculatorEvaluator(EMT()), structures, pressure, optimizer=optimizer, **TIGHT)
    for atoms, result in zip(structures, results, strict=True):
        reference = atoms.copy()
        reference.calc = EMT()
        BFGS(FrechetCellFilter(reference, scalar_pressure=pressure * GPa), logfile=None).run(
            fmax=5e-3, steps=300
        )
        enthalpy = (
            reference.get_potential_energy() + pressure * GPa * reference.get_volume()
        ) / len(atoms)
        assert result.converged and not result.failed and result.reason == ""
        assert result.enthalpy < enthalpy + 1e-4
        assert np.linalg.norm(result.forces, axis=1).max() < 5e-3
        assert np.abs(result.stress + pressure * GPa * np.eye(3)).max() < 0.02 * GPa
        assert result.enthalpy == pytest.approx(
            (result.energy + pressure * GPa * result.atoms.cell.volume) / len(atoms)
        )
        assert result.atoms.calc is None
    assert all(
        np.array_equal(atoms.positions, old) for atoms, old in zip(structures, before, strict=True)
    )


def test_a_mattersim_model_relaxes_h3s_at_pressure_as_ase_does(tiny_checkpoint, potential, h3s):
    double = MatterSim(tiny_checkpoint, device="cpu", dtype="float64")
    start = h3s(3.1, 0.1)
    reference = start.copy()
    reference.calc = double
    BFGS(FrechetCellFilter(reference, scalar_pressure=150 * GPa), logfile=None).run(
        fmax=0.01, steps=200
    )
    enthalpy = (reference.get_potential_energy() + 150 * GPa * reference.get_volume()) / 4
    (result,) = potential.relax([start], pressure=150.0, force_tolerance=0.01)
    assert result.converged
    assert result.enthalpy < enthalpy + 1e-4


@pytest.mark.parametrize("optimizer", ["bfgs", "ase"])
def test_the_gradient_of_the_deformation_is_exact_far_from_the_start(optimizer):
    from magus_anharmonic.potential.optimizers import MinimiserState

    def strain(size):
        values = rng.normal(0, size, (3, 3))
        return values.ravel() if optimizer == "ase" else (values + values.T).ravel()

    options = SimpleNamespace(pressure=0.3, max_move=0.1, relax_cell=True)
    state = MinimiserState(strained("Cu", (2, 1, 1), 4), options, None, optimizer)
    rng = np.random.default_rng(0)
    x = state.x + np.concatenate([rng.normal(0, 0.05, 6), strain(0.2)])

    def enthalpy(point):
        atoms = state.structure(point)
        atoms.calc = EMT()
        return atoms.get_potential_energy() + 0.3 * atoms.cell.volume

    atoms = state.structure(x)
    atoms.calc = EMT()
    gradient = state._gradient(
        x, atoms.cell.array, atoms.get_forces(), atoms.get_stress(voigt=False)
    )
    direction = np.concatenate([rng.normal(size=6), strain(1.0)])
    step = 1e-5 * direction
    assert (enthalpy(x + step) - enthalpy(x - step)) / 2e-5 == pytest.approx(
        gradient @ direction, rel=1e-5
    )


@pytest.mark.parametrize(
    ("optimizer", "rule", "longest"), [("ase", BFGS, 0.2), ("fire", FIRE, 1.0)]
)
def test_the_path_is_that_of_ase(
    optimizer, rule, longest, tiny_checkpoint, potential, h3s, monkeypatch
):
    """For a skew cell, which ASE turns; for FIRE with ASE's coordinates, and without its limit,
    which ASE sets on all atoms."""
    monkeypatch.setattr(
        optimizers_module.Fire, "coordinates", optimizers_module.AseBfgs.coordinates
    )
    start = h3s(3.1, 0.1)
    start.set_cell(
        start.cell.array @ np.array([[1.05, 0.08, 0.0], [-0.05, 0.97, 0.11], [0.0, 0.04, 1.0]]),
        scale_atoms=True,
    )
    reference = start.copy()
    reference.calc = MatterSim(tiny_checkpoint, device="cpu", dtype="float64")
    steps = 20 if optimizer == "ase" else 4
    rule(FrechetCellFilter(reference, scalar_pressure=20 * GPa), logfile=None, maxstep=longest).run(
        fmax=1e-6, steps=steps
    )
    double = Recorder(potential.double())
    relax(
        double,
        [start],
        20.0,
        optimizer=optimizer,
        max_move=longest,
        max_steps=steps + 1,
        force_tolerance=1e-6,
    )
    turned = np.linalg.solve(start.cell.array, reference.cell.array)
    assert np.abs(turned - np.eye(3)).max() > 1e-3
    assert optimizer == "fire" or np.abs(turned - turned.T).max() > 1e-5
    np.testing.assert_allclose(double.visited[-1].cell.array, reference.cell.array, atol=1e-6)
    np.testing.assert_allclose(double.visited[-1].positions, reference.positions, atol=1e-6)


@BOTH
def test_the_end_of_a_cut_short_relaxation_is_the_lowest_point_it_visited(optimizer):
    for seed in (0, 2):
        path = Recorder()
        (result,) = relax(
            path,
            [strained("Cu", (2, 1, 1), seed)],
            20.0,
            optimizer=optimizer,
            max_move=0.3,
            max_steps=13,
            **TIGHT,
        )
        assert result.enthalpy == pytest.approx(min(path.enthalpies(20 * GPa)), abs=1e-9)


def test_a_search_that_finds_nothing_lower_for_long_goes_back_and_then_only_downwards():
    """Forces that point uphill: ASE's rule would climb for ever, ours ends where it began."""

    class Wrong(Recorder):
        def evaluate(self, structures):
            found = super().evaluate(structures)
            return Evaluation(found.energy, [-forces for forces in found.forces], found.stress)

    start = strained("Cu", (2, 1, 1), 1)
    path = Wrong()
    (result,) = relax(
        path, [start], relax_cell=False, max_move=0.01, max_steps=300, optimizer="bfgs"
    )
    energies = path.enthalpies(0.0)
    assert (
        not result.converged
        and "no step lowers the enthalpy" in result.reason
        and result.n_steps < 100
    )
    assert (
        result.enthalpy == pytest.approx(min(energies), abs=4e-6)
        and max(energies) > result.enthalpy + 0.01
    )


def test_waiting_structures_enter_as_others_leave_and_results_keep_the_order():
    start = strained("Cu", (2, 1, 1), 5)
    structures = [bulk("Cu", a=3.59), start, bulk("Al"), Atoms(), bulk("Au"), bulk("Cu", a=3.6)]
    counted = Counted()
    results = relax(counted, structures, edges_in_flight=60)
    assert max(counted.batches) == 2 and [len(result.atoms) for result in results] == [
        len(atoms) for atoms in structures
    ]
    assert [result.atoms.get_chemical_formula() for result in results] == [
        atoms.get_chemical_formula() for atoms in structures
    ]
    assert [result.converged for result in results] == [True, True, True, False, True, True]
    alone = Counted()
    relax(alone, structures, edges_in_flight=1)
    assert set(alone.batches) == {1}


@BOTH
def test_a_relaxation_does_not_depend_on_its_companions(optimizer):
    structures = [strained("Cu", (2, 1, 1), 1), bulk("Al"), strained("Au", (2, 1, 1), 3)]
    together = relax(CalculatorEvaluator(EMT()), structures, 10.0, optimizer=optimizer)
    again = relax(
        CalculatorEvaluator(EMT()), structures, 10.0, optimizer=optimizer, edges_in_flight=1
    )
    for one, other in zip(together, again, strict=True):
        assert one.n_steps == other.n_steps and one.enthalpy == other.enthalpy
        np.testing.assert_array_equal(one.atoms.positions, other.atoms.positions)


def test_a_relaxation_with_the_potential_depends_on_its_companions_by_rounding_alone(
    potential, h3s
):
    double = potential.double()
    structures = [h3s(3.1, 0.1), h3s(2.9, 0.05), h3s(3.0, 0.15)]
    together = double.relax(structures, 150.0, max_steps=15)
    for atoms, one in zip(structures, together, strict=True):
        (other,) = double.relax([atoms], 150.0, max_steps=15)
        assert one.n_steps == other.n_steps and one.enthalpy == pytest.approx(
            other.enthalpy, abs=1e-9
        )
        np.testing.assert_allclose(one.atoms.positions, other.atoms.positions, atol=1e-7)


def test_the_enthalpy_of_what_is_returned_never_exceeds_the_start():
    structures = [strained("Cu", (2, 1, 1), seed) for seed in range(3)]
    first = CalculatorEvaluator(EMT()).evaluate(structures)
    for atoms, energy, result in zip(
        structures,
        first.energy,
        relax(CalculatorEvaluator(EMT()), structures, 20.0, max_steps=3),
        strict=True,
    ):
        assert not result.converged and not result.failed
        assert "not converged after 3 steps" in result.reason and "GPa" in result.reason
        assert result.enthalpy <= (energy + 20 * GPa * atoms.cell.volume) / len(atoms)


def test_a_fixed_cell_stays_and_only_forces_count():
    start = strained("Cu", (2, 1, 1), 7)
    (result,) = relax(CalculatorEvaluator(EMT()), [start], 30.0, relax_cell=False)
    assert result.converged
    np.testing.assert_array_equal(result.atoms.cell.array, start.cell.array)
    assert np.abs(result.stress + 30 * GPa * np.eye(3)).max() > GPa


def test_fix_symmetry_keeps_the_space_group_and_heals_small_deviations():
    start = bulk("Cu", cubic=True)
    start.set_cell(np.diag([3.7, 3.7, 3.9]), scale_atoms=True)
    start.rattle(1e-3, seed=1)
    (result,) = relax(CalculatorEvaluator(EMT()), [start], 10.0, fix_symmetry=True, **TIGHT)
    assert result.converged
    assert space_group(result.atoms, symprec=1e-5) in ("I4/mmm (139)", "Fm-3m (225)")
    assert space_group(start, symprec=1e-5) == "P1 (1)"


class DoubleWell:
    """Pulls every atom off its ideal site, which is a saddle; the cell is fixed."""

    model_id = "double-well"

    def __init__(self, centre):
        self.centre = centre

    def evaluate(self, structures):
        u = np.array([atoms.positions - self.centre for atoms in structures])
        return Evaluation(
            (u**4 - 0.1 * u**2).sum((1, 2)), list(-(4 * u**3 - 0.2 * u)), np.zeros((len(u), 3, 3))
        )


def test_symmetrised_forces_keep_a_saddle_that_free_relaxation_leaves(h3s):
    start = h3s(3.0)
    pushed = start.copy()
    pushed.positions += 1e-3
    evaluator = DoubleWell(start.positions)
    options = {"relax_cell": False, "force_tolerance": 1e-6}
    (free,) = relax(evaluator, [pushed], **options)
    assert free.converged and np.abs(free.atoms.positions - start.positions).min() == pytest.approx(
        np.sqrt(0.05), abs=1e-4
    )
    (kept,) = relax(evaluator, [start], fix_symmetry=True, **options)
    np.testing.assert_allclose(kept.atoms.positions, start.positions, atol=1e-9)


def test_a_perturbation_leaves_the_saddle_on_which_a_symmetric_start_ends(h3s):
    start = h3s(3.0)
    options = {"relax_cell": False, "force_tolerance": 1e-4}
    (saddle,) = relax(DoubleWell(start.positions), [start], **options)
    assert saddle.converged and saddle.n_steps == 1 and saddle.energy == 0.0
    (left,) = relax(DoubleWell(start.positions), [start], perturbations=1, **options)
    assert left.converged and left.energy == pytest.approx(-12 * 0.0025, abs=1e-6)
    (again,) = relax(
        DoubleWell(start.positions), [bulk("Cu"), start][1:], perturbations=1, **options
    )
    np.testing.assert_array_equal(left.atoms.positions, again.atoms.positions)


class Washboard:
    """One atom in a fixed cell on a washboard that sinks along x: a minimum in every period, each
    lower than the one before."""

    model_id = "washboard"

    def __init__(self):
        self.calls = 0

    def evaluate(self, structures):
        self.calls += len(structures)
        x = np.array([atoms.positions for atoms in structures])
        slope = np.zeros_like(x) + [-0.4, 0.0, 0.0]
        energies = (0.2 - 0.2 * np.cos(12 * x) + slope * x).sum((1, 2))
        return Evaluation(energies, list(-(2.4 * np.sin(12 * x) + slope)), np.zeros((len(x), 3, 3)))


def test_a_perturbation_that_leads_back_is_given_up_before_it_has_converged():
    """It costs a quarter of a relaxation that goes on to the minimum which is known, and no minimum
    is lost by it."""
    start = Atoms("H", positions=[[0.3, 0.2, 0.1]], cell=3 * [9.0], pbc=True)
    options = {"relax_cell": False, "force_tolerance": 1e-7}
    evaluator = Washboard()
    (once,) = relax(evaluator, [start], **options)
    alone = evaluator.calls
    (result,) = relax(evaluator, [start], perturbations=8, **options)
    per_perturbation = (evaluator.calls - 2 * alone) / 8
    assert (
        result.converged and result.energy <= once.energy and per_perturbation < FREE_STEPS + 3
    ), (alone, per_perturbation)
    assert result.energy < once.energy - 0.1, "one of eight perturbations finds the next valley"


def test_of_several_optimisers_the_lowest_end_is_kept_and_one_that_fails_spoils_nothing():
    starts = [
        Atoms("H", positions=[[x, 0.2, 0.1]], cell=3 * [9.0], pbc=True)
        for x in np.linspace(0.3, 1.1, 9)
    ]
    options = {"relax_cell": False, "max_move": 1.0, "force_tolerance": 1e-4}
    each = {
        name: relax(Washboard(), starts, optimizer=name, **options)
        for name in ("bfgs", "ase", "fire")
    }
    together = relax(Washboard(), starts, optimizer=("bfgs", "ase", "fire"), **options)
    lowest = np.min([[one.energy for one in found] for found in each.values()], axis=0)
    assert not all(
        one.energy == pytest.approx(low, abs=1e-6)
        for one, low in zip(each["bfgs"], lowest, strict=True)
    ), "nothing to choose"
    np.testing.assert_allclose([one.energy for one in together], lowest, atol=1e-6)
    assert [one.n_steps for one in together] == list(
        np.sum([[one.n_steps for one in found] for found in each.values()], axis=0)
    )

    class SecondFails(Washboard):
        def evaluate(self, structures):
            if self.calls >= each["bfgs"][0].n_steps:
                raise RuntimeError("out of luck")
            return super().evaluate(structures)

    (result,) = relax(SecondFails(), starts[:1], optimizer=["bfgs", "ase"], **options)
    assert result.converged and result.reason == "" and result.energy == each["bfgs"][0].energy


def test_what_goes_wrong_after_a_perturbation_does_not_spoil_the_minimum_before_it(h3s):
    class Once(DoubleWell):
        calls = 0

        def evaluate(self, structures):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("out of luck")
            return super().evaluate(structures)

    start = h3s(3.0)
    evaluator = Once(start.positions)
    (result,) = relax(evaluator, [start], relax_cell=False, perturbations=3)
    assert evaluator.calls == 4 and result.converged and not result.failed and result.reason == ""
    np.testing.assert_array_equal(result.atoms.positions, start.positions)


def test_small_matrices_of_a_relaxation_take_one_thread_and_the_setting_comes_back():
    """More would wait for each other on the cores that the evaluations need."""

    def blas_threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    class Watching(CalculatorEvaluator):
        def evaluate(self, structures):
            seen.update(blas_threads())
            return super().evaluate(structures)

    seen = set()
    with threadpool_limits(2, user_api="blas"):
        relax(Watching(EMT()), [bulk("Cu")])
        assert seen == {1} and blas_threads() == {2}


def test_bad_structures_fail_with_their_reason_and_the_others_relax():
    coincident = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.01]], cell=[4, 4, 4], pbc=True)
    unknown = bulk("Fe")
    flat = Atoms("Cu", cell=[3, 3, 0], pbc=True)
    results = relax(
        CalculatorEvaluator(EMT()), [coincident, bulk("Cu"), unknown, Atoms(), flat], 0.0
    )
    assert [result.failed for result in results] == [True, False, True, True, True]
    assert results[1].converged
    assert (
        "coincide" in results[0].reason
        and "Fe" in results[2].reason
        and "no atoms" in results[3].reason
        and "flat" in results[4].reason
    )
    assert np.isnan(results[0].enthalpy)


def test_crowded_cells_are_refused_before_they_fill_the_memory():
    tiny = Atoms("H2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=3 * [0.5], pbc=True)
    own_image = Atoms("H", cell=[0.05, 3.0, 9.0], pbc=True)
    results = relax(CalculatorEvaluator(EMT()), [tiny, own_image])
    assert all(
        result.failed and np.isnan(result.enthalpy) and result.n_steps == 0 for result in results
    )
    assert (
        "too small: 0.063 A^3/atom" in results[0].reason
        and "atoms 0 and 0 coincide (0.050 A)" in results[1].reason
    )


@BOTH
def test_a_slab_keeps_its_cell_and_its_forces_vanish(optimizer):
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    slab.positions[2, 2] += 0.3
    assert slab.pbc.tolist() == [True, True, False]
    (result,) = relax(CalculatorEvaluator(EMT()), [slab], 100.0, optimizer=optimizer)
    assert result.converged and np.linalg.norm(result.forces, axis=1).max() < 0.05
    np.testing.assert_array_equal(result.atoms.cell.array, slab.cell.array)
    assert result.atoms.pbc.tolist() == [True, True, False]
    assert result.enthalpy == pytest.approx(
        result.energy / 3
    )  # no P V: an area has no pressure in GPa


@BOTH
def test_atoms_that_fly_apart_are_called_dissolved(optimizer):
    start = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1.0]], cell=[30, 30, 30], pbc=True)
    (result,) = relax(Pair(10.0), [start], max_steps=120, relax_cell=False, optimizer=optimizer)
    assert result.failed and "dissolved" in result.reason


@BOTH
def test_atoms_that_fall_into_each_other_are_called_overlapping(optimizer):
    start = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]], cell=[30, 30, 30], pbc=True)
    (result,) = relax(Pair(-1.0), [start], max_steps=120, relax_cell=False, optimizer=optimizer)
    assert result.failed and "overlap" in result.reason


class Jelly:
    """A cell under ``stress`` (3, 3) eV/A^3 whatever its shape; the energy falls as the cell
    follows."""

    model_id = "jelly"

    def __init__(self, stress):
        self.stress_tensor, self.calls = np.asarray(stress, dtype=float), 0

    def evaluate(self, structures):
        self.calls += 1
        n = len(structures)
        return Evaluation(
            np.full(n, -float(self.calls)),
            [np.zeros((len(a), 3)) for a in structures],
            np.tile(self.stress_tensor, (n, 1, 1)),
        )


@pytest.mark.parametrize(
    ("stress", "optimizer"),
    [(-np.eye(3), "bfgs"), (np.eye(3), "ase"), (np.diag([-1.0, 0.5, 0.5]), "fire")],
    ids=["expands", "collapses", "needle"],
)
def test_diverging_cells_are_stopped(stress, optimizer):
    (result,) = relax(
        Jelly(0.1 * stress),
        [Atoms("H", cell=[2, 2, 2], pbc=True)],
        max_steps=400,
        optimizer=optimizer,
    )
    assert result.failed and "diverging cell" in result.reason


def test_long_runs_report_progress_with_an_estimate(monkeypatch, caplog):
    clock = iter(np.arange(0.0, 1e6, 7.0))
    monkeypatch.setattr(
        "magus_anharmonic.runs.record.time", SimpleNamespace(monotonic=lambda: float(next(clock)))
    )
    with caplog.at_level(logging.INFO, logger=relax_module.__name__):
        relax(Counted(), [strained("Cu", (2, 1, 1), 5)])
    assert caplog.messages and all("left" in message for message in caplog.messages)
