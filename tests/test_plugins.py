"""The plug-ins inside a stand-in for MAGUS: registration, input, calculator, hook, seeds,
fitness."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import read, write

sys.path.insert(0, str(Path(__file__).parent))
import magus_stand_in  # noqa: E402
from ranking_fakes import Result  # noqa: E402

from magus_anharmonic.errors import InputError, LabelerNotInstalled, MagusAnharmonicError  # noqa: E402
from magus_anharmonic.io.digests import versions
from magus_anharmonic.io.files import write_json  # noqa: E402
from magus_anharmonic.sscha.record import FreeEnergy  # noqa: E402
from magus_anharmonic.units import gpa_to_ev_per_a3  # noqa: E402

OURS = ("magus", "magus_anharmonic.plugins")


def forget():
    """Take every module of MAGUS and of the plug-ins out of sys.modules, and return them."""
    names = [
        name
        for name in sys.modules
        if name in OURS or name.startswith(tuple(f"{top}." for top in OURS))
    ]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def magus(tmp_path, monkeypatch):
    """The stand-in, imported and with the plug-ins registered; the working directory is a fresh
    folder."""
    before = forget()
    monkeypatch.syspath_prepend(str(magus_stand_in.write(tmp_path / "site")))
    work = tmp_path / "Generation 7"  # a path with a word that MAGUS's restart searches for
    work.mkdir()
    monkeypatch.chdir(work)
    import magus.calculators
    import magus.fitness
    import magus.parameters
    import magus.search.search
    import magus.search.search_ml
    import magus.utils

    import magus_anharmonic.plugins as plugins

    plugins.register()
    yield SimpleNamespace(
        plugins=plugins,
        calculators=magus.calculators,
        fitness=magus.fitness,
        utils=magus.utils,
        Parameters=magus.parameters.magusParameters,
        Magus=magus.search.search.Magus,
        MLMagus=magus.search.search_ml.MLMagus,
        work=work,
    )
    forget()
    sys.modules.update(before)


def keys(checkpoint, **more):
    return {
        "symbols": ["H", "S"],
        "formula": [3, 1],
        "pressure": 150,
        "popSize": 4,
        "numGen": 2,
        "MainCalculator": {
            "calculator": "mattersim",
            "jobPrefix": "MatterSim",
            "checkpoint": str(checkpoint),
        },
        **more,
    }


def search_of(magus, data, *, ml=False, **options):
    return (magus.MLMagus if ml else magus.Magus)(magus.Parameters(data), **options)


def population(magus, h3s, n=3):
    from magus.populations.populations import Population

    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        atoms = h3s(shift=0.1)
        atoms.positions += rng.normal(scale=0.03, size=(len(atoms), 3))
        frames.append(atoms)
    return Population(frames, "init", 1)


# Registration


def test_registering_twice_changes_nothing(magus):
    first = (
        magus.Magus.set_good_pop,
        magus.calculators.load_plugins,
        magus.utils.CALCULATOR_PLUGIN["mattersim"],
    )
    magus.plugins.register()
    assert (
        magus.Magus.set_good_pop,
        magus.calculators.load_plugins,
        magus.utils.CALCULATOR_PLUGIN["mattersim"],
    ) == first


def test_a_file_of_magus_with_our_name_does_not_displace_us(magus, caplog):
    magus.utils.EXTRA.append(("mattersim", object))
    magus.calculators.load_plugins("x", "magus.calculators")
    assert magus.utils.CALCULATOR_PLUGIN["mattersim"] is magus.plugins.mattersim
    assert "is replaced by the one of magus-anharmonic" in caplog.text


# Input

NO_CRYSTALS = (
    "layer",
    "cluster",
    "adclus",
    "surface",
    "interface",
    "confined_1d",
    "confined_2d",
    "something new",
)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            {"learning": {"labeler": {"calculator": "gpaw"}, "n_sampel": 3}},
            "learning.n_sampel: unknown key; did you mean n_sample?",
        ),
        ({"sscah": {"n_configs": 100}}, "sscah: unknown block of keys; did you mean sscha?"),
        ({"sscha": {"nConfigs": 101}}, "must be even"),
        ({"pressure": 1.5e11, "sscha": None}, "looks like Pa"),
        (
            {"MainCalculator": {"calculator": "mattersim", "checkpoint": "nowhere.pth"}},
            "checkpoint nowhere.pth does not exist",
        ),
        ({"learning": {"labeler": {"calculator": "main"}}}, "main is for `magus search -m`"),
        (
            {
                "MainCalculator": {"calculator": "emt"},
                "learning": {"labeler": {"calculator": "gpaw"}},
            },
            "MainCalculator.calculator: is emt; learning: needs calculator: mattersim here",
        ),
        (
            {"sscha": {}, "MainCalculator": {"calculator": "espresso", "jobPrefix": "QE"}},
            "every single point would be lost; name another calculator for SSCHA as sscha.evaluator",
        ),
        (
            {"sscha": {"evaluator": "ase.calculators.emt.Emt"}},
            "sscha.evaluator.calculator: 'ase.calculators.emt.Emt': ase.calculators.emt has no",
        ),
        *(
            ({"structureType": kind, "sscha": {}}, f"structureType: {kind}: SSCHA needs crystals")
            for kind in NO_CRYSTALS
        ),
        ({"dimension": 2, "sscha": {}}, "dimension: 2: SSCHA needs crystals"),
        (
            {"structureType": "layer", "learning": {"labeler": {"calculator": "gpaw"}}},
            "structureType: layer: learning needs",
        ),
        (
            {"Fitness": ["sscha"], "sscha": {}},
            "Fitness: sscha: unknown fitness; did you mean SSCHA?",
        ),
        ({"Fitness": ["sscha"]}, "Fitness: sscha: unknown fitness; did you mean SSCHA?"),
        ({"Fitness": ["Entalpy"]}, "Fitness: Entalpy: unknown fitness; MAGUS has Enthalpy, "),
        ({"Fitness": ["Gap"], "targetGap": 1.0}, "Fitness: Gap: MatterSim gives no band gap"),
        ({"Fitness": ["XRD"], "waveLength": 1.5}, "Fitness: XRD: needs targetXrd"),
        (
            {"fix_volume": True},
            "MainCalculator: fix_volume: True: calculator: mattersim does not know this key",
        ),
        (
            {"maxForce": 20.0},
            "MainCalculator: maxForce: 20.0: calculator: mattersim does not know this key",
        ),
        (
            {"optimizer": "lbfgs"},
            "MainCalculator.optimizer: 'lbfgs': should be 'bfgs', 'ase' or 'fire'",
        ),
        ({"pop_size": 4}, "pop_size: MAGUS reads popSize only"),
        (
            {"MainCalculator": {"calculator": ["emt", "mattersim"], "jobPrefix": ["EMT", "M"]}},
            "mattersim cannot be a stage of a chain (emt, mattersim)",
        ),
        (
            {"MainCalculator": {"jobPrefix": ["EMT", "MatterSim2"]}},
            "mattersim cannot be a stage of a chain (emt, mattersim)",
        ),
    ],
)
def test_wrong_input_ends_with_code_2_before_any_work(
    magus, tiny_checkpoint, caplog, more, complaint
):
    with pytest.raises(SystemExit) as stopped:
        search_of(magus, keys(tiny_checkpoint, **more))
    assert stopped.value.code == 2
    assert complaint in caplog.text
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            {"SelectDFTScf": True, "learning": {"labeler": {"calculator": "gpaw"}}},
            "under `magus search -m` MAGUS takes the labels",
        ),
        ({"learning": {"labeler": {"calculator": "main"}}}, "needs SelectDFTScf: True"),
        ({"SelectDFTScf": True}, "SelectDFTScf: needs the block learning:"),
        (
            {
                "MainCalculator": {"calculator": "espresso", "jobPrefix": "QE"},
                "learning": {"labeler": {"calculator": "main"}},
            },
            "espresso of MAGUS reads relaxations only",
        ),
    ],
)
def test_what_does_not_go_with_the_ml_mode_is_refused(
    magus, tiny_checkpoint, caplog, more, complaint
):
    ours = {"calculator": "mattersim", "jobPrefix": "ML", "checkpoint": str(tiny_checkpoint)}
    data = keys(
        tiny_checkpoint,
        **{
            "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT"},
            "MLCalculator": ours,
            **more,
        },
    )
    with pytest.raises(SystemExit):
        search_of(magus, data, ml=True)
    assert complaint in caplog.text


def test_a_search_without_our_keys_is_not_even_looked_at(magus):
    @magus.utils.CALCULATOR_PLUGIN.register("other")
    class Other:
        def __init__(self, **parameters):
            pass

        def relax(self, pop):
            for ind in pop:
                ind.info["enthalpy"] = 1.0
            return pop

    # A pressure that we would refuse, and a key of the same name as one of ours with another
    # meaning.
    search = search_of(
        magus, {"pressure": 1e12, "seed": "a file", "MainCalculator": {"calculator": "other"}}
    )
    search.one_step([Atoms("H", cell=[3, 3, 3], pbc=True)])
    assert not Path("results/anharmonic").exists()
    assert set(search.good_pop[0].info) == {"fitness", "used", "identity", "enthalpy"}


def test_near_degenerate_phases_get_a_warning_when_magus_would_merge_them(
    magus, tiny_checkpoint, caplog
):
    from magus_anharmonic.plugins.modes import check_input

    data = keys(tiny_checkpoint, Fitness=["SSCHA"], sscha={})
    for more, merges in [
        ({}, "Comparator: naive or zurek"),
        ({"dE": 0.001}, "Comparator: naive or zurek"),
        ({"Comparator": {"comparator_list": ["zurek"]}, "dE": 0.001}, "Comparator: zurek"),
        ({"Comparator": {"comparator_list": ["naive"]}}, "dE: 0.01 takes"),
        (
            {"Comparator": {"comparator_list": ["naive"], "naive": {"dE": 0.02}}, "dE": 0.001},
            "dE: 0.02 takes",
        ),
        ({"Comparator": {"comparator_list": ["naive"]}, "dE": 0.001}, ""),
        (
            {"Comparator": {"comparator_list": ["naive", "zurek"], "connect": "and"}, "dE": 0.001},
            "",
        ),
    ]:
        caplog.clear()
        check_input({**data, **more}, ml=False, parallel=False)
        assert (
            (
                merges in caplog.text
                and "comparator_list: [naive]} and dE: 0.001 keep them" in caplog.text
            )
            if merges
            else not caplog.text
        )


def test_by_free_energy_magus_compares_more_than_shapes_unless_told_otherwise(
    magus, tiny_checkpoint
):
    """The fault: its default, naive or zurek, took R3m and Im-3m for one whatever ``dE``, and every
    input had to know."""
    theirs = {"comparator_list": ["naive", "zurek"]}
    for more, used in [
        ({"Fitness": ["SSCHA"], "sscha": {}, "dE": 0.001}, {"comparator_list": ["naive"]}),
        ({"Fitness": ["SSCHA"], "sscha": {}, "Comparator": theirs}, theirs),
        ({"Fitness": ["Enthalpy"]}, None),
    ]:
        assert search_of(magus, keys(tiny_checkpoint, **more)).parameters.get("Comparator") == used


def test_every_number_of_a_ranking_leaves_with_the_structure_it_belonged_to(magus, h3s):
    """The fault: the distance above the hull stayed with a structure that was relaxed anew."""
    from magus_anharmonic.plugins.calculator import FREE_ENERGY_KEYS, RESULT_KEYS
    from magus_anharmonic.ranking.candidate import Candidate
    from magus_anharmonic.ranking.jobs import set_info

    atoms = h3s()
    parts = [
        Candidate(id=f"{n}", atoms=other, pressure=100.0, enthalpy=-1.0, model="m", members=(0,))
        for n, other in enumerate((atoms, Atoms("Al", cell=[3, 3, 3])))
    ]
    set_info([atoms], parts, "m")
    assert (
        {"gibbs", "gibbs_error", "gibbs_above_hull", "status", "reason", "spg_quantum"}
        <= {*atoms.info}
        <= {*RESULT_KEYS, *FREE_ENERGY_KEYS}
    )


def test_magus_s_default_formula_type_does_not_contradict_the_user_s(tiny_checkpoint):
    from magus_anharmonic.plugins.parameters import settings_of

    assert (
        settings_of(
            {**keys(tiny_checkpoint), "formula_type": "var", "formulaType": "fix"}
        ).formula_type
        == "var"
    )


def test_relaxation_keys_at_the_top_level_hold_for_our_calculator_too(tiny_checkpoint):
    from magus_anharmonic.plugins.parameters import calculator_settings, settings_of

    settings = settings_of(keys(tiny_checkpoint, eps=0.2, maxStep=7))
    options = calculator_settings(settings, learner=False)
    assert (options.eps, options.max_step) == (0.2, 7)


def test_what_magus_would_ignore_is_said(magus, tiny_checkpoint, caplog):
    from magus_anharmonic.plugins.modes import check_input

    given = {
        "presure": 3,
        "diffE": 0.001,
        "goodSize": 4,
        "volRatio": 2,
        "molType": "fix",
        "cutoff": 3,
        "frag_gen": {},
        "remove_p1": 0.5,
    }
    check_input(keys(tiny_checkpoint, sscha={}, workDir="/w", **given), ml=False, parallel=False)
    assert [line.split(":")[0] for line in caplog.messages] == [
        "presure",
        "diffE",
        "molType",
        "sscha",
    ]
    assert (
        "sscha: without Fitness: [SSCHA]: free energies are computed and listed, but the search"
        " does not go by them" in caplog.messages
    )


@pytest.mark.parametrize(
    "block",
    [
        {"jobPrefix": "MatterSim"},
        {"jobPrefix": ["MatterSim"]},
        {"calculator": "mattersim", "jobPrefix": ["A"]},
        {"jobPrefix": "mattersim1"},
    ],
)
def test_the_calculator_is_ours_however_its_name_is_written(magus, tiny_checkpoint, block):
    """The fault: without ``calculator`` MAGUS takes the name from ``jobPrefix`` and our hook was
    off; a list of one made a chain of one."""
    search = search_of(
        magus,
        keys(
            tiny_checkpoint, MainCalculator={"checkpoint": str(tiny_checkpoint), **block}, sscha={}
        ),
    )
    assert search.main_calculator.options.job_prefix == str(np.ravel(block["jobPrefix"])[0])
    assert (
        json.loads(Path("results/anharmonic/run.json").read_text())["settings"]["main_calculator"][
            "calculator"
        ]
        == "mattersim"
    )


def test_molecules_that_magus_puts_in_the_place_of_their_files_are_no_trouble(
    magus, tiny_checkpoint
):
    data = keys(
        tiny_checkpoint,
        molMode=True,
        inputMols=[Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])],
        sscha={},
        refE={"of": np.float64(1.5)},
    )
    search_of(magus, data)
    host = json.loads(Path("results/anharmonic/run.json").read_text())["settings"]["host"]
    assert host["inputMols"] == ["H2"] and host["refE"] == {"of": 1.5} and host["molMode"] is True


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (None, "was started without this package: its enthalpies are not MatterSim's"),
        ({"version": "99.0.0"}, "written by magus-anharmonic 99.0.0"),
        ({"host": "embedded"}, "was made by host 'embedded', this is host 'magus'"),
        (
            {"host": "magus", "settings": {"pressure": 100.0}},
            "pressure: 150.0 but the search was started with 100.0",
        ),
    ],
)
def test_only_the_search_that_began_in_a_folder_goes_on_there(
    magus, tiny_checkpoint, caplog, record, complaint
):
    Path("results/anharmonic").mkdir(parents=True)
    Path("results/good.traj").write_text("of somebody else")
    if record is not None:
        write_json(
            "results/anharmonic/run.json",
            {"version": "0.1.0", **versions(), "seed": 1, "settings": {}, **record},
        )
    with pytest.raises(SystemExit) as stopped:
        search_of(magus, keys(tiny_checkpoint), restart=True)
    assert stopped.value.code == 2 and complaint in caplog.text
    assert Path("results/good.traj").read_text() == "of somebody else"


def test_keys_that_changed_between_a_search_and_its_restart_are_named(
    magus, tiny_checkpoint, caplog
):
    data = keys(
        tiny_checkpoint, sscha={"n_configs": 20}, Fitness=["SSCHA"], preset_spg_prob={230: 0.2}
    )
    search_of(magus, data)
    search_of(magus, data, restart=True)
    assert "but the search was started with" not in caplog.text
    block = {"n_configs": 40, "cell": "fixed"}
    search_of(magus, {**data, "sscha": block, "popSize": 7}, restart=True)
    assert [line for line in caplog.messages if "was started with" in line] == [
        "sscha.cell: 'fixed', but the search was started with 'variable'",
        "sscha.n_configs: 40, but the search was started with 20",
        "popSize: 7, but the search was started with 4",
    ]


@pytest.fixture
def root_handlers():
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    for handler in set(before) - set(root.handlers):
        root.addHandler(handler)


def test_our_own_command_runs_stock_magus_with_the_plugins(
    magus, tiny_checkpoint, monkeypatch, root_handlers
):
    import yaml
    from magus.entrypoints.search import started

    from magus_anharmonic import labelers
    from magus_anharmonic.plugins.parameters import run_stock_magus

    def missing(*_):
        raise LabelerNotInstalled("learning.labeler.calculator: gpaw: labeler not installed")

    monkeypatch.setattr(labelers, "get_labeler", missing)
    learning = {"labeler": {"calculator": "gpaw"}, "required": False}
    Path("input.yaml").write_text(
        yaml.safe_dump(keys(tiny_checkpoint, sscha={}, learning=learning))
    )
    with pytest.raises(InputError, match="-r: no results/"):
        run_stock_magus("input.yaml", restart=True)
    run_stock_magus("input.yaml")
    [search] = started
    assert type(search) is magus.Magus
    assert (
        "running without learning: learning.labeler.calculator: gpaw: labeler not installed"
        in Path("log.txt").read_text()
    )
    assert (
        json.loads(Path("results/anharmonic/run.json").read_text())["settings"]["learning"] is None
    )
    monkeypatch.setattr("magus_anharmonic.autoload.is_magus", lambda: False)
    with pytest.raises(InputError, match="MAGUS is not installed"):
        run_stock_magus("input.yaml")


# Log


def test_no_line_of_ours_can_mislead_the_restart_of_magus(caplog):
    from magus_anharmonic.plugins.parameters import tame

    root = logging.getLogger()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        tame()
        tame()
        logging.getLogger("magus_anharmonic.x").warning(
            "model from %s", "/Generation 7/volRatio.pth"
        )
        logging.getLogger("magus.search.search").warning(" Generation 1 ")
    finally:
        root.removeHandler(handler)
    assert lines == ["model from /generation 7/volume ratio.pth", " Generation 1 "]
    assert len(handler.filters) == 1


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        ("== Generation 4 ==\nchange volRatio from 2 to 3\n", None),
        ("== Generation 4 ==\n== Generation 1 ==\n", "cannot go on within its first round"),
        ("WARNING: applied\n", "names no round to go on with"),
        (None, None),
    ],
)
def test_a_restart_for_which_the_log_of_magus_names_no_place_is_refused(tmp_path, log, complaint):
    from magus_anharmonic.plugins.parameters import check_restart

    file = tmp_path / "log.txt"
    if log is not None:
        file.write_text(log)
    if complaint is None:
        check_restart(file)
        return
    with pytest.raises(InputError, match=complaint):
        check_restart(file)


# Calculator


@pytest.fixture
def calculator(magus, tiny_checkpoint):
    return magus.Parameters(keys(tiny_checkpoint)).MainCalculator


def test_energies_forces_and_stress_equal_those_of_mattersim_itself(
    calculator, magus, tiny_checkpoint, h3s
):
    from mattersim.forcefield import MatterSimCalculator, Potential

    done = calculator.scf(population(magus, h3s))
    oracle = Potential.from_checkpoint(
        load_path=str(tiny_checkpoint), device="cpu", load_training_state=False
    )
    stock = MatterSimCalculator(potential=oracle)
    for individual in done:
        atoms = Atoms(individual)
        atoms.calc = stock
        assert individual.info["energy"] == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
        assert np.allclose(individual.info["forces"], atoms.get_forces(), rtol=1e-4, atol=2e-6)
        assert np.allclose(individual.info["stress"], atoms.get_stress(), rtol=1e-4, atol=1e-6)
        expected = (
            individual.info["energy"] + gpa_to_ev_per_a3(150) * individual.get_volume()
        ) / len(individual)
        assert individual.info["enthalpy"] == pytest.approx(expected)
        assert individual.info["model"] == calculator.potential.model_id
        assert individual.calc is None


def test_a_relaxation_takes_the_caller_s_individuals_and_lowers_the_enthalpy(
    magus, tiny_checkpoint, h3s
):
    block = {"calculator": "mattersim", "checkpoint": str(tiny_checkpoint), "max_step": 5}
    calculator = magus.Parameters(keys(tiny_checkpoint, MainCalculator=block)).MainCalculator
    pop = population(magus, h3s)
    before = [ind.info["enthalpy"] for ind in calculator.scf(pop.copy())]
    pop[0].info.update(gibbs=-1.0, gibbs_model="old", origin="seed")
    relaxed = calculator.relax(pop, logfile="aserelax0.log", trajname="calc0.traj")
    assert type(relaxed) is type(pop) and [ind.info["identity"] for ind in relaxed] == [
        "init1-0",
        "init1-1",
        "init1-2",
    ]
    assert all(ind.info["enthalpy"] < start for ind, start in zip(relaxed, before, strict=True))
    assert "gibbs" not in relaxed[0].info and relaxed[0].info["origin"] == "seed"
    assert len(relaxed[0].info["trajs"]) == 2
    assert Path.cwd() == magus.work


def test_keys_of_the_relaxation_reach_it(magus, tiny_checkpoint, h3s, monkeypatch):
    block = {
        "calculator": "mattersim",
        "checkpoint": str(tiny_checkpoint),
        "max_step": 7,
        "perturbations": 2,
        "optimizer": "fire",
    }
    calculator = magus.Parameters(keys(tiny_checkpoint, MainCalculator=block)).MainCalculator
    given = {}
    relax = type(calculator.potential).relax
    monkeypatch.setattr(
        type(calculator.potential),
        "relax",
        lambda *a, **options: given.update(options) or relax(*a, **options),
    )
    calculator.relax([h3s()])
    assert (given["max_steps"], given["perturbations"], given["optimizer"]) == (7, 2, "fire")


def test_a_list_comes_back_as_a_list_and_nothing_as_nothing(calculator, h3s):
    assert isinstance(calculator.scf([h3s()]), list)
    assert calculator.relax([]) == [] and calculator.scf([]) == []


class Refusing:
    """A potential that fails for some structures, to see what is dropped."""

    model_id = "refusing"
    path = None

    def evaluate(self, structures):
        from magus_anharmonic.evaluator import Evaluation

        if any(len(atoms) == 1 for atoms in structures):
            raise MagusAnharmonicError("structure 0: not finite")
        n = len(structures)
        return Evaluation(
            np.zeros(n), [np.zeros((len(a), 3)) for a in structures], np.zeros((n, 3, 3))
        )

    def relax(self, structures, pressure, **options):
        return [
            SimpleNamespace(
                atoms=a,
                energy=0.0,
                forces=np.zeros((len(a), 3)),
                stress=np.zeros((3, 3)),
                n_steps=1,
                converged=True,
                failed=len(a) == 1,
                reason="dissolved" if len(a) == 1 else "",
            )
            for a in structures
        ]


@pytest.mark.parametrize("mode", ["scf", "relax"])
def test_a_failure_is_dropped_with_its_reason_and_never_keeps_an_old_energy(
    calculator, h3s, caplog, mode
):
    caplog.set_level(logging.INFO)
    calculator.use(Refusing())
    bad = Atoms(
        "H",
        cell=[2, 2, 2],
        pbc=True,
        info={"energy": -99.0, "enthalpy": -99.0, "identity": "init1-9"},
    )
    done = getattr(calculator, mode)([h3s(), bad, h3s(shift=0.1)])
    assert len(done) == 2 and bad not in done and "energy" not in bad.info
    assert "init1-9 (H) failed" in caplog.text
    assert ("not finite" if mode == "scf" else "dissolved") in caplog.text
    [kept] = read(Path("calcFold/MatterSim/errorTraj.traj"), ":")
    assert len(kept) == 1 and kept.info["reason"]


def test_the_model_is_loaded_late_and_left_out_of_pickles(calculator, h3s):
    assert calculator._potential is None
    energy = calculator.scf([h3s()])[0].info["energy"]
    data = pickle.dumps(calculator)
    assert len(data) < 50_000
    copy = pickle.loads(data)
    assert copy._potential is None and copy.scf([h3s()])[0].info["energy"] == energy


def test_a_relative_checkpoint_is_found_from_any_working_directory(
    magus, tiny_checkpoint, h3s, monkeypatch
):
    Path("mine.pth").write_bytes(Path(tiny_checkpoint).read_bytes())
    calculator = magus.Parameters(keys("mine.pth")).MainCalculator
    monkeypatch.chdir("/")
    assert len(calculator.scf([h3s()])) == 1


def test_a_search_that_learns_goes_on_with_its_latest_model(magus, tiny_checkpoint):
    folder = Path("results/anharmonic/checkpoints")
    folder.mkdir(parents=True)
    for name in ("gen2.pth", "gen10.pth", "gen9.pth.state", "genX.pth"):
        (folder / name).write_bytes(Path(tiny_checkpoint).read_bytes())
    learning = {"labeler": {"calculator": "ase.calculators.emt.EMT"}}
    calculator = magus.Parameters(keys(tiny_checkpoint, learning=learning)).MainCalculator
    assert calculator.potential and calculator.checkpoint.endswith("gen10.pth")
    fixed = magus.Parameters(keys(tiny_checkpoint)).MainCalculator
    assert fixed.potential and fixed.checkpoint == str(tiny_checkpoint)


def test_cuda_in_a_forked_worker_is_refused_in_plain_words(
    calculator, tiny_checkpoint, h3s, monkeypatch
):
    import torch

    from magus_anharmonic.plugins.modes import check_input

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(MagusAnharmonicError, match="magus search -p"):
        calculator.scf([h3s()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="run without -p"):
        check_input(keys(tiny_checkpoint), ml=False, parallel=True)


# Seeds


def test_seeds_join_the_user_s_own_and_a_repeated_round_changes_nothing(magus, h3s):
    from magus_anharmonic.plugins.hook import write_seeds

    Path("Seeds").mkdir()
    mine = h3s(shift=0.3)
    mine.info["note"] = "from the paper"
    write("Seeds/seeds_2.traj", [mine])
    centroid = h3s()
    centroid.info["seed"] = "abc"
    for _ in range(2):
        assert write_seeds("Seeds", 2, [centroid, centroid]) == 1
        first, second = read("Seeds/seeds_2.traj", ":")
        assert first.info["note"] == "from the paper" and np.allclose(
            first.positions, mine.positions
        )
        assert second.info["seed"] == "abc" and np.allclose(second.positions, centroid.positions)
    assert len(read("Seeds/seeds_2.traj.user", ":", format="traj")) == 1
    assert write_seeds("Seeds", 3, [centroid]) == 0 and not Path("Seeds/seeds_3.traj").exists()
    assert write_seeds("Seeds", 2, []) == 0 and len(read("Seeds/seeds_2.traj", ":")) == 1


def test_without_anything_to_seed_no_file_appears_and_ours_alone_goes_away(magus, h3s):
    from magus_anharmonic.plugins.hook import write_seeds

    assert write_seeds("Seeds", 2, []) == 0 and not Path("Seeds").exists()
    assert write_seeds("Seeds", 2, [h3s()]) == 1
    assert write_seeds("Seeds", 2, []) == 0 and not Path("Seeds/seeds_2.traj").exists()


def test_a_new_search_starts_without_the_seeds_of_the_last_one(magus, tiny_checkpoint, h3s):
    from magus_anharmonic.plugins.hook import write_seeds

    search_of(magus, keys(tiny_checkpoint, sscha={}))
    Path("Seeds").mkdir()
    write("Seeds/seeds_2.traj", [h3s(shift=0.3)])
    write_seeds("Seeds", 2, [h3s()])
    write_seeds("Seeds", 3, [h3s(shift=0.1)])
    search_of(magus, keys(tiny_checkpoint, sscha={}), restart=True)
    assert len(read("Seeds/seeds_2.traj", ":")) == 2 and Path("Seeds/seeds_3.traj").exists()
    search_of(magus, keys(tiny_checkpoint, sscha={}))
    [mine] = read("Seeds/seeds_2.traj", ":")
    assert (
        np.allclose(mine.positions, h3s(shift=0.3).positions)
        and not Path("Seeds/seeds_3.traj").exists()
    )


# Fitness


def test_the_fitness_reads_flat_keys_and_is_finite_for_everybody(magus):
    from magus.populations.populations import Population

    infos = [
        {"enthalpy": -1.0, "model": "m", "gibbs": -0.8, "gibbs_model": "m", "status": "converged"},
        {"enthalpy": -1.1, "model": "m", "gibbs": -0.9, "gibbs_model": "m", "status": "converged"},
        {"enthalpy": -0.5, "model": "m"},
        {"enthalpy": float("nan"), "model": "m"},
        {},
    ]
    pop = Population([Atoms("H", info=dict(info)) for info in infos])
    magus.fitness.fit_dict["SSCHA"]({}).calc(pop)
    values = [ind.info["fitness"]["sscha"] for ind in pop]
    assert np.isfinite(values).all()
    assert np.argsort(values)[::-1].tolist()[:3] == [1, 0, 2]


def test_the_fitness_of_another_package_is_known_to_magus(magus, monkeypatch):
    from magus.populations.populations import Population

    from magus_anharmonic import third_party
    from magus_anharmonic.ranking.fitness import third_party_fitness

    monkeypatch.setattr(third_party, "declared", lambda kind: {"Size": [], "Broken": []})
    parts = {"Size": lambda population: map(len, population), "Broken": 3}
    monkeypatch.setattr(third_party, "load", lambda kind, name: parts[name])
    magus.plugins.register()
    pop = Population([Atoms("H2"), Atoms("H")])
    magus.fitness.fit_dict["Size"]({}).calc(pop)
    assert [ind.info["fitness"]["size"] for ind in pop] == [2.0, 1.0]
    with pytest.raises(SystemExit):
        magus.fitness.fit_dict["Broken"]({})
    third_party_fitness.cache_clear()


# Hook


class Relaxing(Refusing):
    """Harmonic wells by volume: enough for populations to have different enthalpies; relaxes
    nothing."""

    def __init__(self, model_id="first"):
        self.model_id = model_id

    def evaluate(self, structures):
        found = super().evaluate(structures)
        shift = 1.0 if self.model_id == "first" else 2.0
        energy = np.array([shift + 0.01 * np.abs(atoms.positions).sum() for atoms in structures])
        return type(found)(energy, found.forces, found.stress)


@pytest.fixture
def rounds_of(magus, tiny_checkpoint, monkeypatch):
    """Start a stand-in search whose potential is `Relaxing`; returns the search and its rounds."""
    from magus_anharmonic.plugins import hook

    def begin(ml=False, restart=False, **more):
        search = search_of(magus, keys(tiny_checkpoint, **more), ml=ml, restart=restart)
        rounds = hook._ROUNDS[search]
        rounds.state.potential = Relaxing()
        rounds.calculator.use(rounds.state.potential)
        return search, rounds

    return begin


def sscha_stand_in(calls):
    """A free energy that is the enthalpy plus 0.1 eV/atom, and centroids that are the structure
    itself."""

    def free_energy(atoms, evaluator, **options):
        calls.append(atoms)
        found = evaluator.evaluate([atoms])
        gibbs = (
            found.energy[0] + gpa_to_ev_per_a3(options["pressure"]) * atoms.get_volume()
        ) / len(atoms) + 0.1
        own = dict(
            gibbs=gibbs,
            gibbs_error=1e-4,
            gibbs_raw=gibbs,
            finite_size=0.0,
            helmholtz=gibbs,
            volume=atoms.get_volume() / len(atoms),
            stress=np.zeros((3, 3)),
            pressure=options["pressure"],
            centroids=atoms.copy(),
            space_group_start="P1 (1)",
            space_group="P1 (1)",
            n_evaluations=2,
            n_populations=2,
            temperature=0.0,
            supercell=(1, 1, 1),
            model_id=evaluator.model_id,
            n_atoms_supercell=len(atoms),
            symmetry_tolerance=0.05,
            force_constants=None,
            predicted_decrease=0.0,
        )
        return Result(**{**vars(FreeEnergy(status="converged")), **own})

    return free_energy


def test_the_record_is_there_before_the_first_step_and_the_seed_survives_a_restart(rounds_of):
    import json

    _, rounds = rounds_of(sscha={})
    record = json.loads(Path("results/anharmonic/run.json").read_text())
    assert record["seed"] == rounds.state.seed
    assert (record["host"], record["command"]) == ("magus", "magus search"), (
        "by which `status` says how to go on"
    )
    _, again = rounds_of(sscha={}, restart=True)
    assert again.state.seed == rounds.state.seed


def test_each_round_hands_over_the_relaxed_population_with_duplicates_and_all_survivors(
    rounds_of, magus, h3s, monkeypatch
):
    from magus_anharmonic.plugins import hook as module

    seen = []

    def after_generation(state, population, survivors, generation, *, last):
        survivors = list(survivors)
        seen.append((generation, len(population), len(survivors)))
        assert all("fitness" in ind.info for ind in survivors), (
            "MAGUS's own individuals, not copies"
        )
        for ind in survivors:
            ind.info.update(gibbs=-1.0, compare_info={"old": 1})
        state.potential = Relaxing(f"after round {generation}")
        return [h3s()]

    monkeypatch.setattr(module, "after_generation", after_generation)
    search, _ = rounds_of(
        distinct=2, learning={"labeler": {"calculator": "ase.calculators.emt.EMT"}}
    )
    for generation in (1, 2):
        search.one_step(population(magus, h3s).pop)
        assert (
            len(read(f"Seeds/seeds_{generation + 1}.traj", ":")) == 1 if generation == 1 else True
        )
    assert seen == [(1, 3, 2), (2, 3, 4)]
    assert {frame.info["model"] for frame in read("results/raw2.traj", ":")} == {"after round 1"}, (
        "the next round relaxes with what was learned"
    )
    assert [frame.info["gibbs"] for frame in read("results/gen1.traj", ":")] == [-1.0, -1.0]
    assert all("compare_info" not in ind.info and ind.info["spg"] == 1 for ind in search.cur_pop)


def test_free_energies_and_one_model_are_in_every_survivor_and_in_the_saved_population(
    rounds_of, magus, h3s
):
    search, rounds = rounds_of(Fitness=["SSCHA"], sscha={"max_candidates": 2}, dE=0.001)
    calls = []
    rounds.state.free_energy, rounds.state.workers, rounds.state.relaxation_steps = (
        sscha_stand_in(calls),
        1,
        0,
    )
    search.one_step(population(magus, h3s).pop)
    assert len(calls) == 2
    saved = read("results/gen1.traj", ":")
    assert sorted(frame.info["status"] for frame in saved) == [
        "converged",
        "converged",
        "estimated",
    ]
    assert {frame.info["model"] for frame in saved} == {"first"}
    assert np.isfinite([ind.info["fitness"]["sscha"] for ind in search.good_pop]).all()
    # The same round again, as after a kill: nothing is calculated twice.
    search.curgen = 1
    search.one_step(population(magus, h3s).pop)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "more", [{"numGen": 5, "converged_in": 2}, {"numGen": 2}], ids=["MAGUS ended it", "numGen"]
)
def test_the_last_round_is_ranked_whatever_ended_the_search(
    rounds_of, magus, h3s, monkeypatch, more, capsys
):
    """The fault: with learning SSCHA waits for round ``numGen``, and MAGUS's
    ``convergence_condition`` ended the search before it."""
    monkeypatch.setattr(
        "magus_anharmonic.learning.learn.learn",
        lambda *_, potential, **__: SimpleNamespace(potential=potential, metrics={}),
    )
    learning = {"labeler": {"calculator": "ase.calculators.emt.EMT"}}
    search, rounds = rounds_of(
        Fitness=["SSCHA"], sscha={"max_candidates": 2}, learning=learning, **more
    )
    calls = []
    rounds.state.free_energy, rounds.state.workers, rounds.state.relaxation_steps = (
        sscha_stand_in(calls),
        1,
        0,
    )
    search.run(population(magus, h3s).pop)
    assert search.curgen == 3 and len(calls) == 2
    assert sum("gibbs" in ind.info for ind in search.good_pop) > 0
    assert len(search.best_pop) == 2, "one for each round"
    assert [
        info
        for ind in read("results/gen2.traj", ":")
        if (info := ind.info.get("status")) == "converged"
    ]
    shown = capsys.readouterr().out
    assert "ranking by free energy" in shown and "ranking.png" in shown
    assert (
        Path("results/anharmonic/ranking.png").exists()
        and Path("results/anharmonic/report.html").exists()
    )


def test_a_structure_that_magus_changed_in_place_gets_its_own_energy_again(rounds_of, magus, h3s):
    search, rounds = rounds_of(sscha={"max_candidates": 1})
    rounds.state.free_energy, rounds.state.workers, rounds.state.relaxation_steps = (
        sscha_stand_in([]),
        1,
        0,
    )
    search.one_step(population(magus, h3s).pop)
    moved = search.good_pop[0]
    before = moved.info["energy"]
    moved.positions += 0.5  # what addSym does to the members of the archive
    search.one_step(population(magus, h3s, 1).pop)
    expected = Relaxing().evaluate([moved]).energy[0]
    assert moved.info["energy"] == pytest.approx(expected) and moved.info["energy"] != before


def test_with_a_seed_magus_s_own_random_numbers_repeat_round_by_round(rounds_of):
    draws = []
    for _ in range(2):
        search, _ = rounds_of(seed=7, sscha={})
        search.curgen = 5
        search.update_volume_ratio()
        draws.append(np.random.random())
    assert draws[0] == draws[1]
    search.curgen = 6
    search.update_volume_ratio()
    assert np.random.random() != draws[0]


# Calculators of MAGUS


class Inside:
    """What MAGUS's emt, lj, mace, nep, chgnet, deepmd are: one with an ASE calculator in it."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.scf_calc = Scaled()


class Scaled(EMT):
    """EMT that may become another energy surface, as a model that is trained does."""

    scale = 1.0

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        self.results = {key: self.scale * value for key, value in self.results.items()}


class Jobs:
    """What MAGUS's vasp and mtp are: single points by programs, in any order, from its folder."""

    def scf_(self, pop):
        os.chdir(self.calc_dir)
        found = []
        for atoms in reversed(pop):
            after = atoms.copy()
            after.calc = EMT()
            after.info.update(
                energy=after.get_potential_energy(),
                forces=after.get_forces(),
                stress=after.get_stress(),
            )
            after.calc = None
            found.append(self.returned(after))
        if self.fails:
            raise RuntimeError("the program ended with code 1")
        return found

    fails = False
    returned = staticmethod(lambda atoms: atoms)


def own_calculator(magus, kind):
    """``kind`` as a calculator of MAGUS that keeps what it is to relax."""
    from magus.calculators.base import Calculator

    def relax_(self, pop, **options):
        for atoms in pop:
            atoms.info.update(energy=0.0, enthalpy=0.0)
        return pop

    made = type(kind.__name__, (kind, Calculator), {"relax_": relax_})
    magus.utils.CALCULATOR_PLUGIN.register("own")(made)
    return made


def own_keys(**more):
    return {
        "symbols": ["Cu"],
        "pressure": 5,
        "numGen": 2,
        "Fitness": ["SSCHA"],
        "scheduler": "serial",
        "sscha": {"supercell": [1, 1, 1], "n_configs": 10},
        "MainCalculator": {"calculator": "own", "jobPrefix": "Own"},
        **more,
    }


@pytest.mark.parametrize(("kind", "name"), [(Inside, "scaled-"), (Jobs, "dft-")])
@pytest.mark.parametrize("named", [None, {"calculator": "lj", "arguments": {"sigma": 2.3}}])
def test_free_energies_rank_by_any_calculator_of_magus_or_by_the_one_that_is_named(
    magus, kind, name, named
):
    own_calculator(magus, kind)
    keys = own_keys()
    keys["sscha"]["evaluator"] = named
    search = search_of(magus, keys)
    from magus_anharmonic.plugins import hook

    calls = []
    state = hook._ROUNDS[search].state
    state.free_energy = sscha_stand_in(calls)
    search.one_step([bulk("Cu", a=3.5), bulk("Cu", "bcc", a=2.8)])
    found = list(search.good_pop)
    assert calls and len(found) == 2
    assert {atoms.info["model"] for atoms in found} == {state.potential.model_id}
    assert state.potential.model_id.startswith("lennardjones-" if named else name)
    for atoms in found:
        atoms.calc = LennardJones(sigma=2.3) if named else EMT()
        enthalpy = atoms.get_potential_energy() + gpa_to_ev_per_a3(5) * atoms.get_volume()
        assert atoms.info["enthalpy"] * len(atoms) == pytest.approx(enthalpy, abs=1e-6)
        assert atoms.info["gibbs"] == pytest.approx(atoms.info["enthalpy"] + 0.1, abs=1e-3)
    assert Path.cwd() == magus.work
    again = hook._ROUNDS[search_of(magus, keys, restart=True)].state
    assert again.potential.model_id == state.potential.model_id


def test_the_model_that_magus_trains_itself_ranks_as_it_is_in_each_round(magus):
    own_calculator(magus, Inside)
    ml = {"calculator": "own", "jobPrefix": "ML"}
    from magus_anharmonic.plugins import hook

    search = search_of(magus, own_keys(MLCalculator=ml), ml=True)
    rounds, search.cur_pop = hook._ROUNDS[search], population_of(magus, [bulk("Cu", a=3.5)])
    rounds.state.free_energy = sscha_stand_in([])
    ids = []
    for scale in (1.0, 2.0):
        search.ml_calculator.scf_calc.scale = scale
        search.ml_calculator.scf_calc.reset()
        rounds.finish(search)
        ids.append(search.cur_pop[0].info["model"])
        expected = bulk("Cu", a=3.5)
        expected.calc = EMT()
        energy = scale * expected.get_potential_energy()
        assert search.cur_pop[0].info["energy"] == pytest.approx(energy)
    assert ids[0] != ids[1]


def population_of(magus, structures):
    from magus.populations.populations import Population

    found = Population(structures, "init", 1)
    for atoms in found:
        atoms.info["enthalpy"] = 0.0
    return found


def sorted_atoms(atoms):
    after = atoms[::-1]
    after.info = atoms.info
    return after


def without_stress(atoms):
    del atoms.info["stress"]
    return atoms


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"returned": staticmethod(sorted_atoms)}, "it moved or reordered the atoms"),
        ({"returned": staticmethod(without_stress)}, "it gave no energy, forces or stress"),
        ({"fails": True}, "the program ended with code 1"),
    ],
)
def test_single_points_of_magus_that_are_none_are_not_taken(magus, change, said):
    from magus_anharmonic.evaluator import evaluate_each
    from magus_anharmonic.plugins.calculator import evaluator_of_magus

    made = own_calculator(magus, type("Bad", (Jobs,), change))
    calculator = made(workDir=str(magus.work), jobPrefix="Own")
    structures = [bulk("Cu", cubic=True)]
    structures[0].positions[1] += 0.3
    search = SimpleNamespace(main_calculator=calculator, parameters=own_keys())
    found = evaluate_each(evaluator_of_magus(search, ml=False), structures, Exception)
    assert said in found[0]
    assert Path.cwd() == magus.work


# Learning under `magus search -m`


@pytest.fixture
def ml_keys(magus, tiny_checkpoint):
    """Input of a search whose MainCalculator is ``dft``: a spring to the origin, in place like
    MAGUS's own, with failures on request."""
    from magus.calculators.base import Calculator

    class Dft(Calculator):
        fail: set[int] = set()
        voigt = True

        def scf_(self, pop):
            for number, atoms in enumerate(pop):
                if number in self.fail:
                    continue
                forces = (-0.1 * atoms.positions).tolist()
                stress = np.full(6, 0.01) if self.voigt else 0.01 * np.ones((3, 3))
                atoms.info.update(
                    energy=0.05 * float((atoms.positions**2).sum()), forces=forces, stress=stress
                )
            return pop

    magus.utils.CALCULATOR_PLUGIN.register("dft")(Dft)
    learning = {
        "labeler": {"calculator": "main"},
        "n_sample": 2,
        "n_perturb": 2,
        "epochs": 1,
        "n_replay": 2,
        "batch_size": 4,
    }
    ours = {
        "calculator": "mattersim",
        "jobPrefix": "ML",
        "checkpoint": str(tiny_checkpoint),
        "max_step": 2,
    }
    main = {"calculator": "dft", "jobPrefix": "DFT", "cutoff": 500, "numCore": 4}
    return keys(
        tiny_checkpoint,
        MainCalculator=main,
        MLCalculator=ours,
        SelectDFTScf=True,
        learning=learning,
    )


@pytest.fixture
def search(magus, ml_keys):
    return search_of(magus, ml_keys, ml=True)


@pytest.fixture
def ml(search):
    return search.ml_calculator


def test_a_round_of_the_ml_mode_labels_distortions_and_trains_on_them(search, magus, h3s):
    from magus_anharmonic.io.files import read_jsonl

    ml = search.ml_calculator
    assert ml.init_times == 0 and ml.trainset == [] and ml.get_loss([]) == [0.0]
    first = ml.potential.model_id
    search.one_step(population(magus, h3s).pop)
    assert len(ml.store) == 4
    assert {atoms.info["kind"] for atoms in ml.store.labels()} == {"distorted"}
    assert len({atoms.info["parent"] for atoms in ml.store.labels()}) == 2
    for atoms in ml.store.labels():
        assert atoms.get_potential_energy() == pytest.approx(
            0.05 * (atoms.positions**2).sum(), rel=1e-5
        )
        assert "fitness" not in atoms.info and "identity" not in atoms.info
    [metrics] = read_jsonl(Path("results/anharmonic/metrics.jsonl"))
    assert metrics["generation"] == 1 and metrics["n_labels"] == 4 and metrics["old_model"] == first
    assert {ind.info["model"] for ind in search.good_pop} == {metrics["new_model"]}, (
        "survivors are of the model after training"
    )
    assert all(np.isfinite(ind.info["enthalpy"]) for ind in search.good_pop)
    search.one_step(population(magus, h3s).pop)
    assert [
        record["generation"] for record in read_jsonl(Path("results/anharmonic/metrics.jsonl"))
    ] == [1, 2]
    assert len(list(Path("results/anharmonic/checkpoints").glob("gen?.pth"))) == 2


def test_a_restart_repeats_a_round_with_its_own_model_and_volumes_and_asks_for_no_label_again(
    search, magus, ml_keys, h3s
):
    search.one_step(population(magus, h3s).pop)
    files = [
        *Path("results/anharmonic/labels").glob("*.*"),
        *Path("results/anharmonic/checkpoints").glob("*"),
    ]
    found = {path: path.read_bytes() for path in files}
    assert len(found) == 4 and search.volume_updates == 1

    again = search_of(magus, ml_keys, ml=True, restart=True)
    again.main_calculator.scf_ = asked = Asked()
    again.one_step(population(magus, h3s).pop)
    assert asked.numbers == [0] and again.volume_updates == 0
    assert {path: path.read_bytes() for path in found} == found and not list(
        Path("results/anharmonic/labels").glob("*/*/*")
    )
    for first, second in zip(search.cur_pop, again.cur_pop, strict=True):
        assert (
            np.allclose(first.positions, second.positions, atol=1e-5)
            and first.info["model"] == second.info["model"]
        )
    again.update_volume_ratio()
    assert again.volume_updates == 1, "only the first round is a repeated one"


def test_a_round_that_was_killed_between_its_labels_and_its_training_asks_for_the_missing_ones(
    search, magus, ml_keys, h3s
):
    ml = search.ml_calculator
    planned = ml.expand_perturb(ml.select(population(magus, h3s)))
    ml.updatedataset(list(search.main_calculator.scf(planned))[:3])
    restarted = search_of(magus, ml_keys, ml=True, restart=True).ml_calculator
    waiting = restarted.expand_perturb(restarted.select(population(magus, h3s)))
    assert [atoms.info["id"] for atoms in waiting] == [planned[3].info["id"]]


class Asked:
    """A main calculator's single points, which fail: how many it was asked for, call by call."""

    def __init__(self):
        self.numbers: list[int] = []

    def __call__(self, pop):
        self.numbers.append(len(pop))
        return pop


def test_the_miner_s_step_in_the_place_of_the_learning_one_is_refused(search, caplog):
    """The fault: ``-m -smfr`` puts a step of its own on the search, which relaxed with DFT and
    never trained, without a word."""
    search.one_step = pytest.fail
    with pytest.raises(SystemExit) as stopped:
        search.run()
    assert stopped.value.code == 2 and "search with -m or with -smfr" in caplog.text


def test_a_label_that_fails_is_recorded_and_the_search_goes_on(search, magus, h3s):
    from magus_anharmonic.io.files import read_jsonl

    search.main_calculator.fail, search.main_calculator.voigt = {1}, False
    search.one_step(population(magus, h3s).pop)
    assert len(search.ml_calculator.store) == 3
    [failure] = read_jsonl(Path("results/anharmonic/failures.jsonl"))
    assert "gave no result" in failure["reason"] and failure["generation"] == 1
    [metrics] = read_jsonl(Path("results/anharmonic/metrics.jsonl"))
    assert (metrics["n_labels"], metrics["n_failures"]) == (3, 1)


def test_labels_of_an_earlier_batch_that_come_back_are_not_taken(search, magus, h3s, caplog):
    ml, main = search.ml_calculator, search.main_calculator
    pop = population(magus, h3s)
    old = main.scf(ml.expand_perturb(ml.select(pop)))
    ml.generation = 2
    asked = ml.expand_perturb(ml.select(pop))
    ml.updatedataset([*main.scf(asked), *old])
    assert len(ml.store) == len(asked)
    assert "earlier batch" in caplog.text


def test_selection_keeps_the_kind_of_the_population_and_never_touches_it(ml, magus, h3s):
    pop = ml.relax(population(magus, h3s))
    chosen = ml.select(pop)
    assert type(chosen) is type(pop) and len(chosen) == 2
    assert not any(a is b for a in chosen for b in pop)
    distorted = ml.expand_perturb(chosen)
    assert type(distorted) is type(pop) and len(distorted) == 4
    assert not any("energy" in atoms.info or "enthalpy" in atoms.info for atoms in distorted)
    assert [a.positions.tolist() for a in ml.expand_perturb(chosen)] == [
        a.positions.tolist() for a in distorted
    ], "same seed, same labels"
    assert isinstance(ml.select(list(pop)), list)


def test_predictions_leave_the_labels_as_they_are(search, magus, h3s):
    ml, labelled = search.ml_calculator, search.main_calculator.scf(population(magus, h3s))
    before = [ind.info["energy"] for ind in labelled]
    predicted = ml.calc_efs(labelled)
    assert [ind.info["energy"] for ind in labelled] == before
    expected = np.mean(
        [abs(b - p.info["energy"]) / 4 for b, p in zip(before, predicted, strict=True)]
    )
    assert ml.get_loss(labelled) == pytest.approx([expected])
    assert np.isnan(
        ml.calc_efs(Atoms("HH", positions=np.zeros((2, 3)), cell=[3, 3, 3], pbc=True))[0].info[
            "energy"
        ]
    )


def test_labels_of_the_other_loops_of_magus_are_kept_too(search, magus, h3s):
    ml = search.ml_calculator
    ml.updatedataset([*search.main_calculator.scf(population(magus, h3s))])
    ml.train()
    assert len(ml.store) == 3 and {atoms.info["kind"] for atoms in ml.store.labels()} == {"relaxed"}
    ml.updatedataset([])
    assert all("energy" in atoms.info for atoms in ml.trainset)


def test_other_dft_settings_make_another_data_set_but_another_queue_does_not(magus, ml_keys, h3s):
    def hash_with(**changes):
        main = {**ml_keys["MainCalculator"], **changes}
        return search_of(
            magus, {**ml_keys, "MainCalculator": main}, ml=True
        ).ml_calculator.labeler.settings_hash

    first = hash_with()
    assert hash_with(numCore=16, queueName="long", preProcessing="module load vasp") == first
    assert hash_with(cutoff=600) != first
    Path("inputFold/DFT").mkdir(parents=True)
    Path("inputFold/DFT/INCAR").write_text("ENCUT = 500")
    with_incar = hash_with()
    assert with_incar != first
    Path("inputFold/DFT/INCAR").write_text("ENCUT = 600")
    assert hash_with() != with_incar


def test_the_better_copy_takes_the_place_of_an_equal_known_structure(magus):
    from magus_anharmonic.plugins.hook import keep_better

    class Individual(Atoms):
        def __eq__(self, other):
            return isinstance(other, Atoms) and self.info["phase"] == other.info["phase"]

        __hash__ = None  # type: ignore[assignment]

    def individual(phase, **info):
        return Individual("H", info={"phase": phase, "model": "m", **info})

    ranked = {"gibbs": -1.0, "status": "converged", "gibbs_model": "m"}
    old, own, new = individual("A"), individual("B", **ranked), individual("A", **ranked)
    known = [old, own]
    keep_better(known, [new, individual("B", **{**ranked, "gibbs": -0.5})])
    assert known[0] is new, "MAGUS would have thrown the free energy away"
    assert known[1] is own, "a structure that has a lower one keeps its own"
    older, lower, equal = (
        individual("C", enthalpy=-0.0081),
        individual("C", enthalpy=-0.0088),
        individual("C", enthalpy=-0.0088),
    )
    known = [older, lower]
    keep_better(known, [lower, equal])
    assert known[0] is lower and known[1] is lower, (
        "MAGUS would have kept the worse one of two equals"
    )
    stale = [individual("A")]
    keep_better(stale, [individual("A", **{**ranked, "gibbs_model": "older"})])
    assert "gibbs" not in stale[0].info, "a free energy of another model is none"
