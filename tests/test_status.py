"""``status``: where a search is, told from its files, whoever runs it and whether it runs at
all."""

import json
import os
import shutil
import threading
import time
from dataclasses import asdict, replace

import pytest
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import write_json
from magus_anharmonic.runs import status as status_module
from magus_anharmonic.runs.lock import NAME, locked
from magus_anharmonic.runs.record import record_failure
from magus_anharmonic.runs.status import status
from magus_anharmonic.search.host import run
from magus_anharmonic.settings import parse_settings

SMALL = {
    "symbols": ["Cu"],
    "formula": [1],
    "min_n_atoms": 1,
    "max_n_atoms": 2,
    "spacegroup": [225, 229, 194],
    "popSize": 2,
    "initSize": 2,
    "saveGood": 1,
    "numGen": 1,
    "randRatio": 1.0,
    "seed": 1,
    "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT", "maxStep": 3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status") / "search"
    run(parse_settings(SMALL), folder)
    return folder


@pytest.fixture
def search(tmp_path):
    """A search of 4 generations with learning and SSCHA, killed in the third; nothing of the third
    is there yet."""
    ours = tmp_path / "results" / "anharmonic"
    ours.mkdir(parents=True)
    settings = {
        "num_gen": 4,
        "learning": {"n_sample": 2, "n_perturb": 5},
        "sscha": {"n_configs": 10},
    }
    (ours / "run.json").write_text(
        json.dumps({"version": "0", "host": "embedded", "settings": settings})
    )
    (ours / "search.json").write_text('{"finished": 2, "volume_ratio": 1.0}')
    (ours / "generations.jsonl").write_text(
        '{"generation": 1, "seconds": 100}\n{"generation": 2, "seconds": 300}\n'
    )
    return tmp_path


@pytest.fixture
def search_by_magus(tmp_path):
    """As MAGUS leaves it: 3 generations of 4, an hour apart, each 1000 s long; no search.json, no
    generations.jsonl."""
    ours = tmp_path / "results" / "anharmonic"
    ours.mkdir(parents=True)
    record = {
        "version": "0",
        "settings": {"num_gen": 4},
        "host": "magus",
        "command": "magus search -m",
        "restart": False,
    }
    (ours / "run.json").write_text(json.dumps(record))
    names = ("init", "mlraw", "mlgen", "gen", "good", "keep")
    for generation in (1, 2, 3):
        for place, name in enumerate(names):
            written(tmp_path / f"results/{name}{generation}.traj", 3600 * generation + 200 * place)
    for name in ("good", "best"):
        written(tmp_path / f"results/{name}.traj", 3600 * 3 + 1000)
    return tmp_path


def written(file, when):
    file.write_text("")
    os.utime(file, (1.7e9 + when,) * 2)


def dead_lock(ours):
    with locked(ours, "magus-anharmonic search") as owner:
        pass
    (ours / NAME).write_text(json.dumps(asdict(replace(owner, born=owner.born - 1))))


def test_a_finished_search_says_so_and_nothing_is_written(finished):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.rglob("*")}
    for folder in (finished, finished / "results", finished / "results/anharmonic"):
        found = status(folder)
        assert (
            found.state == "finished"
            and found.where == "all 1 generations are done"
            and found.waits_for == "nothing"
        )
        assert not any("left" in line for line in found.lines())
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.rglob("*")
    } == before


@pytest.mark.parametrize(
    ("files", "where", "waits_for"),
    [
        ((), "making structures", "random structures"),
        (("init3.traj", "anharmonic/relax/3/chunk-0.traj"), "relaxing, 1 chunks done", "next chunk"),
        (("init3.traj", "raw3.traj", "anharmonic/labels/pending/gen003/a.xyz"), "labelling, 1 of at most 10 labels done, 1 failed", "labe"),
        (("init3.traj", "raw3.traj", "anharmonic/labels/gen003.xyz"), "training, no epoch done yet", "epoch"),
        (("init3.traj", "raw3.traj", "anharmonic/labels/gen003.xyz", "anharmonic/training/gen3.pth.state"), "a checkpoint of its", "epoch"),
        (
            ("init3.traj", "raw3.traj", "anharmonic/checkpoints/gen3.pth", "anharmonic/sscha/a/result.json",
             "anharmonic/sscha/b/population_001.npz"),
            "free energies, 1 runs finished, 1 open with 1 populations", "population",
        ),
    ],
)  # fmt: skip
def test_the_step_of_a_dead_search_is_told_from_its_files(search, files, where, waits_for):
    ours = search / "results/anharmonic"
    record_failure(ours, "label", "the density is negative", generation=3, id="g3-a")
    dead_lock(ours)
    for name in files:
        (search / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (search / "results" / name).write_text("")
    found = status(search)
    assert (
        found.state == "dead"
        and found.where.startswith("generation 3 of 4: ")
        and where in found.where
    )
    assert waits_for in found.waits_for and found.seconds_left == pytest.approx(400)
    text = "\n".join(found.lines())
    assert (
        "label g3-a: the density is negative" in text
        and "failures: 1 label" in text
        and "search -r" in text
        and str(os.getpid()) in text
    )


def test_a_running_search_names_its_process_and_its_rate(search):
    ours = search / "results/anharmonic"
    pending = ours / "labels/pending/gen003"
    pending.mkdir(parents=True)
    for number in range(4):
        (pending / f"{number}.xyz").write_text("")
        os.utime(pending / f"{number}.xyz", (time.time() - 360 * number,) * 2)
    with locked(ours, "magus-anharmonic search"):
        found = status(search)
    assert found.state == "running" and found.owner is not None and found.owner.pid == os.getpid()
    assert any(rate.startswith("13 labels per hour") for rate in found.rates) and any(
        "200 s" in r or "3 min" in r for r in found.rates
    )


def test_a_search_by_magus_is_told_from_the_files_that_magus_writes(search_by_magus):
    found = status(search_by_magus)
    assert found.where == "generation 4 of 4: making structures" and found.state == "stopped"
    assert (
        found.seconds_left == pytest.approx(1000)
        and "rate: 17 min per generation (last 3)" in found.lines()
    )
    assert "to go on: magus search -m -r" in found.lines()
    written(search_by_magus / "results/init4.traj", 20000)
    assert status(search_by_magus).where == "generation 4 of 4: relaxing"
    written(search_by_magus / "results/mlraw4.traj", 20100)
    assert status(search_by_magus).where == "generation 4 of 4: ranking"
    for name in ("gen", "good", "keep"):
        written(search_by_magus / f"results/{name}4.traj", 21000)
    found = status(search_by_magus)
    assert (found.state, found.where, found.waits_for) == (
        "finished",
        "all 4 generations are done",
        "nothing",
    )
    assert not any("left" in line or "to go on" in line for line in found.lines())


def test_the_generation_that_a_restart_of_magus_repeats_is_not_finished(search_by_magus):
    written(search_by_magus / "results/init3.traj", 50000)
    assert status(search_by_magus).where.startswith("generation 3 of 4")


def test_a_search_on_another_machine_runs_as_long_as_its_heart_beats(search, monkeypatch):
    ours = search / "results/anharmonic"
    with locked(ours, "magus-anharmonic search") as mine:
        pass
    owner = replace(mine, host="node7", machine="another boot")
    (ours / NAME).write_text(json.dumps(asdict(owner)))
    monkeypatch.setattr(status_module, "WATCH", 3.0)
    beat = threading.Timer(0.3, lambda: write_json(ours / NAME, asdict(owner) | {"beat": 2}))
    beat.start()
    assert status(search).state == "running"
    beat.join()
    monkeypatch.setattr(status_module, "WATCH", 0.3)
    found = status(search)
    assert (
        found.state == "dead (no sign of life for 0.3 s)"
        and "to go on: magus-anharmonic search -r" in found.lines()
    )
    (ours / "search.json").write_text('{"finished": 4, "volume_ratio": 1.0}')
    assert status(search).state == "finished"


def test_a_lock_that_cannot_be_read_hides_nothing_else(search):
    (search / "results/anharmonic" / NAME).mkdir()
    found = status(search)
    assert (
        found.state.startswith("unknown (")
        and found.state.endswith("Is a directory)")
        and found.where.startswith("generation 3 of 4")
    )
    assert not any("held by" in line for line in found.lines())


def test_texts_of_any_length_and_kind_take_one_short_line_each(search):
    ours = search / "results/anharmonic"
    record_failure(ours, "ru\nn", "\x1b[31m" + "x" * 3_000_000 + "\nred", id="a\nb")
    dead_lock(ours)
    owner = json.loads((ours / NAME).read_text())
    (ours / NAME).write_text(
        json.dumps({**owner, "what": "\x1b[31mhi\nSECOND LINE", "since": "2026-01-01T00:00:00"})
    )
    lines = status(search).lines()
    assert max(map(len, lines)) < 500 and all(line.isprintable() for line in lines)
    assert any(line.startswith("held by: [31mhi SECOND LINE, process") for line in lines) and any(
        line.endswith("xxx...") for line in lines
    )


def test_times_of_the_future_and_damaged_files_spoil_nothing(search):
    ours = search / "results/anharmonic"
    for name in ("search.json", "lock.json", "failures.jsonl"):
        (ours / name).write_text('{"fini')
    os.utime(ours / "run.json", (2e9 * 2,) * 2)
    found = status(search)
    assert found.where.startswith("generation 3 of 4") and found.state == "stopped"
    assert "last file written: 0 s ago" in found.lines()


def test_a_campaign_is_told_step_by_step_with_the_search_that_it_is_in(search, tmp_path):
    folder = tmp_path / "project/campaign"
    shutil.copytree(search / "results", folder / "learn-075GPa/results")
    steps = {
        "learn-000GPa": {"status": "done", "wall_s": 1800.0},
        "learn-075GPa": {"status": "running"},
        "merge": {"status": "open"},
        "produce-100GPa": {"status": "failed", "reason": "no structure is left"},
    }
    (folder / "steps.json").write_text(json.dumps(steps))
    for place in (folder, folder.parent):
        found = status(place)
        assert found.kind == "campaign" and found.where.startswith(
            "1 of 4 steps done, 1 failed; in learn-075GPa (generation 3 of 4"
        )
        assert (
            found.seconds_left == pytest.approx(3600)
            and "produce-100GPa: no structure is left" in found.errors
        )


@pytest.mark.parametrize("what", ["", "empty", "steps"])
def test_a_folder_that_is_nothing_is_one_clear_line(tmp_path, what):
    folder = tmp_path / "nothing"
    if what:
        folder.mkdir()
    if what == "steps":
        (folder / "steps.json").write_text("[1")
    with pytest.raises(InputError):
        status(folder)
    result = CliRunner().invoke(app, ["status", str(folder)])
    assert (
        result.exit_code == 2
        and len(result.output.strip().splitlines()) == 1
        and "input error: " in result.output
    )


def test_the_command_prints_what_the_library_finds(finished):
    result = CliRunner().invoke(app, ["status", str(finished)])
    assert (
        result.exit_code == 0
        and "search in" in result.output
        and "where: all 1 generations are done" in result.output
    )
