"""Faults of the machine, of the disk and of people: a search goes on as if nothing had been, or
says one clear line."""

import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from misbehaving import Misbehaving
from records import stored_run
from typer.testing import CliRunner

from magus_anharmonic.calculator_check import check_calculator
from magus_anharmonic.cli import app
from magus_anharmonic.errors import (
    DamagedFile,
    InputError,
    MachineError,
    MagusAnharmonicError,
    is_machine_error,
)
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.io import files
from magus_anharmonic.io.files import load_arrays, read_json, read_whole, write_json
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Label
from magus_anharmonic.learning import dataset
from magus_anharmonic.learning.dataset import LabelStore, labelled
from magus_anharmonic.learning.learn import label_planned
from magus_anharmonic.potential import checkpoint
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.ranking.jobs import Job, run_job
from magus_anharmonic.ranking.store import FreeEnergyStore, Key
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.runs.record import read_failures
from magus_anharmonic.scheduler import SerialScheduler
from magus_anharmonic.search import host
from magus_anharmonic.search.archive import Archive, whole_frames, write_frames
from magus_anharmonic.search.host import run
from magus_anharmonic.settings import LabelerSettings, parse_settings
from magus_anharmonic.sscha import free_energy

INPUT = {
    "symbols": ["Cu", "Al"],
    "formula": [1, 1],
    "min_n_atoms": 2,
    "max_n_atoms": 4,
    "spacegroup": [123, 166, 221, 225],
    "pressure": 10,
    "popSize": 2,
    "initSize": 3,
    "saveGood": 1,
    "numGen": 3,
    "randRatio": 0.5,
    "seed": 1,
    "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT", "maxStep": 3},
}
SETTINGS = parse_settings(INPUT)
LIMIT = 2500
"""Bytes: run.json fits, populations do not."""
COMMAND = ["search", "--host", "embedded"]


def results(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "results").glob("*.traj"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A search of three generations that met no fault."""
    folder = tmp_path_factory.mktemp("faults") / "search"
    folder.mkdir()
    (folder / "input.yaml").write_text(yaml.safe_dump(INPUT))
    run(SETTINGS, folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def invoke(folder, *arguments, command=COMMAND):
    """The command line in ``folder``: exit code and what it says at the end."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, [*command, *arguments])
    finally:
        os.chdir(before)
        root = logging.getLogger()
        for handler in [known for known in root.handlers if known.get_name() == "magus-anharmonic"]:
            root.removeHandler(handler)  # it writes where nobody listens any more
    unexpected = "" if isinstance(result.exception, SystemExit | None) else repr(result.exception)
    return result.exit_code, result.output + unexpected


def in_a_child(action, folder):
    """Exit code of ``action`` in a forked process, in ``folder``."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- disk and memory ------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_search_goes_on_once_there_is_space(finished, tmp_path):
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(INPUT))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        code, said = invoke(tmp_path)
        os.pwrite(said_file, said.encode()[-4000:], 0)
        return code

    said_file = os.open(tmp_path / "said", os.O_RDWR | os.O_CREAT)
    assert in_a_child(full, tmp_path) == 1
    last = (tmp_path / "said").read_text().rstrip().splitlines()[-1]
    assert (
        last.startswith("error: ")
        and "File too large" in last
        and "-r to go on" in last
        and "Traceback" not in last
    )
    run(SETTINGS, tmp_path, restart=True)
    assert results(tmp_path) == results(finished)
    assert not list(tmp_path.rglob("*.tmp"))


def without_privileges():
    """Give up root's right to write everywhere; nothing for anybody else (Linux)."""
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, rights) == 0


def caused(error, cause):
    error.__cause__ = cause
    return error


def full_database():
    """What SQLite raises when there is no room for a row."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("create table numbers (value)")
        database.execute("pragma max_page_count = 2")
        try:
            database.execute("insert into numbers values (zeroblob(1000000))")
        except sqlite3.Error as error:
            return error
    raise AssertionError("it had room")


class Raising(EMT):
    """An ASE calculator that raises what it is given."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def calculate(self, *arguments):
        raise self.error


def evaluator_raising(error):
    return CalculatorEvaluator(Raising(error))


MACHINE_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device", "scratch/pw.in"),
    OSError(errno.EMFILE, "Too many open files"),
    MemoryError("Unable to allocate 2.10 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    BrokenProcessPool("A process in the process pool was terminated abruptly"),
    caused(RuntimeError("the calculator failed"), OSError(errno.EIO, "Input/output error")),
    full_database(),
]
OTHER_ERRORS = [
    OSError('Failed to execute "no-such-code > log"'),
    caused(
        OSError('Failed to execute "no-such-code"'),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "no-such-code"),
    ),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "Cu.pot"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    RuntimeError("SCF did not converge"),
    ZeroDivisionError(),
]


@pytest.mark.parametrize("error", MACHINE_ERRORS[-1:], ids=lambda error: type(error).__name__)
def test_a_machine_error_stops_a_search_and_is_no_property_of_a_structure(
    finished, tmp_path, monkeypatch, error
):
    assert is_machine_error(error)
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(INPUT))
    calculate, calls = EMT.calculate, iter(range(1_000_000))

    def failing(self, *arguments):
        if next(calls) > 20:
            raise error
        calculate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EMT, "calculate", failing)
        code, said = invoke(tmp_path)
    last = said.rstrip().splitlines()[-1]
    assert (
        code == 1
        and last.startswith("error: ")
        and last.endswith("with -r to go on")
        and "Traceback" not in said
    )
    assert [record["stage"] for record in read_failures(tmp_path / "results/anharmonic")] == ["run"]
    code, said = invoke(tmp_path, "-r")
    assert code == 0 and results(tmp_path) == results(finished)


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_calculator_says_of_a_structure_or_of_its_own_files_is_no_machine_error(error):
    assert not is_machine_error(error)
    (result,) = relax(evaluator_raising(error), [bulk("Cu")])
    assert result.failed and (str(error) or type(error).__name__) in result.reason


@pytest.mark.parametrize("error", MACHINE_ERRORS, ids=lambda error: type(error).__name__)
def test_a_machine_error_ends_whatever_asks_for_numbers(error, tmp_path):
    source, settings = evaluator_raising(error), parse_settings(INPUT)
    job = Job("Cu", bulk("Cu"), (0.0,), (tmp_path / "job",))
    for action in (
        lambda: relax(source, [bulk("Cu")]),
        lambda: check_calculator(source, bulk("Cu"), stress=True),
        lambda: free_energy(
            bulk("Cu"), source, directory=tmp_path / "run", supercell=(2, 2, 2), n_configs=60
        ),
        lambda: run_job(job, source, free_energy),
        lambda: reevaluate([bulk("Cu")], source, settings),
        lambda: list(SerialScheduler().map(raises, [error])),
    ):
        with pytest.raises((type(error), MachineError)):
            action()
    assert not list(tmp_path.rglob("result.json"))


def raises(error, shared=None):
    raise error


def test_a_batch_too_large_for_the_memory_is_no_trouble_while_its_structures_fit_alone():
    def evaluate(structures):
        if len(structures) > 1:
            raise MemoryError("too many")
        if structures[0].get_chemical_symbols() == ["Al"]:
            raise ValueError("no aluminium here")
        return CalculatorEvaluator(EMT()).evaluate(structures)

    fine, failed = relax(
        SimpleNamespace(model_id="small", evaluate=evaluate), [bulk("Cu"), bulk("Al")]
    )
    assert fine.converged and failed.failed and failed.reason == "no aluminium here"


def test_a_machine_error_in_the_process_of_a_labeler_stops_the_labels(tmp_path):
    """Memory ran out, a queue's time is up, the disk is full: none of them is the structure's."""
    for behaviour, task, words in (
        ("disk full", "relax", "No space left"),
        ("killed", "label", "SIGKILL"),
        ("terminated", "label", "SIGTERM"),
    ):
        settings = LabelerSettings(
            calculator="misbehaving.Misbehaving",
            arguments={"behaviour": {1: behaviour}},
            n_workers=1,
        )
        with get_labeler(settings, tmp_path / behaviour) as labeler:
            with pytest.raises(MachineError, match=words):
                getattr(labeler, task)([bulk("Cu")])


def test_when_every_relaxation_fails_a_restart_tries_them_again(finished, tmp_path, monkeypatch):
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(INPUT))
    with monkeypatch.context() as patch:
        patch.setattr(
            EMT, "calculate", lambda *arguments: raises(RuntimeError("the licence has expired"))
        )
        code, said = invoke(tmp_path)
    assert code == 1 and "every relaxation failed" in said and "licence" in said
    code, said = invoke(tmp_path, "-r")
    assert code == 0 and results(tmp_path) == results(finished)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_without_the_right_to_write_is_one_line(finished, tmp_path):
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(INPUT))
    said_file = os.open(tmp_path / "said", os.O_RDWR | os.O_CREAT)
    tmp_path.chmod(0o555)

    def powerless():
        without_privileges()
        code, said = invoke(tmp_path)
        os.pwrite(said_file, said.encode()[-4000:], 0)
        return code

    assert in_a_child(powerless, tmp_path) == 1
    last = (tmp_path / "said").read_text().rstrip().splitlines()[-1]
    tmp_path.chmod(0o755)
    assert last.startswith("error: ") and "Permission denied" in last


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (MemoryError(), "memory exhausted", 1),
        (
            OSError(28, "No space left on device", "results/x.traj"),
            "results/x.traj: No space left on device",
            1,
        ),
        (KeyboardInterrupt(), "stopped by SIGINT", 130),
    ],
)
def test_what_stops_a_search_is_said_and_recorded(
    finished, tmp_path, monkeypatch, error, words, code
):
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(INPUT))

    def stop(self, *_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(host.Search, "_step", stop)
        ended, said = invoke(tmp_path)
    assert ended == code and words in said.rstrip().splitlines()[-1]
    (record,) = read_failures(tmp_path / "results/anharmonic")
    assert record["stage"] == "run" and record["reason"] == words
    if code == 130:  # the restart does not know which error it was
        run(SETTINGS, tmp_path, restart=True)
        assert results(tmp_path) == results(finished)


# --- damaged files --------------------------------------------------------------------------------

FILES = [
    *(f"{name}{g}.traj" for name in ("init", "raw", "gen", "good", "keep") for g in (2, 3)),
    *("best.traj", "good.traj"),
    *(f"anharmonic/{name}" for name in ("run.json", "search.json", "generations.jsonl")),
]


@pytest.mark.parametrize("name", FILES)
def test_a_killed_search_with_a_cut_file_ends_the_same_or_names_the_file(finished, copy, name):
    """Killed at the end of its last generation, all of whose files are there. What earlier steps
    left is not needed any more."""
    history = copy / "results/anharmonic/generations.jsonl"
    lines = history.read_text().splitlines()
    history.write_text("\n".join(lines[:2]) + "\n")
    (copy / "results/anharmonic/search.json").write_text(
        json.dumps({"finished": 2, "volume_ratio": json.loads(lines[1])["volume_ratio"]})
    )
    file = copy / "results" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: random.Random(name).randrange(len(whole))])
    try:
        run(SETTINGS, copy, restart=True)
    except InputError as error:
        assert (
            len(error.problems) == 1 and str(file) in str(error) and name == "anharmonic/run.json"
        )
        return
    found, expected = results(copy), results(finished)
    if name.startswith(("init", "raw")):
        del found[name], expected[name]
    assert found == expected


def test_the_end_of_a_search_can_be_found_again_without_its_state_file(finished, copy):
    for name in ("search.json", "generations.jsonl"):
        (copy / "results/anharmonic" / name).unlink()
    run(SETTINGS, copy, restart=True)
    assert results(copy) == results(finished)


def store_with_labels(folder):
    store = LabelStore(folder)
    for generation in (1, 2):
        for number in range(3):
            atoms = bulk("Cu", cubic=True)
            atoms.rattle(0.1, seed=10 * generation + number)
            atoms.info = {"id": f"g{generation}-{number}", "generation": generation, "parent": "p"}
            values = np.random.default_rng(number)
            forces, stress = values.normal(size=(4, 3)), values.normal(size=(3, 3))
            store.add(
                labelled(atoms, Label(atoms, values.normal(), None, forces, stress, "hash", 1.0))
            )
        if generation == 1:
            store.close_batch(1)
    return store


def test_no_cut_of_a_label_file_loses_or_changes_a_label_unnoticed(tmp_path):
    """Also where the cut leaves a readable file: at the end of a structure, or within a number."""
    original = tmp_path / "labels"
    energies = {
        key: store_atoms.get_potential_energy()
        for key, store_atoms in store_with_labels(original)._frames.items()
    }
    files = [path for path in sorted(original.rglob("*.xyz"))]
    assert len(files) == 4
    draw = random.Random(1)
    for file in files:
        whole = file.read_bytes()
        for cut in {
            0,
            1,
            *(draw.randrange(len(whole)) for _ in range(12)),
            len(whole) // 3,
            len(whole) - 2,
            len(whole) - 4,
        }:
            folder = Path(shutil.copytree(original, tmp_path / "cut"))
            (folder / file.relative_to(original)).write_bytes(whole[:cut])
            try:
                found = {
                    key: atoms.get_potential_energy()
                    for key, atoms in LabelStore(folder)._frames.items()
                }
            except DamagedFile as error:
                assert file.parent == original, "a label of an unfinished batch can be made again"
                assert file.name in str(error) or "in no file" in str(error)
            else:
                missing = set(energies) - set(found)
                assert missing <= ({file.stem} if file.parent != original else set()), (
                    f"{file.name} cut at {cut} of {len(whole)}"
                )
                assert all(found[key] == energies[key] for key in found)
            shutil.rmtree(folder)


def test_a_label_whose_line_in_the_index_a_kill_prevented_is_protected_from_the_restart_on(
    tmp_path, monkeypatch, caplog
):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("magus_anharmonic.learning.dataset.append_jsonl", killed)
        with pytest.raises(KeyboardInterrupt):
            store_with_labels(tmp_path)
    batch = LabelStore(tmp_path).close_batch(1)
    assert batch is not None and len((tmp_path / "index.jsonl").read_text().splitlines()) == 1
    assert len(LabelStore(tmp_path)) == 1 and not caplog.records
    whole = batch.read_text()
    batch.write_text(whole.replace("energy=", "energy=1"))
    with pytest.raises(DamagedFile, match="label g1-0 is not what it was"):
        LabelStore(tmp_path)
    batch.unlink()
    with pytest.raises(DamagedFile, match="1 labels are in index.jsonl but in no file"):
        LabelStore(tmp_path)
    batch.write_text(whole)
    (tmp_path / "index.jsonl").write_text("")
    assert (
        len(LabelStore(tmp_path)) == 1
        and "of finished batches have no line in index.jsonl (g1-0)" in caplog.text
    )
    caplog.clear()
    assert len(LabelStore(tmp_path)) == 1 and not caplog.records


def test_a_damaged_database_is_set_aside_and_made_anew(tmp_path, caplog):
    key = Key("model", 10.0, 0.0, "settings")
    record = stored_run("abc", key, bulk("Cu"), "failed", reason="x", enthalpy=1.0)
    FreeEnergyStore(tmp_path / "free_energies.db").put(record)
    whole = (tmp_path / "free_energies.db").read_bytes()
    for cut in (0, 10, 2000, len(whole) // 2, len(whole) - 5000):
        (tmp_path / "free_energies.db").write_bytes(whole[:cut])
        store = FreeEnergyStore(tmp_path / "free_energies.db")
        store.put(record)
        assert [
            item.structure for item in FreeEnergyStore(tmp_path / "free_energies.db").runs()
        ] == ["abc"]
    assert "is damaged" in caplog.text


def readers(folder):
    """Every kind of file that is set aside when it is damaged, whole, with what reads it."""
    store = store_with_labels(folder / "labels")
    FreeEnergyStore(folder / "free_energies.db").put(
        stored_run(
            "abc",
            Key("model", 10.0, 0.0, "settings"),
            bulk("Cu"),
            "failed",
            reason="x",
            enthalpy=1.0,
        )
    )
    np.savez(folder / "population_001.npz", a=np.zeros(3))
    write_json(folder / "settings.json", {"a": 1})
    write_frames(folder / "raw1.traj", [bulk("Cu")])
    return {
        "label": (
            sorted(store.directory.glob("pending/*/*.xyz"))[0],
            lambda file: len(LabelStore(file.parents[2])),
        ),
        "database": (folder / "free_energies.db", lambda file: len(FreeEnergyStore(file))),
        "population": (folder / "population_001.npz", lambda file: read_whole(file, load_arrays)),
        "settings": (folder / "settings.json", lambda file: read_whole(file, read_json)),
        "structures": (folder / "raw1.traj", whole_frames),
    }


@pytest.mark.parametrize("what", ["label", "database", "population", "settings", "structures"])
def test_a_file_that_cannot_be_read_at_the_moment_is_not_called_damaged(what, tmp_path, caplog):
    """Too many open files, the most common such moment: one line that is not about the input, and
    the file stays what it is."""
    file, reader = readers(tmp_path)[what]
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    # databases of earlier tests would close their files, and so make room, at any moment
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        held = stack.enter_context(open(os.devnull))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held.fileno() + 1, hard))
        with pytest.raises((OSError, MagusAnharmonicError)) as caught:
            reader(file)
    assert not isinstance(caught.value, InputError)
    assert {
        path: path.stat().st_ino for path in tmp_path.rglob("*")
    } == before and "damaged" not in caplog.text
    assert reader(file)


@pytest.mark.parametrize(
    "machine_error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "denied"),
        MemoryError(),
    ],
)
def test_a_label_behind_a_machine_error_of_disk_or_memory_is_kept(
    machine_error, tmp_path, monkeypatch
):
    def read(*_, **__):
        raise machine_error

    n_labels = len(store_with_labels(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(dataset, "read", read)
    if isinstance(machine_error, MemoryError):
        monkeypatch.setattr(files, "_has_room_for", lambda path: False)
    with pytest.raises(type(machine_error)):
        LabelStore(tmp_path)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before and len(LabelStore(tmp_path)) == n_labels


READ_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from magus_anharmonic.io.files import load_arrays, read_whole
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, resource.RLIM_INFINITY))
try:
    read_whole(Path("whole.npz"), load_arrays)
except MemoryError:
    sys.exit(42)
"""


def test_memory_that_is_exhausted_is_no_damage_but_a_file_that_asks_for_any_amount_is(tmp_path):
    whole, nonsense = tmp_path / "whole.npz", tmp_path / "nonsense.npz"
    np.savez(whole, a=np.zeros(40_000_000))
    np.savez(nonsense, a=np.zeros(10))
    nonsense.write_bytes(
        nonsense.read_bytes().replace(b"(10,), }" + 14 * b" ", b"(1000000000000000,), }")
    )
    # a process of its own: what earlier tests left free in this one is room that the limit does not
    # see
    ended = subprocess.run(
        [sys.executable, "-c", READ_WITH_LITTLE_MEMORY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 42 and whole.exists(), ended.stderr
    assert read_whole(nonsense, load_arrays) is None and not nonsense.exists()


@contextlib.contextmanager
def largest_file(size):
    """No file can be written beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_database_its_records_and_leaves_no_half_of_one(tmp_path, caplog):
    """At whatever byte the disk is full: while the file is made, while a record is added, and while
    it is opened."""
    key, path = Key("model", 10.0, 0.0, "settings"), tmp_path / "free_energies.db"
    first, second = (
        stored_run(name, key, bulk("Cu").repeat(3), "failed", reason="x", enthalpy=1.0)
        for name in ("abc", "def")
    )
    refused = 0
    for size in (*range(0, 40000, 1500), 60000):
        path.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "sscha", ignore_errors=True)
        with contextlib.suppress(MagusAnharmonicError, OSError), largest_file(size):
            FreeEnergyStore(path).put(first)
        whole = path.exists()
        assert len(FreeEnergyStore(path)) == int(whole)
        FreeEnergyStore(path).put(first)
        try:
            with largest_file(size):
                FreeEnergyStore(path).put(second)
        except MagusAnharmonicError as error:
            refused += 1
            assert "free_energies.db" in str(error) and "free space" in str(error)
        assert {record.structure for record in FreeEnergyStore(path).runs()} >= {"abc"}
    assert refused > 3 and "damaged" not in caplog.text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["free_energies.db", "sscha"]


# --- people and clocks ----------------------------------------------------------------------------


RECORDS = {
    "no seed": (
        lambda record: {key: value for key, value in record.items() if key != "seed"},
        "no seed",
    ),
    "no settings": (
        lambda record: {key: value for key, value in record.items() if key != "settings"},
        "no settings",
    ),
    "a list": (lambda record: {**record, "settings": [1]}, "settings: "),
    "no host": (
        lambda record: {**record, "settings": {**record["settings"], "host": None}},
        "settings: host: ",
    ),
    "starts": (lambda record: {**record, "earlier_starts": {"a": 1}}, "earlier_starts: "),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_of_the_run_that_lacks_a_field_is_one_line_that_names_it(copy, what):
    file, (change, complaint) = copy / "results/anharmonic/run.json", RECORDS[what]
    write_json(file, change(json.loads(file.read_text())))
    before = file.read_bytes()
    code, said = invoke(copy, "-r")
    assert (
        code == 2
        and f"{file}: damaged: {complaint}" in said.splitlines()[-1]
        and file.read_bytes() == before
    )


@pytest.mark.parametrize("value", ['"a"', "[1]", "null", "NaN", "1e400"])
@pytest.mark.parametrize("key", ["generation", "volume_ratio"])
def test_a_line_of_the_history_with_a_value_that_is_no_number_is_left_out(copy, key, value):
    history = copy / "results/anharmonic/generations.jsonl"
    other = "volume_ratio" if key == "generation" else "generation"
    history.write_text(
        f'{{"{key}": {value}, "{other}": 1, "seconds": null}}\n' + history.read_text()
    )
    assert Archive(copy).finished()[0] == 3


def test_a_link_for_the_results_that_leads_nowhere_is_called_that(tmp_path):
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(INPUT))
    (tmp_path / "results").symlink_to(tmp_path / "scratch/of/mine")
    code, said = invoke(tmp_path)
    assert (
        code == 2
        and f"a link to {tmp_path}/scratch/of/mine, which is not there" in said
        and "same moment" not in said
    )


@pytest.mark.parametrize("arguments", [(), ("-r",)])
def test_a_second_search_in_the_folder_is_refused_and_touches_nothing(copy, arguments):
    before = contents(copy)
    with locked(copy / "results/anharmonic", "magus-anharmonic search"):
        code, said = invoke(copy, *arguments)
        (copy / "results/anharmonic/lock.json").read_text()
    assert (
        code == 2
        and f"another process works here: magus-anharmonic search, process {os.getpid()} on" in said
    )
    assert contents(copy) == before


def test_a_second_training_of_a_checkpoint_is_refused_and_another_beside_it_is_not(tmp_path):
    """Trainings of several checkpoints in one folder have no file in common."""
    frames = []
    for seed in range(4):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        frames.append(
            labelled(
                atoms,
                Label(atoms, -14.0, None, np.full((4, 3), 0.1), np.zeros((3, 3)), "hash", 1.0),
            )
        )
    write(tmp_path / "labels.extxyz", frames)
    recipe = {
        "architecture": {"num_blocks": 1, "units": 8},
        "stages": [{"epochs": 1, "batch_size": 4}],
        "split": [1, 0, 0],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("train", "labels.extxyz", "--recipe", "recipe.yaml", "--device", "cpu", "-o")
    with locked(tmp_path, "magus-anharmonic train", "a.lock.json"):
        before = contents(tmp_path)
        code, said = invoke(tmp_path, *arguments, "a.pth", command=[])
        assert contents(tmp_path) == before
        assert (
            code == 2
            and f"a.*: another process writes these files: magus-anharmonic train, process {os.getpid()} on"
            in one_line(said)
        )
        assert "(0 min)" in one_line(said)
        code, said = invoke(tmp_path, *arguments, "b.pth", command=[])
        assert code == 0 and (tmp_path / "b.pth").is_file(), said
    assert not list(tmp_path.rglob("*lock*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank", "cu.vasp"),
        ("errors", "cu.vasp", "-r", "dft.yaml", "--pressure", "0"),
        ("hessian", "cu.vasp"),
        ("phase-diagram", "cu.vasp", "--pressure", "0"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_second_command_in_the_folder_is_refused_and_touches_nothing(
    tmp_path, tiny_checkpoint, arguments
):
    write(tmp_path / "cu.vasp", bulk("Cu"))
    (tmp_path / "dft.yaml").write_text("calculator: ase.calculators.emt.EMT\n")
    with locked(tmp_path / "out", f"magus-anharmonic {arguments[0]}"):
        before = contents(tmp_path)
        code, said = invoke(
            tmp_path, *arguments, "--checkpoint", str(tiny_checkpoint), "-o", "out", command=[]
        )
        assert contents(tmp_path) == before
    assert (
        code == 2
        and f"out: another process works here: magus-anharmonic {arguments[0]}, process {os.getpid()} on"
        in one_line(said)
    )
    assert (
        len([line for line in said.splitlines() if "another process" in line]) == 1
        and "Traceback" not in said
    )


def contents(folder):
    """Bytes of every file but of locks, whose heart beats."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: b"" if path.name.endswith("lock.json") else path.read_bytes() for path in files}


def one_line(text):
    return " ".join(text.split())


def test_a_clock_that_goes_backwards_changes_nothing(finished, tmp_path, monkeypatch):
    moments = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    run(SETTINGS, tmp_path)
    assert results(tmp_path) == results(finished)


def test_a_model_that_was_replaced_meanwhile_is_refused(copy):
    file = copy / "results/anharmonic/run.json"
    record = json.loads(file.read_text())
    write_json(file, {**record, "model": "0123456789ab"})
    with pytest.raises(
        InputError,
        match=(
            r"holds the model emt-[0-9a-f]{12}, but the search went on with 0123456789ab: the file"
            r" was replaced"
        ),
    ):
        run(SETTINGS, copy, restart=True)


class Replacing(logging.Handler):
    """Replaces a checkpoint by another model when the first generation is done."""

    def __init__(self, checkpoint):
        super().__init__()
        self.checkpoint, self.replaced = checkpoint, False

    def emit(self, record):
        if record.getMessage().startswith("generation 1 of 2 done"):
            module, _ = checkpoint.read(self.checkpoint)
            with torch.no_grad():
                module.normalizer.shift.add_(1.0)
            checkpoint.save(module, self.checkpoint, species=range(1, 95))
            self.replaced = True


def test_a_checkpoint_replaced_under_a_running_search_changes_nothing_and_a_restart_with_it_is_refused(
    tmp_path, tiny_checkpoint
):
    settings = {}
    for name in ("undisturbed", "replaced"):
        own = Path(shutil.copy(tiny_checkpoint, tmp_path / f"{name}.pth"))
        calculator = {"calculator": "mattersim", "checkpoint": str(own), "max_step": 3}
        settings[name] = parse_settings({**INPUT, "numGen": 2, "MainCalculator": calculator})
        (tmp_path / name).mkdir()
    run(settings["undisturbed"], tmp_path / "undisturbed")
    logger, handler = logging.getLogger("magus_anharmonic"), Replacing(tmp_path / "replaced.pth")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        run(settings["replaced"], tmp_path / "replaced")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert handler.replaced
    assert results(tmp_path / "replaced") == results(tmp_path / "undisturbed")
    with pytest.raises(
        InputError,
        match=(
            r"holds the model [0-9a-f]{12}, but the search went on with [0-9a-f]{12}: the file was"
            r" replaced"
        ),
    ):
        run(settings["replaced"], tmp_path / "replaced", restart=True)


@pytest.mark.parametrize("path", ["../../etc/model.pth", "a/../../b", ".."])
def test_a_relative_path_cannot_leave_the_project_folder(path):
    with pytest.raises(InputError, match="leaves the project folder"):
        _ = parse_settings(
            {**INPUT, "MainCalculator": {"calculator": "mattersim", "checkpoint": path}}
        )
    inside = parse_settings(
        {**INPUT, "MainCalculator": {"calculator": "mattersim", "checkpoint": "models/../m.pth"}}
    )
    absolute = parse_settings(
        {**INPUT, "MainCalculator": {"calculator": "mattersim", "checkpoint": "/srv/m.pth"}}
    )
    assert inside.calculator is not None and absolute.calculator is not None


# --- labelers -------------------------------------------------------------------------------------

WAYS = {
    2: ("segfault", "SIGSEGV"),
    3: ("hang", "within 3 s"),
    4: ("raise", "the density is negative"),
}


def chain(n):
    atoms = Atoms(
        f"H{n}", positions=[[0, 0, 2.0 * i] for i in range(n)], cell=[3, 3, 2.0 * n], pbc=True
    )
    atoms.info = {"id": f"g1-{n}", "generation": 1, "parent": "p", "distortion_seed": f"1-{n}"}
    return atoms


def test_every_fault_of_a_labeler_is_in_the_record_of_failures_once(tmp_path):
    """Also when a restarted round meets it again; the labels that could be made are there, each of
    its own structure."""
    assert Misbehaving.implemented_properties
    behaviour = {str(n): how for n, (how, _) in WAYS.items()}
    settings = LabelerSettings(
        calculator="misbehaving.Misbehaving",
        arguments={"behaviour": behaviour},
        n_workers=1,
        timeout=3.0,
    )
    planned = [chain(n) for n in range(1, 6)]
    for _ in range(2):
        store = LabelStore(tmp_path / "labels")
        with get_labeler(settings, tmp_path / "labeling") as labeler:
            assert label_planned(planned, 1, labeler, store, tmp_path) == len(WAYS)
    reasons = {record["id"]: record["reason"] for record in read_failures(tmp_path)}
    assert len(read_failures(tmp_path)) == len(reasons) == len(WAYS)
    for n, (_, words) in WAYS.items():
        assert words in reasons[f"g1-{n}"]
    made = {
        atoms.info["id"]: (len(atoms), atoms.get_potential_energy()) for atoms in store.labels()
    }
    assert made == {"g1-1": (1, 1.0), "g1-5": (5, 5.0)}


@pytest.fixture(autouse=True)
def same_folder():
    before = Path.cwd()
    yield
    os.chdir(before)
