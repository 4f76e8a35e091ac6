"""How long the rest of a work takes at its pace so far."""

from __future__ import annotations

import time

from magus_anharmonic.units import time_left


class Progress:
    """A work of ``total`` pieces of which ``done`` were there before it began; ``interval``:
    seconds between two lines of progress."""

    def __init__(self, total: float, done: float = 0.0, interval: float = 0.0) -> None:
        self.total, self._before, self._interval = total, done, interval
        self._began = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Whether the next line of progress may be said; it counts as said then."""
        now = time.monotonic()
        if now - self._told < self._interval:
            return False
        self._told = now
        return True

    def left(self, done: float, rest: float | None = None, separator: str = "; ") -> str:
        """``"; about 3 min left"`` when ``done`` pieces are done and ``rest`` (None: all others)
        are not; empty where that cannot be told."""
        rest = self.total - done if rest is None else rest
        text = time_left(self.seconds, done - self._before, rest)
        return f"{separator}{text}" if text else ""
