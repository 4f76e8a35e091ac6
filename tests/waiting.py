"""Waiting for something that another process or thread does."""

from __future__ import annotations

import time


def wait_for(condition, what, seconds=120.0):
    """Until ``condition()`` is true; raises ``TimeoutError`` with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {seconds:.0f} s")
        time.sleep(0.05)
