"""Crystal structure prediction ranked by anharmonic free energy; importing this costs nothing (PEP
562)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.potential import load as load
    from magus_anharmonic.potential.calculator import MatterSim as MatterSim
    from magus_anharmonic.sscha import free_energy as free_energy

__version__ = "0.1.0"

_LAZY = {
    "MatterSim": "magus_anharmonic.potential.calculator",
    "load": "magus_anharmonic.potential",
    "free_energy": "magus_anharmonic.sscha",
}

__all__ = ["MatterSim", "__version__", "free_energy", "load"]


def __getattr__(name: str) -> Any:
    """Import the public name on first use; raises AttributeError for any other name."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
