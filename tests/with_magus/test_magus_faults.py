"""Faults of MAGUS 2.0.1 that this package works round, each shown in MAGUS's own code, and what
ours does instead."""

import numpy as np
import pytest
from ase.build import bulk
from magus_run import needs_magus, ours, write_input

pytestmark = needs_magus


@pytest.fixture
def magus_folder(work, monkeypatch):
    """MAGUS's calculators take the working directory as theirs."""
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def population(magus_folder):
    """MAGUS's class of populations, set up for aluminium."""
    from magus.parameters import magusParameters

    write_input(magus_folder, MainCalculator=ours(), Fitness=["Enthalpy"])
    made = magusParameters("input.yaml").Population
    calculators = made.fit_calcs
    yield made
    made.fit_calcs = calculators


def stock_emt(folder, **more):
    """MAGUS's own calculator."""
    from magus.calculators.emt import EMTCalculator

    both = {
        "workDir": str(folder),
        "work_dir": str(folder),
        "jobPrefix": "EMT",
        "job_prefix": "EMT",
    }
    return EMTCalculator(**both, pressure=0, **more)


def test_a_failed_single_point_keeps_the_energy_of_another_structure_there_and_not_here(
    magus_folder,
):
    from magus_anharmonic.plugins.calculator import MatterSimCalculator

    wrong = bulk("Fe")
    wrong.info.update(energy=-99.0, forces=np.zeros((1, 3)), stress=np.zeros(6), enthalpy=-99.0)
    stock = stock_emt(magus_folder)
    (returned,) = stock.scf([wrong.copy()])
    assert returned.info["energy"] == -99.0, "EMT has no iron; MAGUS hands the old number back"

    calculator = MatterSimCalculator(
        **ours(),
        MainCalculator=ours(),
        pressure=0,
        workDir=str(magus_folder),
        work_dir=str(magus_folder),
    )
    invalid = bulk("Al")
    invalid.info.update(energy=-99.0)
    invalid.positions[:] = np.nan
    assert calculator.scf([invalid]) == [] and "energy" not in invalid.info


def test_two_calculators_of_one_name_overwrite_each_other_there_and_ours_stays(magus_folder):
    import magus.calculators
    from magus.utils import CALCULATOR_PLUGIN

    from magus_anharmonic import plugins

    plugins.register()
    CALCULATOR_PLUGIN.register("mattersim")(dict)
    assert CALCULATOR_PLUGIN["mattersim"] is dict, "MAGUS overwrites without a word"
    magus.calculators.load_plugins(magus.calculators.__file__, "magus.calculators")
    assert CALCULATOR_PLUGIN["mattersim"] is plugins.mattersim


@pytest.mark.parametrize("name", ["gpmin", "scipyfminbfgs", "scipyfmincg"])
def test_optimisers_that_kill_a_search_there_are_refused_at_the_start_here(magus_folder, name):
    from magus_anharmonic.errors import InputError
    from magus_anharmonic.settings import parse_settings

    stock = stock_emt(magus_folder, optimizer=name)
    with pytest.raises(TypeError, match="maxstep"):
        stock.relax([bulk("Al", a=4.2)])
    with pytest.raises(InputError, match="optimizer"):
        parse_settings({"MainCalculator": ours(optimizer=name)})


def test_a_list_of_prefixes_builds_a_calculator_that_cannot_learn_there_and_is_taken_apart_or_refused_here():
    from magus.calculators.base import AdjointCalculator

    from magus_anharmonic.errors import InputError
    from magus_anharmonic.settings import parse_settings

    assert not hasattr(AdjointCalculator, "select") and not hasattr(AdjointCalculator, "train")
    assert parse_settings({"MLCalculator": ours(["A"])}).ml_calculator["jobPrefix"] == "A"
    with pytest.raises(InputError, match="mattersim cannot be a stage of a chain"):
        parse_settings({"MLCalculator": {"jobPrefix": ["EMT", "MatterSim"]}})


def test_adding_symmetry_moves_the_archive_there_so_the_ranking_keeps_structures_of_its_own(
    population, tmp_path
):
    """MAGUS's ``addSym`` standardises the parents in place, and those of the keep population share
    their arrays with the good one."""
    bent = bulk("Al", a=4.0, cubic=True)
    bent.positions[0] += [0.02, 0.01, 0.0]
    good = population([bent], "good")
    good[0].info["gibbs"] = -1.0
    before = good[0].copy()
    population(good.clustering(2)[1], "keep").add_symmetry()
    assert not np.allclose(
        good[0].get_all_distances(mic=True), before.get_all_distances(mic=True), atol=1e-3
    )
    assert good[0].info["gibbs"] == -1.0, "moved, and its number stays"

    from records import stored_run

    from magus_anharmonic.ranking.store import FreeEnergyStore, Key
    from magus_anharmonic.structures import structure_id

    start = bulk("Al", a=4.0)
    key = Key("m", 0.0, 0.0, "s")
    FreeEnergyStore(tmp_path / "x.db").put(
        stored_run(structure_id(start), key, start, gibbs=-1.0, centroids=start.copy())
    )
    start.positions += 0.3
    stored = FreeEnergyStore(tmp_path / "x.db").get(structure_id(bulk("Al", a=4.0)), key)
    assert np.allclose(stored.start.positions, 0.0)


def test_a_fitness_that_is_no_number_spoils_the_order_there_and_ours_is_always_one(population):
    from magus.fitness import FitnessCalculator

    from magus_anharmonic.plugins.calculator import NamedFitness

    class Given(FitnessCalculator):
        def calc(self, pop):
            for individual in pop:
                individual.info["fitness"]["given"] = -individual.info.get("gibbs", np.nan)

    individuals = population([bulk("Al", a=a) for a in (4.0, 4.1, 4.2)])
    for individual, enthalpy, free_energy in zip(
        individuals, (0.1, 0.0, 0.2), (-1.0, None, -2.0), strict=True
    ):
        individual.info.update(enthalpy=enthalpy, model="m", fitness={})
        if free_energy is not None:
            individual.info.update(gibbs=free_energy, status="sscha", gibbs_model="m")
    population.fit_calcs = [Given({})]
    individuals.calc_dominators()
    assert [individual.info["dominators"] for individual in individuals] == [2, 2, 1], (
        "the best one is dominated by what has no number"
    )
    for individual in individuals:
        individual.info["fitness"] = {}
    population.fit_calcs = [NamedFitness({})]
    individuals.calc_dominators()
    assert [individual.info["dominators"] for individual in individuals] == [2, 1, 0], (
        "estimated: as much below its enthalpy as the least lowered"
    )


def test_two_structures_of_one_identity_there_are_two_here(population):
    """MAGUS counts offspring anew after a restart; labels and candidates are named by what they
    are."""
    from magus_anharmonic.structures import structure_id

    before, after = (
        population([bulk("Al", a=4.0)], "init", 2)[0],
        population([bulk("Al", a=4.1)], "init", 2)[0],
    )
    assert before.info["identity"] == after.info["identity"]
    assert structure_id(before) != structure_id(after)


def test_every_step_of_a_relaxation_is_kept_there_and_two_frames_here(magus_folder):
    from magus_anharmonic.plugins.calculator import MatterSimCalculator

    where = {"pressure": 0, "workDir": str(magus_folder), "work_dir": str(magus_folder)}
    (stock,) = stock_emt(magus_folder).relax([bulk("Al", a=4.4)])
    assert len(stock.info["trajs"]) > 3
    (here,) = MatterSimCalculator(**ours(), MainCalculator=ours(), **where).relax(
        [bulk("Al", a=4.4)]
    )
    assert len(here.info["trajs"]) == 2


def test_a_single_point_of_quantum_espresso_cannot_be_read_there_and_is_refused_here(tmp_path):
    from magus.formatting.espresso import load_espresso

    from magus_anharmonic.errors import InputError
    from magus_anharmonic.plugins.modes import check_input

    (tmp_path / "output").write_text(
        "!    total energy              =     -15.85 Ry\n     JOB DONE.\n"
    )
    with pytest.raises(UnboundLocalError):
        load_espresso(tmp_path / "output")
    data = {
        "symbols": ["Al"],
        "MainCalculator": {"calculator": "espresso"},
        "MLCalculator": ours("ML"),
        "SelectDFTScf": True,
        "learning": {"labeler": {"calculator": "main"}},
    }
    with pytest.raises(InputError, match="espresso of MAGUS reads relaxations only"):
        check_input(data, ml=True, parallel=False)
