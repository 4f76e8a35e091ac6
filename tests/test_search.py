"""The embedded host: what it makes, what it leaves, and that a search survives being killed."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import ranking_fakes as fakes
import spglib
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import read, write
from ase.units import GPa

from magus_anharmonic import __version__
from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.generation import checked_labelers
from magus_anharmonic.io.digests import versions
from magus_anharmonic.io.files import TEMPORARY
from magus_anharmonic.ranking.store import FreeEnergyStore
from magus_anharmonic.ranking.structures import rank_file
from magus_anharmonic.runs.lock import born, check_free, locked
from magus_anharmonic.search import host, population, relaxation
from magus_anharmonic.search.archive import Archive
from magus_anharmonic.search.generate import Geometry, RandomGenerator
from magus_anharmonic.search.host import run
from magus_anharmonic.search.keys import parse_host_keys
from magus_anharmonic.search.population import DESCRIPTORS, OffspringGenerator
from magus_anharmonic.settings import AseCalculatorSettings, parse_settings

INPUT = {
    "formulaType": "fix",
    "symbols": ["Cu", "Al"],
    "formula": [1, 1],
    "min_n_atoms": 2,
    "max_n_atoms": 4,
    "spacegroup": [12, 63, 123, 166, 194, 221, 225],
    "pPri": 0.5,
    "pressure": 10,
    "popSize": 4,
    "initSize": 5,
    "saveGood": 2,
    "numGen": 2,
    "randRatio": 0.4,
    "seed": 1,
    "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT", "maxStep": 8},
}


def settings(**changes):
    return parse_settings({**INPUT, **changes})


def parts(**changes):
    given = settings(**changes)
    geometry = Geometry(parse_host_keys(given)[0], given.symbols)
    return geometry, population.Checker(geometry.keys, geometry), RandomGenerator(geometry)


def files(directory):
    return {path.name: path.read_bytes() for path in sorted((directory / "results").glob("*.traj"))}


def dataset(atoms, symprec):
    found = spglib.get_symmetry_dataset(
        (atoms.cell, atoms.get_scaled_positions(), atoms.numbers), symprec=symprec
    )
    assert found is not None
    return found


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magus_anharmonic.potential.relax.CHUNK", {"cpu": 2, "cuda": 2})
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("search")
    return directory, run(settings(), directory)


# --- one search -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files_and_another_seed_others(finished, tmp_path):
    np.random.seed(5)  # the global generator plays no part
    run(settings(), tmp_path / "same")
    assert files(tmp_path / "same") == files(finished[0])
    run(settings(seed=2, numGen=1), tmp_path / "other")
    assert files(tmp_path / "other")["init1.traj"] != files(finished[0])["init1.traj"]


def test_results_have_the_layout_and_the_info_keys_of_magus(finished):
    directory, outcome = finished
    expected = {
        f"{name}{g}.traj" for name in ("init", "raw", "gen", "good", "keep") for g in (1, 2)
    } | {"good.traj", "best.traj"}
    assert set(files(directory)) == expected
    good = read(directory / "results/good.traj", index=":")
    needed = {
        "identity",
        "gen",
        "origin",
        "enthalpy",
        "energy",
        "forces",
        "stress",
        "spg",
        "priNum",
        "priVol",
        "dominators",
        "symbols",
        "units",
    }
    for atoms in good:
        assert needed <= set(atoms.info)
        assert isinstance(atoms.info["units"][0], Atoms) and np.shape(atoms.info["stress"]) == (6,)
        assert np.shape(atoms.info["forces"]) == (len(atoms), 3)
    assert [a.info["enthalpy"] for a in good] == sorted(a.info["enthalpy"] for a in good)
    assert len(good) <= 4 and len(read(directory / "results/keep2.traj", index=":")) <= 2
    assert (
        outcome.good[0].info["identity"] == good[0].info["identity"] and outcome.n_generations == 2
    )
    second = read(directory / "results/init2.traj", index=":")
    assert {a.info["origin"] for a in second} & set(DESCRIPTORS.values()) and any(
        a.info["origin"] == "random" for a in second
    )
    known = {
        a.info["identity"]
        for a in [
            *read(directory / "results/gen1.traj", index=":"),
            *read(directory / "results/keep1.traj", index=":"),
        ]
    }
    assert all(set(a.info["parents"]) <= known for a in second if "parents" in a.info)


def test_numbers_in_the_results_are_those_of_the_calculator(finished):
    for atoms in finished[1].good:
        again = atoms.copy()
        again.calc = EMT()
        assert again.get_potential_energy() == pytest.approx(atoms.info["energy"], abs=1e-9)
        assert again.get_forces() == pytest.approx(np.asarray(atoms.info["forces"]), abs=1e-8)
        assert again.get_stress() == pytest.approx(np.asarray(atoms.info["stress"]), abs=1e-9)
        assert atoms.info["enthalpy"] == pytest.approx(
            (again.get_potential_energy() + 10 * GPa * again.get_volume()) / len(again), abs=1e-9
        )
        assert atoms.info["spg"] == dataset(again, 0.1).number


def relaxer(keys, pressure):
    return relaxation.Relaxer(
        evaluator=CalculatorEvaluator(EMT()), settings=keys, pressure=pressure
    )


def test_the_search_finds_close_packed_copper_under_pressure(tmp_path):
    copper = {
        "symbols": ["Cu"],
        "formula": [1],
        "min_n_atoms": 1,
        "max_n_atoms": 2,
        "initSize": 8,
        "pressure": 50,
    }
    outcome = run(
        settings(
            **copper,
            MainCalculator={"calculator": "ase.calculators.emt.EMT", "eps": 0.01, "maxStep": 80},
        ),
        tmp_path,
    )
    fcc = relaxer(AseCalculatorSettings(calculator="emt", eps=0.01), 50.0)
    reference = bulk("Cu", a=3.4)
    known = fcc.relax([reference], tmp_path / "reference")[0]
    assert outcome.good[0].info["enthalpy"] <= known.info["enthalpy"] + 2e-3
    assert {225, 194} & {atoms.info["spg"] for atoms in outcome.good}


def test_progress_can_be_read_in_a_log_file(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="magus_anharmonic")
    run(settings(numGen=1, initSize=3), tmp_path)
    text = caplog.text
    assert (
        "relaxed 2 of 3 structures, best enthalpy" in text
        and "s left" in text
        and "generation 1 of 1 done" in text
    )
    assert "Generation" not in text and "volRatio" not in text


def test_an_earlier_results_folder_is_kept_as_magus_does(tmp_path):
    (tmp_path / "results").mkdir()
    for _ in range(2):
        run(settings(numGen=1, initSize=2, popSize=2, saveGood=1), tmp_path)
    assert {path.name for path in tmp_path.glob("results*")} == {"results", "results1", "results2"}
    assert (tmp_path / "results2/anharmonic/run.json").exists()


def test_of_two_starts_at_once_the_second_moves_nothing(tmp_path, monkeypatch):
    """Both find the folder free, and only one of them may be the first."""
    both = threading.Barrier(2)

    def slowly(folder):
        check_free(folder)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(2.0)

    def search():
        try:
            run(settings(numGen=1), tmp_path)
            ended.append("")
        except InputError as error:
            ended.append(str(error))

    monkeypatch.setattr("magus_anharmonic.search.host.check_free", slowly)
    ended = []
    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "another process works here" in ended[0] and ended[1] == ""
    assert [path.name for path in tmp_path.glob("results*")] == ["results"]
    assert (tmp_path / "results/anharmonic/run.json").is_file()


@pytest.mark.parametrize("wrote", [False, True])
def test_a_search_that_was_killed_before_it_had_begun_leaves_no_lock_behind(tmp_path, wrote):
    """Found by the soak: killed between its lock and its run.json, it is no search to go on with,
    and is moved away."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ours = tmp_path / "results/anharmonic"
    ours.mkdir(parents=True)
    with locked(ours, "magus-anharmonic search") as owner:
        lock = asdict(owner) | {"pid": process.pid, "born": born(process.pid)}
    process.kill()
    process.wait()
    ours.mkdir(parents=True, exist_ok=True)
    (ours / "lock.json").write_text(json.dumps(lock))
    (ours / f".run-abc.json{TEMPORARY}").touch()
    if wrote:
        (tmp_path / "results/raw1.traj").touch()
    run(settings(numGen=1, initSize=2, popSize=2, saveGood=1), tmp_path)
    assert (tmp_path / "results/anharmonic/run.json").exists()
    assert [path.name for path in tmp_path.rglob("results1/**/*") if path.is_file()] == [
        "raw1.traj"
    ] * wrote
    assert (tmp_path / "results1").exists() == wrote and not list(tmp_path.rglob("lock.json"))


def test_variable_composition_ranks_by_the_distance_to_the_hull(tmp_path):
    outcome = run(
        settings(
            formulaType="var", formula=[[1, 0], [0, 1]], full_ele=False, min_n_atoms=1, initSize=8
        ),
        tmp_path,
    )
    distances = [atoms.info["ehull"] for atoms in outcome.good]
    assert distances[0] == pytest.approx(0, abs=1e-9) and distances == sorted(distances)
    assert len({atoms.get_chemical_formula(empirical=True) for atoms in outcome.good}) > 1


# --- killed and restarted -------------------------------------------------------------------------


def in_a_process_that_dies(action):
    """Run ``action`` in a forked process, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("n_files", "before"), [(2, False), (5, True), (24, True)])
def test_a_search_killed_around_any_file_goes_on_as_if_it_had_not_been(
    finished, tmp_path, monkeypatch, n_files, before
):

    def killed():
        count = 0
        replace = Path.replace

        def counting(self, target):
            nonlocal count
            count += 1
            if before and count == n_files:
                die()
            result = replace(self, target)
            if count == n_files:
                die()
            return result

        Path.replace = counting  # type: ignore[method-assign]
        run(settings(), tmp_path)

    in_a_process_that_dies(killed)
    run(settings(), tmp_path, restart=True)
    assert files(tmp_path) == files(finished[0])


def test_a_kill_during_relaxation_repeats_one_chunk_at_most(finished, tmp_path):
    def killed():
        relax_chunk = relaxation.Relaxer._relax_chunk
        calls = 0

        def counting(self, chunk):
            nonlocal calls
            calls += 1
            if calls == 3:
                die()
            return relax_chunk(self, chunk)

        relaxation.Relaxer._relax_chunk = counting  # type: ignore[method-assign]
        run(settings(), tmp_path)

    in_a_process_that_dies(killed)
    chunks = sorted((tmp_path / "results/anharmonic/relax/1").glob("*.traj"))
    assert [path.name for path in chunks] == ["chunk-0.traj", "chunk-1.traj"]
    times = [path.stat().st_mtime_ns for path in chunks]
    relaxed = []
    with pytest.MonkeyPatch.context() as patch:
        original = relaxation.Relaxer._relax_chunk
        patch.setattr(
            relaxation.Relaxer,
            "_relax_chunk",
            lambda self, chunk: relaxed.append(len(chunk)) or original(self, chunk),
        )
        patch.setattr(relaxation, "forget", lambda folder: None)
        patch.setattr(host, "forget", lambda folder: None)
        run(settings(), tmp_path, restart=True)
    assert [path.stat().st_mtime_ns for path in chunks] == times
    assert sum(relaxed) == 5 - 4 + len(read(tmp_path / "results/init2.traj", index=":"))
    assert files(tmp_path) == files(finished[0])


def test_a_finished_search_can_be_given_more_generations(finished, tmp_path):
    run(settings(numGen=1), tmp_path)
    run(settings(numGen=2), tmp_path, restart=True)
    assert files(tmp_path) == files(finished[0])


def test_a_restart_takes_the_recorded_seed_and_refuses_other_physics(tmp_path):
    few = {"numGen": 1, "initSize": 2, "popSize": 2, "saveGood": 1}
    outcome = run(settings(seed=None, **few), tmp_path)
    before = files(tmp_path)
    assert run(settings(seed=None, **few), tmp_path, restart=True).seed == outcome.seed
    for key, value in (("pressure", 20), ("seed", outcome.seed + 1), ("formula", [2, 1])):
        with pytest.raises(InputError, match=f"{key}: .* but the search was started with"):
            run(
                settings(**{"seed": None, **few, "max_n_atoms": 6, key: value}),
                tmp_path,
                restart=True,
            )
    assert files(tmp_path) == before


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presure": 3}, "presure: unknown key; did you mean pressure"),
        ({"molMode": True}, "molMode: only MAGUS knows"),
        (
            {"MainCalculator": {"calculator": "vasp"}},
            "'vasp': without MAGUS, calculator is mattersim, emt",
        ),
        ({"MainCalculator": {"calculator": "ase.calculators.emt.Emt"}}, "has no calculator 'Emt'"),
        (
            {
                "MainCalculator": {
                    "calculator": "ase.calculators.lammpsrun.LAMMPS",
                    "arguments": {"command": "touch ran;"},
                }
            },
            "an input cannot start programs here",
        ),
        (
            {
                "MainCalculator": {
                    "calculator": "ase.calculators.amber.Amber",
                    "arguments": {"infile": "x; touch ran;"},
                }
            },
            "calculator: an input cannot start programs here",
        ),
        (
            {"MainCalculator": {"calculator": "emt", "step_size": 0.1}},
            "MainCalculator.step_size: unknown key",
        ),
        (
            {"MainCalculator": {"calculator": "ase.calculators.singlepoint.SinglePointCalculator"}},
            "'atoms'; give its arguments as MainCalculator.arguments",
        ),
        (
            {"sscha": {"evaluator": {"calculator": "no_such_code.Calculator"}}},
            "sscha.evaluator.calculator: 'no_such_code.Calculator': No module named 'no_such_code'",
        ),
        (
            {"sscha": {"evaluator": {"calculator": "emt", "argument": {}}}},
            "sscha.evaluator.argument: unknown key; did you mean arguments",
        ),
        ({"sscha": {"evaluator": "nowhere.pth"}}, "checkpoint nowhere.pth does not exist"),
        (
            {"learning": {"labeler": {"calculator": "gpaw"}}},
            "learning: needs a model that can learn",
        ),
    ],
)
def test_wrong_input_stops_before_any_file_is_touched(tmp_path, changes, message):
    (tmp_path / "results").mkdir()
    with pytest.raises(InputError, match=message):
        run(settings(**changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results"] and not list(
        (tmp_path / "results").iterdir()
    )


@pytest.mark.parametrize("record", [{"host": "magus"}, {}])
def test_a_search_of_another_host_is_refused_and_left_as_it_is(tmp_path, record):
    """The fault: a search of MAGUS was begun anew in its own files, from the first generation
    on."""
    folder = tmp_path / "results/anharmonic"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"version": __version__, **versions(), "seed": 1, "settings": {}, **record})
    )
    write(tmp_path / "results/good.traj", bulk("Cu"))
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"was made by host .*, this is host 'embedded'"):
        run(settings(), tmp_path, restart=True)
    assert files(tmp_path) == before


def test_a_restart_without_a_search_or_of_another_version_is_refused(tmp_path):
    with pytest.raises(InputError, match="-r: no search to go on with"):
        run(settings(), tmp_path, restart=True)
    folder = tmp_path / "results/anharmonic"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"version": "99.0.0", "seed": 1, "settings": {}}')
    with pytest.raises(InputError, match=r"written by magus-anharmonic 99\.0\.0"):
        run(settings(), tmp_path, restart=True)


# --- random structures ----------------------------------------------------------------------------


def test_random_structures_respect_every_key():
    changes = {
        "formula": [1, 2],
        "min_n_atoms": 3,
        "max_n_atoms": 12,
        "spacegroup": [5, "62-64", 139, 166, 225],
        "d_ratio": 0.6,
        "pPri": 0.5,
    }
    geometry, checker, generator = parts(**changes)
    structures = generator.generate(5, 2.0, np.random.default_rng(1))
    for atoms in structures:
        counts = geometry.counts(atoms)
        assert counts[1] == 2 * counts[0] and 3 <= len(atoms) <= 12
        low, high = geometry.volume_range(counts, 2.0)
        assert low * (1 - 1e-9) <= atoms.get_volume() <= high * (1 + 1e-9)
        distances = atoms.get_all_distances(mic=True)
        for i, j in zip(*np.triu_indices(len(atoms), 1), strict=True):
            assert distances[i, j] >= geometry.distances[atoms[i].symbol, atoms[j].symbol] - 1e-9
        # more symmetry than asked for may come out by chance, less may not
        operations = len(np.unique(dataset(atoms, 1e-3).rotations, axis=0))
        assert operations >= min(spglib_operations(number) for number in (5, 62, 139, 166, 225))
    assert len({len(atoms) for atoms in structures}) > 1


def spglib_operations(number):
    """Order of the point group of a space group."""
    hall = next(h for h in range(1, 531) if spglib.get_spacegroup_type(h).number == number)
    return len(np.unique(spglib.get_symmetry_from_database(hall)["rotations"], axis=0))


@pytest.mark.parametrize(("number", "n_atoms"), [(225, 1), (166, 1), (38, 2), (62, 4)])
def test_atoms_counted_in_the_primitive_cell_keep_the_space_group(number, n_atoms):
    one = {
        "symbols": ["Al"],
        "formula": [1],
        "min_n_atoms": n_atoms,
        "max_n_atoms": n_atoms,
        "spacegroup": number,
        "pPri": 1.0,
    }
    _, _, generator = parts(**one)
    for atoms in generator.generate(3, 2.0, np.random.default_rng(number)):
        assert len(atoms) == n_atoms
        found = dataset(atoms, 1e-3)
        assert len(np.unique(found.rotations, axis=0)) >= spglib_operations(number)


def test_distances_and_lattices_can_be_given_directly():
    geometry, _, generator = parts(
        distance_matrix=[[2.0, 2.4], [2.4, 2.6]],
        min_lattice=[3, 3, 3, 60, 60, 60],
        max_lattice=[9, 9, 9, 120, 120, 120],
        pPri=0,
    )
    for atoms in generator.generate(5, 3.0, np.random.default_rng(2)):
        assert not geometry.too_close(atoms)
        lengths, angles = atoms.cell.cellpar()[:3], atoms.cell.cellpar()[3:]
        assert (
            (lengths >= 3).all()
            and (lengths <= 9).all()
            and (angles >= 60 - 1e-9).all()
            and (angles <= 120 + 1e-9).all()
        )
    close = Atoms("CuAl", positions=[[0, 0, 0], [2.3, 0, 0]], cell=[8, 8, 8], pbc=True)
    assert geometry.too_close(close)


def test_a_generator_that_cannot_succeed_says_so_instead_of_trying_for_ever():
    with pytest.raises(InputError, match="spacegroup: none of the 1 given space groups can hold"):
        parts(spacegroup=227, pPri=0, max_n_atoms=4)[2].generate(1, 2.0, np.random.default_rng(1))
    with pytest.raises(
        MagusAnharmonicError, match=r"no random structure in 10 attempts \(.*raise volume_ratio"
    ):
        parts(d_ratio=3.0, max_n_try=1)[2].generate(1, 1.5, np.random.default_rng(1))


# --- offspring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    structures = parts(max_n_atoms=8)[2].generate(6, 2.0, np.random.default_rng(3))
    for index, atoms in enumerate(structures):
        atoms.info.update(identity=f"gen1-{index}", enthalpy=0.1 * index, dominators=index)
    return structures


@pytest.fixture
def parents(drawn):
    return [atoms.copy() for atoms in drawn]


@pytest.mark.parametrize("name", ["cutandsplice", "lattice", "rattle", "perm"])
def test_children_keep_composition_and_distances_and_name_their_parents(name, parents):
    others = {operator: {"prob": 0.0} for operator in DESCRIPTORS if operator != name}
    geometry, checker, _ = parts(max_n_atoms=8, OffspringCreator=others)
    before = [atoms.copy() for atoms in parents]
    children = OffspringGenerator(geometry.keys, geometry, checker).generate(
        parents, 4, np.random.default_rng(4)
    )
    assert len(children) == 4
    for child in children:
        assert checker.problem(child) is None
        assert child.info["origin"] == DESCRIPTORS[name] and len(child.info["parents"]) == (
            2 if name == "cutandsplice" else 1
        )
        assert set(child.info["parents"]) <= {atoms.info["identity"] for atoms in parents}
    for atoms, old in zip(parents, before, strict=True):
        assert np.array_equal(atoms.positions, old.positions) and np.array_equal(
            atoms.cell.array, old.cell.array
        )


def test_better_parents_are_drawn_more_often(parents):
    geometry, checker, _ = parts(
        max_n_atoms=8,
        k=1.0,
        OffspringCreator={n: {"prob": 0.0} for n in ("cutandsplice", "lattice", "perm")},
    )
    children = OffspringGenerator(geometry.keys, geometry, checker).generate(
        parents, 60, np.random.default_rng(5)
    )
    first = sum(child.info["parents"] == ["gen1-0"] for child in children)
    last = sum(child.info["parents"] == ["gen1-5"] for child in children)
    assert first > 5 * (last + 1)


def test_operators_that_always_fail_leave_the_rest_to_random_structures(parents, monkeypatch):
    monkeypatch.setattr(population, "ATTEMPTS_PER_CHILD", 3)
    geometry, checker, _ = parts(d_ratio=3.0)
    assert (
        OffspringGenerator(geometry.keys, geometry, checker).generate(
            parents[:1], 2, np.random.default_rng(6)
        )
        == []
    )


# --- populations ----------------------------------------------------------------------------------


def described(atoms, enthalpy, gen=1):
    atoms.info.update(
        energy=enthalpy * len(atoms),
        enthalpy=enthalpy,
        gen=gen,
        identity=f"x{gen}-{id(atoms)}",
        origin="random",
    )
    population.find_space_group(atoms, 0.1)
    return atoms


def test_duplicates_are_found_in_any_setting_and_cell():
    keys = parts()[0].keys
    fcc = described(bulk("Al", a=4.0), 0.0)
    cubic = described(bulk("Al", a=4.0, cubic=True), 0.004)
    turned = make_supercell(bulk("Al", a=4.01), np.diag([1, 2, 1]))
    turned.rotate(30, "z", rotate_cell=True)
    bcc = described(bulk("Al", "bcc", a=3.2), 0.0)
    dense = described(bulk("Al", a=3.7), 0.0)
    kept = population.remove_duplicates(
        [cubic, described(turned, 0.002), bcc, fcc, dense], ["Enthalpy"], keys
    )
    assert {id(atoms) for atoms in kept} == {id(fcc), id(bcc), id(dense)}


def test_volume_left_over_by_a_relaxation_does_not_hide_a_duplicate_under_pressure():
    pair = [described(bulk("Al", a=3.5), 1.0), described(bulk("Al", a=3.502), 1.0)]
    pair[1].info["energy"] -= 150 * GPa * (pair[1].get_volume() - pair[0].get_volume())
    assert len(population.remove_duplicates(pair, ["Enthalpy"], parts(dE=0.001)[0].keys)) == 1


def test_near_degenerate_phases_survive_a_small_dE():
    pair = [described(bulk("Al", a=4.0), 0.0), described(bulk("Al", a=4.02), 0.003)]
    assert len(population.remove_duplicates(pair, ["Enthalpy"], parts()[0].keys)) == 1
    assert len(population.remove_duplicates(pair, ["Enthalpy"], parts(dE=0.001)[0].keys)) == 2


def test_different_compositions_are_never_duplicates():
    a, b = described(bulk("Al", a=4.0), 0.0), described(bulk("Cu", a=4.0), 0.0)
    assert not population.same(a, b, parts()[0].keys)


def test_dominators_count_who_is_at_least_as_good():
    structures = [described(bulk("Al", a=4.0), value) for value in (0.2, 0.1, 0.1, 0.3)]
    population.set_dominators(structures, ["Enthalpy"])
    assert [atoms.info["dominators"] for atoms in structures] == [2, 1, 1, 3]


def test_a_child_that_relaxed_back_is_its_parent():
    parent, child = described(bulk("Al", a=4.0), 0.0), described(bulk("Al", a=4.001), 0.0, gen=2)
    other = described(bulk("Al", "bcc", a=3.2), 0.0, gen=2)
    replaced = population.replace_known([child, other], [parent], parts()[0].keys)
    assert replaced[0] is parent and replaced[1] is other
    child.info.update(gibbs=0.05, status="sscha", gibbs_model="m", model="m")
    assert population.replace_known([child], [parent], parts()[0].keys)[0] is child, (
        "a computed free energy is not thrown away"
    )


@pytest.mark.parametrize("fitness", ["Enthalpy", "SSCHA"])
def test_the_better_of_two_equal_structures_is_kept(fitness):
    keys = parts()[0].keys
    parent, child = (
        described(bulk("Al", a=4.0), -0.0081),
        described(bulk("Al", a=4.001), -0.0088, gen=2),
    )
    assert population.replace_known([child], [parent], keys)[0] is child
    assert population.replace_known([parent], [child], keys)[0] is child
    for pair in ([parent, child], [child, parent]):
        assert population.remove_duplicates(pair, [fitness], keys) == [child]
        assert [
            atoms.info["enthalpy"] for atoms in population.select_good(pair, [fitness], keys)
        ] == [-0.0088]
    for atoms in (parent, child):
        atoms.info.update(gibbs=0.05, status="sscha", gibbs_model="m", model="m")
    assert population.remove_duplicates([parent, child], [fitness], keys) == [child], (
        "one free energy for both: the lower enthalpy"
    )
    del child.info["gibbs"]
    assert population.remove_duplicates([parent, child], [fitness], keys) == [parent], (
        "the free energy was paid for"
    )


def test_keep_takes_the_best_of_each_kind():
    kinds = [("fcc", 4.0), ("fcc", 4.02), ("bcc", 3.2), ("bcc", 3.21)]
    structures = [
        described(bulk("Al", kind, a=a), 0.1 * index) for index, (kind, a) in enumerate(kinds)
    ]
    population.set_dominators(structures, ["Enthalpy"])
    kept = population.select_keep(structures, 2)
    assert sorted(atoms.info["enthalpy"] for atoms in kept) == pytest.approx([0.0, 0.2])


def test_the_distance_to_the_hull_is_that_of_ase():
    from ase.phasediagram import PhaseDiagram

    rng = np.random.default_rng(7)
    structures = []
    for formula in ("Cu", "Al", "Cu", "CuAl", "CuAl2", "Cu3Al", "Cu2Al2", "CuAl3"):
        atoms = Atoms(formula)
        atoms.info["enthalpy"] = float(rng.normal())
        structures.append(atoms)
    reference = PhaseDiagram(
        [(a.get_chemical_formula(), a.info["enthalpy"] * len(a)) for a in structures], verbose=False
    )
    expected = [
        a.info["enthalpy"] - reference.decompose(a.get_chemical_formula())[0] / len(a)
        for a in structures
    ]
    found = population.ehull_fitness(structures)
    assert [-value for value in found] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("atoms", "reason"),
    [
        (Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 1.0]], cell=[4, 4, 4], pbc=True), "distance"),
        (
            Atoms(
                "CuAl2", positions=[[0, 0, 0], [0, 0, 2.5], [0, 2.5, 0]], cell=[5, 5, 5], pbc=True
            ),
            "composition",
        ),
        (Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 15]], cell=[3, 3, 30], pbc=True), "cell shape"),
    ],
)
def test_checks_name_their_reason_and_let_seeds_pass(atoms, reason):
    assert parts()[1].problem(atoms) == reason
    atoms.info["origin"] = "seed"
    assert parts()[1].problem(atoms) is None and parts(check_seed=True)[1].problem(atoms) == reason


def test_large_forces_and_enthalpies_are_dropped():
    checker = parts()[1]
    atoms = Atoms("CuAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[3, 3, 3], pbc=True)
    atoms.info["forces"] = np.array([[0, 0, 49.0], [0, 0, 0]])
    assert checker.problem(atoms) is None
    atoms.info["forces"][1, 1] = -51
    assert checker.problem(atoms) == "forces"
    atoms.info.update(forces=np.zeros((2, 3)), enthalpy=101.0)
    assert checker.problem(atoms) == "enthalpy"


# --- seeds and the round after each generation ----------------------------------------------------


def test_seeds_are_read_where_magus_reads_them(tmp_path):
    (tmp_path / "Seeds").mkdir()
    b2 = Atoms(
        "CuAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.9, 2.9, 2.9], pbc=True
    )
    write(tmp_path / "Seeds/seeds_1.traj", b2)
    write(tmp_path / "Seeds/POSCARS_2", [b2, b2], format="vasp-xdatcar")
    run(settings(initSize=2, popSize=2, saveGood=1), tmp_path)
    for generation, number in ((1, 1), (2, 2)):
        first = read(tmp_path / f"results/init{generation}.traj", index=":")
        assert [a.info["identity"] for a in first if a.info["origin"] == "seed"] == [
            f"seed{generation}-{i}" for i in range(number)
        ]
    assert 221 in {a.info["spg"] for a in read(tmp_path / "results/good.traj", index=":")}


def test_a_seed_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "Seeds").mkdir()
    (tmp_path / "Seeds/seeds_1.traj").write_text("no trajectory")
    with pytest.raises(InputError, match=r"seeds_1\.traj: damaged or not readable as seeds"):
        run(settings(), tmp_path)


def test_free_energies_rank_and_centroids_become_seeds_of_the_next_generation(
    tmp_path, monkeypatch
):
    """A stand-in for the round prefers the worst enthalpy; its seed must be relaxed in the next
    generation, once."""
    centroid = Atoms(
        "CuAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.9, 2.9, 2.9], pbc=True
    )
    calls = []

    def after_generation(state, relaxed, survivors, generation, *, last):
        calls.append((generation, len(relaxed), last))
        for atoms in survivors:
            free = {"gibbs": -atoms.info["enthalpy"], "gibbs_error": 0.0, "status": "sscha"}
            atoms.info |= {**free, "gibbs_model": atoms.info["model"]}
        return [centroid.copy()]

    monkeypatch.setattr(host, "after_generation", after_generation)
    outcome = run(settings(Fitness=["SSCHA"], sscha={}, numGen=3, initSize=3, popSize=3), tmp_path)
    assert [call[0] for call in calls] == [1, 2, 3] and [call[2] for call in calls] == [
        False,
        False,
        True,
    ]
    enthalpies = [atoms.info["enthalpy"] for atoms in outcome.good]
    assert enthalpies == sorted(enthalpies, reverse=True)
    seeds = [
        [a.info["origin"] for a in read(tmp_path / f"results/init{g}.traj", index=":")].count(
            "seed"
        )
        for g in (1, 2, 3)
    ]
    assert seeds == [0, 1, 0]


SMALL = {
    "Fitness": ["SSCHA"],
    "scheduler": "serial",
    "numGen": 2,
    "initSize": 3,
    "popSize": 2,
    "sscha": {
        "supercell": [1, 1, 1],
        "n_configs": 8,
        "max_populations": 1,
        "max_candidates": 1,
        "hessian": 0,
    },
}
LJ = {"calculator": "lj", "arguments": {"sigma": 2.3, "epsilon": 0.3, "rc": 6.0, "smooth": True}}


def test_a_search_relaxes_with_one_calculator_and_ranks_by_another_that_is_named(tmp_path):
    named = {**SMALL, "sscha": {**SMALL["sscha"], "evaluator": LJ}}
    run(settings(**{**named, "numGen": 1}), tmp_path)
    outcome = run(settings(**named), tmp_path, restart=True)
    models = {atoms.info["model"].split("-")[0] for atoms in outcome.good}
    raw = {atoms.info["model"].split("-")[0] for atoms in Archive(tmp_path).load("raw", 2)}
    assert (raw, models) == ({"emt"}, {"lennardjones"})
    for atoms in outcome.good:
        atoms.calc = LennardJones(**LJ["arguments"])
        assert atoms.get_potential_energy() == pytest.approx(atoms.info["energy"], abs=1e-6)
    ranking = (tmp_path / "results/anharmonic/ranking.csv").read_text()
    assert "lennardjones-" in ranking and "emt-" not in ranking


def test_a_universal_potential_searches_and_ranks_by_its_own_ase_calculator(tmp_path):
    """With the weights that CHGNet's wheel ships; it only does not learn here."""
    name = "chgnet.model.dynamics"
    pytest.importorskip(name, reason="CHGNet is not installed (pip install chgnet)")
    block = {"calculator": f"{name}.CHGNetCalculator", "arguments": {"use_device": "cpu"}}
    outcome = run(settings(**SMALL, MainCalculator={**block, "maxStep": 20}), tmp_path)
    best = outcome.good[0].info
    assert best["model"].startswith("chgnetcalculator-") and np.isfinite(best["gibbs"])
    write(tmp_path / "copper.vasp", bulk("Cu", a=3.7))
    given = parse_settings({**SMALL, "MainCalculator": block})
    found = rank_file(tmp_path / "copper.vasp", given, tmp_path / "ranking")
    fcc = found[0].structure.get_volume()
    assert fcc == pytest.approx(11.8, abs=0.8), "A^3; 11.81 in experiment"
    assert found[0].model.startswith("chgnetcalculator-")
    with pytest.raises(InputError, match="needs a model that can learn"):
        run(settings(MainCalculator=block, learning={"labeler": {"calculator": "gpaw"}}), tmp_path)


def test_structures_that_the_new_model_cannot_evaluate_leave_the_population(tmp_path, monkeypatch):
    def after_generation(state, relaxed, survivors, generation, *, last):
        max(survivors, key=lambda atoms: atoms.info["enthalpy"]).info["enthalpy"] = np.inf
        return []

    monkeypatch.setattr(host, "after_generation", after_generation)
    outcome = run(settings(sscha={}, numGen=1), tmp_path)
    assert all(np.isfinite(atoms.info["enthalpy"]) for atoms in outcome.good)
    assert len(outcome.good) == len(Archive(tmp_path).load("gen", 1))


def test_a_missing_labeler_stops_the_search_or_switches_learning_off(
    tmp_path, tiny_checkpoint, monkeypatch, caplog
):
    learning = {"labeler": {"calculator": "no_such_code.Calculator"}}
    given = settings(
        MainCalculator={"calculator": "mattersim", "checkpoint": str(tiny_checkpoint)},
        learning=learning,
    )
    with pytest.raises(InputError):
        run(given, tmp_path)
    assert not list(tmp_path.iterdir())
    allowed = checked_labelers(
        given.model_copy(
            update={"learning": given.learning.model_copy(update={"required": False})}
        ),
        tmp_path,
    )
    assert allowed.learning is None and "running without learning" in caplog.text


def test_a_search_goes_on_with_its_own_calculator_only(tmp_path):
    morse = {"calculator": "ase.calculators.morse.MorsePotential", "jobPrefix": "M", "maxStep": 2}
    run(
        settings(numGen=1, MainCalculator={**morse, "arguments": {"r0": 2.6, "rho0": 4.0}}),
        tmp_path,
    )
    with pytest.raises(
        InputError, match="MainCalculator: holds the model morsepotential-.*parameter changed"
    ):
        run(
            settings(numGen=2, MainCalculator={**morse, "arguments": {"r0": 2.5, "rho0": 4.0}}),
            tmp_path,
            restart=True,
        )


@pytest.mark.parametrize("which", ["before", "now"])
def test_energies_of_a_calculator_without_an_id_are_worked_out_again(
    tmp_path, monkeypatch, caplog, which
):
    from magus_anharmonic import evaluator

    def without(calculator, elements):
        raise evaluator.NoIdError("the probe fails")

    with monkeypatch.context() as patch:
        if which == "before":
            patch.setattr(evaluator, "calculator_id", without)
        run(settings(numGen=1), tmp_path)
    good = tmp_path / "results" / "good1.traj"
    frames = read(good, index=":")
    for frame in frames:
        frame.info["enthalpy"] = frame.info["energy"] = -99.0
    write(good, frames)
    if which == "now":
        monkeypatch.setattr(evaluator, "calculator_id", without)
    found = run(settings(numGen=2), tmp_path, restart=True)
    assert "worked out again" in caplog.text
    assert min(atoms.info["enthalpy"] for atoms in found.good) > -50.0


def softened(atoms, evaluator, *, pressure, max_populations, **options):
    """As `ranking_fakes.falling`, with a zero-point energy that grows with the density: estimates
    lie on no exact line."""
    result = fakes.falling(
        atoms, evaluator, pressure=pressure, max_populations=max_populations, **options
    )
    result.gibbs += 3.0 * len(result.centroids) / result.centroids.get_volume()
    return result


def everything(directory):
    ours = directory / "results" / "anharmonic"
    records = [
        (r.structure, r.generation, r.status, r.reason, r.gibbs)
        for r in FreeEnergyStore(ours / "free_energies.db").runs()
    ]
    tables = {
        path.name: path.read_bytes()
        for path in [ours / "ranking.csv", ours / "quantum.traj", *ours.glob("seeds/*")]
    }
    return files(directory) | tables | {"records": records}


@pytest.mark.parametrize("damaged", [(3,), (1, 2, 3)])
def test_generations_done_again_are_those_of_an_undisturbed_search(tmp_path, monkeypatch, damaged):
    """The fault: estimates of a generation that was done again used free energies that later ones
    had found."""
    monkeypatch.setattr(
        "magus_anharmonic.ranking.rank.open_scheduler", lambda *_, **__: contextlib.nullcontext(1)
    )
    monkeypatch.setattr("magus_anharmonic.sscha.gibbs.free_energy", softened)
    given = settings(
        Fitness=["SSCHA"], sscha={"max_candidates": 1, "seed_back": False}, numGen=3, saveGood=4
    )
    run(given, tmp_path)
    expected = everything(tmp_path)
    assert {generation for _, generation, *_ in expected["records"]} >= {1, 3}, (
        "a later generation finds free energies"
    )
    for generation in damaged:
        file = tmp_path / "results" / f"keep{generation}.traj"
        file.write_bytes(file.read_bytes()[:-20])
    run(given, tmp_path, restart=True)
    found = everything(tmp_path)
    assert [name for name in expected if found[name] != expected[name]] == []
