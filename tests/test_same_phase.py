"""A race knows a phase from itself, and two phases from one: by rule, by statistics, and on crystals
whose free energies are known."""

from dataclasses import replace

import numpy as np
import pytest
from crystal_models import Crystals, crystal
from ranking_fakes import h3s
from records import stored_run
from saddle_model import HydrogenBond
from test_elimination import Relaxations, standing

from magus_anharmonic.ranking.elimination import FAR, Rules, Stop, race, verdicts
from magus_anharmonic.ranking.jobs import potential_energy
from magus_anharmonic.ranking.matcher import PHASE_TOLERANCE, Fingerprint, largest_difference
from magus_anharmonic.ranking.phases import alike, ending_of
from magus_anharmonic.ranking.store import FreeEnergyStore, Key
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.structures import structure_id

KEY = Key("model", 150.0, 0.0, "settings")
THREE = Rules(confidence=0.95, keep_best=3, max_populations=30, far=FAR)


def first_letter(meaning):
    """Candidates called alike are one phase, and their structures say ``meaning``."""
    return lambda one, other: meaning if one[0] == other[0] else ""


# ------------------------------------------------------------------------- the rule, in a race


def test_of_one_phase_one_is_run_to_the_end_and_the_best_three_are_phases():
    truth = {"a0": 0.0, "a1": 0.0, "a2": 1e-4, "b": 0.01, "c": 0.02, "d": 0.03}
    field = Relaxations(truth)
    stops = race(list(truth), field.advance, THREE, {}, {}, alike=first_letter("state"))
    assert [stops[name].same_as for name in truth] == ["", "a0", "a0", "", "", ""]
    assert stops["a1"].reason == "stopped after 2 populations: the same phase as a0"
    assert {name: field.calls[name] >= 9 for name in truth} == {
        "a0": True, "a1": False, "a2": False, "b": True, "c": True, "d": False,
    }  # fmt: skip


def test_another_start_takes_over_when_the_one_that_stood_for_the_phase_falls_apart():
    field = Relaxations({"a0": 0.0, "a1": 0.0, "b": 0.02})

    def advance(wanted):
        gone = field.advance(wanted)
        return {n: one for n, one in gone.items() if (n, one.n_populations) != ("a0", 5)}

    stops = race(list(field.truth), advance, THREE, {}, {}, alike=first_letter("state"))
    assert set(stops) == {"a1", "b"} and stops["a1"] == Stop() and field.calls["a1"] >= 9


def test_equal_free_energies_or_equal_structures_alone_make_no_phase():
    tied = {name: standing(0.0, 1e-4, converged=True) for name in ("a", "b")}
    assert not any(stop.same_as for stop in verdicts(tied, THREE).values())
    apart = {"a0": tied["a"], "a1": standing(6e-3, 1e-4, converged=True)}
    for meaning in ("state", "end"):
        found = verdicts(apart, THREE, alike=first_letter(meaning))
        assert not any(stop.same_as for stop in found.values())
    falling = {"a0": standing(0.0, 1e-4, 5e-3), "a1": standing(0.0, 1e-4, 5e-3)}
    assert "a1" in verdicts(falling, THREE, alike=first_letter("state")), "both fall alike"
    assert not verdicts(falling, THREE, alike=first_letter("end")), "one may fall alone"
    once = {name: standing(0.0, 1e-4, 5e-3, n_populations=1) for name in falling}
    assert not verdicts(once, THREE, alike=first_letter("state"))


def test_the_smaller_cell_stands_for_the_phase():
    cells = {
        "a8": standing(0.0, 1e-4, converged=True, n_atoms=8),
        "a4": standing(1e-4, 1e-4, n_atoms=4),
    }
    assert verdicts(cells, THREE, alike=first_letter("end"))["a8"].same_as == "a4"


def test_a_phase_far_above_the_lowest_is_not_relaxed_though_it_is_the_second():
    field = Relaxations({"lowest": 0.0, "far": 0.163, "near": 0.03})
    stops = race(list(field.truth), field.advance, THREE, {}, {})
    assert stops["far"].eliminated and field.calls["far"] <= 3 and field.calls["near"] >= 9
    assert "more than 50 meV/atom above the lowest" in stops["far"].reason
    wide = replace(THREE, far=0.2)
    assert not race(list(field.truth), field.advance, wide, {}, {})["far"].eliminated
    first = {
        name: standing(g, 1e-3, 0.3, None, n_populations=1, potential=0.1)
        for name, g in {"lowest": 0.0, "far": 0.163, "near": 0.145}.items()
    }
    found = verdicts(first, THREE)
    assert list(found) == ["far"], "the near one may lose all of its potential energy"
    assert found["far"].reason.startswith("stopped after 1 population: more than 50 meV/atom above")


# ------------------------------------------------------- what structures say, with errors


def run_at(shift, reach, group="R3m (160)", start="R3m (160)", status="unconverged", lattice=3.1):
    atoms = h3s(lattice, shift)
    numbers = {"symmetry_tolerance": reach, "space_group": group, "space_group_start": start}
    return stored_run("aaaa", KEY, atoms, status, centroids=atoms, **numbers)


def test_a_run_that_may_still_leave_a_higher_symmetry_is_not_told_to_be_there():
    """Im-3m of a run that began there; R3m that passes within the noise of it; one that was moved
    onto it and may go back; one that could not decide; one that decided."""
    cubic, name = "Im-3m (229)", "Im-3m (229)"
    own = ending_of(run_at(0.0, 0.01, cubic, cubic))
    assert alike(own, ending_of(run_at(0.0, 0.01, cubic, cubic, lattice=3.101))) == "end"
    for other in (
        run_at(0.004, 0.01, name),
        run_at(0.0, 0.01, name),
        run_at(0.0, 0.01, f"R3m (160) or {name}: not decided, 1.1 sigma", status="converged"),
    ):
        assert alike(own, ending_of(other)) == ""
    assert alike(own, ending_of(run_at(0.0, 0.01, name, status="converged"))) == "end"


def test_two_phases_are_taken_for_one_as_seldom_as_the_rule_says():
    """R3m H3S that ends with another displacement of its hydrogen, each run with a standard error
    of 0.008 A in it, of which the reach is three."""
    rng, error = np.random.default_rng(2), 0.008
    per_shift = largest_difference(*(Fingerprint(h3s(3.1, s)) for s in (0.1, 0.12))) / 0.02
    found = {}
    for apart in (0.0, 1.0, 1.5):
        ends = 0.12, 0.12 + apart * PHASE_TOLERANCE / per_shift
        seen = rng.normal(ends, error, (100, 2))
        pairs = ([ending_of(run_at(s, 3.0 * error)) for s in pair] for pair in seen)
        found[apart] = sum(alike(*pair) == "end" for pair in pairs)
    assert found[0.0] >= 80 and found[1.0] <= 2 and found[1.5] == 0, found
    vague = [ending_of(run_at(s, 0.1)) for s in (0.12, 0.14)]
    assert alike(*vague) == "", "where they end is not known, and they are not in one state"


# -------------------------------------------------------------------- with the SSCHA itself


def test_the_potential_energy_of_a_harmonic_crystal_is_half_of_its_energy():
    """No relaxation of an SSCHA state ends below its kinetic part; also with a start too high."""
    one = crystal((3.0, 3.0, 3.0), 1.0, 0.2, 0.0, 0.0)
    model = Crystals([one])
    options = {"n_configs": 100, "reference_spacing": 0.5, "cell": "fixed", "supercell": (1, 1, 1)}
    result = free_energy(one.atoms, model, **options)
    static = float(model.evaluate([one.atoms]).energy[0]) / 2
    half = 0.5 * (result.numbers.gibbs_raw - static)
    assert potential_energy(result, static) == pytest.approx(half, rel=1e-3)
    assert potential_energy(result, static + 0.05) == pytest.approx(half, rel=1e-3)
    assert potential_energy(result, static - 0.05) == pytest.approx(half + 0.05, rel=1e-3)


def ranked(structures, evaluator, folder, **sscha):
    block = {"reference_spacing": 0.5, "hessian": 0, "n_configs": 400, **sscha}
    settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": block})
    return rank_structures(structures, evaluator, settings, folder, relax=False, workers=1)


def test_starts_in_one_well_are_relaxed_once_and_the_table_gives_each_the_free_energy(tmp_path):
    """Quantum hydrogen ends in the middle, from the middle and from two starts in a well; another
    crystal is far above. A second call evaluates no configuration."""
    one = crystal((3.0, 3.0, 3.3), 1.0, 0.2, -0.3, 1.0, well=5.5, wall=3.0)
    high = crystal((2.7,) * 3, 1.0, 0.2, -0.3, 1.0, depth=0.6)
    starts = [replace(one, shift=(0.0, 0.0, shift)).atoms for shift in (0.0, 0.15, 0.3)]
    evaluator = Crystals([one, high])
    table = ranked([*starts, high.atoms], evaluator, tmp_path)
    once = evaluator.n_structures
    ranked([*starts, high.atoms], evaluator, tmp_path)
    assert evaluator.n_structures == once + len(table), "their static energies alone"
    store = {run.structure: run for run in FreeEnergyStore(tmp_path / "free_energies.db").runs()}
    far = store.pop(structure_id(high.atoms))
    assert far.status == "eliminated" and far.free_energy.n_populations == 1
    table = [row for row in table if row.id in store]
    assert sum(not row.same_as for row in table) == 1
    assert {row.spg_quantum for row in table} == {"P4/mmm (123)"}
    (stopped,) = (run for run in store.values() if run.status == "eliminated")
    assert stopped.free_energy.n_populations == 2
    (row,) = (row for row in table if row.id == stopped.structure)
    assert row.status == "converged" and row.reason.startswith("stopped after 2 populations: the")
    assert row.gibbs == store[stopped.reduced].gibbs
    spent = sum(run.free_energy.n_evaluations for run in store.values())
    assert sum(row.free_energy.n_evaluations for row in table) == spent, "nothing counts twice"


@pytest.mark.parametrize("parameters", [(-14.0, 60.0, 2.0), (-1.0, 12.0, 14.0)])
def test_a_well_2_mev_below_the_middle_is_a_phase_and_one_that_is_none_is_not(tmp_path, parameters):
    """The exact free energies of middle and well say which; a first-order transition between the
    two sets of parameters, as pressure makes it between R3m and Im-3m."""
    model = HydrogenBond(*parameters)
    middle, well = (model.free_energy(symmetric)[0] / 3 for symmetric in (True, False))
    starts = [model.crystal(shift) for shift in (0.0, 0.12, 0.25)]
    table = ranked(starts, model, tmp_path, supercell=[1, 1, 1], cell="fixed")
    phases = [row for row in table if not row.same_as]
    if middle - well < 1e-6:
        assert [row.spg_quantum for row in phases] == ["P4/mmm (123)"]
        return
    assert middle - well == pytest.approx(2e-3, abs=5e-4)
    assert [row.spg_quantum for row in phases] == ["P4mm (99)", "P4/mmm (123)"]
    error = np.hypot(*(row.gibbs_error for row in phases))
    assert phases[1].gibbs - phases[0].gibbs == pytest.approx(middle - well, abs=4 * error)
