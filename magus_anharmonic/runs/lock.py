"""One process at a time works in a results folder, or on one checkpoint: a lock that names its
owner and outlives no dead one.

No clock is compared with another: an owner on this machine is looked up by its process id and
start, one elsewhere is watched for its heartbeat, so neither a wrong clock nor a clock that is set
back matters.

A process that was stopped, taken for dead and woken again finds another token in the lock: every
write of a run asks for it (`still_ours`), and the heartbeat ends the process whatever signals it
ignores.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import InputError, LostLock, MachineError, one_line
from magus_anharmonic.io.digests import from_json, time_stamp, to_json

log = logging.getLogger(__name__)

NAME = "lock.json"
"""The lock of a whole folder. One of many things in a folder, a checkpoint, has its own:
``<stem>.lock.json``."""
TEMPORARY = ".magus-anharmonic.tmp"
"""How the names of our temporary files and folders end, which begin with a dot; nobody else's
do."""
HEARTBEAT = 10.0
"""Seconds between two signs of life of an owner."""
PATIENCE = 45.0
"""Seconds without a sign of life after which an owner on another machine is dead."""
ATTEMPTS, PAUSE = 4, 0.2
"""How often, and seconds apart, a lock that is there and cannot be read is read before it counts as
damaged: network file systems have moments in which a file that is being replaced cannot be read."""
HEARTBEAT_START, GRACE, GUARD = 20.0, 5.0, 5.0
"""Seconds that the heartbeat may take to begin, that a process which lost its lock has to end by
itself, and that a start waits for a process which is writing."""

_CLAIMS: dict[tuple[Path, str], str] = {}
"""Folder and name of the locks that this process holds, or works for -> token."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. ``machine`` : boot and process namespace, in which ``pid`` and ``born``
    (clock ticks) mean something; ``beat`` : counts signs of life, from 1."""

    host: str
    pid: int
    machine: str
    born: int
    what: str
    since: str
    token: str
    beat: int = 1

    @property
    def here(self) -> bool:
        """Whether the owner's process id can be looked up from this process."""
        return self.machine == machine()

    @property
    def alive(self) -> bool | None:
        """Whether the owner runs; None when it is on another machine and only its heartbeat can
        tell."""
        return born(self.pid) == self.born if self.here else None

    def described(self) -> str:
        """``magus-anharmonic search, process 4711 on node7, since 2026-11-25T01:02:03+00:00 (3.2
        h)``."""
        what, host, since = (one_line(text, 100) for text in (self.what, self.host, self.since))
        return f"{what}, process {self.pid} on {host}, since {since}{_age(self.since)}"


def read_owner(folder: str | Path, name: str = NAME) -> Owner | None:
    """The owner that the lock in ``folder`` names, dead or alive; None without a lock, or when it
    holds no owner.

    Fields of a later version are left out. Raises ``OSError`` when a lock that is there cannot be
    read.
    """
    try:
        found = from_json((Path(folder) / name).read_bytes())
        owner = Owner(**{one.name: found[one.name] for one in fields(Owner) if one.name in found})
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        return None
    # not by pydantic: the heartbeat must not need memory for it
    whole = all(type(getattr(owner, one.name)).__name__ == one.type for one in fields(Owner))
    return owner if whole else None


_HERE = uuid.uuid4().hex
"""Where this process is, as far as others can know."""


def machine() -> str:
    """Names boot and process namespace: host names are not unique, and process ids mean nothing in
    another container."""
    parts = []
    with contextlib.suppress(OSError):
        # /proc of another namespace: no process can be looked up
        if int(os.readlink("/proc/self")) != os.getpid():
            return f"{socket.gethostname()} {_HERE} {os.getpid()}"
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts) if len(parts) == 2 else f"{socket.gethostname()} {uuid.getnode():x}"


def born(pid: int) -> int | None:
    """When a process started, in ticks since boot (process ids are used again); None when there is
    none, 0 when nothing tells."""
    try:
        parts: Any = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return 0
        return None
    return None if parts[0] in "ZX" else int(parts[19])


def _age(since: str) -> str:
    # TypeError: without a time zone
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        seconds = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
        if seconds >= 0:
            return f" ({seconds / 3600:.1f} h)" if seconds > 5400 else f" ({seconds / 60:.0f} min)"
    return ""


def check_free(folder: str | Path, name: str = NAME) -> Owner | None:
    """Raise ``InputError`` when a living process works in ``folder``; waits up to `PATIENCE` for
    one on another machine.

    Returns the dead owner of the lock, as it was seen; None without one. Raises ``OSError`` when
    the lock cannot be read.
    """
    owner = _found(Path(folder), name)
    if owner is not None and lives(Path(folder), name, owner):
        raise InputError(_refusal(Path(folder), name, owner))
    return owner


def remove_unfinished(folder: str | Path, locked_folder: str | Path | None = None) -> int:
    """Remove the temporary files and folders that killed processes of ours left below ``folder``;
    returns how many.

    ``held`` : the folder whose lock the caller holds, None: ``folder``. What belongs to somebody
    else who lives is left alone: folders below with a lock of their own, and the files that a
    search (above ``anharmonic``, where its lock is) or a training has beside its own.
    """
    mine, n_removed = Path(folder if locked_folder is None else locked_folder).absolute(), 0
    for root, folders, files in os.walk(Path(folder).absolute()):
        here = Path(root)
        if here != mine and _somebody(here, NAME):
            folders.clear()
            continue
        names = [
            name
            for name in (*folders, *files)
            if name.startswith(".") and name.removesuffix("-journal").endswith(TEMPORARY)
        ]
        search = here / "anharmonic"
        if (search != mine and _somebody(search, NAME)) or any(
            _somebody(here, name) for name in files if name.endswith(f".{NAME}")
        ):
            continue
        for path in (here / name for name in names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        folders[:] = [name for name in folders if name not in names]
        n_removed += len(names)
    return n_removed


def forget_dead(folder: str | Path) -> bool:
    """Remove the lock of a dead process of this machine from ``folder``, and what it had begun to
    write; whether there was one."""
    owner = read_owner(folder)
    if owner is None or owner.alive is not False:
        return False
    (Path(folder) / NAME).unlink(missing_ok=True)
    remove_unfinished(folder)
    return True


@contextlib.contextmanager
def locked(folder: str | Path, what: str, name: str = NAME) -> Iterator[Owner]:
    """Hold the lock of ``folder`` (made if needed, and removed again if nothing was written).

    That of a dead process is taken over, and what it had begun to write in the folder is removed.
    ``what`` names this command for whoever comes second. Raises ``InputError`` (exit code 2) that
    names the living owner.
    """
    lock = FolderLock(folder, what, name)
    try:
        yield lock.owner
    finally:
        lock.release()


class FolderLock:
    """A lock that this process holds until `release`; prefer `locked` where there is a block to
    hold it for."""

    def __init__(self, folder: str | Path, what: str, name: str = NAME) -> None:
        self.folder, self.name = Path(folder).resolve(), name
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        me = socket.gethostname(), pid, machine(), born(pid) or 0
        self.owner = Owner(*me, what, time_stamp(), uuid.uuid4().hex[:12])
        seen = check_free(self.folder, name)
        with guarded(self.folder):
            earlier = _found(self.folder, name)
            if earlier is not None and (
                earlier.alive or (earlier.alive is None and earlier != seen)
            ):  # came after the check
                raise InputError(_refusal(self.folder, name, earlier))
            _write(self.folder, name, self.owner)
            _CLAIMS[self.folder, name] = self.owner.token
        if earlier is not None:
            log.warning(
                "%s: took over the lock of a dead process (%s)", self.folder, earlier.described()
            )
            if name == NAME:
                remove_unfinished(self.folder)
        self._of, self._inode = threading.get_ident(), self.folder.stat().st_ino
        self._begun, self._ended, self._finished = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._begin()

    def _begin(self) -> None:
        """Start the heartbeat. Not as a ``Thread``, whose start waits for ever where its first
        lines find no memory."""
        why = "it did not begin"
        try:
            _thread.start_new_thread(self._beat, ())
            if self._begun.wait(HEARTBEAT_START):
                return
        except (RuntimeError, MemoryError) as error:
            why = str(error) or "memory exhausted"
        self._finished.set()
        self.release()
        raise MachineError(
            f"{self.folder}: no thread for the heartbeat of its lock ({why}); allow more memory or"
            " processes (ulimit -v, -u)"
        )

    def release(self) -> None:
        """Give the lock back; a lock that somebody else took over, or that a forked child
        inherited, is left alone."""
        self._ended.set()
        if os.getpid() != self.owner.pid:
            return
        self._finished.wait(PATIENCE)
        if _CLAIMS.get((self.folder, self.name)) != self.owner.token:
            return
        del _CLAIMS[self.folder, self.name]
        with contextlib.suppress(OSError):
            with guarded(self.folder, shared=True):
                if not _is_locked_by(self.folder, self.name, self.owner.token):
                    return
                (self.folder / self.name).unlink()
            for path in self._made:
                path.rmdir()

    def _beat(self) -> None:
        self._begun.set()
        beat, lost = 1, False
        try:
            while (
                not lost
                and not self._ended.wait(HEARTBEAT)
                and _CLAIMS.get((self.folder, self.name)) == self.owner.token
            ):
                # An unreadable moment, which the next beat tells; a full disk, which whatever the
                # process writes reports; a folder that was moved away or removed, which is no
                # reason to end who works elsewhere.
                with contextlib.suppress(OSError), guarded(self.folder, shared=True):
                    beat += 1
                    if _is_locked_by(self.folder, self.name, self.owner.token):
                        _write(self.folder, self.name, self.owner, beat)
                    else:
                        lost = (
                            read_owner(self.folder, self.name) is not None
                            or self.folder.stat().st_ino == self._inode
                        )
            if lost:
                self._end_process()
        finally:
            self._finished.set()

    def _end_process(self) -> None:
        log.error("%s", _lost(self.folder, self.name))
        # Not a signal: a process that was started in the background of a script ignores SIGINT.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self._of), ctypes.py_object(LostLock)
        )
        if not self._ended.wait(GRACE):
            os._exit(1)


def claims() -> Mapping[tuple[Path, str], str]:
    """The locks under which this process writes, for a process that works for it: see `adopt`."""
    return dict(_CLAIMS)


def adopt(given: Mapping[tuple[Path, str], str]) -> None:
    """Write under the locks of the process that this one works for, and as long as that one holds
    them."""
    _CLAIMS.clear()
    _CLAIMS.update(given)


@contextlib.contextmanager
def still_ours(path: str | Path) -> Iterator[None]:
    """The moment in which a file of a run is renamed, appended to or removed.

    Raises ``LostLock`` where a lock of this process over ``path`` is gone or another's. Nobody
    takes over a lock in that moment, where the file system knows `flock`.
    """
    target = Path(path).resolve()
    with contextlib.ExitStack() as stack:
        for (folder, name), token in _CLAIMS.copy().items():
            if _covers(folder, name, target):
                with contextlib.suppress(FileNotFoundError):
                    stack.enter_context(guarded(folder, shared=True))
                if not _is_locked_by(folder, name, token):
                    raise LostLock(_lost(folder, name))
        yield


def _covers(folder: Path, name: str, target: Path) -> bool:
    """Whether a file is one of those for which a lock stands: of a search, all results; of a
    checkpoint, those that have its name."""
    if name != NAME:
        return folder in target.parents and target.relative_to(folder).parts[0].startswith(
            name.removesuffix(f".{NAME}")
        )
    return (folder.parent if folder.name == "anharmonic" else folder) in target.parents


def _is_locked_by(folder: Path, name: str, token: str) -> bool:
    """Whether the lock has this token; given up as gone or damaged after several attempts only."""
    owner = _found(folder, name, gone=True)
    return owner is not None and owner.token == token


def _lost(folder: Path, name: str) -> str:
    owner = None
    with contextlib.suppress(OSError):
        owner = read_owner(folder, name)
    now = "is gone" if owner is None else f"belongs to {owner.described()}"
    return (
        f"{folder}: this process was taken for dead (was it stopped?) and lost its lock, which"
        f" {now}; it ends and writes nothing more"
    )


def _write(folder: Path, name: str, owner: Owner, beat: int = 1) -> None:
    """Write a lock whole or not at all."""
    temporary = folder / f".{name}-{owner.token}{TEMPORARY}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(to_json(asdict(owner) | {"beat": beat}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)


def _found(folder: Path, name: str, gone: bool = False) -> Owner | None:
    """As `read_owner`, but a lock that is there (``gone``: or not) is given up as damaged, or its
    error raised, after several attempts only."""
    for left in reversed(range(ATTEMPTS)):
        try:
            owner = read_owner(folder, name)
            if owner is not None or not (gone or (folder / name).exists()):
                return owner
        except OSError:
            if not left:
                raise
        if left:
            time.sleep(PAUSE)
    return None


def _somebody(folder: Path, name: str) -> bool:
    """Whether a lock is held by somebody who lives, or may live."""
    try:
        owner = read_owner(folder, name)
    except OSError:
        return True
    return owner is not None and owner.alive is not False


def lives(folder: Path, name: str, owner: Owner, patience: float | None = None) -> bool:
    """Whether the owner of a lock, as it was just read, is at work: looked up on this machine, on
    another one watched for ``patience`` s (None: `PATIENCE`) for its heartbeat.

    Raises ``OSError`` when the lock cannot be read.
    """
    if owner.alive is not None:
        return owner.alive
    patience = PATIENCE if patience is None else patience
    log.info("%s: waiting up to %g s for a sign of life of %s", folder, patience, owner.described())
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 5))
        found = _found(folder, name)
        if found is None:
            return False
        if (found.token, found.beat) != (owner.token, owner.beat):
            return True
    return False


def _refusal(folder: Path, name: str, owner: Owner) -> str:
    if name != NAME:
        files = folder / name.removesuffix(f".{NAME}")
        return (
            f"{files}.*: another process writes these files: {owner.described()}; wait for it or"
            " end it, or give another output"
        )
    return (
        f"{folder}: another process works here: {owner.described()}; wait for it or end it "
        "(`magus-anharmonic status` shows what it does), or work in another folder"
    )


@contextlib.contextmanager
def guarded(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Many write, or one decides about a lock in ``folder`` or below, at a time; where the file
    system knows no such guard, none.

    Raises ``InputError`` where somebody has been writing for `GUARD` seconds: a process that was
    stopped then would go on with it.
    """
    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + GUARD
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{folder}: another process is in the middle of a write here (was it"
                        " stopped?); wait for it or end it"
                    ) from None
                time.sleep(0.02)
                continue
            except OSError:
                log.debug("%s: its file system knows no flock", folder)
            break
        yield
    finally:
        # closing alone would leave it to a child that was forked meanwhile
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
