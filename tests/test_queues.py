"""Jobs of SLURM, LSF and PBS: the scripts that are sent, and a run through a queue system that is played by small programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import dask
import pytest
import scheduler_tasks as tasks

from magus_anharmonic.errors import InputError
from magus_anharmonic.scheduler import close_clusters, open_scheduler
from magus_anharmonic.scheduler.queues import CLASSES, COMMANDS, arguments, missing
from magus_anharmonic.settings import WorkerSettings, parse_settings

_ctrl_c, _end = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
dask_jobqueue = pytest.importorskip("dask_jobqueue", reason="skipped: dask-jobqueue is not installed (extra cluster)")
signal.signal(signal.SIGINT, _ctrl_c)  # the package takes both when it is imported
signal.signal(signal.SIGTERM, _end)

WORKERS = WorkerSettings(
    count=2, cores=8, gpus=1, memory="16 GB", walltime="12:00:00", queue="gpu", account="h3s", python="/env/bin/python",
    directives=["--exclusive"], prologue=["source /env/bin/activate"], scratch="/tmp/x",
)  # fmt: skip

PROLOGUE = [
    "export OMP_NUM_THREADS=8", "export OPENBLAS_NUM_THREADS=8", "export MKL_NUM_THREADS=8",
    "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False", "export DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL=1s",
    "export DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL=10s", "source /env/bin/activate",
]  # fmt: skip

HEADERS = {
    "slurm": [
        "#SBATCH -J magus-anharmonic", "#SBATCH -p gpu", "#SBATCH -A h3s", "#SBATCH -n 1", "#SBATCH --cpus-per-task=8", "#SBATCH --mem=15G",
        "#SBATCH -t 12:00:00", "#SBATCH --gres=gpu:1", "#SBATCH --exclusive",
    ],
    "lsf": [
        "#BSUB -J magus-anharmonic", "#BSUB -q gpu", '#BSUB -P "h3s"', "#BSUB -n 8", '#BSUB -R "span[hosts=1]"', "#BSUB -W 12:00",
        "#BSUB -gpu num=1", "#BSUB --exclusive",
    ],
    "pbs": [
        "#PBS -N magus-anharmonic", "#PBS -q gpu", "#PBS -A h3s", "#PBS -l select=1:ncpus=8:mem=16gb:ngpus=1", "#PBS -l walltime=12:00:00",
        "#PBS --exclusive",
    ],
}  # fmt: skip


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Programs that play the queue systems: a job starts at once on this machine, and cancelling kills it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # dask-jobqueue makes the folder of its logs when it is asked for a script
    start = f'setsid bash "$script" > {tmp_path}/job-$$.out 2>&1 < /dev/null & echo $! >> {tmp_path}/pids\n'
    sent = f"{tmp_path}/sent.sh"
    log = f'echo "$0 $*" >> {tmp_path}/commands\n'
    programs = {
        "sbatch": f'{log}script="${{!#}}"; cp "$script" {sent}; script={sent}\n{start}echo "Submitted batch job $!"',
        "bsub": f'{log}cat "$@" > {sent}; script={sent}\n{start}echo "Job <$!> is submitted to queue <gpu>."',
        "qsub": f'{log}script="${{!#}}"; cp "$script" {sent}; script={sent}\n{start}echo "$!.server"',
        **{name: f'{log}for id in "$@"; do kill -- -"${{id%.server}}"; done; exit 0' for name in ("scancel", "bkill", "qdel")},
        "squeue": log,
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(tasks.__file__).parent), *filter(None, sys.path)]))
    return tmp_path


@pytest.mark.parametrize("name", CLASSES)
def test_the_job_script_asks_for_what_the_keys_say(name, tools, monkeypatch):
    if name == "lsf":
        monkeypatch.setattr("dask_jobqueue.lsf.lsf_detect_units", lambda: "mb")
    with getattr(dask_jobqueue, CLASSES[name])(**arguments(name, WORKERS)) as cluster:
        lines = cluster.job_script().strip().splitlines()
        address = cluster.scheduler_address
    head = [line for line in lines if line.startswith(("#SBATCH", "#BSUB", "#PBS"))]
    assert [line for line in head if "worker-logs" not in line and " -M " not in line] == HEADERS[name]
    body = [line for line in lines if not line.startswith("#") and line]
    assert body[:-1][-len(PROLOGUE) :] == PROLOGUE
    assert body[-1].startswith(f"/env/bin/python -m distributed.cli.dask_worker {address} ")
    for part in ("--nthreads 1", "--nanny", "--local-directory /tmp/x", "--lifetime 42900s", "--lifetime-stagger 120s"):
        assert part in body[-1]


def test_several_gpus_per_job_are_workers_of_dask_cuda():
    given = arguments("slurm", WorkerSettings(gpus=4))
    assert given["worker_command"] == "dask_cuda.cli" and "--gres=gpu:4" in given["job_extra_directives"]


@pytest.mark.parametrize("name", CLASSES)
def test_without_the_commands_of_the_queue_system_it_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = parse_settings({"scheduler": name})
    with pytest.raises(InputError, match=f"scheduler: {name}: no command {COMMANDS[name][0]}.*address of a Dask scheduler"):
        with open_scheduler(settings):
            pass


def test_what_is_missing_for_several_gpus_is_named(tools):
    assert "dask-cuda" in missing("slurm", WorkerSettings(gpus=2)) or not missing("slurm", WorkerSettings(gpus=2))
    assert missing("slurm", WorkerSettings()) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("slurm"), pytest.param("lsf", marks=pytest.mark.full), pytest.param("pbs", marks=pytest.mark.full)]
)
def test_tasks_run_in_jobs_that_are_sent_and_ended(name, tools, monkeypatch):
    if name == "lsf":
        monkeypatch.setattr("dask_jobqueue.lsf.lsf_detect_units", lambda: "mb")
    workers = {"count": 1, "memory": "1 GB", "scratch": str(tools / "scratch"), "logs": str(tools / "logs"), "interface": "lo"}
    settings = parse_settings({"scheduler": name, "workers": workers})
    try:
        with open_scheduler(settings) as scheduler:
            found = [done.value for done in scheduler.map(tasks.who, [0.0] * 4)]
            again = [done.value for done in scheduler.map(tasks.square, [2, 3])]
    finally:
        close_clusters()
    assert len({pid for pid, _ in found}) == 1 and os.getpid() not in {pid for pid, _ in found}
    assert sorted(again) == [4, 9]
    called = [Path(line.split()[0]).name for line in (tools / "commands").read_text().splitlines()]
    assert called[0] == COMMANDS[name][0] and COMMANDS[name][1] in called, "the job is ended when it is not needed any more"


@pytest.mark.slow
def test_a_job_that_ends_is_sent_again(tools):
    """At its walltime, or with its node: Dask takes it off its list and sends no other one by itself."""
    workers = {"count": 1, "memory": "1 GB", "scratch": str(tools / "scratch"), "logs": str(tools / "logs"), "interface": "lo"}
    settings = parse_settings({"scheduler": "slurm", "workers": workers})
    ended = threading.Event()

    def run() -> None:
        with open_scheduler(settings) as scheduler:
            (first,) = [done.value[0] for done in scheduler.map(tasks.who, [0.0])]
            os.killpg(int((tools / "pids").read_text()), signal.SIGKILL)
            found = sorted(done.value for done in scheduler.map(tasks.square, [1, 2, 3]))
            (second,) = [done.value[0] for done in scheduler.map(tasks.who, [0.0])]
            if found == [1, 4, 9] and first != second:
                ended.set()

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        try:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(120)
        finally:
            close_clusters()
    assert ended.is_set(), "nobody was left to work"
    sent = [line for line in (tools / "commands").read_text().splitlines() if Path(line.split()[0]).name == "sbatch"]
    assert len(sent) == 2


def test_asking_for_a_queue_leaves_ctrl_c_as_it_was():
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM);"
        "from magus_anharmonic.scheduler.queues import _dask_jobqueue; _dask_jobqueue();"
        "assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
