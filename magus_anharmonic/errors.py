"""Exceptions that carry a message for the user: what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from concurrent.futures import BrokenExecutor

OF_THE_WORK = {
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EINVAL,
    errno.EOVERFLOW,
    errno.ENAMETOOLONG,
    errno.ENOEXEC,
    errno.EPIPE,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ESRCH,
    errno.ECHILD,
}
"""What the system says about the file, the program or the socket that somebody works with: one that
is not there, that ended, that is damaged and sends a reader to a place that it does not have.

Every other number is of the machine: disk full, read-only, broken or away, too many files, no
memory, no process, no right."""
_OF_SQLITE = (
    "SQLITE_FULL",
    "SQLITE_IOERR",
    "SQLITE_NOMEM",
    "SQLITE_READONLY",
    "SQLITE_CANTOPEN",
    "SQLITE_BUSY",
    "SQLITE_LOCKED",
)
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
)
_OF_A_GPU = ("cuda error", "cublas_status", "no cuda gpus", "cuda driver", "hip error")
"""After one of these a process gets nothing more out of its GPU."""


class MagusAnharmonicError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(MagusAnharmonicError):
    """The input (a key, a file, a structure) is wrong; the command line exits with code 2.

    Parameters
    ----------
    problems
        One line per problem, each naming the key path or file, the value and what is allowed.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class CheckpointError(InputError):
    """A checkpoint is missing, truncated, or of an architecture that is not supported."""


class DamagedFile(InputError):
    """A file of a results folder is cut, changed or not what its name says; nothing of it is
    used."""


class NotFinite(MagusAnharmonicError):
    """A potential gives an energy, force or stress that is not finite."""


class LabelerError(MagusAnharmonicError):
    """A labeler cannot be used at all (not installed, wrong settings); one failed label is a
    ``Failure``."""


class LabelerNotInstalled(InputError, LabelerError):
    """The DFT code or ASE calculator asked for is not here; the message says what to install."""


class SschaError(MagusAnharmonicError):
    """An SSCHA run ended without a usable state; the message is the reason shown in the ranking."""


class NotConverged(MagusAnharmonicError):
    """A number was asked of an SSCHA run that did not converge; the message says where what it has
    is."""


class MachineError(MagusAnharmonicError):
    """Memory, disk or a process gave out: says nothing about the structure at work, and the run
    stops where it can go on."""


class LostLock(BaseException):
    """Another process works in the folder of this one, which was taken for dead: it ends and writes
    nothing more."""

    def __str__(self) -> str:
        return (
            super().__str__()
            or "the lock of this run belongs to another process now; this one ends and writes "
            "nothing more"
        )


class Terminated(BaseException):
    """SIGTERM arrived: the batch system, or a person, wants the process to end now."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was the reason: torch and its allocators have several types and wordings for
    it."""
    # torch's own type is a RuntimeError; by name, so that torch is not imported for this
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        wording in str(error).lower() for wording in _OUT_OF_MEMORY
    )


def is_machine_error(error: BaseException | None) -> bool:
    """Whether ``error``, or one that led to it, speaks of the machine: never a property of a
    structure, a label or a setting.

    Whoever catches what an evaluator, a calculator or a library raised for a structure raises it
    again when this is true, so that the run stops, with exit code 1, where it can be resumed.
    """
    if error is None:
        return False
    if isinstance(
        error, MachineError | KeyboardInterrupt | Terminated | BrokenExecutor
    ) or is_out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_WORK:
        return True
    if getattr(error, "sqlite_errorname", "").startswith(_OF_SQLITE):
        return True
    if isinstance(error, RuntimeError) and any(
        wording in str(error).lower() for wording in _OF_A_GPU
    ):
        return True
    return is_machine_error(
        error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    )


_CONTROL = {
    code: "?"
    for code in (
        *range(9),
        *range(11, 32),
        *range(127, 160),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}


def printable(text: str) -> str:
    """``text``, of whatever origin, as a terminal may get it: no escape sequence, nothing that
    moves the cursor or turns the line round."""
    return text.translate(_CONTROL)


def one_line(said: str | BaseException, limit: int = 300) -> str:
    """A text of whatever origin as it can be shown: on one line, without control characters, not
    longer than ``limit``.

    Of an error what it says, or its type where it says nothing.
    """
    text = said if isinstance(said, str) else str(said)
    shown = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    if not shown and isinstance(said, BaseException):
        return type(said).__name__
    return shown if len(shown) <= limit and len(text) <= 4 * limit else f"{shown[: limit - 3]}..."


def typed_line(error: BaseException, limit: int = 300) -> str:
    """Type of an error of other software and what it says, on one line: ``KeyError: 'energy'``."""
    name = type(error).__name__
    return name if not str(error).strip() else f"{name}: {one_line(error, limit)}"


def reason_of(error: BaseException) -> str:
    """One line that says what stopped a run, for the user and for ``failures.jsonl``."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT"
    if isinstance(error, Terminated):
        return "stopped by SIGTERM"
    text = " ".join(str(error).split())
    if isinstance(error, LostLock):
        return text
    if isinstance(error, MemoryError):
        return f"memory exhausted{': ' if text else ''}{text}"
    if isinstance(error, OSError):
        return (
            f"{error.filename or _full_disk() or 'a file'}:"
            f" {error.strerror or text or type(error).__name__}"
        )
    return (
        text
        if isinstance(error, MagusAnharmonicError)
        else f"{type(error).__name__}{': ' if text else ''}{text}"
    )


def _full_disk() -> str:
    """Which disk has no room: what is written through a library or to a terminal may fail without a
    name."""
    full = [
        path for path in (os.getcwd(), tempfile.gettempdir()) if shutil.disk_usage(path).free == 0
    ]
    return f"the disk of {full[0]}" if full else ""
