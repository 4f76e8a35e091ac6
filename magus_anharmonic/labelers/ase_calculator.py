"""Labels from any ASE calculator, named by its import path, e.g. ``ase.calculators.emt.EMT``."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from magus_anharmonic.errors import InputError, LabelerError, is_machine_error, typed_line
from magus_anharmonic.labelers.base import Recipe, make_recipe
from magus_anharmonic.settings import AseCalculatorSettings, LabelerSettings

log = logging.getLogger(__name__)

ALLOW = "MAGUS_ANHARMONIC_ALLOW"
"""Environment variable: modules, separated by commas, of which an input may call functions that
make calculators."""
ENTRY_POINTS = "magus_anharmonic.calculators"
"""Group in which an installed package names such functions (module:function)."""
EXECUTION_KEYS = frozenset({"command", "profile"})
METHODS = ("get_potential_energy", "get_forces", "get_stress")
NO_CALCULATOR = (
    f"is no ASE calculator; needed is a class with {', '.join(METHODS)}, e.g."
    " ase.calculators.emt.EMT"
)


def allowed_modules() -> list[str]:
    """Modules of which an input may call what is no subclass of ASE's Calculator: of the user's
    environment, and of installed packages.

    An input file comes from anywhere, and must not name them itself.
    """
    installed = [point.value.partition(":")[0] for point in entry_points(group=ENTRY_POINTS)]
    return [
        *(name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()),
        *installed,
    ]


def may_call(found: Any, module_name: str) -> bool:
    """Whether an input may call ``found`` of a module: a subclass of ASE's calculators, or anything
    of an allowed module."""
    if isinstance(found, type) and issubclass(found, BaseCalculator):
        return True
    if any(module_name == name or module_name.startswith(f"{name}.") for name in allowed_modules()):
        log.info(
            "%s is called although it is no subclass of ASE's Calculator: its module is allowed",
            found,
        )
        return True
    return False


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
            f"{path!r} is no labeler; allowed: gpaw, vasp, espresso, main, or the import path of an"
            " ASE calculator, e.g. ase.calculators.emt.EMT"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LabelerError(
            f"{error}; install the package that brings {module_name}, "
            "or take the open default: calculator: gpaw after pip install 'magus-anharmonic[gpaw]'"
        ) from None
    except Exception as error:  # a module may raise anything while it is imported
        raise LabelerError(f"{module_name} cannot be imported: {typed_line(error)}") from None
    found = getattr(module, name, None)
    if found is None:
        raise LabelerError(f"{module_name} has no calculator {name!r}")
    if not may_call(found, module_name):
        raise LabelerError(
            f"{path} is no ASE calculator (a subclass of ASE's Calculator, e.g."
            " ase.calculators.emt.EMT), and an input cannot call anything else; if you trust it"
            " and what it does, allow its module outside of the input: export"
            f" {ALLOW}={module_name}"
        )
    if not inspect.isfunction(found) and not (isinstance(found, type) and _calculates(found)):
        raise LabelerError(f"{path} {NO_CALCULATOR}")
    return found


def _calculates(found: Any) -> bool:
    own = found if isinstance(found, type) else type(found)
    return not issubclass(own, Atoms) and all(
        callable(getattr(found, method, None)) for method in METHODS
    )


PROGRAMS = re.compile(
    r"command|(^|_)(profile|exe|bin|executable|binary|launcher|mpi)$|cmds$", re.IGNORECASE
)
"""Names of arguments in which calculators expect the program to start, or commands for it."""
SHORT_NAMES = {"emt": "ase.calculators.emt.EMT", "lj": "ase.calculators.lj.LennardJones"}


def make_calculator(block: AseCalculatorSettings) -> BaseCalculator:
    """The calculator of ``MainCalculator``; raises ``InputError`` that names its key where an input
    may not make it or cannot."""
    where = f"MainCalculator.calculator: {block.calculator!r}"
    module, _, _ = SHORT_NAMES.get(block.calculator, block.calculator).rpartition(".")
    if not module:
        raise InputError(
            f"{where}: without MAGUS, calculator is mattersim, emt, lj or the"
            " import path of an ASE calculator; vasp and others need MAGUS"
        )
    try:
        calculator = load_class(SHORT_NAMES.get(block.calculator, block.calculator))
    except LabelerError as error:
        raise InputError(f"{where}: {error}") from None
    commands = sorted(f"arguments.{key}" for key in block.arguments if PROGRAMS.search(str(key)))
    # they build the line that starts their program from any argument (infile of Amber, label of
    # others)
    commands += ["calculator"] if starts_programs(calculator) else []
    if commands and module not in allowed_modules():
        raise InputError(
            f"MainCalculator.{commands[0]}: an input cannot start programs here; if you trust it,"
            f" allow the calculator's module outside of the input: export {ALLOW}={module}"
        )
    try:
        return calculator(**block.arguments)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        if is_machine_error(error):
            raise
        raise InputError(
            f"{where}: cannot be made with arguments {block.arguments}: {error}"
        ) from None


def available(name: str, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
    """Whether the class ``name`` can be imported, and what to do if not."""
    try:
        load_class(name)
    except LabelerError as error:
        return False, str(error)
    return True, f"{name} can be imported"


def recipe(settings: LabelerSettings) -> Recipe:
    """Arguments as given; raises ``LabelerError`` for ``k_spacing``, which has no general meaning
    here."""
    if settings.k_spacing is not None:
        raise LabelerError(
            f"learning.labeler.k_spacing: is not known to {settings.calculator}; give its own"
            " keyword under arguments"
        )
    return make_recipe(
        settings.calculator, settings, defaults={}, k_spacing=None, execution_keys=EXECUTION_KEYS
    )


def calculator(recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
    """An instance with the user's arguments; calculators that write files get ``directory``."""
    found = load_class(recipe.code)
    arguments = {**recipe.arguments, **recipe.execution}
    if (
        starts_programs(found)
        or "directory"
        in inspect.signature(found.__init__ if isinstance(found, type) else found).parameters
    ):
        arguments["directory"] = str(directory)
    made = found(**arguments)
    if not _calculates(made):
        raise LabelerError(f"what {recipe.code} makes {NO_CALCULATOR}")
    return made


def check(calculator: Any, directory: Path) -> None:
    """Raise ``LabelerError`` when the calculator itself says that it did not converge."""
    if getattr(calculator, "converged", None) is False:
        raise LabelerError("the calculator reports that it did not converge")


def default_workers(cores: int) -> int:
    """One label per core."""
    return cores
