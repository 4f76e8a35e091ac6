"""Tables of a campaign, and each number of the paper once (`quantities`, `enthalpies`); errors of a
model in an ensemble.

The scripts that draw and validate these numbers lie beside the inputs of the paper, in
``inputs/h3s-paper``; a wheel has them in this package. `script` finds them in either place.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

__path__ = [*__path__, str(Path(__file__).parents[2] / "inputs" / "h3s-paper")]


def script(name: str) -> ModuleType:
    """``figures``, ``figures_sscha``, ``validate``, ``expected`` or ``explain``."""
    return import_module(f"{__name__}.{name}")
