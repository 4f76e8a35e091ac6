"""Labels from GPAW, the open default (plane waves, PBE).

The default arguments are those of the H3S label set that this package ships: labels of the two may
be mixed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.labelers.base import Recipe, folder_digest, k_points, make_recipe
from magus_anharmonic.settings import LabelerSettings

DEFAULTS: Mapping[str, Any] = {
    "mode": {"name": "pw", "ecut": 500},
    "xc": "PBE",
    "occupations": {"name": "fermi-dirac", "width": 0.2},
    "convergence": {"energy": 2e-5, "density": 2e-5},
}
K_SPACING = 0.08
STANDARD_SETUPS = "53e985d27c5e"
"""Digest of the PBE set-ups that GPAW's data package brings: the shipped labels were made with
them, and their hash names none."""
EXECUTION_KEYS = frozenset({"parallel", "communicator", "verbose", "maxiter"})


def available(name: str = "gpaw", execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
    """Whether GPAW can be imported, and how to get it if not."""
    if importlib.util.find_spec("gpaw") is None:
        return False, "gpaw cannot be imported; pip install 'magus-anharmonic[gpaw]'"
    return True, "gpaw is installed"


def recipe(settings: LabelerSettings) -> Recipe:
    """Arguments and k-point rule for these settings."""
    made = make_recipe(
        "gpaw", settings, defaults=DEFAULTS, k_spacing=K_SPACING, execution_keys=EXECUTION_KEYS
    )
    xc = made.arguments.get("xc")
    found = _setups(str(xc.get("name") if isinstance(xc, Mapping) else xc))
    digest = folder_digest(found) if found else STANDARD_SETUPS
    return (
        made
        if digest == STANDARD_SETUPS
        else replace(made, files={**made.files, "set-ups": digest})
    )


def _setups(functional: str) -> dict[str, Path]:
    """The set-ups of a functional by name (those of PBE where it has none of its own): of
    GPAW_SETUP_PATH, then of GPAW's data package."""
    package = importlib.util.find_spec("gpaw_data")
    own = (
        [str(Path(package.origin).parent / "setups")]
        if package is not None and package.origin
        else []
    )
    found: dict[str, Path] = {}
    for folder in filter(None, [*os.environ.get("GPAW_SETUP_PATH", "").split(os.pathsep), *own]):
        for file in sorted(Path(folder).glob("[A-Z]*")):
            found.setdefault(file.name.removesuffix(".gz"), file)
    chosen = {name: file for name, file in found.items() if name.endswith(f".{functional}")}
    return chosen or {name: file for name, file in found.items() if name.endswith(".PBE")}


def calculator(recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
    """A GPAW calculator for one structure; its text output goes to ``directory/gpaw.txt``."""
    from gpaw import GPAW

    arguments = {**recipe.arguments, **recipe.execution}
    if recipe.k_spacing is not None:
        arguments["kpts"] = {"size": k_points(atoms, recipe.k_spacing), "gamma": True}
    return GPAW(txt=str(directory / "gpaw.txt"), **arguments)


def check(calculator: Any, directory: Path) -> None:
    """Nothing to check: GPAW raises ``KohnShamConvergenceError`` itself."""


def default_workers(cores: int) -> int:
    """GPAW runs serially: one label per core."""
    return cores
