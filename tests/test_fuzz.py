"""Whatever stands in a file that we read, the answer is its content or a documented error: no other
exception, and no hang."""

import contextlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import a_candidate, stored_run

from magus_anharmonic.campaign.learning import read_identity, validation_rmse
from magus_anharmonic.campaign.modes import run_of_record
from magus_anharmonic.campaign.production import _read_relaxed, read_statics
from magus_anharmonic.campaign.structures import _frames
from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.gate import read_structures
from magus_anharmonic.io.files import SUMS, load_arrays, read_json, read_jsonl, write_json
from magus_anharmonic.learning.choose import Families
from magus_anharmonic.learning.dataset import LabelStore, read_dataset, read_labels
from magus_anharmonic.learning.round import read_plan
from magus_anharmonic.paper.ensemble_labels import claim
from magus_anharmonic.phase_diagram.grid import _isotope_name
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, read_records
from magus_anharmonic.ranking.uncertainty import samples_of
from magus_anharmonic.runs.lock import read_owner
from magus_anharmonic.runs.record import read_failures, read_run_record
from magus_anharmonic.runs.status import status
from magus_anharmonic.search.archive import Archive, read_frames
from magus_anharmonic.settings import load_settings
from magus_anharmonic.sscha.qe_files import state_from_dyn
from magus_anharmonic.sscha.result import (
    RunFolder,
    SschaResult,
    read_population_file,
    read_progress_file,
)
from magus_anharmonic.sscha.state import SschaState

SECONDS = 20
"""After which a reader hangs."""


def copper():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.info = {
        "id": "g1-a",
        "generation": 1,
        "parent": "p",
        "settings_hash": "abc",
        "identity": "init1-0",
        "best_of": 1,
        "note": "x y",
    }
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((4, 3)), stress=np.eye(3))
    return atoms


def make_yaml(file):
    file.write_text(
        "symbols: [Cu]\nformula: [1]\npressure: 10\nnumGen: 3\nFitness: [SSCHA]\nsscha:"
        " {temperature: [0, 300.0], supercell: [2, 2, 2]}\nMainCalculator: {calculator: mattersim,"
        " checkpoint: a.pth, eps: 1.0e-2}\nlearning:\n  labeler: {calculator: gpaw, arguments: {xc:"
        " PBE}}\n"
    )


def make_xyz(file):
    write(file, [copper(), copper()], format="extxyz")


def make_traj(file):
    write(file, [copper(), copper()], format="traj")


def make_database(file):
    key = Key("model", 10.0, 0.0, "hash")
    FreeEnergyStore(file).put(
        stored_run(
            "abc",
            key,
            bulk("Cu"),
            "converged",
            gibbs=1.0,
            gibbs_error=0.1,
            enthalpy=1.0,
            centroids=bulk("Cu"),
        )
    )


def a_state():
    return SschaState(
        bulk("Cu"), (2, 1, 1), np.array([np.eye(3), -np.eye(3)]).reshape(2, 1, 1, 3, 3), 0.0
    )


def make_population(file):
    from magus_anharmonic.sscha.ensemble import Ensemble

    state = a_state()
    folder = RunFolder(file.parent, {"a": 1})
    ensemble = Ensemble(np.zeros((2, 2, 3)), np.zeros(2), np.zeros((2, 2, 3)), np.zeros((2, 3, 3)))
    arrays = {
        name: getattr(ensemble, name)
        for name in ("displacements", "energies", "forces", "stresses")
    }
    folder._write(file.name, state, **arrays)


def a_result(folder):
    values = dict.fromkeys(SschaResult.__dataclass_fields__, 1.0)
    values |= {"status": "converged", "reason": "", "supercell": (1, 1, 1), "centroids": bulk("Cu")}
    values |= {
        "stress": np.eye(3),
        "stress_error": np.eye(3),
        "space_group": "x",
        "space_group_start": "x",
        "model_id": "m",
    }
    values |= {"error_vector": None, "force_constants": np.zeros((1, 1, 3, 3))}
    SschaResult(**values).write(folder)


def make_result(file):
    a_result(file.parent)


def make_progress(file):
    progress = {
        "rows": [{"population": 1, "effective_sample": 1.0}],
        "gibbs": [[-1.0, 0.1]],
        "n_evaluations": 42,
        "pooled": [[1]],
    }
    progress |= {
        "cell": [np.eye(2), np.zeros((2, 2, 2, 2))],
        "limited": False,
        "asked": 0,
        "group": "",
        "open": "",
        "moved": False,
        "requests": [None],
    }
    progress |= {"burn_in": True, "reason": "x"}
    write_json(file, progress)


def make_dyn(file):
    from magus_anharmonic.sscha.qe_files import write_dyn

    write_dyn(a_state(), file.with_name("dyn"))


def make_json(file):
    write_json(
        file,
        {
            "version": "0.1.0",
            "seed": 3,
            "settings": {"num_gen": 3, "pressure": 1.5},
            "earlier_starts": [],
            "finished": 2,
            "x": [1, None],
        },
    )


def make_lines(file):
    density = [0.1, 0.2, 0.3]
    record = {
        "parent": "p",
        "family": "f",
        "formula": "Cu",
        "volume": 11.0,
        "density": density,
        "stage": "label",
        "reason": "x",
        "id": "g1-a",
    }
    record |= {
        "generation": 1,
        "volume_ratio": 2.0,
        "new_model": "m",
        "seconds": 3.0,
        "digest": "0",
    }
    file.write_text("".join(json.dumps({**record, "generation": n}) + "\n" for n in range(3)))


def make_ranking(file):
    from magus_anharmonic.ranking.candidate import write_ranking

    write_ranking(
        file,
        [
            a_candidate(
                name, bulk("Cu"), pressure=10.0, enthalpy=1.0, model="m", spg_static="Fm-3m (225)"
            )
            for name in "ab"
        ],
    )
    file.with_name(
        SUMS
    ).unlink()  # as a table of before: what the reader makes of it, not that its digest is another


def make_lock(file):
    owner = {
        "host": "a",
        "pid": 1,
        "machine": "m",
        "born": 2,
        "what": "x",
        "since": "2026-01-01T00:00:00+00:00",
        "token": "t",
        "beat": 1,
    }
    write_json(file, owner)


def families(file):
    found = Families(file)
    found.family("q", bulk("Cu"))


def search_status(file):
    ours = file.parent / "results" / "anharmonic"
    ours.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "search.json", "lock.json", "generations.jsonl", "failures.jsonl"):
        (ours / name).write_bytes(file.read_bytes())
    status(file.parent).lines()
    Archive(file.parent).finished()


def campaign_status(file):
    (file.parent / "steps.json").write_bytes(file.read_bytes())
    status(file.parent).lines()


def make_plan(file):
    frames = [copper(), copper()]
    for atoms in frames:
        atoms.calc = None
        atoms.info["n_planned"] = 2
    write(file, frames, format="extxyz")


def make_identity(file):
    write_json(
        file,
        {
            "input": {"symbols": ["Cu"], "pressure": 1.5},
            "model": "abc",
            "finished": True,
            "run": ".",
            "masses": {"H": 2.0},
        },
    )


def make_scores(file):
    write_json(file, {"foundation": {}, "finetuned": {"validation": {"n": 3, "energy_rmse": 0.01}}})


def make_source(file):
    claim(file.parent, a_state(), "abc", "EMT")


def make_relaxed(file):
    frames = [copper(), copper()]
    for atoms in frames:
        atoms.info = {
            "enthalpy": 1.0,
            "n_steps": 3,
            "failed": False,
            "reason": "x",
            "kind": "static",
            "id": "a",
        }
    write(file, frames)


def masses_of(file):
    (file.parent / "settings.json").write_bytes(file.read_bytes())
    _isotope_name(file.parent, Atoms("H"))


def statics_of(file):
    (file.parent / "tables").mkdir()
    (file.parent / "tables" / file.name).write_bytes(file.read_bytes())
    read_statics(file.parent)


READERS = {
    "yaml": ("input.yaml", make_yaml, [load_settings]),
    "extxyz": (
        "gen001.xyz",
        make_xyz,
        [
            read_labels,
            lambda f: LabelStore(f.parent),
            lambda f: read_dataset(f, "abc"),
            read_structures,
        ],
    ),
    "traj": ("good1.traj", make_traj, [read_frames, read_structures]),
    "db": ("free_energies.db", make_database, [FreeEnergyStore, read_records]),
    "npz": ("population_001.npz", make_population, [read_population_file, load_arrays]),
    "result.json": ("result.json", make_result, [lambda f: SschaResult.read(f.parent)]),
    "result.npz": ("result.npz", make_result, [lambda f: SschaResult.read(f.parent)]),
    "progress.json": (
        "progress.json",
        make_progress,
        [read_progress_file, lambda f: samples_of(f.parent)],
    ),
    "dyn": ("dyn1", make_dyn, [lambda f: state_from_dyn(f.with_name("dyn"))]),
    "json": ("run.json", make_json, [read_json, read_run_record, search_status, campaign_status]),
    "jsonl": (
        "lines.jsonl",
        make_lines,
        [read_jsonl, families, lambda f: read_failures(f.parent), search_status],
    ),
    "plan": ("gen1.xyz", make_plan, [read_plan]),
    "identity.json": ("identity.json", make_identity, [read_identity, masses_of]),
    "run of record": ("run.json", make_identity, [lambda f: run_of_record(f.parent)]),
    "scores": ("errors-cycle1.json", make_scores, [validation_rmse]),
    "source.json": (
        "source.json",
        make_source,
        [lambda f: claim(f.parent, a_state(), "abc", "EMT")],
    ),
    "relaxed": (
        "found.traj",
        make_relaxed,
        [lambda f: _read_relaxed(f, 2), lambda f: list(_frames(f))],
    ),
    "structures": ("structures.extxyz", make_relaxed, [statics_of]),
    "csv": ("ranking.csv", make_ranking, [read_ranking]),
    "lock": ("lock.json", make_lock, [lambda f: read_owner(f.parent)]),
}


@contextlib.contextmanager
def in_time():
    def stop(number, frame):
        raise TimeoutError(f"the reader hangs (more than {SECONDS} s)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]),
        st.floats(0, 1),
        st.integers(0, 255),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def damaged(whole, changes):
    for how, where, value, more in changes:
        place = int(where * len(whole))
        if how == "flip" and whole:
            place = min(place, len(whole) - 1)
            whole = whole[:place] + bytes([value]) + whole[place + 1 :]
        elif how == "cut":
            whole = whole[:place]
        elif how == "insert":
            whole = whole[:place] + more + whole[place:]
        elif how == "remove":
            whole = whole[:place] + whole[place + value :]
        elif how == "repeat":
            whole = whole[:place] + whole[max(0, place - value) :]
    return whole


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused(kind, examples, tmp_path_factory):
    name, make, readers = READERS[kind]
    pristine = tmp_path_factory.mktemp(f"fuzz-{kind}")
    make(pristine / name)
    others = {
        path.name: path.read_bytes()
        for path in pristine.iterdir()
        if path.is_file() and path.name != name
    }
    whole = (pristine / name).read_bytes()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes=CHANGES)
    def holds(changes):
        for reader in readers:
            folder = tmp_path_factory.mktemp("f")
            for other, content in others.items():
                (folder / other).write_bytes(content)
            (folder / name).write_bytes(damaged(whole, changes))
            with in_time(), contextlib.suppress(MagusAnharmonicError):
                reader(folder / name)

    holds()


def test_undamaged_files_are_read(tmp_path):
    """So that the test above does not pass because nothing can be read."""
    for kind, (name, make, readers) in READERS.items():
        if kind in ("jsonl",):
            continue
        folder = tmp_path / kind
        folder.mkdir()
        make(folder / name)
        for reader in readers:
            if reader not in (campaign_status, search_status):
                reader(folder / name)


def test_no_file_of_ours_can_bring_code_with_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    import pickle

    import torch

    from magus_anharmonic.potential import load

    np.savez(tmp_path / "population_001.npz", energies=np.array([Bomb()], dtype=object))
    torch.save({"model": Bomb()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "input.yaml").write_text(
        f"a: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'executed'}]\n"
    )
    for read in (
        lambda: load_arrays(tmp_path / "population_001.npz"),
        lambda: load(tmp_path / "a.pth", device="cpu"),
        lambda: load(tmp_path / "b.pth", device="cpu"),
        lambda: load_settings(tmp_path / "input.yaml"),
    ):
        with pytest.raises(MagusAnharmonicError):
            read()
    assert not (tmp_path / "executed").exists()
