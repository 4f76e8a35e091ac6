"""Embedded host: runs the same ``input.yaml`` and leaves the same ``results/`` as MAGUS, where
MAGUS is not installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.search.host import SearchOutcome as SearchOutcome
    from magus_anharmonic.search.host import run as run

__all__ = ["SearchOutcome", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.host"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
