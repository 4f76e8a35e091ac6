"""Dask workers as jobs of SLURM, LSF or PBS, by dask-jobqueue."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.runs.lock import guarded
from magus_anharmonic.scheduler.submission import Submissions, patient
from magus_anharmonic.settings import QUEUES, WorkerSettings

COMMANDS = {"slurm": ("sbatch", "scancel"), "lsf": ("bsub", "bkill"), "pbs": ("qsub", "qdel")}
"""What dask-jobqueue calls to send and to end a job."""

CERTIFICATES = ".certificates-"
"""How the names of `Certificates` begin."""

CLASSES = {"slurm": "SLURMCluster", "lsf": "LSFCluster", "pbs": "PBSCluster"}

QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.worker.http.routes": [],
}
"""What Dask does beside the tasks, made rarer: its profiler alone takes several per cent of the
core that a task runs on. No web pages."""


def missing(name: str, workers: WorkerSettings) -> str:
    """What ``scheduler: name`` lacks on this machine, and what to do; empty when nothing."""
    wanted = [
        ("distributed", "dask"),
        ("dask_jobqueue", "cluster"),
        ("cryptography", "cluster"),
        *([("dask_cuda", "")] if workers.gpus > 1 else []),
    ]
    for module, extra in wanted:
        if importlib.util.find_spec(module) is None:
            how = (
                f"pip install 'magus-anharmonic[{extra}]'"
                if extra
                else "pip install dask-cuda (several GPUs per job need it)"
            )
            return f"the Python package {module} is not installed; {how}"
    lacking = [command for command in COMMANDS[name] if shutil.which(command) is None]
    if lacking:
        return (
            f"no command {' and no '.join(lacking)} here; run where jobs can be sent, or give the"
            " address of a Dask scheduler"
        )
    return ""


def start_cluster(name: str, workers: WorkerSettings) -> Any:
    """A Dask scheduler in this process, and ``workers.count`` jobs that are sent again when they
    end.

    Only who holds the certificates made here can connect to scheduler and workers; they lie in the
    folder ``certificates`` of the result, whose ``submissions`` say what the queue system answers.
    Raises ``InputError`` when a package or a command is missing, or dask-jobqueue refuses the keys.
    """
    problem = missing(name, workers)
    if problem:
        raise InputError(f"scheduler: {name}: {problem}")
    import dask

    # A task that ends its worker comes back to us at once: we count, because we know which tasks
    # were beside it.
    dask.config.set(
        {
            **QUIET,
            "distributed.scheduler.http.routes": [],
            "distributed.scheduler.allowed-failures": 0,
        }
    )
    submissions, logs = Submissions(COMMANDS[name][0]), Path(workers.logs).absolute()
    try:
        logs.mkdir(parents=True, exist_ok=True)
        # The nodes find the certificates beside the output of the jobs, where nobody else may read.
        certificates = Certificates(logs)
        kind = getattr(_dask_jobqueue(), CLASSES[name])
        _write_words_to(logs / "dask.log")
        cluster = kind(
            job_cls=patient(kind.job_cls, submissions),
            security=_security(certificates.folder),
            **arguments(name, workers),
        )
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise InputError(f"scheduler: {name}: {one_line(error)}") from None
    cluster.submissions, cluster.certificates = submissions, certificates
    cluster.adapt(minimum_jobs=workers.count or 1, maximum_jobs=workers.count or 1)
    return cluster


class Certificates:
    """A new folder below ``logs`` for the certificates of this process.

    `remove` removes it, or after a kill the next start.
    """

    def __init__(self, logs: Path) -> None:
        with guarded(logs):
            for left in logs.glob(f"{CERTIFICATES}*"):
                held = _flocked(left)
                if held is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(held)
            self.folder = Path(tempfile.mkdtemp(prefix=CERTIFICATES, dir=logs))
            self._held = _flocked(self.folder)

    def remove(self) -> None:
        """Remove the folder; nothing can connect any more."""
        shutil.rmtree(self.folder)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _flocked(folder: Path) -> int | None:
    """Descriptor of a folder that no living process has; None where one has.

    None too where the file system knows no flock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None  # removed at this moment, or another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _dask_jobqueue() -> ModuleType:
    """The package, with the signal handlers that it installs when it is imported (a Ctrl-C that
    says nothing) taken back."""
    main = threading.current_thread() is threading.main_thread()
    before = (
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if main
        else {}
    )
    module = importlib.import_module("dask_jobqueue")
    for number, handler in before.items():
        signal.signal(number, handler)
    return module


def _security(folder: Path) -> Any:
    """Certificates for this run alone; those of the workers in files of ``folder``, which only
    their owner can read."""
    from distributed.security import Security

    security = Security.temporary()
    for part in ("tls_ca_file", "tls_worker_cert", "tls_worker_key"):
        file = folder / f"{part}.pem"
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            out.write(getattr(security, part))
        setattr(security, part, str(file))
    return security


def _write_words_to(file: Path) -> None:
    """Into a file with what Dask writes to the screen, unless its own configuration has another
    place for it."""
    handler = logging.FileHandler(file, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    handler.set_name("magus-anharmonic-dask")
    for logger in (
        logging.getLogger(name)
        for name in ("distributed", "distributed.client", "distributed.gc", "tornado", "bokeh")
    ):
        if all(
            type(known) is logging.StreamHandler or known.get_name() == handler.get_name()
            for known in logger.handlers
        ):
            logger.handlers[:] = [handler]
            logger.propagate = False


def arguments(name: str, workers: WorkerSettings) -> dict[str, Any]:
    """Keyword arguments of dask-jobqueue's cluster class: one worker that runs one task at a time
    per job (per GPU with several)."""
    cores = workers.cores or 1
    exports = [
        f"export {variable}={cores}"
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    ]
    exports += [f"export {dask_variable(key)}={value}" for key, value in QUIET.items()]
    common: dict[str, Any] = {
        "queue": workers.queue,
        "cores": 1,
        "processes": 1,
        "memory": workers.memory,
        "walltime": _walltime(name, workers.walltime),
        "python": workers.python or sys.executable,
        "interface": workers.interface,
        "local_directory": workers.scratch,
        "log_directory": os.path.abspath(workers.logs),
        "silence_logs": False,
        "death_timeout": 600,
        "job_name": "magus-anharmonic",
        "scheduler_options": {
            "dashboard": False,
            "dashboard_address": "127.0.0.1:0",
            "extensions": extensions(),
            **_host(name, workers),
        },
        "job_script_prologue": [*exports, *workers.prologue],
        # Before the queue system ends the job the worker hands its task back and goes: no death is
        # counted.
        "worker_extra_args": (
            ["--lifetime", f"{max(60, workers.walltime - 300)}s", "--lifetime-stagger", "120s"]
            + ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        ),
    }
    if workers.gpus > 1:
        common |= {"worker_command": "dask_cuda.cli", "worker_extra_args": []}
    return common | _OWN[name](workers, cores)


def _host(name: str, workers: WorkerSettings) -> dict[str, str]:
    """Where the scheduler listens: at the interface asked for, else at the one address that it
    tells its workers, never at all of them."""
    import dask
    from distributed.utils import get_ip

    return (
        {}
        if workers.interface or dask.config.get(f"jobqueue.{name}.interface", None)
        else {"host": get_ip()}
    )


def extensions() -> dict[str, Any]:
    """Dask's own extensions of its scheduler, without the note of every task that one of them keeps
    for ever (half a kB each)."""
    from distributed.scheduler import DEFAULT_EXTENSIONS
    from distributed.spans import SpansSchedulerExtension

    class Spans(SpansSchedulerExtension):
        """Says what tasks belong together, and does not write down how each was sent."""

        def observe_tasks(self, *args: Any, **kwargs: Any) -> Any:
            if "span_metadata" in kwargs:
                kwargs["span_metadata"] = {"collections": []}
            return super().observe_tasks(*args, **kwargs)

    return {**DEFAULT_EXTENSIONS, "spans": Spans}


def dask_variable(key: str) -> str:
    """The variable from which a process takes this key of Dask's configuration."""
    return f"DASK_{key.upper().replace('.', '__').replace('-', '_')}"


def _walltime(name: str, seconds: int) -> str:
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return (
        f"{hours:02d}:{minutes:02d}" if name == "lsf" else f"{hours:02d}:{minutes:02d}:{rest:02d}"
    )


def _slurm(workers: WorkerSettings, cores: int) -> dict[str, Any]:
    gpus = [f"--gres=gpu:{workers.gpus}"] if workers.gpus else []
    return {
        "account": workers.account,
        "job_cpu": cores,
        "job_extra_directives": [*gpus, *workers.directives],
    }


def _lsf(workers: WorkerSettings, cores: int) -> dict[str, Any]:
    gpus = [f"-gpu num={workers.gpus}"] if workers.gpus else []
    return {
        "project": workers.account,
        "ncpus": cores,
        "job_extra_directives": [*gpus, *workers.directives],
    }


def _pbs(workers: WorkerSettings, cores: int) -> dict[str, Any]:
    gpus = f":ngpus={workers.gpus}" if workers.gpus else ""
    memory = workers.memory.replace(" ", "").lower().replace("i", "")
    select = f"select=1:ncpus={cores}:mem={memory}{gpus}"
    return {
        "account": workers.account,
        "resource_spec": select,
        "job_extra_directives": list(workers.directives),
    }


_OWN: dict[str, Callable[[WorkerSettings, int], dict[str, Any]]] = {
    "slurm": _slurm,
    "lsf": _lsf,
    "pbs": _pbs,
}
assert set(_OWN) == set(QUEUES) == set(CLASSES) == set(COMMANDS)
