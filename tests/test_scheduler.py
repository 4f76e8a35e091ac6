"""Schedulers: every task ends exactly once, whoever runs it and whatever dies; results do not
depend on the number of workers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import ranking_fakes as fakes
import scheduler_tasks as tasks
from ase import Atoms
from ase.build import bulk

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.pool import ScheduledLabeler
from magus_anharmonic.potential.relax import relax, relax_on, serialised
from magus_anharmonic.ranking.jobs import Job, run_jobs
from magus_anharmonic.scheduler import (
    MAX_DEATHS,
    LocalScheduler,
    SerialScheduler,
    changed,
    close_clusters,
    open_scheduler,
    packed,
    unpack,
)
from magus_anharmonic.scheduler.cluster import DaskScheduler, _is_here
from magus_anharmonic.search.relaxation import Relaxer, build_relaxer
from magus_anharmonic.settings import LabelerSettings, WorkerSettings, parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.structures import structure_id

pytest.importorskip("distributed", reason="skipped: distributed is not installed (extra dask)")


@pytest.fixture(scope="module")
def cluster():
    """A Dask scheduler with two worker processes on this machine.

    A cluster takes a worker for gone for ever that is not there 15 s after a death of it, also
    while it is being started again after another one; with tasks that kill their workers nobody is
    left then.
    """
    import dask
    from distributed import LocalCluster

    patient = dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"})
    with (
        patient,
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=":0",
        ) as found,
    ):
        yield found
        close_clusters()


@pytest.fixture(scope="module")
def dask(cluster):
    """The scheduler that users get for ``scheduler: tcp://...``."""
    with contextlib.closing(
        DaskScheduler.connect(cluster.scheduler_address, WorkerSettings())
    ) as found:
        yield found


@pytest.fixture(scope="module")
def local():
    with contextlib.closing(LocalScheduler(2)) as found:
        yield found


@pytest.fixture(params=["serial", "local", "dask"])
def scheduler(request):
    """Each of the three."""
    return (
        SerialScheduler() if request.param == "serial" else request.getfixturevalue(request.param)
    )


@pytest.fixture(params=["local", "dask"])
def parallel(request):
    """Those with other processes."""
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------ every task ends once


@pytest.mark.slow
def test_every_item_comes_back_once_with_its_own_result(scheduler):
    found = list(scheduler.map(tasks.square, iter(range(40))))
    assert Counter(done.index for done in found) == Counter(range(40))
    assert all(done.value == done.index**2 and not done.reason for done in found)
    assert list(scheduler.map(tasks.square, [])) == []


@pytest.mark.slow
def test_an_error_is_the_reason_of_its_item_alone(scheduler):
    found = {
        done.index: done for done in scheduler.map(tasks.with_machine_error, ["a", "raise", "b"])
    }
    assert [found[index].value for index in range(3)] == ["a", None, "b"]
    assert found[1].reason == "ValueError: negative density" and not found[1].died


@pytest.mark.slow
def test_two_workers_work_at_the_same_time_and_make_the_shared_object_once_each(parallel, tmp_path):
    shared = tasks.Counted(str(tmp_path / "made"), key=f"counted-{tmp_path}")
    found = [
        *parallel.map(tasks.who, [0.3] * 6, shared),
        *parallel.map(tasks.who, [0.3] * 6, shared),
    ]
    pids = {done.value[0] for done in found}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {done.value[1] for done in found} == {"made"}
    made = (tmp_path / "made").read_text().split()
    assert sorted(made) == sorted(map(str, pids)), "the model stays warm from call to call"


@pytest.mark.slow
def test_a_task_that_kills_its_worker_is_given_up_and_the_others_end(parallel):
    items = ["a", "b", "die", "c", "d", "e"]
    found = {done.index: done for done in parallel.map(tasks.with_machine_error, items)}
    assert sorted(found) == list(range(6))
    assert found[2].died and "died" in found[2].reason
    assert [found[index].value for index in (0, 1, 3, 4, 5)] == ["a", "b", "c", "d", "e"]


@pytest.mark.slow
def test_a_task_whose_worker_died_once_is_run_again(parallel, tmp_path):
    names = ["a", "victim", "b", "c"]
    found = [
        done.value
        for done in parallel.map(tasks.dies_once, [(str(tmp_path), name) for name in names])
    ]
    assert sorted(found) == sorted(names)


@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_no_task_and_doubles_none(parallel, tmp_path):
    def kill():
        end = time.monotonic() + 60
        while not list(tmp_path.glob("*-*")) and time.monotonic() < end:
            time.sleep(0.02)
        victim = next(tmp_path.glob("*-*")).name.split("-")[1]
        os.kill(int(victim), signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    found = list(parallel.map(tasks.wait_for, [(str(tmp_path), number) for number in range(8)]))
    killer.join()
    assert sorted(done.value for done in found) == list(range(8))
    starts = Counter(path.name.split("-")[0] for path in tmp_path.glob("*-*"))
    assert max(starts.values()) == 2, "the killed one was started twice"


@pytest.mark.slow
def test_a_local_task_is_tried_three_times(local, caplog):
    (done,) = local.map(tasks.with_machine_error, ["die"])
    assert done.died and f"died {MAX_DEATHS} times" in done.reason
    assert (
        sum("a worker process died (killed by SIGKILL)" in line for line in caplog.messages)
        == MAX_DEATHS
    )


def gone(pid):
    """Whether a process ends within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "return"])
def test_a_local_worker_that_ends_takes_the_programs_of_its_tasks_along(tmp_path, how):
    file = tmp_path / "program"
    with contextlib.closing(LocalScheduler(1)) as scheduler:
        (done,) = scheduler.map(tasks.leaves_a_program, [(str(file), how)])
        assert done.died == (how == "die")
        (alive,) = scheduler.map(tasks.square, [2])
        assert alive.value == 4
    assert gone(int(file.read_text()))


@pytest.mark.slow
def test_a_search_that_is_killed_takes_the_programs_of_its_tasks_along(tmp_path):
    file = tmp_path / "program"
    code = (
        "import scheduler_tasks as tasks; from magus_anharmonic.scheduler import"
        " LocalScheduler\nif __name__ == '__main__':"
        f" list(LocalScheduler(1).map(tasks.leaves_a_program, [({str(file)!r}, 'hang')]))"
    )
    paths = os.pathsep.join([str(Path(tasks.__file__).parent), *filter(None, sys.path)])
    search = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    end = time.monotonic() + 60
    while not (file.is_file() and file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    search.kill()
    search.wait()
    assert gone(int(file.read_text()))


@pytest.mark.slow
def test_leaving_in_the_middle_ends_what_runs(tmp_path):
    with contextlib.closing(LocalScheduler(2)) as scheduler:
        ends = scheduler.map(tasks.who, [0.0, 600.0, 600.0])
        first = next(ends)
        begun = time.monotonic()
        ends.close()
        assert first.value[0] > 0 and time.monotonic() - begun < 5


@pytest.mark.slow
def test_a_connection_that_breaks_is_made_again_and_no_task_is_lost(cluster, tmp_path):
    with contextlib.closing(
        DaskScheduler.connect(cluster.scheduler_address, WorkerSettings())
    ) as scheduler:
        ends = scheduler.map(tasks.who, [0.3] * 8)
        found = [next(ends)]
        client = scheduler._client
        client.loop.add_callback(lambda: client.scheduler_comm.comm.abort())
        found += list(ends)
    assert sorted(done.index for done in found) == list(range(8)) and not any(
        done.reason for done in found
    )


@pytest.mark.slow
def test_a_result_that_is_lost_with_the_connection_is_computed_again(cluster, monkeypatch):
    """The task had ended, and the connection broke before its result was here."""
    from distributed.client import Future, FutureCancelledError

    lost, fetch = [], Future.result

    def result(future, *arguments, **options):
        if not lost:
            lost.append(future.key)
            raise FutureCancelledError(future.key, "scheduler-connection-lost")
        return fetch(future, *arguments, **options)

    monkeypatch.setattr(Future, "result", result)
    with contextlib.closing(
        DaskScheduler.connect(cluster.scheduler_address, WorkerSettings())
    ) as scheduler:
        found = list(scheduler.map(tasks.who, [0.0] * 4))
    assert (
        lost
        and sorted(done.index for done in found) == list(range(4))
        and not any(done.reason for done in found)
    )


@pytest.mark.slow
def test_a_scheduler_that_is_gone_ends_the_call_with_a_reason(monkeypatch):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
    ) as short:
        scheduler = DaskScheduler.connect(short.scheduler_address, WorkerSettings())
        ends = scheduler.map(tasks.who, [0.2] * 50)
        next(ends)
        monkeypatch.setattr("magus_anharmonic.scheduler.cluster.PATIENCE", 3.0)
        short.close()
        with pytest.raises(
            MagusAnharmonicError,
            match="connection to the Dask scheduler is lost; finished work is kept",
        ):
            list(ends)
        scheduler.close()


# ------------------------------------------------------------------ addresses, files


def test_an_address_where_nobody_answers_is_refused():
    settings = parse_settings({"scheduler": "tcp://127.0.0.1:9", "workers": {"timeout": 2.0}})
    with (
        pytest.raises(
            InputError,
            match=r"tcp://127.0.0.1:9: no Dask scheduler answers within 2 s.*dask scheduler",
        ),
        open_scheduler(settings),
    ):
        pass


def test_an_address_with_tls_and_no_certificates_is_refused():
    with (
        pytest.raises(
            InputError, match=r"tls://127.0.0.1:9: Dask's configuration names no certificates"
        ),
        open_scheduler(
            parse_settings({"scheduler": "tls://127.0.0.1:9", "workers": {"timeout": 2.0}})
        ),
    ):
        pass


@pytest.mark.slow
def test_who_works_without_tls_on_another_machine_is_told(cluster, monkeypatch, caplog):
    for here in (True, False):
        monkeypatch.setattr(
            "magus_anharmonic.scheduler.cluster._is_here", lambda address, here=here: here
        )
        DaskScheduler.connect(cluster.scheduler_address, WorkerSettings()).close()
        assert any("can run programs as you" in line for line in caplog.messages) is not here
    assert (
        _is_here("tcp://127.0.0.1:1")
        and _is_here("tls://[::1]:1")
        and not _is_here("tcp://10.0.0.1:8786")
    )


@pytest.mark.parametrize(
    "address", ["tcp:/127.0.0.1:8786", "http://a:1", "tcp://host", "lokal", "SLURM", "tcp://a b:1"]
)
def test_what_is_no_scheduler_is_refused_with_what_is_allowed(address):
    with pytest.raises(
        InputError, match=r"^scheduler: .* must be local, serial, slurm, lsf, pbs, or the address"
    ):
        parse_settings({"scheduler": address})


@pytest.mark.parametrize(
    ("given", "seconds"), [("24:00:00", 86400), ("00:30", 1800), (7200, 7200), ("1:02:03", 3723)]
)
def test_walltimes_as_people_write_them(given, seconds):
    assert WorkerSettings(walltime=given).walltime == seconds


@pytest.mark.parametrize(
    "keys",
    [
        {"walltime": "a day"},
        {"walltime": "00:01:00"},
        {"memory": "16"},
        {"gpus": -1},
        {"count": 0},
        {"cpus": 1},
    ],
)
def test_wrong_workers_are_refused(keys):
    with pytest.raises(InputError, match="workers"):
        parse_settings({"workers": keys})


def test_folders_travel_as_bytes_and_only_what_changed_comes_back(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "sub").mkdir(parents=True)
    (here / "start.npz").write_bytes(b"\0\1")
    (here / "sub" / "log").write_text("a")
    (here / ".start-x.tmp").write_text("half-written")
    sent = packed(here)
    unpack(sent, there)
    assert packed(there) == sent == {"start.npz": b"\0\1", "sub/log": b"a"}
    (there / "result.json").write_text("{}")
    (there / "sub" / "log").write_text("ab")
    assert changed(sent, packed(there)) == {"result.json": b"{}", "sub/log": b"ab"}
    assert packed(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd-of-nobody", "a/../../b"])
def test_a_worker_cannot_write_outside_the_folder(tmp_path, name):
    with pytest.raises(MagusAnharmonicError, match="outside its folder"):
        unpack({name: b"x"}, tmp_path / "run")
    assert not (tmp_path / "outside").exists()


# ------------------------------------------------------------------ labels, relaxations, SSCHA


def at(address):
    return parse_settings({"scheduler": address, "Fitness": ["SSCHA"], "sscha": {}})


def copper(scale):
    atoms = bulk("Cu", cubic=True, a=3.6 * scale)
    atoms.rattle(0.05, seed=3)
    return atoms


@pytest.mark.parametrize(
    ("own", "keys", "expected"),
    [
        (None, {"workers": {"count": 3}}, 3),
        (5, {"workers": {"count": 3}}, 5),
        (5, {"scheduler": "serial"}, 1),
    ],
)
def test_labels_here_run_as_many_at_a_time_as_the_keys_say(tmp_path, own, keys, expected):
    settings = LabelerSettings(calculator="ase.calculators.emt.EMT", n_workers=own)
    with get_labeler(settings, tmp_path, parse_settings(keys)) as labeler:
        assert labeler.n_workers == expected


@pytest.mark.slow
def test_labels_on_dask_workers_are_those_made_here(cluster, tmp_path):
    structures = [copper(scale) for scale in (1.0, 1.02, 0.97)]
    settings = LabelerSettings(calculator="ase.calculators.emt.EMT", n_workers=1)
    seen = []
    with (
        get_labeler(settings, tmp_path, at(cluster.scheduler_address)) as labeler,
        get_labeler(settings, tmp_path / "here") as here,
    ):
        assert isinstance(labeler, ScheduledLabeler) and labeler.settings_hash == here.settings_hash
        found = labeler.label(structures, lambda index, label: seen.append(index))
        for one, other in zip(found, here.label(structures), strict=True):
            assert (
                one.energy == other.energy
                and (one.forces == other.forces).all()
                and (one.stress == other.stress).all()
            )
    assert sorted(seen) == [0, 1, 2]
    assert not list(tmp_path.glob("slot*")), "workers write nothing into the search's folder"


@pytest.mark.slow
def test_a_code_that_crashes_on_a_worker_is_a_failure_with_its_files_and_the_worker_lives(
    cluster, dask, tmp_path
):
    behaviour = {"2": "segfault", "3": "raise"}
    settings = LabelerSettings(
        calculator="misbehaving.Misbehaving", arguments={"behaviour": behaviour}, timeout=60.0
    )
    before = set(dask._client.nthreads())
    with get_labeler(settings, tmp_path, at(cluster.scheduler_address)) as labeler:
        chain = [
            Atoms(
                f"H{n}",
                positions=[[0, 0, 2.0 * i] for i in range(n)],
                cell=[3, 3, 2.0 * n],
                pbc=True,
            )
            for n in (1, 2, 3, 4)
        ]
        found = labeler.label(chain)
    assert [result.ok for result in found] == [True, False, False, True]
    assert "SIGSEGV" in found[1].reason and "the density is negative" in found[2].reason
    assert len(list((tmp_path / "failed").glob("*/worker.log"))) == 2
    assert set(dask._client.nthreads()) == before


@pytest.mark.slow
def test_relaxations_of_a_search_are_done_by_the_workers_and_none_by_its_own_process(
    cluster, tmp_path
):
    from distributed import Client

    block = {
        "calculator": "scheduler_tasks.Witness",
        "arguments": {"folder": str(tmp_path)},
        "maxStep": 3,
    }
    settings = parse_settings(
        {"scheduler": cluster.scheduler_address, "symbols": ["Cu"], "MainCalculator": block}
    )
    relaxer = build_relaxer(settings)
    assert relaxer.scheduling is settings and relaxer.run_dir is None and relaxer.evaluator.model_id
    for asked in tmp_path.iterdir():  # for its id, here
        asked.unlink()
    assert (
        len(relaxer.relax([bulk("Cu", a=3.5 + 0.01 * i) for i in range(60)], tmp_path / "chunks"))
        == 60
    )
    with Client(cluster) as client:
        workers = {f"{socket.gethostname()} {pid}" for pid in client.run(os.getpid).values()}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == workers and len(
        workers
    ) == 2
    with pytest.raises(TypeError):
        Relaxer(relaxer.evaluator, relaxer.settings, 0.0, settings)


@pytest.mark.slow
def test_relaxations_on_dask_workers_are_those_made_here_in_the_same_chunks(dask, monkeypatch):
    relax_in_both_places(
        dask, fakes.Emt(), [bulk("Cu", a=3.5 + 0.05 * i) for i in range(5)], monkeypatch
    )


@pytest.mark.full
def test_relaxations_with_a_checkpoint_that_travels_are_bitwise_those_made_here(
    dask, potential, h3s, monkeypatch
):
    relax_in_both_places(
        dask, potential, [h3s(a, 0.1) for a in (2.9, 3.0, 3.1, 3.2, 3.3)], monkeypatch
    )


def relax_in_both_places(dask, potential, structures, monkeypatch):
    options = {"pressure": 100.0, "max_steps": 5}
    monkeypatch.setattr("magus_anharmonic.potential.relax.CHUNK", {"cpu": 2, "cuda": 2})
    seen = []
    found = relax_on(
        dask, potential, structures, on_relaxed=lambda index, result: seen.append(index), **options
    )
    expected = [
        result
        for first in (0, 2, 4)
        for result in relax(potential, structures[first : first + 2], **options)
    ]
    assert sorted(seen) == list(range(5))
    for one, other in zip(found, expected, strict=True):
        assert one.energy == other.energy and one.n_steps == other.n_steps
        assert (one.atoms.positions == other.atoms.positions).all() and (
            one.forces == other.forces
        ).all()


def test_a_checkpoint_travels_as_bytes_and_a_replaced_one_is_refused(potential, tmp_path):
    import dataclasses

    source = serialised(potential, remote=True)
    elsewhere = dataclasses.replace(source, checkpoint=str(tmp_path / "not-mounted" / "tiny.pth"))
    made = elsewhere.make()
    atoms = copper(1.0)
    assert made.evaluate([atoms]).energy == potential.evaluate([atoms]).energy
    with pytest.raises(MagusAnharmonicError, match="was replaced"):
        dataclasses.replace(source, model_id="another").make()


METALS = (("Cu", 3.55), ("Al", 3.95))


def sscha_jobs(folder, workers, crystals=METALS):
    """Free energies of metals on EMT by the real engine, at two temperatures, as the ranking runs
    them."""
    options = {"n_configs": 10, "max_populations": 1, "supercell": (1, 1, 2), "cell": "fixed"}
    jobs = []
    for symbol, a in crystals:
        atoms = bulk(symbol, a=a, cubic=True)
        generator = np.random.default_rng([5, int(structure_id(atoms), 16)])
        seeded = {**options, "seed": int(generator.integers(2**31))}
        name = f"{symbol}{a}"
        jobs.append(
            Job(name, atoms, (0.0, 300.0), (folder / f"{name}-0", folder / f"{name}-300"), seeded)
        )
    found = {}

    def done(job, outcomes):
        for outcome, place in zip(outcomes, job.folders, strict=True):
            assert (place / "result.json").is_file(), (
                "its files are here when the client hears of it"
            )
            found[place.name] = outcome.result.numbers.gibbs

    run_jobs(jobs, fakes.Emt(), free_energy, done, workers)
    return found


@pytest.mark.full
def test_sscha_gives_the_same_numbers_with_one_worker_and_with_eight(tmp_path):
    crystals = [(symbol, a + strain) for symbol, a in METALS for strain in (0.0, 0.01, 0.02, 0.03)]
    with (
        contextlib.closing(LocalScheduler(1, threads=1)) as one,
        contextlib.closing(LocalScheduler(8, threads=1)) as eight,
    ):
        expected = sscha_jobs(tmp_path / "one", one, crystals)
        assert len(expected) == 16 and len(set(expected.values())) == 16
        assert sscha_jobs(tmp_path / "eight", eight, crystals) == expected
        assert len({done.value[0] for done in eight.map(tasks.who, [0.1] * 16)}) == 8, (
            "all of them work"
        )


@pytest.mark.slow
def test_sscha_gives_the_same_numbers_in_one_process_in_two_and_on_dask(dask, local, tmp_path):
    expected = sscha_jobs(tmp_path / "one", SerialScheduler())
    assert len(expected) == 4 and np.isfinite(list(expected.values())).all()
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")}
    for name, workers in (("two", local), ("dask", dask)):
        assert sscha_jobs(tmp_path / name, workers) == expected
        assert {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")} == names
        for file in sorted((tmp_path / "one").rglob("population_*.npz")):
            with (
                np.load(file) as a,
                np.load(tmp_path / name / file.relative_to(tmp_path / "one")) as b,
            ):
                assert all((a[key] == b[key]).all() for key in a.files), (
                    "bitwise the same ensembles"
                )
    populations = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "dask").rglob("population_*.npz")
    }
    assert len(populations) == 4
    assert sscha_jobs(tmp_path / "dask", dask) == expected
    assert {path: path.stat().st_mtime_ns for path in populations} == populations, (
        "what is finished is neither run nor written again"
    )


@pytest.mark.slow
def test_a_candidate_that_kills_its_worker_is_a_failure_that_is_tried_again_later(dask, tmp_path):
    found = {}
    jobs = [
        Job(s, bulk(s), (0.0,), (tmp_path / "sscha" / s,), {"pressure": 0.0})
        for s in ("Cu", "Ni", "Al")
    ]
    run_jobs(
        jobs,
        fakes.Emt(),
        fakes.failing_on_gold,
        lambda job, outcomes: found.update({job.structure: outcomes[0]}),
        dask,
    )
    assert found["Cu"].result is not None and found["Al"].result is not None
    assert (
        found["Ni"].result is None
        and not found["Ni"].lasting
        and "worker died" in found["Ni"].reason
    )
