"""Keeps MAGUS's log usable: its restart searches log.txt for two words, and its console shows every debug line."""

from __future__ import annotations

import logging

# `magus search -r` takes the last line with one of these words, whoever wrote it (a path in a message is enough).
RESERVED = {"Generation": "generation", "volRatio": "volume ratio"}

_NOISY = ("matplotlib", "asyncio", "h5py", "numba", "PIL", "urllib3", "filelock", "fsspec", "torch", "jax", "pymatgen", "e3nn", "loguru")


class RestartSafe(logging.Filter):
    """Rewrites the reserved words in every record that MAGUS itself has not written."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in ("magus", "root", "__main__"):
            return True
        message = record.getMessage()
        if any(word in message for word in RESERVED):
            for word, replacement in RESERVED.items():
                message = message.replace(word, replacement)
            record.msg, record.args = message, ()
        return True


def tame() -> None:
    """Quiet the noisy libraries and guard the handlers of the root logger; repeated calls change nothing."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, RestartSafe) for known in handler.filters):
            handler.addFilter(RestartSafe())
