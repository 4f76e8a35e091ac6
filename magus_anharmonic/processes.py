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
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

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
