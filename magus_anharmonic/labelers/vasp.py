"""Labels from VASP through ASE. VASP and its POTCAR files are the user's (VASP_PP_PATH,
ASE_VASP_COMMAND or ``command``).

Cutoff and k-point spacing are the paper's (Sec. IV: 500 eV, 2 pi x 0.03 / A); it names no smearing,
ours is Gaussian, 0.05 eV.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import LabelerError
from magus_anharmonic.labelers.base import (
    Recipe,
    folder_digest,
    k_points,
    make_readable,
    make_recipe,
    program_of,
)
from magus_anharmonic.settings import LabelerSettings

DEFAULTS: Mapping[str, Any] = {
    "xc": "PBE",
    "encut": 500,
    "prec": "Accurate",
    "ediff": 1e-6,
    "ismear": 0,
    "sigma": 0.05,
    "nelm": 100,
    "lreal": False,
}
K_SPACING = 0.03
EXECUTION_KEYS = frozenset(
    {
        "command",
        "ncore",
        "npar",
        "kpar",
        "lplane",
        "nsim",
        "lwave",
        "lcharg",
        "lvtot",
        "lvhar",
        "nelm",
    }
)
_OURS = frozenset({"nsw", "ibrion", "isif", "pstress", "potim"})
_COMMANDS = ("ASE_VASP_COMMAND", "VASP_COMMAND")


def available(name: str = "vasp", execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
    """Whether the command and the POTCAR folder are known, in ``execution``, the environment or
    ASE's configuration."""
    command = _command(execution or {})
    missing = []
    try:
        if not command:
            missing.append("ASE_VASP_COMMAND (how to start VASP, e.g. 'mpirun -n 16 vasp_std')")
        elif shutil.which(program_of(command)) is None:
            return False, f"the program of the command {command!r} is not found"
    except LabelerError as error:
        return False, f"the command {error}"
    if not _configured("VASP_PP_PATH"):
        missing.append("VASP_PP_PATH (folder of the POTCAR files)")
    if missing:
        return (
            False,
            (
                f"set {' and '.join(missing)} in the environment or in ~/.config/ase/config.ini;"
                " VASP itself needs a licence"
            ),
        )
    return True, f"command {command!r} and POTCAR folder are set"


def _command(execution: Mapping[str, Any]) -> str | None:
    return execution.get("command") or next(
        (value for name in _COMMANDS if (value := _configured(name))), None
    )


def _configured(name: str) -> str | None:
    from ase.config import cfg

    return os.environ.get(name) or cfg.get(name)


def recipe(settings: LabelerSettings) -> Recipe:
    """Arguments and k-point rule; raises ``LabelerError`` for keys that would make it more than a
    single point."""
    wrong = sorted(_OURS & {str(key).lower() for key in settings.arguments})
    if wrong:
        raise LabelerError(
            f"learning.labeler.arguments.{wrong[0]}: labels are single points; leave it out"
        )
    made = make_recipe(
        "vasp",
        settings,
        defaults=DEFAULTS,
        k_spacing=K_SPACING,
        execution_keys=EXECUTION_KEYS,
        fixes_kpoints=("kpts", "kspacing", "reciprocal"),
    )
    potcars = _potcars(str(made.arguments.get("pp") or made.arguments.get("xc") or "PBE"))
    return (
        replace(made, files={**made.files, "POTCAR": folder_digest(potcars)}) if potcars else made
    )


def _potcars(functional: str) -> dict[str, Path]:
    """The POTCAR files of a functional's folders below VASP_PP_PATH, by their path there; none
    where it is not set."""
    folders = {"lda": "potpaw", "pw91": "potpaw_GGA"}
    wanted = folders.get(functional.lower(), "potpaw_PBE")
    found: dict[str, Path] = {}
    for root in filter(None, (_configured("VASP_PP_PATH") or "").split(os.pathsep)):
        for folder in sorted(
            path for path in Path(root).glob("potpaw*") if path.name.split(".")[0] == wanted
        ):
            for file in sorted(folder.rglob("POTCAR*")):
                if file.is_file():
                    found.setdefault(str(file.relative_to(root)), file)
    return found


def calculator(recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
    """ASE's Vasp for one single point in ``directory``."""
    arguments = {"lwave": False, "lcharg": False, **recipe.arguments, **recipe.execution}
    if recipe.k_spacing is not None:
        arguments.update(kpts=k_points(atoms, recipe.k_spacing), gamma=True)
    arguments["command"] = _command(recipe.execution)
    return _lenient()(directory=str(directory), atoms=None, nsw=0, ibrion=-1, **arguments)


def _lenient() -> type:
    from ase.calculators.vasp import Vasp

    class LenientVasp(Vasp):
        """ASE's Vasp, which takes an OUTCAR with bytes that are no UTF-8."""

        def read_results(self) -> None:
            make_readable(Path(self.directory) / "OUTCAR")
            super().read_results()

    return LenientVasp


def check(calculator: Any, directory: Path) -> None:
    """Raise ``LabelerError`` unless VASP's electronic loop ended because EDIFF was reached."""
    if not calculator.converged:
        steps = calculator.exp_params.get("ediff")
        raise LabelerError(
            f"SCF did not converge: VASP's electronic loop ended before EDIFF = {steps:g} eV was"
            " reached"
        )


def default_workers(cores: int) -> int:
    """VASP's command usually takes all cores itself."""
    return 1
