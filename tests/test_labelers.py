"""Labelers: what they compute, and that nothing a DFT code does can stop a search."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read
from ase.units import GPa
from waiting import wait_for

from magus_anharmonic.errors import InputError, MachineError
from magus_anharmonic.labelers import CallableLabeler, available, get_labeler
from magus_anharmonic.labelers.base import k_points, settings_hash
from magus_anharmonic.labelers.codes import code_of
from magus_anharmonic.labelers.pool import LOG_LIMIT
from magus_anharmonic.labelers.worker import _absolute
from magus_anharmonic.learning.dataset import dataset_file, read_labels
from magus_anharmonic.scheduler import available_cores
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.structures import change_of, stripped

EMT_PATH = "ase.calculators.emt.EMT"
H3S_CELL = [[-1.5, 1.5, 1.5], [1.5, -1.5, 1.5], [1.5, 1.5, -1.5]]
H3S_SCALED = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]


def copper(scale=1.0):
    atoms = bulk("Cu", cubic=True, a=3.6 * scale)
    atoms.rattle(0.05, seed=3)
    return atoms


def chain(n):
    return Atoms(
        f"H{n}", positions=[[0, 0, 2.0 * i] for i in range(n)], cell=[3, 3, 2.0 * n], pbc=True
    )


def misbehaving(directory, behaviour, *, n_workers=1, timeout=60.0, **arguments):
    settings = LabelerSettings(
        calculator="misbehaving.Misbehaving",
        arguments={"behaviour": behaviour, **arguments},
        n_workers=n_workers,
        timeout=timeout,
    )
    return get_labeler(settings, directory)


# ------------------------------------------------------------------ any ASE calculator


@pytest.fixture(scope="module")
def emt(tmp_path_factory):
    with get_labeler(
        LabelerSettings(calculator=EMT_PATH, n_workers=2), tmp_path_factory.mktemp("emt")
    ) as labeler:
        yield labeler


def test_labels_are_those_of_the_calculator_in_the_order_of_the_input(emt):
    structures = [copper(1.0), copper(1.02), copper(0.97)]
    finished = []
    labels = emt.label(structures, lambda index, label: finished.append((index, label)))
    for atoms, label in zip(structures, labels, strict=True):
        reference = atoms.copy()
        reference.calc = EMT()
        assert label.ok and label.settings_hash == emt.settings_hash
        assert label.energy == pytest.approx(reference.get_potential_energy(), abs=1e-12)
        assert label.forces == pytest.approx(reference.get_forces(), abs=1e-12)
        assert label.stress == pytest.approx(reference.get_stress(voigt=False), abs=1e-12)
    assert sorted(index for index, _ in finished) == [0, 1, 2]
    assert all(label is labels[index] for index, label in finished)


def test_relaxation_reaches_the_pressure_asked_for(emt):
    start = copper()
    (result,) = emt.relax([start], pressure=20.0, force_tolerance=0.005)
    assert result.converged and not result.failed and result.n_steps > 1
    assert -np.trace(result.stress) / 3 / GPa == pytest.approx(20.0, abs=0.1)
    assert np.abs(result.forces).max() < 0.005
    pv = 20.0 * GPa * result.atoms.get_volume()
    assert result.enthalpy == pytest.approx((result.energy + pv) / len(start))
    assert start.get_volume() > result.atoms.get_volume()


def test_relaxation_that_runs_out_of_steps_says_so(emt):
    (result,) = emt.relax([copper()], pressure=20.0, max_steps=1)
    assert not result.converged and not result.failed
    assert "1 steps" in result.reason


ODD = ["pid", "escape", "stdin", "garbage", "fork", "nan", "segfault"]
"""What one code does with 2, 3, ... atoms."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    with misbehaving(tmp_path_factory.mktemp("odd"), dict(enumerate(ODD, start=2))) as labeler:
        yield labeler


def does(how):
    return chain(ODD.index(how) + 2)


def test_the_worker_is_kept_from_call_to_call(odd):
    first, second = odd.label([does("pid")]) + odd.label([does("pid")])
    assert first.energy == second.energy != os.getpid()


# ------------------------------------------------------------------ failures


WAYS_TO_FAIL = {
    "segfault": "SIGSEGV",
    "exit": "exit code 7",
    "nan": "NaN or infinite forces",
    "infinite": "NaN or infinite energy",
    "atoms": "wrong number of atoms",
    "raise": "ValueError: the density is negative",
    "unconverged": "did not converge",
}


@pytest.fixture(scope="module")
def after_failures(tmp_path_factory):
    """Results of one worker: structures of 1 to 8 atoms of which those of 2 to 8 fail, each in its
    own way, then one more of 1 atom."""
    behaviour = {str(number): how for number, how in enumerate(WAYS_TO_FAIL, start=2)}
    with misbehaving(tmp_path_factory.mktemp("failures"), behaviour) as labeler:
        return labeler.label([*(chain(n) for n in range(1, 9)), chain(1)])


@pytest.mark.parametrize(("position", "how"), list(enumerate(WAYS_TO_FAIL, start=1)))
def test_a_label_that_fails_has_its_reason(after_failures, position, how):
    failure = after_failures[position]
    assert not failure.ok and WAYS_TO_FAIL[how] in failure.reason
    assert len(failure.structure) == position + 1


def test_labels_before_and_after_failures_are_made(after_failures):
    assert [result.ok for result in after_failures] == [True] + [False] * 7 + [True]
    assert after_failures[0].energy == after_failures[-1].energy == 1.0


CHANGES = {
    "species": "sorted the atoms",
    "sort": "moved or reordered the atoms",
    "move": "moved or reordered the atoms",
    "strain": "strained the cell",
    "own copy": "sorted the atoms",
}


def uneven(n):
    atoms = Atoms(
        "S" + f"H{n - 1}",
        positions=[[0, 0, 1.0 * i + 0.1 * i**2] for i in range(n)],
        cell=[3, 3, 2.0 * n],
        pbc=True,
    )
    return atoms


def test_results_of_another_structure_than_the_one_given_are_refused(tmp_path):
    """A calculator that sorts, moves or strains what it is given has the forces of something
    else."""
    behaviour = {str(number): how for number, how in enumerate(CHANGES, start=3)}
    with misbehaving(tmp_path, behaviour) as labeler:
        results = labeler.label([uneven(n) for n in range(2, 3 + len(CHANGES))])
    assert results[0].ok
    for result, words in zip(results[1:], CHANGES.values(), strict=True):
        assert not result.ok and words in result.reason and "of another structure" in result.reason

    def sorts(structures):
        for atoms in structures:
            atoms.set_atomic_numbers(atoms.numbers[::-1])
        return [{"energy": 1.0, "forces": np.zeros((3, 3)), "stress": np.zeros(6)}]

    (refused,) = CallableLabeler(sorts, description="MainCalculator", settings={}).label(
        [uneven(3)]
    )
    assert not refused.ok and "MainCalculator sorted the atoms" in refused.reason


def test_a_calculator_may_wrap_and_rotate_its_own_copy():
    given = copper()
    own = given.copy()
    own.positions += [0.3, 0.1, -2.0]
    own.wrap()
    own.rotate(40, (1, 2, 3), rotate_cell=True)
    assert change_of(given, given.copy(), own) == ""
    assert "reordered" in change_of(given, given.copy(), own[[1, 0, 2, 3]])


def test_every_answer_is_that_of_its_job_whatever_else_comes_through_the_pipe(odd):
    """Stray bytes, and a copy of the process that answers too: each label got the answer before
    it."""
    asked = [chain(1), does("garbage"), chain(9), does("fork"), chain(10), does("garbage")]
    asked += [does("fork"), chain(11)]
    assert [result.ok and result.energy for result in odd.label(asked)] == [
        float(len(atoms)) for atoms in asked
    ]


def test_a_code_that_reads_its_standard_input_takes_no_job(odd):
    results = odd.label([does("stdin"), chain(9)])
    assert [result.energy for result in results] == [0.0, 9.0]


@pytest.mark.parametrize(
    ("how", "launcher"),
    [
        *product(["hang"], ["session", "deaf", "bare orphan"]),
        *product(["leave"], ["deaf", "bare orphan"]),
        *product(["crash"], ["session", "deaf"]),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                *product(["hang"], ["child", "orphan", "bare"]),
                *product(["leave"], ["child", "session", "orphan", "bare"]),
                # what has lost both its parent and its environment is nobody's
                *product(["crash"], ["child", "orphan"]),
            )
        ),
    ],
)
def test_a_label_that_fails_leaves_no_program_running(tmp_path, how, launcher):
    """MPI's launchers put ranks into sessions of their own, and ranks outlive them."""
    child_file = tmp_path / "child"
    with misbehaving(
        tmp_path / "scratch", {2: how}, timeout=4.0, child_file=str(child_file), launcher=launcher
    ) as labeler:
        if how == "crash":
            with pytest.raises(
                MachineError, match="SIGKILL"
            ):  # as the kernel does where memory runs out
                labeler.label([chain(2), chain(1)])
            assert not _alive(int(child_file.read_text()), patience=0.0)
            return
        results = labeler.label([chain(2), chain(1)])
        assert not _alive(int(child_file.read_text()), patience=0.0), "before the next label begins"
    assert [result.ok for result in results] == [False, True]
    assert {"hang": "within 4 s", "leave": "rank 3 exited"}[how] in results[0].reason


def _alive(pid, patience=60.0):
    deadline = time.monotonic() + patience
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.05)


def test_a_relaxation_that_fails_returns_the_start_and_the_reason(odd):
    bad, worse = odd.relax([does("nan"), does("segfault")], pressure=10.0)
    assert bad.failed and not bad.converged and worse.failed and "SIGSEGV" in worse.reason
    assert bad.atoms.positions == pytest.approx(does("nan").positions)


def test_a_code_works_in_its_slot_and_finds_the_files_of_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.txt").write_text("7.5")
    with misbehaving(
        tmp_path / "scratch", {2: "here", 1: "here"}, child_file="model.txt"
    ) as labeler:
        assert [label.energy for label in labeler.label([chain(2), chain(1)])] == [7.5, 7.5]
    assert {path.name for path in tmp_path.iterdir()} == {"model.txt", "scratch"}
    assert (tmp_path / "scratch" / "slot0" / "restart.dat").read_text() == "1"


def test_what_an_argument_names_is_meant_from_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my.model", "pbe", "log.txt", "Si.upf"):
        (tmp_path / name).touch()
    (tmp_path / "pseudo").mkdir()
    given = {
        "model": "my.model",
        "xc": "pbe",
        "txt": "log.txt",
        "pseudopotentials": {"Si": "./Si.upf"},
        "pseudo_dir": "pseudo",
        "a": [1.5, "b.c"],
    }
    here = str(tmp_path)
    assert _absolute(given) == given | {
        "model": f"{here}/my.model",
        "pseudopotentials": {"Si": f"{here}/Si.upf"},
        "pseudo_dir": f"{here}/pseudo",
    }


def test_a_reason_cannot_control_the_terminal(odd):
    (failure,) = odd.label([does("escape")])
    assert failure.reason == "ValueError: [31mred ]0;title [2J"


def test_what_a_code_prints_does_not_grow_without_limit_and_its_end_is_kept(tmp_path):
    with misbehaving(tmp_path, {2: "chatty"}) as labeler:
        assert all(result.ok for result in labeler.label([chain(2), chain(2), chain(2), chain(1)]))
        last = (tmp_path / "worker0.log").read_text()
        assert len(last) < 1000, "of the last label alone"
        assert "a line that a DFT code prints" in last
        earlier = (tmp_path / "worker0.earlier.log").read_text()
        assert len(earlier) == LOG_LIMIT and "the end of a long output" in earlier
    assert {path.name for path in tmp_path.glob("*.log")} == {"worker0.log", "worker0.earlier.log"}


@pytest.mark.parametrize("launcher", ["child", "orphan"])
def test_the_worker_ends_when_the_search_is_killed(tmp_path, launcher):
    code = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from pathlib import Path
    from test_labelers import misbehaving, chain
    arguments = {{"child_file": {str(tmp_path / "child")!r}, "launcher": {launcher!r}}}
    with misbehaving(Path({str(tmp_path)!r}), {{2: "pid", 3: "hang"}}, **arguments) as labeler:
        print(int(labeler.label([chain(2)])[0].energy), flush=True)
        labeler.label([chain(3)])
    """
    search = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    worker = int(search.stdout.readline())
    wait_for((tmp_path / "child").exists, "no child of the worker")
    time.sleep(0.2)
    child = int((tmp_path / "child").read_text())
    search.send_signal(signal.SIGKILL)
    search.wait()
    assert not _alive(worker) and not _alive(child)


def test_an_exception_in_the_search_ends_the_workers(tmp_path):
    pids = []

    def interrupt(index, label):
        pids.append(int(label.energy))
        raise KeyboardInterrupt

    with misbehaving(tmp_path, {2: "pid"}) as labeler, pytest.raises(KeyboardInterrupt):
        labeler.label([chain(2), chain(1)], interrupt)
    assert not _alive(pids[0])


def test_progress_names_count_failures_and_time_left(tmp_path, caplog):
    caplog.set_level("INFO")
    with misbehaving(tmp_path, {2: "raise"}) as labeler:
        labeler.label([chain(2), chain(1), chain(1)])
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith("label 2 of 3, 1 failed, about ") and line.endswith(" left")
        for line in lines
    )
    assert "label 3 of 3, 1 failed" in lines


def test_two_workers_work_at_the_same_time(tmp_path):
    with misbehaving(tmp_path, {}, n_workers=2, nap=1.5) as labeler:
        labeler.label([chain(1), chain(1)])
        started = time.monotonic()
        labeler.label([chain(1)] * 4)
    assert time.monotonic() - started < 5.5


def test_a_module_of_the_users_folder_cannot_shadow_the_package(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with get_labeler(
        LabelerSettings(calculator=EMT_PATH, n_workers=1), tmp_path / "scratch"
    ) as labeler:
        assert labeler.label([copper()])[0].ok


def test_one_label_per_available_core_unless_told_otherwise(tmp_path):
    with get_labeler(LabelerSettings(calculator=EMT_PATH), tmp_path) as labeler:
        assert labeler.n_workers == available_cores() >= 1


# ------------------------------------------------------------------ settings


def test_hash_names_the_energy_surface_and_nothing_else(tmp_path):
    def of(**arguments):
        return get_labeler(LabelerSettings(calculator="gpaw", **arguments), tmp_path).settings_hash

    pytest.importorskip("gpaw")
    default = of()
    assert len(default) == 12 and int(default, 16) >= 0
    assert default == of(k_spacing=0.08) == of(n_workers=3, timeout=10.0)
    assert default == of(arguments={"mode": {"ecut": 500.0, "name": "pw"}})
    assert default == of(arguments={"convergence": {"energy": "2e-5", "density": "2E-5"}}), (
        "YAML 1.1 reads 2e-5 as text"
    )
    others = [
        of(k_spacing=0.05),
        of(arguments={"xc": "LDA"}),
        of(arguments={"mode": {"name": "pw", "ecut": 600}}),
    ]
    others.append(of(arguments={"occupations": {"name": "fermi-dirac", "width": 0.1}}))
    assert len({default, *others}) == 5


def hash_of(**settings):
    return code_of(settings["calculator"]).recipe(LabelerSettings(**settings)).settings_hash


def test_hash_holds_pseudopotentials_by_their_content_and_not_by_their_folder(
    tmp_path, monkeypatch
):
    for name, text in (("one", "PBE of 2015"), ("two", "PBE of 2024"), ("copy", "PBE of 2015")):
        for file in ("H.upf", "potpaw_PBE/H/POTCAR", "H.PBE", "lj.table"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("one", "two", "copy"):
        monkeypatch.setenv("VASP_PP_PATH", str(tmp_path / name))
        monkeypatch.setenv("GPAW_SETUP_PATH", str(tmp_path / name))
        upf = {"pseudopotentials": {"H": "H.upf"}, "pseudo_dir": name}
        found[name] = [
            hash_of(calculator="espresso", arguments=upf),
            hash_of(calculator="vasp"),
            hash_of(calculator="gpaw"),
        ]
    assert found["one"] == found["copy"]
    assert all(one != two for one, two in zip(found["one"], found["two"], strict=True))
    before = hash_of(calculator="misbehaving.Misbehaving", arguments={"child_file": "one/lj.table"})
    (tmp_path / "one" / "lj.table").write_text("another potential")
    assert (
        hash_of(calculator="misbehaving.Misbehaving", arguments={"child_file": "one/lj.table"})
        != before
    )


def test_the_set_ups_that_gpaw_brings_are_those_of_the_shipped_labels(monkeypatch):
    pytest.importorskip("gpaw")
    monkeypatch.delenv("GPAW_SETUP_PATH", raising=False)
    shipped = {atoms.info["settings_hash"] for atoms in read_labels(dataset_file("h3s-gpaw-small"))}
    assert shipped == {hash_of(calculator="gpaw")}


def test_hash_is_never_a_number_in_extended_xyz():
    hashes = [settings_hash("code", {"n": n}, None) for n in range(3000)]
    assert not any(value.isdigit() for value in hashes)
    for value in hashes:
        with pytest.raises(ValueError):
            float(value)


def test_k_points_of_the_shared_labels():
    cell = Atoms("SH3", cell=H3S_CELL, scaled_positions=H3S_SCALED, pbc=True)
    assert k_points(cell, 0.08) == [6, 6, 6]
    assert k_points(cell.repeat((2, 1, 1)), 0.08) == [3, 6, 6]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"calculator": "no_such_package.Calculator"},
            ("learning.labeler.calculator", "not installed", "brings no_such_package"),
        ),
        ({"calculator": "ase.calculators.emt.NoSuch"}, ("no calculator 'NoSuch'",)),
        ({"calculator": "gpa"}, ("'gpa'", "allowed", "gpaw")),
        ({"calculator": "main"}, ("magus search -m",)),
        ({"calculator": EMT_PATH, "k_spacing": 0.1}, ("learning.labeler.k_spacing",)),
        (
            {"calculator": "gpaw", "k_spacing": 0.1, "arguments": {"kpts": [2, 2, 2]}},
            ("k_spacing", "arguments.kpts", "keep one"),
        ),
        ({"calculator": "gpaw", "arguments": {"txt": "here"}}, ("arguments.txt", "leave it out")),
        ({"calculator": "vasp", "arguments": {"nsw": 50}}, ("arguments.nsw", "single points")),
        (
            {"calculator": "vasp", "arguments": {"command": "no-such-vasp-here"}},
            ("no-such-vasp-here", "not found"),
        ),
        ({"calculator": "espresso"}, ("pseudopotentials", "missing")),
    ],
)
def test_wrong_settings_are_refused_before_any_work(tmp_path, settings, words):
    pytest.importorskip("gpaw")
    with pytest.raises(InputError) as caught:
        get_labeler(LabelerSettings(**settings), tmp_path / "scratch")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "scratch").exists()


def test_available_answers_for_every_labeler():
    assert available(EMT_PATH)[0] and available("main")[0]
    assert not available("no_such_package.Calculator")[0]
    for name in ("gpaw", "vasp", "espresso"):
        usable, text = available(name)
        assert isinstance(usable, bool) and text


# ------------------------------------------------------------------ GPAW, for real


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modes-0000", pytest.param("modes-0056", marks=pytest.mark.full)])
def test_gpaw_reproduces_a_label_of_the_shared_set(tmp_path, name):
    """Of Im-3m, with few k-points; of Cm, off every minimum (20 s)."""
    pytest.importorskip("gpaw")
    shared = Path(__file__).parents[1] / "inputs" / "h3s-checkpoint" / "labels.xyz"
    (atoms,) = (atoms for atoms in read(shared, ":") if atoms.info["id"] == name)
    with get_labeler(LabelerSettings(calculator="gpaw", n_workers=1), tmp_path) as labeler:
        (label,) = labeler.label([stripped(atoms)])
    assert label.ok, label.reason
    assert (np.abs(label.forces).max() > 0.1) == (name == "modes-0056")  # eV/A
    assert label.energy == pytest.approx(atoms.info["energy_gpaw"], abs=1e-4)
    assert label.forces == pytest.approx(atoms.get_forces(), abs=2e-3)
    assert label.stress == pytest.approx(atoms.get_stress(voigt=False), abs=2e-4)
    # Fermi-Dirac: F < E0, and E0 lies half way between F and F + TS.
    assert label.free_energy < label.energy
    assert (tmp_path / "slot0" / "gpaw.txt").is_file()


@pytest.mark.slow
def test_gpaw_that_does_not_converge_is_a_failure_with_that_reason(tmp_path):
    pytest.importorskip("gpaw")
    arguments = {"mode": {"name": "pw", "ecut": 200}, "kpts": [1, 1, 1], "maxiter": 3}
    atoms = Atoms("H", cell=[1.7, 1.7, 1.7], pbc=True)
    with get_labeler(
        LabelerSettings(calculator="gpaw", arguments=arguments, n_workers=1), tmp_path
    ) as labeler:
        (result,) = labeler.label([atoms])
    assert not result.ok and "SCF did not converge" in result.reason
    assert list((tmp_path / "failed").iterdir()), "the output of a failed label is kept"


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "shutil.rmtree",
        "subprocess.Popen",
        "subprocess.run",
        "builtins.exec",
        "os.remove",
        "ase.io.write",
        "ase.Atoms",
    ],
)
def test_an_input_calls_nothing_but_calculators(tmp_path, path):
    with pytest.raises(
        InputError, match="is no ASE calculator .* an input cannot call anything else"
    ):
        get_labeler(
            LabelerSettings(calculator=path, arguments={"path": str(tmp_path)}), tmp_path / "work"
        )
    assert tmp_path.is_dir() and not (tmp_path / "work").exists()


def test_a_module_is_allowed_outside_of_the_input_alone_and_the_log_names_it(
    tmp_path, monkeypatch, caplog
):
    settings = LabelerSettings(calculator="misbehaving.made")
    with pytest.raises(InputError, match="export MAGUS_ANHARMONIC_ALLOW=misbehaving"):
        get_labeler(settings, tmp_path)
    monkeypatch.setenv("MAGUS_ANHARMONIC_ALLOW", "mace.calculators, misbehaving")
    with caplog.at_level("INFO"):
        get_labeler(settings, tmp_path).close()
    assert "its module is allowed" in caplog.text
    from magus_anharmonic.doctor import _labelers

    assert any("mace.calculators, misbehaving" in check.detail for check in _labelers(None))


def test_a_function_that_makes_a_calculator_is_a_labeler_and_what_it_makes_is_looked_at(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MAGUS_ANHARMONIC_ALLOW", "misbehaving")
    atoms = bulk("Cu")
    with get_labeler(
        LabelerSettings(calculator="misbehaving.made", n_workers=1), tmp_path / "good"
    ) as labeler:
        (label,) = labeler.label([atoms])
    assert label.energy == len(atoms)
    settings = LabelerSettings(
        calculator="misbehaving.made", arguments={"behaviour": 5}, n_workers=1
    )
    with get_labeler(settings, tmp_path / "bad") as labeler:
        (failure,) = labeler.label([atoms])
    assert "what misbehaving.made makes is no ASE calculator" in failure.reason
