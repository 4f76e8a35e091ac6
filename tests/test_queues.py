"""Jobs of SLURM, LSF and PBS: the scripts that are sent, and a run through a queue system that is
played by small programs."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import psutil
import pytest
import scheduler_tasks as tasks
from distributed import Client
from distributed.utils import get_ip

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.scheduler import close_clusters, open_scheduler
from magus_anharmonic.scheduler.cluster import DaskScheduler
from magus_anharmonic.scheduler.queues import (
    CLASSES,
    COMMANDS,
    Certificates,
    Submissions,
    arguments,
    missing,
    start_cluster,
)
from magus_anharmonic.settings import WorkerSettings, parse_settings

_ctrl_c, _end = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
dask_jobqueue = pytest.importorskip(
    "dask_jobqueue", reason="skipped: dask-jobqueue is not installed (extra cluster)"
)
signal.signal(signal.SIGINT, _ctrl_c)  # the package takes both when it is imported
signal.signal(signal.SIGTERM, _end)

WORKERS = WorkerSettings(
    count=2,
    cores=8,
    gpus=1,
    memory="16 GB",
    walltime="12:00:00",
    queue="gpu",
    account="h3s",
    python="/env/bin/python",
    directives=["--exclusive"],
    prologue=["source /env/bin/activate"],
    scratch="/tmp/x",
)

PROLOGUE = [
    "export OMP_NUM_THREADS=8",
    "export OPENBLAS_NUM_THREADS=8",
    "export MKL_NUM_THREADS=8",
    "export NUMEXPR_NUM_THREADS=8",
    "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False",
    "export DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL=1s",
    "export DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL=10s",
    "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES=[]",
    "source /env/bin/activate",
]

HEADERS = {
    "slurm": [
        "#SBATCH -J magus-anharmonic",
        "#SBATCH -p gpu",
        "#SBATCH -A h3s",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=15G",
        "#SBATCH -t 12:00:00",
        "#SBATCH --gres=gpu:1",
        "#SBATCH --exclusive",
    ],
    "lsf": [
        "#BSUB -J magus-anharmonic",
        "#BSUB -q gpu",
        '#BSUB -P "h3s"',
        "#BSUB -n 8",
        '#BSUB -R "span[hosts=1]"',
        "#BSUB -W 12:00",
        "#BSUB -gpu num=1",
        "#BSUB --exclusive",
    ],
    "pbs": [
        "#PBS -N magus-anharmonic",
        "#PBS -q gpu",
        "#PBS -A h3s",
        "#PBS -l select=1:ncpus=8:mem=16gb:ngpus=1",
        "#PBS -l walltime=12:00:00",
        "#PBS --exclusive",
    ],
}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Programs that play the queue systems: a job starts at once on this machine, and cancelling
    kills it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.chdir(
        tmp_path
    )  # dask-jobqueue makes the folder of its logs when it is asked for a script
    start = (
        f'setsid bash "$script" > {tmp_path}/job-$$.out 2>&1 < /dev/null & echo $! >>'
        f" {tmp_path}/pids\n"
    )
    sent = f"{tmp_path}/sent.sh"
    log = f'echo "$0 $*" >> {tmp_path}/commands\n'
    programs = {
        "sbatch": (
            f'{log}script="${{!#}}"; cp "$script" {sent}; script={sent}\n{start}echo "Submitted'
            ' batch job $!"'
        ),
        "bsub": (
            f'{log}cat "$@" > {sent}; script={sent}\n{start}echo "Job <$!> is submitted to queue'
            ' <gpu>."'
        ),
        "qsub": (
            f'{log}script="${{!#}}"; cp "$script" {sent}; script={sent}\n{start}echo "$!.server"'
        ),
        **{
            name: f'{log}for id in "$@"; do kill -- -"${{id%.server}}"; done; exit 0'
            for name in ("scancel", "bkill", "qdel")
        },
        "squeue": log,
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(tasks.__file__).parent), *filter(None, sys.path)])
    )
    return tmp_path


@pytest.mark.parametrize("name", CLASSES)
def test_the_job_script_asks_for_what_the_keys_say(name, tools, monkeypatch):
    if name == "lsf":
        monkeypatch.setattr("dask_jobqueue.lsf.lsf_detect_units", lambda: "mb")
    cluster = start_cluster(name, WORKERS)
    try:
        lines = cluster.job_script().strip().splitlines()
        address = cluster.scheduler_address
        words = lines[-1].split()
        secrets = [
            Path(words[words.index(flag) + 1])
            for flag in ("--tls-ca-file", "--tls-cert", "--tls-key")
        ]
        assert all(
            file.is_relative_to(tools / "worker-logs") and file.stat().st_mode & 0o777 == 0o600
            for file in secrets
        )
        assert secrets[0].parent.stat().st_mode & 0o777 == 0o700
        assert "PRIVATE KEY" in secrets[2].read_text() and "PRIVATE KEY" not in "".join(lines)
    finally:
        DaskScheduler(
            Client(cluster, set_as_default=False), description="", cluster=cluster
        ).close()
    assert address.startswith("tls://") and not any(file.exists() for file in secrets), (
        "they go with the cluster"
    )
    head = [line for line in lines if line.startswith(("#SBATCH", "#BSUB", "#PBS"))]
    assert [line for line in head if "worker-logs" not in line and " -M " not in line] == HEADERS[
        name
    ]
    body = [line for line in lines if not line.startswith("#") and line]
    assert body[:-1][-len(PROLOGUE) :] == PROLOGUE
    assert body[-1].startswith(f"/env/bin/python -m distributed.cli.dask_worker {address} ")
    for part in (
        "--nthreads 1",
        "--nanny",
        "--local-directory /tmp/x",
        "--lifetime 42900s",
        "--lifetime-stagger 120s",
        "--protocol tls://",
        "--no-dashboard",
    ):
        assert part in body[-1]


def test_certificates_of_a_killed_process_go_with_the_next_start(tmp_path):
    """They stayed in worker-logs for ever; those of a search that runs beside are left alone."""
    code = (
        "import sys, time; from pathlib import Path; from magus_anharmonic.scheduler.queues import Certificates\n"
        "made = Certificates(Path(sys.argv[1])); print(made.folder, flush=True); time.sleep(600)"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    killed, running = (Path(other.stdout.readline().strip()) for other in others)
    assert killed.is_dir() and running.is_dir()
    (killed / "tls_worker_key.pem").write_text("secret")
    others[0].kill()
    others[0].wait()
    mine = Certificates(tmp_path)
    assert {*tmp_path.iterdir()} == {running, mine.folder}
    mine.remove()
    others[1].kill()
    others[1].wait()
    Certificates(tmp_path).remove()
    assert not [*tmp_path.iterdir()]


def test_several_gpus_per_job_are_workers_of_dask_cuda():
    given = arguments("slurm", WorkerSettings(gpus=4))
    assert (
        given["worker_command"] == "dask_cuda.cli"
        and "--gres=gpu:4" in given["job_extra_directives"]
    )


def small(tools, count):
    """Keys of workers that fit this machine."""
    folders = {name: str(tools / name) for name in ("scratch", "logs")}
    return {"count": count, "memory": "1 GB", "interface": "lo", **folders}


ONE_OF_EACH = [
    "slurm",
    pytest.param("lsf", marks=pytest.mark.full),
    pytest.param("pbs", marks=pytest.mark.full),
]


def connects(address, **security):
    """Whether a client in an environment of its own can have its code run at ``address``."""
    code = (
        "import sys; from distributed import Client; from distributed.security import Security\n"
        f"with Client({address!r}, timeout=4, security={security.get('made', 'None')}) as client:\n"
        "    print('ran', client.run_on_scheduler(lambda: 6 * 7))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return "ran 42" in found.stdout


def listening():
    """Addresses at which this process listens."""
    return [
        entry.laddr.ip
        for entry in psutil.Process().net_connections()
        if entry.status == psutil.CONN_LISTEN
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_stranger_is_refused_and_nothing_listens_where_it_was_not_asked(name, tools, monkeypatch):
    if name == "lsf":
        monkeypatch.setattr("dask_jobqueue.lsf.lsf_detect_units", lambda: "mb")
    before = listening()
    workers = WorkerSettings(memory="1 GB", interface="lo", scratch=str(tools / "scratch"))
    cluster = start_cluster(name, workers)
    try:
        opened = listening()
        for address in before:
            opened.remove(address)
        assert opened and set(opened) == {"127.0.0.1"}
        address = cluster.scheduler_address
        assert not connects(address.replace("tls", "tcp")), "without certificates"
        assert not connects(address, made="Security.temporary()"), "with certificates of its own"
        with Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=100)
            assert client.run_on_scheduler(lambda: 6 * 7) == 42
            (worker,) = client.nthreads()
            assert worker.startswith("tls://")
    finally:
        cluster.close(timeout=20)


def test_without_an_interface_the_scheduler_listens_at_one_address(tools):
    (host,) = (
        arguments("slurm", WorkerSettings())["scheduler_options"].get(key) for key in ("host",)
    )
    assert host == get_ip() and host != "0.0.0.0"
    assert "host" not in arguments("slurm", WorkerSettings(interface="lo"))["scheduler_options"]
    with dask.config.set({"jobqueue.slurm.interface": "ib0"}):
        assert "host" not in arguments("slurm", WorkerSettings())["scheduler_options"]


def refusing(tools, name, times):
    """Let the queue system say no ``times`` times."""
    program = tools / "bin" / COMMANDS[name][0]
    program.rename(program.with_suffix(".real"))
    program.write_text(
        f'#!/bin/bash\necho . >> {tools}/calls\n[ "$(wc -l < {tools}/calls)" -gt {times} ] && exec'
        f' {program}.real "$@"\necho "{name}: controller away for a moment" >&2; exit 1\n'
    )
    program.chmod(0o755)


@pytest.fixture
def hurried(monkeypatch):
    """No long pauses."""
    monkeypatch.setattr("dask_jobqueue.lsf.lsf_detect_units", lambda: "mb")
    for key, value in {"FIRST_PAUSE": 0.05, "LONGEST_PAUSE": 0.2, "GIVE_UP": 3.0}.items():
        monkeypatch.setattr(f"magus_anharmonic.scheduler.queues.{key}", value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_queue_that_refuses_for_a_moment_is_asked_again(name, tools, hurried, caplog):
    refusing(tools, name, "4")
    workers = small(tools, 2)
    try:
        with open_scheduler(parse_settings({"scheduler": name, "workers": workers})) as scheduler:
            assert sorted(done.value for done in scheduler.map(tasks.square, [2, 3])) == [4, 9]
    finally:
        close_clusters()
    refusals = [line for line in caplog.messages if "refuses a job" in line]
    assert len(refusals) == 1 and f"{name}: controller away for a moment" in refusals[0], (
        "its own words, once"
    )
    assert len((tools / "calls").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_queue_that_refuses_for_good_ends_the_call_with_its_own_words(name, tools, hurried):
    refusing(tools, name, "1000")
    workers = small(tools, 2)
    try:
        with open_scheduler(parse_settings({"scheduler": name, "workers": workers})) as scheduler:
            with pytest.raises(
                MagusAnharmonicError,
                match=f"{COMMANDS[name][0]} has refused every job.*{name}: controller away",
            ):
                list(scheduler.map(tasks.square, [2, 3]))
    finally:
        begun = time.monotonic()
        close_clusters()
    assert time.monotonic() - begun < 8, "nobody waits for the next attempt"


def test_one_job_in_the_queue_is_hope_and_an_answer_without_a_number_is_none(monkeypatch):
    monkeypatch.setattr("magus_anharmonic.scheduler.queues.GIVE_UP", 0.0)
    queue = Submissions("sbatch")
    assert not queue.refusal()
    queue.refuse("a", "QOSMaxSubmitJobPerUserLimit", 2.0)
    assert "QOSMaxSubmitJobPerUserLimit" in queue.refusal()
    queue.accept("b")
    assert not queue.refusal()
    queue.forget("b")
    assert queue.refusal()
    queue.accept("a")
    assert not queue.refusal()
    queue.misread("Welcome to the cluster")
    assert "Welcome to the cluster" in queue.refusal()


@pytest.mark.slow
def test_what_dask_says_goes_into_a_file(tools):
    workers = small(tools, 1)
    code = (
        "import scheduler_tasks as tasks; from magus_anharmonic.cli.common import"
        " configure_logging\nfrom magus_anharmonic.scheduler import open_scheduler; from"
        " magus_anharmonic.settings import parse_settings\nconfigure_logging(20)\nwith"
        f" open_scheduler(parse_settings({{'scheduler': 'slurm', 'workers': {workers}}})) as"
        " scheduler:\n    print([done.value for done in scheduler.map(tasks.square, [3])])"
    )
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("DASK_LOGGING")
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 0 and found.stdout.strip() == "[9]" and found.stderr == ""
    assert "Adaptive scaling stopped" in (tools / "logs" / "dask.log").read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_without_the_commands_of_the_queue_system_it_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = parse_settings({"scheduler": name})
    with pytest.raises(
        InputError,
        match=f"scheduler: {name}: no command {COMMANDS[name][0]}.*address of a Dask scheduler",
    ):
        with open_scheduler(settings):
            pass


def test_what_is_missing_for_several_gpus_is_named(tools):
    assert "dask-cuda" in missing("slurm", WorkerSettings(gpus=2)) or not missing(
        "slurm", WorkerSettings(gpus=2)
    )
    assert missing("slurm", WorkerSettings()) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tasks_run_in_jobs_that_are_sent_and_ended(name, tools, monkeypatch):
    if name == "lsf":
        monkeypatch.setattr("dask_jobqueue.lsf.lsf_detect_units", lambda: "mb")
    workers = small(tools, 1)
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
    assert called[0] == COMMANDS[name][0] and COMMANDS[name][1] in called, (
        "the job is ended when it is not needed any more"
    )


@pytest.mark.slow
def test_a_job_that_ends_is_sent_again(tools):
    """At its walltime, or with its node: Dask takes it off its list and sends no other one by
    itself."""
    workers = small(tools, 1)
    settings = parse_settings({"scheduler": "slurm", "workers": workers})
    ended = threading.Event()

    def run():
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
    sent = [
        line
        for line in (tools / "commands").read_text().splitlines()
        if Path(line.split()[0]).name == "sbatch"
    ]
    assert len(sent) == 2


def test_asking_for_a_queue_leaves_ctrl_c_as_it_was():
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM);"
        "from magus_anharmonic.scheduler.queues import _dask_jobqueue; _dask_jobqueue();"
        "assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
