"""MatterSim potentials: load a checkpoint, evaluate and relax structures in batches, finetune,
score.

The names below are loaded at first use (PEP 562), so that importing this package does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.potential.checkpoint import Model as Model
    from magus_anharmonic.potential.evaluate import Potential as Potential
    from magus_anharmonic.potential.loading import load as load

_HOMES = {"load": "loading", "Potential": "evaluate", "Model": "checkpoint"}

__all__ = ["Model", "Potential", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
