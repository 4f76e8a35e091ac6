"""Who gets how much SSCHA effort, the store of free energies, and the ranking with error bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.ranking.candidate import Candidate as Candidate
    from magus_anharmonic.ranking.fitness import fitness_values as fitness_values
    from magus_anharmonic.ranking.matcher import distinct as distinct
    from magus_anharmonic.ranking.structures import rank_file as rank_file
    from magus_anharmonic.ranking.structures import rank_structures as rank_structures

_LAZY = {
    "Candidate": "candidate",
    "distinct": "matcher",
    "fitness_values": "fitness",
    "rank_file": "structures",
    "rank_structures": "structures",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    """Import the public name on first use; raises AttributeError for any other name."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
