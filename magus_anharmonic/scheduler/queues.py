"""Dask workers as jobs of SLURM, LSF or PBS, by dask-jobqueue; jobs that the queue refuses are
submitted again with growing pauses."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.runs.lock import guarded
from magus_anharmonic.scheduler.base import THREAD_VARIABLES
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
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}
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
    for name in ("distributed", "distributed.client", "distributed.gc", "tornado", "bokeh"):
        logger = logging.getLogger(name)
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
    exports = [f"export {variable}={cores}" for variable in THREAD_VARIABLES]
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
    return common | _own(name, workers, cores)


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
    text = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}"
    return text if name == "lsf" else f"{text}:{seconds % 60:02d}"


def _own(name: str, workers: WorkerSettings, cores: int) -> dict[str, Any]:
    """What each queue system calls account, cores and GPUs."""
    if name == "pbs":
        gpus = f":ngpus={workers.gpus}" if workers.gpus else ""
        memory = workers.memory.replace(" ", "").lower().replace("i", "")
        return {
            "account": workers.account,
            "resource_spec": f"select=1:ncpus={cores}:mem={memory}{gpus}",
            "job_extra_directives": list(workers.directives),
        }
    account, cpus, option = {
        "slurm": ("account", "job_cpu", "--gres=gpu:"),
        "lsf": ("project", "ncpus", "-gpu num="),
    }[name]
    asked = [f"{option}{workers.gpus}"] if workers.gpus else []
    directives = [*asked, *workers.directives]
    return {account: workers.account, cpus: cores, "job_extra_directives": directives}


assert set(QUEUES) == set(CLASSES) == set(COMMANDS)


log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # s between two attempts to send a job

GIVE_UP = 300.0  # s without any job before a refusal is for good

SAY_AGAIN = 60.0  # s between two lines with the same words


class Submissions:
    """What a queue system has answered to the jobs of one cluster, by their names."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.words = ""
        self._accepted: set[Any] = set()
        self._refused: dict[Any, float] = {}
        self._unreadable = ""
        self._said = float("-inf")

    def accept(self, name: Any) -> None:
        """A job is in the queue."""
        self._accepted.add(name)
        self._refused.pop(name, None)

    def refuse(self, name: Any, words: str, pause: float) -> None:
        """A job was refused with these ``words`` and is sent again in ``pause`` seconds."""
        self._refused.setdefault(name, time.monotonic())
        if words != self.words or time.monotonic() - self._said > SAY_AGAIN:
            log.warning("%s refuses a job (%s); sent again in %.0f s", self.command, words, pause)
            self._said = time.monotonic()
        self.words = words

    def misread(self, words: str) -> None:
        """The command ended well and named no job: sending again could fill the queue."""
        self._unreadable = words

    def forget(self, name: Any) -> None:
        """A job is over, or not wanted any more."""
        self._accepted.discard(name)
        self._refused.pop(name, None)

    def refusal(self) -> str:
        """Why no job will ever run; empty while there is hope: a job in the queue, or refusals for
        less than `GIVE_UP`."""
        if self._unreadable:
            return f"{self.command} was not understood: {self._unreadable}"
        since = min(self._refused.copy().values(), default=None)
        if self._accepted or since is None or time.monotonic() - since < GIVE_UP:
            return ""
        return f"{self.command} has refused every job for {GIVE_UP:.0f} s: {self.words}"


def patient(job_class: type, submissions: Submissions) -> type:
    """A job class of dask-jobqueue whose jobs are sent in the background, again and again until the
    queue system takes them.

    dask-jobqueue sends each once: one refusal, and its worker is waited for without an end.
    """
    from distributed.deploy.spec import ProcessInterface

    class PatientJob(job_class):  # type: ignore[misc,valid-type]
        async def start(self) -> None:
            self._ending = asyncio.Event()
            self._sending = asyncio.ensure_future(self._send())
            await ProcessInterface.start(self)

        async def _send(self) -> None:
            pause = FIRST_PAUSE
            while not self._ending.is_set():
                try:
                    await super().start()
                except (RuntimeError, OSError) as error:
                    submissions.refuse(self.name, _words(error), pause)
                except ValueError as error:
                    submissions.misread(_words(error))
                    return
                else:
                    submissions.accept(self.name)
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), pause)
                pause = min(2.0 * pause, LONGEST_PAUSE)

        async def _submit_job(self, script_filename: str) -> str:
            if not getattr(self, "use_stdin", False):
                return await super()._submit_job(script_filename)
            # As the class of LSF does it, which throws the reason of a refusal away.
            return await self._call(
                [f"{self.submit_command} < {shlex.quote(script_filename)}"], shell=True
            )

        async def close(self) -> None:
            self._ending.set()
            await asyncio.wait({self._sending})
            submissions.forget(self.name)
            await super().close()
            await ProcessInterface.close(self)

    return PatientJob


def _words(error: BaseException) -> str:
    """What the command itself said."""
    parts = (str(error).partition(mark)[2].strip() for mark in ("stderr:\n", "output is:\n"))
    said = next(filter(None, parts), str(error))
    return one_line(said) or type(error).__name__
