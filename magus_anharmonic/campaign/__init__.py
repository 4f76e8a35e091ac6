"""The paper's two stages over several pressures (Fig. 1b): learning searches, one model,
production, SSCHA, checks; resumable."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magus_anharmonic.campaign.run import run_campaign as run_campaign
    from magus_anharmonic.campaign.run import status as status

_LAZY = {"run_campaign": "run", "status": "status"}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
