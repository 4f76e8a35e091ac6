"""The process in which a DFT code runs.

It is a process of its own so that a crash, a hang or the code's printing cannot harm the search.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import (
    LabelerError,
    MagusAnharmonicError,
    is_machine_error,
    one_line,
    typed_line,
)
from magus_anharmonic.labelers.base import Code, Recipe, no_shell
from magus_anharmonic.labelers.codes import code_of
from magus_anharmonic.processes import failed_program, last_words, require_space
from magus_anharmonic.structures import change_of, stripped
from magus_anharmonic.units import gpa_to_ev_per_a3


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job (``task``: label or relaxation) and return its result as plain data.

    No shell is started, whatever the calculator asks for. Anything that the DFT code raises becomes
    ``{"ok": False, "reason": ...}``, with ``machine_error`` where it speaks of the machine and not
    of the structure.
    """
    started = time.monotonic()
    try:
        atoms = job["atoms"].copy()
        recipe = replace(
            job["recipe"],
            arguments=_absolute(job["recipe"].arguments),
            execution=_absolute(job["recipe"].execution),
        )
        directory = Path(job["directory"]).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        task = {"label": _label, "relaxation": _relax}[job["task"]]
        # What a code writes beside its own files (restart files, cores) belongs to the label, not
        # to the user's folder.
        with no_shell(), contextlib.chdir(directory):
            result = {"ok": True, **task(atoms, recipe, directory, job)}
    except Exception as error:
        with contextlib.suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        cause = _cause(error, job)
        result = {"ok": False, "reason": _reason(cause), "machine_error": is_machine_error(cause)}
    result["seconds"] = time.monotonic() - started
    return result


OUTPUTS = ("txt", "log", "out")
"""How the names of arguments begin that are files which a code writes."""


def _absolute(value: Any, key: str = "") -> Any:
    """Arguments in which the names of files here (``my.model``, ``./Si.upf``) and of the folder of
    pseudopotentials hold anywhere."""
    if isinstance(value, dict):
        return {name: _absolute(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, key) for item in value]
    if not isinstance(value, str) or "\0" in value or key.startswith(OUTPUTS):
        return value
    named = os.path.isfile(value) if "." in value or "/" in value else False
    return (
        os.path.abspath(value) if named or (key == "pseudo_dir" and os.path.isdir(value)) else value
    )


def _absolute_variables() -> None:
    """The same for the places that variables name (``VASP_PP_PATH``, ``ESPRESSO_PSEUDO``)."""
    for name, value in os.environ.items():
        if name.endswith(("_PATH", "_DIR", "_PSEUDO")) and os.path.exists(value):
            os.environ[name] = os.path.abspath(value)


def _cause(error: Exception, job: dict[str, Any]) -> Exception:
    """What led to ``error``: a disk without space, or the end of a program in its own words."""
    directory = Path(job["directory"]).absolute()
    try:
        for folder in (directory, *code_of(job["recipe"].code).writes_to(job["recipe"])):
            require_space(folder)
    except OSError as full:
        return full
    if isinstance(error, subprocess.CalledProcessError):
        return failed_program(error, last_words(directory))
    return error


def _reason(error: Exception) -> str:
    if isinstance(error, MagusAnharmonicError):
        return one_line(error)
    if type(error).__name__ == "KohnShamConvergenceError":
        return f"SCF did not converge: {one_line(error)}"
    return typed_line(error)


def _results(atoms: Atoms, code: Code) -> dict[str, Any]:
    from ase.calculators.calculator import PropertyNotImplementedError

    given = atoms.copy()
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        # some codes find no neighbours of such an atom, and go on without it
        raise LabelerError("the structure has positions or a cell that are no numbers")
    energy = float(atoms.get_potential_energy())
    forces = np.asarray(atoms.get_forces(apply_constraint=False))
    try:
        stress = np.asarray(atoms.get_stress(voigt=False, apply_constraint=False))
    except PropertyNotImplementedError:
        raise LabelerError(
            "the calculator gives no stress; choose one that does (for GPAW: a plane-wave mode)"
        ) from None
    free_energy = getattr(atoms.calc, "results", {}).get("free_energy")
    code.check(atoms.calc)
    changed = change_of(given, atoms, getattr(atoms.calc, "atoms", None))
    if changed:
        raise LabelerError(
            f"the calculator {changed}: its forces and stress are those of another structure"
        )
    return {
        "energy": energy,
        "free_energy": None if free_energy is None else float(free_energy),
        "forces": forces,
        "stress": stress,
        "info": getattr(atoms.calc, "label_info", {}),
    }


def _label(atoms: Atoms, recipe: Recipe, directory: Path, job: dict[str, Any]) -> dict[str, Any]:
    code = code_of(recipe.code)
    atoms.calc = code.calculator(recipe, atoms, directory)
    return _results(atoms, code)


def _relax(atoms: Atoms, recipe: Recipe, directory: Path, job: dict[str, Any]) -> dict[str, Any]:
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    code = code_of(recipe.code)
    atoms.calc = code.calculator(recipe, atoms, directory)
    pressure = gpa_to_ev_per_a3(job["pressure"])
    both: Any = FrechetCellFilter(atoms, scalar_pressure=pressure)
    optimizer = BFGS(both, logfile=str(directory / "relax.log"))
    converged = bool(optimizer.run(fmax=job["force_tolerance"], steps=job["max_steps"]))
    results = _results(atoms, code)
    enthalpy = (results["energy"] + pressure * atoms.get_volume()) / len(atoms)
    return {
        **results,
        "atoms": stripped(atoms),
        "enthalpy": enthalpy,
        "converged": converged,
        "n_steps": int(optimizer.nsteps),
    }


def begin() -> Callable[[dict[str, Any] | None], dict[str, Any] | None]:
    """What the process of a labeler does with a job; None is answered with None."""
    _absolute_variables()
    return lambda job: None if job is None else run_job(job)
