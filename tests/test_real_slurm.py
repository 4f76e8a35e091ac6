"""SLURM itself, and PBS's commands in front of it: a node of its own on the loopback address.

Debian has them: apt-get install slurm-wlm slurm-wlm-torque munge; the daemons need root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
import real_slurm
import scheduler_tasks as tasks
import yaml
from test_queues import dask_jobqueue
from test_scheduler import copper, sscha_jobs
from test_search import INPUT, files
from waiting import wait_for

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.scheduler import close_clusters, open_scheduler
from magus_anharmonic.scheduler.base import SerialScheduler
from magus_anharmonic.settings import LabelerSettings, parse_settings

assert dask_jobqueue
LACKING = real_slurm.missing()
pytestmark = [
    pytest.mark.real_slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"skipped: {LACKING}"),
]


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    with real_slurm.slurm(tmp_path_factory.mktemp("slurm")) as configuration:
        yield configuration


@pytest.fixture
def queue(daemons, monkeypatch, tmp_path):
    """In a folder of its own, with SLURM's commands meaning that cluster and no job left."""
    monkeypatch.setenv("SLURM_CONF", str(daemons))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(tasks.__file__).parent), *filter(None, sys.path)])
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    close_clusters()
    subprocess.run(["scancel", "-p", "normal"], check=True)
    wait_for(lambda: not jobs(), "jobs are left in the queue")


def jobs(state: str = "") -> list[str]:
    """Numbers of the jobs in the queue, or of those in one state."""
    chosen = ["-t", state] if state else []
    return subprocess.run(
        ["squeue", "-h", "-o", "%i", *chosen], capture_output=True, text=True, check=True
    ).stdout.split()


def keys(folder: Path, scheduler: str = "slurm", **workers) -> dict:
    given = {"count": 1, "cores": 1, "memory": "2 GB", "queue": "normal", "walltime": "00:30:00"}
    where = {"scratch": str(folder / "scratch"), "logs": str(folder / "logs"), "interface": "lo"}
    return {"scheduler": scheduler, "workers": {**given, **where, **workers}}


def opened(folder: Path, scheduler: str = "slurm", **workers):
    return open_scheduler(parse_settings(keys(folder, scheduler, **workers)))


@pytest.mark.parametrize("name", ["slurm", "pbs"])
def test_numbers_are_those_of_this_process(queue, name):
    """SSCHA and labels through sbatch, and through PBS's qsub in front of the same SLURM."""
    if name == "pbs" and shutil.which("qsub") is None:
        pytest.skip("skipped: no qsub here (apt-get install slurm-wlm-torque)")
    expected = sscha_jobs(queue / "here", SerialScheduler())
    with opened(queue, name, count=2) as scheduler:
        assert sscha_jobs(queue / "there", scheduler) == expected
        assert len(jobs("RUNNING")) >= 1
    structures = [copper(scale) for scale in (1.0, 1.02)]
    emt = LabelerSettings(calculator="ase.calculators.emt.EMT", n_workers=1)
    elsewhere = parse_settings({**keys(queue, name), "Fitness": ["SSCHA"], "sscha": {}})
    with get_labeler(emt, queue / "a", elsewhere) as there, get_labeler(emt, queue / "b") as here:
        for one, other in zip(there.label(structures), here.label(structures), strict=True):
            assert one.energy == other.energy and (one.stress == other.stress).all()


def test_a_search_through_slurm_is_the_search_of_this_machine(queue):
    """With SSCHA, from the command line; Dask's own words stay off the screen."""
    fitness = {
        "Fitness": ["SSCHA"],
        "sscha": {"keep_best": 1, "n_configs": 10, "max_populations": 1, "supercell": [1, 1, 1]},
    }
    shown = {}
    for name, where in (("here", {"scheduler": "serial"}), ("there", keys(queue))):
        folder = queue / name
        folder.mkdir()
        given = {**INPUT, **fitness, "numGen": 1, **where}
        (folder / "input.yaml").write_text(yaml.safe_dump(given))
        command = [sys.executable, "-m", "magus_anharmonic", "search"]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        assert found.returncode == 0, found.stderr[-2000:]
        shown[name] = found.stdout + found.stderr
    assert files(queue / "there") == files(queue / "here")
    ranking = "results/anharmonic/ranking.csv"
    assert (queue / "there" / ranking).read_text() == (queue / "here" / ranking).read_text()
    assert list((queue / "logs").glob("magus-anharmonic-*.out")), "jobs ran"
    for words in ("Adaptive scaling", "Lost all workers", "distributed.", "Traceback"):
        assert words not in shown["there"]


def meanwhile(action) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_a_job_that_is_cancelled_is_sent_again_and_its_task_runs_again(queue):
    def cancel():
        wait_for(lambda: (queue / "begun").exists(), "no task runs")
        subprocess.run(["scancel", *jobs("RUNNING")], check=True)

    thread = meanwhile(cancel)
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        with opened(queue) as scheduler:
            (found,) = scheduler.map(tasks.slow_the_first_time, [str(queue / "begun")])
    thread.join()
    assert found.value == 2, "the second run ended"


@pytest.mark.full  # a minute is the least that SLURM knows
def test_a_job_that_outlives_its_walltime_is_sent_again(queue):
    """SLURM ends it (walltime 5 min is the least that the keys allow, so scontrol shortens it)."""

    def shorten():
        wait_for(lambda: (queue / "begun").exists(), "no task runs")
        for job in jobs("RUNNING"):
            subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"], check=True)

    thread = meanwhile(shorten)
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        with opened(queue) as scheduler:
            (found,) = scheduler.map(tasks.slow_the_first_time, [str(queue / "begun")])
    thread.join()
    assert found.value == 2
    said = "".join(file.read_text() for file in (queue / "logs").glob("*.err"))
    assert "DUE TO TIME LIMIT" in said


def test_jobs_wait_for_a_drained_node_and_run_when_it_is_resumed(queue):
    node = subprocess.run(
        ["sinfo", "-h", "-o", "%N"], capture_output=True, text=True
    ).stdout.strip()
    update = ["scontrol", "update", f"NodeName={node}"]
    subprocess.run([*update, "State=DRAIN", "Reason=test"], check=True)
    waited = []

    def resume():
        wait_for(lambda: jobs("PENDING"), "no job waits")
        time.sleep(2)
        waited.extend(jobs("RUNNING"))
        subprocess.run([*update, "State=RESUME"], check=True)

    thread = meanwhile(resume)
    with opened(queue) as scheduler:
        assert [done.value for done in scheduler.map(tasks.square, [3])] == [9]
    thread.join()
    assert not waited, "nothing ran while it was drained"


@pytest.mark.full
def test_a_full_machine_is_waited_for(queue):
    """All cores are another job's until it ends."""
    script = queue / "wait.sh"
    script.write_text("#!/bin/sh\nsleep 600\n")
    subprocess.run(["sbatch", "-c", "8", "-o", "/dev/null", script], check=True)
    wait_for(lambda: jobs("RUNNING"), "the other job does not run")
    waited = []

    def make_room():
        wait_for(lambda: jobs("PENDING"), "no job waits")
        waited.extend(jobs("PENDING"))
        subprocess.run(["scancel", "-n", "wait.sh"], check=True)

    thread = meanwhile(make_room)
    with opened(queue) as scheduler:
        assert [done.value for done in scheduler.map(tasks.square, [3])] == [9]
    thread.join()
    assert len(waited) == 1


@pytest.mark.full
def test_a_queue_that_takes_no_jobs_is_asked_again_and_says_why(queue, caplog):
    close = ["scontrol", "update", "PartitionName=normal"]
    subprocess.run([*close, "State=INACTIVE"], check=True)

    def reopen():
        wait_for(lambda: "refuses a job" in caplog.text, "nothing was refused")
        subprocess.run([*close, "State=UP"], check=True)

    thread = meanwhile(reopen)
    with opened(queue) as scheduler:
        assert [done.value for done in scheduler.map(tasks.square, [3])] == [9]
    thread.join()
    assert "sbatch refuses a job (sbatch: error: Batch job submission failed" in caplog.text


@pytest.mark.full
def test_wrong_keys_of_the_queue_end_with_slurms_own_words(queue, monkeypatch):
    monkeypatch.setattr("magus_anharmonic.scheduler.queues.GIVE_UP", 3.0)
    monkeypatch.setattr("magus_anharmonic.scheduler.queues.FIRST_PAUSE", 0.5)
    with opened(queue, queue="nowhere") as scheduler:
        with pytest.raises(MagusAnharmonicError, match="sbatch has refused every job.*partition"):
            list(scheduler.map(tasks.square, [3]))
