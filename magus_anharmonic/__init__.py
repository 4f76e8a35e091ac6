"""Crystal structure prediction ranked by anharmonic free energy; importing this costs nothing (PEP
562)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.potential import Potential as Potential
    from magus_anharmonic.potential import load as load
    from magus_anharmonic.potential.calculator import MatterSim as MatterSim
    from magus_anharmonic.ranking.structures import rank_structures as rank_structures
    from magus_anharmonic.settings import parse_settings as parse_settings
    from magus_anharmonic.sscha import SschaResult as SschaResult
    from magus_anharmonic.sscha import free_energy as free_energy
    from magus_anharmonic.sscha.report import hessian_of_run as hessian_of_run

__version__ = "0.1.0"

_LAZY = {
    "MatterSim": "magus_anharmonic.potential.calculator",
    "Potential": "magus_anharmonic.potential",
    "SschaResult": "magus_anharmonic.sscha",
    "free_energy": "magus_anharmonic.sscha",
    "hessian_of_run": "magus_anharmonic.sscha.report",
    "load": "magus_anharmonic.potential",
    "parse_settings": "magus_anharmonic.settings",
    "rank_structures": "magus_anharmonic.ranking.structures",
}

__all__ = ["__version__", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import the public name on first use; raises AttributeError for any other name."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
