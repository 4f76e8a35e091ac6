"""Keeps MAGUS's log usable: its restart searches log.txt for two words, and its console shows every
debug line."""

from __future__ import annotations

import logging
from pathlib import Path

from magus_anharmonic.errors import InputError, printable

# `magus search -r` takes the last line with one of these words, whoever wrote it (a path in a
# message is enough).
RESERVED = {"Generation": "generation", "volRatio": "volume ratio"}

_NOISY = (
    "matplotlib",
    "asyncio",
    "h5py",
    "numba",
    "PIL",
    "urllib3",
    "filelock",
    "fsspec",
    "torch",
    "jax",
    "pymatgen",
    "e3nn",
    "loguru",
)


class RestartSafe(logging.Filter):
    """Rewrites the reserved words, and what would control a terminal, in every record that MAGUS
    itself has not written."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in ("magus", "root", "__main__"):
            return True
        message = printable(record.getMessage())
        for word, replacement in RESERVED.items():
            message = message.replace(word, replacement)
        if message != record.getMessage():
            record.msg, record.args = message, ()
        return True


def tame() -> None:
    """Quiet the noisy libraries and guard the handlers of the root logger; repeated calls change
    nothing."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, RestartSafe) for known in handler.filters):
            handler.addFilter(RestartSafe())


def check_restart(log_file: Path) -> None:
    """Raise InputError where ``magus search -r`` would end with a traceback: its log names no round
    after the first.

    Nothing is said about a missing log: MAGUS says that itself.
    """
    if not log_file.exists():
        return
    with log_file.open(encoding="utf-8", errors="replace") as lines:
        begun = [line.split() for line in lines if "Generation" in line]
    last = begun[-1][-2] if begun and len(begun[-1]) > 1 else ""
    if last == "1":
        raise InputError(
            "-r: MAGUS cannot go on within its first round. Start without -r: results/ moves to"
            " results1/ (or the next free number), and learning.dataset:"
            " results1/anharmonic/labels/gen001.xyz takes a finished batch of labels along"
        )
    if not last:
        raise InputError(
            f"-r: {log_file} names no round to go on with (was the search run with -ll WARNING?);"
            " start without -r"
        )
