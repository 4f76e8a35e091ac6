"""Every table and figure of the paper: pure functions from the tables of a campaign to numbers, a
CSV and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.paper.figures import make_figures as make_figures

__all__ = ["make_figures"]


def __getattr__(name: str) -> Any:
    """Import the public name on first use; raises AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from magus_anharmonic.paper import figures

    return getattr(figures, name)
