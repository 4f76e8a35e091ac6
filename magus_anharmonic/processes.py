"""Programs that this package starts end with everything that they have started, also in sessions or
groups of their own.

MPI's launchers put their ranks into groups of their own, and what outlives its parent is given to
init: neither a process group nor descent alone finds all of them, so each program also carries a
mark in its environment that its children inherit.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from magus_anharmonic.errors import LabelerError, MachineError, one_line

log = logging.getLogger(__name__)

MARK = "MAGUS_ANHARMONIC_PROCESS"
PATIENCE = 2.0
"""Seconds between SIGTERM, with which launchers end what they started on other machines, and
SIGKILL."""
_PR_SET_CHILD_SUBREAPER = 36
GIVE_UP = 20.0
"""Seconds after which a process that even SIGKILL does not end (it waits for a disk) is left alone,
with a warning."""


def adopt_orphans() -> None:
    """Linux: what loses its parent below this process becomes its child instead of init's, and
    `descendants` finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def new_mark() -> str:
    """A value of the variable `MARK` that no other process has."""
    return uuid.uuid4().hex


def descendants(pid: int) -> list[psutil.Process]:
    """All living processes below ``pid``; none where it is gone. Ask before it is ended: its
    children lose their parent then."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def end_processes(known: Iterable[psutil.Process], mark: str, spare: Iterable[int] = ()) -> None:
    """End the ``known`` processes, everything below them and whatever carries ``mark``; neither
    this process nor those of ``spare``."""
    spared = {os.getpid(), *spare}
    found = {process for process in known if process.pid not in spared}
    begun, number = time.monotonic(), signal.SIGTERM
    while True:
        found |= {below for process in found for below in descendants(process.pid)} | _marked(
            mark, spared
        )
        living = [process for process in found if process.pid not in spared and _lives(process)]
        if not living:
            return
        if time.monotonic() - begun > GIVE_UP:
            log.warning(
                "processes that cannot be ended: %s",
                ", ".join(str(process.pid) for process in living),
            )
            return
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(map(_lives, living)):
            time.sleep(0.02)
        number = signal.SIGKILL


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _marked(mark: str, spared: set[int]) -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in spared and process.environ().get(MARK) == mark:
                found.add(process)
    return found


def run_bounded(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with text captured; after ``timeout`` seconds the program and all that
    it started are ended.

    Raises ``subprocess.TimeoutExpired`` then, without waiting for who still holds its pipes.
    """
    mark = new_mark()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark},
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            known = descendants(process.pid)
            process.kill()
            process.wait()
            end_processes(known, mark)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class Worker:
    """A fresh interpreter (torch and CUDA do not survive a fork) that does one job after the other.

    It ends with this process, together with everything that it has started.

    begin : called there with ``given``, returns the function of one job. ``variables`` : of its
    environment, which BLAS and torch read when they are loaded. output : file to which it prints;
    its standard input is empty. with_main : jobs may be functions of the script that runs here,
    which is imported there.
    """

    # the module search path travels as an argument: no variable that a program there would inherit
    _BOOTSTRAP = (
        "import sys; sys.path[:] = sys.argv.pop(1).split(chr(10));"
        " from magus_anharmonic.processes import serve; serve()"
    )

    def __init__(
        self,
        begin: Callable[..., Callable[[Any], Any]],
        *given: Any,
        variables: Mapping[str, str],
        output: Path | None = None,
        with_main: bool = False,
    ) -> None:
        self.mark = new_mark()
        # raises in a script that is being imported by a worker of its own
        script = spawn.get_preparation_data("") if with_main else {}
        kept = ("sys_argv", "init_main_from_name", "init_main_from_path")
        paths = "\n".join(os.path.abspath(path or ".") for path in sys.path)
        self.connection, other = multiprocessing.Pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(other.close)
            printed = None if output is None else stack.enter_context(output.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", self._BOOTSTRAP, paths, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=[other.fileno()],
                start_new_session=True,
                env={**os.environ, **variables, MARK: self.mark},
            )
        self.pid = self._process.pid
        self.send(({key: script[key] for key in kept if key in script}, begin, given))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, job: Any) -> None:
        """Hand over a job; that the process is dead shows where its answer is read."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job)

    def end(self, patience: float = 0.1) -> str:
        """End the process, if it has not ended within ``patience`` seconds; how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        known = descendants(self.pid) if self.alive else []
        self._process.kill()
        code = self._process.wait()
        end_processes(known, self.mark)
        self.connection.close()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve() -> None:
    """Do the jobs of a `Worker` until its maker is gone or lets it go: in the middle of a job it
    ends at once then, with everything that it has started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    descriptor, myself = int(sys.argv.pop(1)), os.getpid()
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    script, begin, given = connection.recv()
    multiprocessing.current_process()._inheriting = True  # type: ignore[attr-defined]
    spawn.prepare(script)
    del multiprocessing.current_process()._inheriting  # type: ignore[attr-defined]
    run, busy = begin(*given), threading.Event()

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                job = connection.recv()
                busy.set()
                jobs.put((job,))
        if busy.is_set():
            end_processes(descendants(myself), os.environ[MARK])
            os._exit(1)
        jobs.put(())

    threading.Thread(target=read, daemon=True).start()
    while job := jobs.get():
        answer = run(*job)
        if os.getpid() != myself:
            os._exit(0)  # a copy that a program made of this process and let go on
        busy.clear()
        connection.send(answer)


def failed_program(error: subprocess.CalledProcessError, words: str = "") -> Exception:
    """What the end of a program says: ``LabelerError`` with its own last ``words``, or
    ``MachineError`` where somebody killed it (the kernel where memory runs out, a queue)."""
    arguments = shlex.split(error.cmd) if isinstance(error.cmd, str) else error.cmd
    program, code = os.path.basename(str(arguments[0])), error.returncode
    number = -code if code < 0 else code - 128  # of the signal, from a shell or MPI's launcher
    if number in (signal.SIGKILL, signal.SIGTERM):
        return MachineError(
            f"{program} was killed ({signal.Signals(number).name}): memory ran out, or somebody"
            " ended it"
        )
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return LabelerError(one_line(f"{program}: {words or how}"))


def last_words(directory: Path) -> str:
    """The last lines that a program left in the youngest of its files for errors and output, less
    what MPI says about its end."""
    files = [file for kind in ("*.err", "*.log", "*.out") for file in directory.glob(kind)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        text = file.read_text(errors="replace")[-20_000:]
        text = re.sub(r"(?s)^-{20,}\n(MPI_ABORT|Primary job|mpirun).*", "", text, flags=re.M)
        if said := [line.strip() for line in text.splitlines() if re.search(r"\w", line)]:
            return " ".join(said[-4:])
    return ""


def require_space(directory: Path, size: int = 1 << 20) -> None:
    """Raise ``OSError`` where ``size`` bytes cannot be written below ``directory``: programs rarely
    say that a full disk or a quota was what ended them."""
    if directory.is_dir():
        try:
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(bytes(size))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(directory)) from None
