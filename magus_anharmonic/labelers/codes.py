"""The codes that make labels: GPAW, VASP, any ASE calculator (Quantum ESPRESSO: `espresso`)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from magus_anharmonic import third_party
from magus_anharmonic.errors import InputError, LabelerError, is_machine_error, one_line, typed_line
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.labelers.base import (
    Code,
    Recipe,
    folder_digest,
    k_points,
    make_readable,
    program_of,
)
from magus_anharmonic.labelers.espresso import Espresso
from magus_anharmonic.labelers.sscha import SschaLabels
from magus_anharmonic.settings import (
    AseCalculatorSettings,
    LabelerSettings,
    import_path,
    is_evaluator,
)

log = logging.getLogger(__name__)

PROGRAMS = re.compile(
    r"command|(^|_)(profile|exe|bin|executable|binary|launcher|mpi)$|cmds$", re.IGNORECASE
)
"""Names of arguments in which calculators expect the program to start, or commands for it."""


class Gpaw(Code):
    """Labels from GPAW, the open default (plane waves, PBE).

    The default arguments are those of the H3S label set that this package ships: labels of the two
    may be mixed.
    """

    defaults = {
        "mode": {"name": "pw", "ecut": 500},
        "xc": "PBE",
        "occupations": {"name": "fermi-dirac", "width": 0.2},
        "convergence": {"energy": 2e-5, "density": 2e-5},
    }
    k_spacing = 0.08
    execution_keys = frozenset({"parallel", "communicator", "verbose", "maxiter"})
    STANDARD_SETUPS = "53e985d27c5e"
    """Digest of the PBE set-ups that GPAW's data package brings: the shipped labels were made with
    them, and their hash names none."""

    def available(self, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
        if importlib.util.find_spec("gpaw") is None:
            return False, "gpaw cannot be imported; pip install 'magus-anharmonic[gpaw]'"
        return True, "gpaw is installed"

    def recipe(self, settings: LabelerSettings) -> Recipe:
        """See `Code`; the files are the set-ups, unless they are GPAW's own."""
        made = super().recipe(settings)
        xc = made.arguments.get("xc")
        found = self._setups(str(xc.get("name") if isinstance(xc, Mapping) else xc))
        digest = folder_digest(found) if found else self.STANDARD_SETUPS
        known = {} if digest == self.STANDARD_SETUPS else {"set-ups": digest}
        return replace(made, files={**made.files, **known})

    def _setups(self, functional: str) -> dict[str, Path]:
        """The set-ups of a functional by name (those of PBE where it has none of its own): of
        GPAW_SETUP_PATH, then of GPAW's data package."""
        folders = os.environ.get("GPAW_SETUP_PATH", "").split(os.pathsep)
        package = importlib.util.find_spec("gpaw_data")
        if package is not None and package.origin:
            folders.append(str(Path(package.origin).parent / "setups"))
        found: dict[str, Path] = {}
        for folder in filter(None, folders):
            for file in sorted(Path(folder).glob("[A-Z]*")):
                found.setdefault(file.name.removesuffix(".gz"), file)
        chosen = {name: file for name, file in found.items() if name.endswith(f".{functional}")}
        return chosen or {name: file for name, file in found.items() if name.endswith(".PBE")}

    def fermi_dirac(self, arguments: Mapping[str, Any], width: float) -> dict[str, Any]:
        """See `Code`."""
        return {**arguments, "occupations": {"name": "fermi-dirac", "width": width}}

    def calculator(self, recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
        """A GPAW calculator, which itself raises ``KohnShamConvergenceError``."""
        from gpaw import GPAW

        arguments = {**recipe.arguments, **recipe.execution}
        if recipe.k_spacing is not None:
            arguments["kpts"] = {"size": k_points(atoms, recipe.k_spacing), "gamma": True}
        return GPAW(txt=str(directory / "gpaw.txt"), **arguments)


class Vasp(Code):
    """Labels from VASP through ASE. VASP and its POTCAR files are the user's (VASP_PP_PATH,
    ASE_VASP_COMMAND or ``command``).

    Cutoff and k-point spacing are the paper's (Sec. IV: 500 eV, 2 pi x 0.03 / A); it names no
    smearing, ours is Gaussian, 0.05 eV.
    """

    defaults = {
        "xc": "PBE",
        "encut": 500,
        "prec": "Accurate",
        "ediff": 1e-6,
        "ismear": 0,
        "sigma": 0.05,
        "nelm": 100,
        "lreal": False,
    }
    k_spacing = 0.03
    fixes_kpoints = ("kpts", "kspacing", "reciprocal")
    execution_keys = frozenset(
        "command ncore npar kpar lplane nsim lwave lcharg lvtot lvhar nelm".split()
    )
    FOLDERS = {"lda": "potpaw", "pw91": "potpaw_GGA"}

    def available(self, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
        """Whether the command and the POTCAR folder are known, in ``execution``, the environment or
        ASE's configuration."""
        command = self._command(execution or {})
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
            return False, (
                f"set {' and '.join(missing)} in the environment or in ~/.config/ase/config.ini;"
                " VASP itself needs a licence"
            )
        return True, f"command {command!r} and POTCAR folder are set"

    def _command(self, execution: Mapping[str, Any]) -> str | None:
        return (
            execution.get("command")
            or _configured("ASE_VASP_COMMAND")
            or _configured("VASP_COMMAND")
        )

    def recipe(self, settings: LabelerSettings) -> Recipe:
        """See `Code`; raises ``LabelerError`` also for keys that would make it more than a single
        point. The files are the POTCARs."""
        ours = {"nsw", "ibrion", "isif", "pstress", "potim"}
        if wrong := sorted(ours & {str(key).lower() for key in settings.arguments}):
            raise LabelerError(
                f"learning.labeler.arguments.{wrong[0]}: labels are single points; leave it out"
            )
        made = super().recipe(settings)
        found = self._potcars(str(made.arguments.get("pp") or made.arguments.get("xc") or "PBE"))
        potcars = {"POTCAR": folder_digest(found)} if found else {}
        return replace(made, files={**made.files, **potcars})

    def _potcars(self, functional: str) -> dict[str, Path]:
        """The POTCAR files of a functional's folders below VASP_PP_PATH, by their path there; none
        where it is not set."""
        wanted = self.FOLDERS.get(functional.lower(), "potpaw_PBE")
        found: dict[str, Path] = {}
        for root in filter(None, (_configured("VASP_PP_PATH") or "").split(os.pathsep)):
            for file in sorted(Path(root).glob("potpaw*/**/POTCAR*")):
                place = file.relative_to(root)
                if place.parts[0].split(".")[0] == wanted and file.is_file():
                    found.setdefault(str(place), file)
        return found

    def fermi_dirac(self, arguments: Mapping[str, Any], width: float) -> dict[str, Any]:
        """See `Code`."""
        kept = {k: v for k, v in arguments.items() if k.lower() not in ("ismear", "sigma")}
        return {**kept, "ismear": -1, "sigma": width}

    def calculator(self, recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
        """ASE's Vasp, which takes an OUTCAR with bytes that are no UTF-8."""
        from ase.calculators import vasp

        class LenientVasp(vasp.Vasp):
            def read_results(self) -> None:
                make_readable(Path(self.directory) / "OUTCAR")
                super().read_results()

        arguments = {"lwave": False, "lcharg": False, **recipe.arguments, **recipe.execution}
        if recipe.k_spacing is not None:
            arguments.update(kpts=k_points(atoms, recipe.k_spacing), gamma=True)
        arguments["command"] = self._command(recipe.execution)
        return LenientVasp(directory=str(directory), atoms=None, nsw=0, ibrion=-1, **arguments)

    def check(self, calculator: Any) -> None:
        """Raise ``LabelerError`` unless VASP's electronic loop ended because EDIFF was reached."""
        if not calculator.converged:
            raise LabelerError(
                "SCF did not converge: VASP's electronic loop ended before EDIFF ="
                f" {calculator.exp_params.get('ediff'):g} eV was reached"
            )

    def default_workers(self, cores: int) -> int:
        """VASP's command usually takes all cores itself."""
        return 1


def _configured(name: str) -> str | None:
    from ase.config import cfg

    return os.environ.get(name) or cfg.get(name)


ALLOW = "MAGUS_ANHARMONIC_ALLOW"
"""Environment variable: modules, separated by commas, of which an input may call functions that
make calculators."""
METHODS = ("get_potential_energy", "get_forces", "get_stress")
NO_CALCULATOR = (
    f"is no ASE calculator; needed is a class with {', '.join(METHODS)}, e.g."
    " ase.calculators.emt.EMT"
)


class AseCalculator(Code):
    """Labels from any ASE calculator, named by its import path, e.g.
    ``ase.calculators.emt.EMT``."""

    execution_keys = frozenset({"command", "profile"})

    def available(self, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
        try:
            load_class(self.name)
        except LabelerError as error:
            return False, str(error)
        return True, f"{self.name} can be imported"

    def recipe(self, settings: LabelerSettings) -> Recipe:
        """See `Code`; raises ``LabelerError`` also for ``k_spacing``, which has no general meaning
        here."""
        if settings.k_spacing is not None:
            raise LabelerError(
                f"learning.labeler.k_spacing: is not known to {self.name}; give its own keyword"
                " under arguments"
            )
        return super().recipe(settings)

    def calculator(self, recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
        """An instance with the user's arguments; calculators that write files get
        ``directory``."""
        found = load_class(recipe.code)
        arguments = {**recipe.arguments, **recipe.execution}
        made_by = found.__init__ if isinstance(found, type) else found  # type: ignore[misc]
        if starts_programs(found) or "directory" in inspect.signature(made_by).parameters:
            arguments["directory"] = str(directory)
        made = found(**arguments)
        if not _calculates(type(made)):
            raise LabelerError(f"what {recipe.code} makes {NO_CALCULATOR}")
        return made

    def check(self, calculator: Any) -> None:
        """Raise ``LabelerError`` when the calculator itself says that it did not converge."""
        if getattr(calculator, "converged", None) is False:
            raise LabelerError("the calculator reports that it did not converge")


def allowed_modules() -> list[str]:
    """Modules of which an input may call what is no subclass of ASE's Calculator: of the user's
    environment, and of installed packages.

    An input file comes from anywhere, and must not name them itself.
    """
    return [
        *(name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()),
        *(p.module for points in third_party.declared("evaluators").values() for p in points),
    ]


def _may_call(found: Any, module_name: str) -> bool:
    """Whether an input may call ``found`` of a module: a subclass of ASE's calculators, or anything
    of an allowed module."""
    if isinstance(found, type) and issubclass(found, BaseCalculator):
        return True
    allowed = any(f"{module_name}.".startswith(f"{name}.") for name in allowed_modules())
    if allowed:
        log.info(
            "%s is called although it is no subclass of ASE's Calculator: its module is allowed",
            found,
        )
    return allowed


def starts_programs(found: Any) -> bool:
    """Whether it is one of ASE's calculators that write files for a program and start it."""
    from ase.calculators.calculator import FileIOCalculator
    from ase.calculators.genericfileio import GenericFileIOCalculator

    return isinstance(found, type) and issubclass(found, FileIOCalculator | GenericFileIOCalculator)


def load_class(path: str) -> Callable[..., Any]:
    """The subclass of ASE's Calculator at an import path, or what makes a calculator in a module
    that the user has allowed.

    Raises ``LabelerError`` that says which part is missing, or that it is no ASE calculator.
    """
    module_name, _, name = path.rpartition(".")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
        raise LabelerError(
            f"{path!r} is no labeler; allowed: gpaw, vasp, espresso, main, a name that an installed"
            " package declares (`magus-anharmonic doctor`), or the import path of an ASE"
            " calculator, e.g. ase.calculators.emt.EMT"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LabelerError(f"{error}; install the package that brings {module_name}") from None
    except Exception as error:  # a module may raise anything while it is imported
        raise LabelerError(f"{module_name} cannot be imported: {typed_line(error)}") from None
    found = getattr(module, name, None)
    if found is None:
        raise LabelerError(f"{module_name} has no calculator {name!r}")
    if not _may_call(found, module_name):
        raise LabelerError(
            f"{path} is no ASE calculator (a subclass of ASE's Calculator, e.g."
            " ase.calculators.emt.EMT), and an input cannot call anything else; if you trust it"
            " and what it does, allow its module outside of the input: export"
            f" {ALLOW}={module_name}"
        )
    if not inspect.isfunction(found) and not _calculates(found):
        raise LabelerError(f"{path} {NO_CALCULATOR}")
    return found


def make_calculator(block: AseCalculatorSettings, at: str) -> Any:
    """The calculator of the block at the key ``at``, or another package's evaluator; raises
    ``InputError`` that names its key where an input may not make it or cannot."""
    where = f"{at}.calculator: {block.calculator!r}"
    path = import_path(block.calculator)
    if path is None and is_evaluator(block.calculator):
        made = _made(third_party.load("evaluators", block.calculator), block, at)
        if not isinstance(made, Evaluator) and not callable(getattr(made, METHODS[0], None)):
            raise InputError(
                f"{where}: makes {made!r}, which is no evaluator (model_id, evaluate) and no ASE"
                " calculator"
            )
        return made
    if path is None:
        raise InputError(
            f"{where}: without MAGUS, calculator is mattersim, emt, lj, what an installed package"
            " declares (`magus-anharmonic doctor`) or the import path of an ASE calculator; vasp"
            " and others need MAGUS"
        )
    try:
        calculator = load_class(path)
    except LabelerError as error:
        raise InputError(f"{where}: {error}") from None
    commands = sorted(f"arguments.{key}" for key in block.arguments if PROGRAMS.search(str(key)))
    # they build the line that starts their program from any argument (infile of Amber, label of
    # others)
    commands += ["calculator"] if starts_programs(calculator) else []
    module = path.rpartition(".")[0]
    if commands and module not in allowed_modules():
        raise InputError(
            f"{at}.{commands[0]}: an input cannot start programs here; if you trust it,"
            f" allow the calculator's module outside of the input: export {ALLOW}={module}"
        )
    return _made(calculator, block, at)


def _made(calculator: Callable[..., Any], block: AseCalculatorSettings, at: str) -> Any:
    try:
        return calculator(**block.arguments)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        if is_machine_error(error):
            raise
        raise InputError(
            f"{at}.calculator: {block.calculator!r}: cannot be made with arguments"
            f" {block.arguments}: {one_line(error)}; give its arguments as {at}.arguments"
        ) from None


def _calculates(found: Any) -> bool:
    return (
        isinstance(found, type)
        and not issubclass(found, Atoms)
        and all(callable(getattr(found, method, None)) for method in METHODS)
    )


REGISTRY: dict[str, type[Code]] = {
    "gpaw": Gpaw,
    "vasp": Vasp,
    "espresso": Espresso,
    "sscha": SschaLabels,
}
"""Name in ``learning.labeler.calculator`` -> code; others are of other packages, or import paths of
ASE calculators."""


def code_of(name: str) -> Code:
    """The code called ``name`` in ``learning.labeler.calculator``: ours, that of another package,
    or an import path. Raises ``InputError``."""
    kind: Any = REGISTRY.get(name)
    if kind is None and "." not in name and name in third_party.declared("labelers"):
        kind = third_party.load("labelers", name)
        if not (isinstance(kind, type) and issubclass(kind, Code)):
            raise InputError(
                f"learning.labeler.calculator: {name}: {kind!r} is no subclass of"
                " magus_anharmonic.labelers.Code"
            )
    return (kind or AseCalculator)(name)
