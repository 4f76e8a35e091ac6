"""Who works in a folder: the process that its lock names, and whether that one runs."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import one_line
from magus_anharmonic.io.digests import from_json

NAME = "lock.json"
"""The lock of a whole folder. One of many things in a folder, a checkpoint, has its own:
``<stem>.lock.json``."""


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
        known = {field.name: found[field.name] for field in fields(Owner) if field.name in found}
        owner = Owner(**known)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"int": int, "str": str}
    whole = all(isinstance(getattr(owner, one.name), kinds[str(one.type)]) for one in fields(Owner))
    return owner if whole else None


_HERE = uuid.uuid4().hex
"""Where this process is, as far as others can know."""


def machine() -> str:
    """Names boot and process namespace: host names are not unique, and process ids mean nothing in
    another container."""
    parts = []
    with contextlib.suppress(OSError):
        if (
            int(os.readlink("/proc/self")) != os.getpid()
        ):  # /proc of another namespace: no process can be looked up
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
    with contextlib.suppress(
        ValueError, TypeError, OverflowError
    ):  # TypeError: without a time zone
        seconds = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
        if seconds >= 0:
            return f" ({seconds / 3600:.1f} h)" if seconds > 5400 else f" ({seconds / 60:.0f} min)"
    return ""
