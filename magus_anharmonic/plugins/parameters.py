"""From MAGUS's parameter dictionary to our settings, and how a run with wrong input ends."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import (
    CalculatorSettings,
    Settings,
    as_magus_reads,
    parse,
    parse_settings,
    snake_case,
    stages,
)

logger = logging.getLogger(__name__)

BLOCKS = ("learning", "sscha")
CALCULATOR_BLOCKS = ("MainCalculator", "MLCalculator")
OURS = ["mattersim"]

# MAGUS merges a calculator's block over the top level, so these may stand there too, as for MAGUS's
# own calculators.
_SHARED_KEYS = ("eps", "max_step", "max_move", "relax_lattice", "fix_symmetry", "optimizer")

# Keys of MAGUS's own calculators without a counterpart here, and the value that asks for nothing.
_NOT_OURS = {"fix_volume": False, "max_force": None}

# What magusParameters adds of itself; `parameters` differ in it when a folder has been moved.
_ADDED = ("workDir", "resultsDir", "calcDir", "mlDir")


def concerns_us(parameters: Mapping[str, Any]) -> bool:
    """Whether the input has any key of this package; everybody else's search must run exactly as
    without it."""
    if any(snake_case(str(key)) in BLOCKS for key in parameters):
        return True
    blocks = [parameters[name] for name in CALCULATOR_BLOCKS if name in parameters]
    return any(
        "mattersim" in stages(as_magus_reads(block)) for block in blocks
    ) or "SSCHA" in fitness_names(parameters)


def fitness_names(parameters: Mapping[str, Any]) -> list[str]:
    """The names of ``Fitness:``, a list or one."""
    named = parameters["Fitness"] if "Fitness" in parameters else []
    return [str(name) for name in (named if isinstance(named, list | tuple) else [named])]


def misspelt_blocks(parameters: Mapping[str, Any]) -> list[str]:
    """One line for each name that is nearly ``learning``, ``sscha`` or ``SSCHA``: MAGUS would
    ignore it, or end in a traceback."""
    lines = []
    for key, value in parameters.items():
        name = snake_case(str(key))
        close = difflib.get_close_matches(name, BLOCKS, n=1, cutoff=0.75)
        if isinstance(value, Mapping) and close and name not in BLOCKS:
            lines.append(f"{key}: unknown block of keys; did you mean {close[0]}?")
    for name in fitness_names(parameters):
        if name != "SSCHA" and difflib.get_close_matches(name.upper(), ["SSCHA"], cutoff=0.75):
            lines.append(f"Fitness: {name}: unknown fitness; did you mean SSCHA?")
    return lines


def settings_of(parameters: Mapping[str, Any]) -> Settings:
    """Settings from the whole parameter dictionary of MAGUS, with the defaults that MAGUS adds;
    raises InputError.

    The values are copies as YAML knows them: MAGUS replaces some of its own as it goes (the files
    of ``inputMols`` by molecules).
    """
    data = {key: _plain(value) for key, value in parameters.items() if key not in _ADDED}
    if "formula_type" in data:
        # MAGUS adds formulaType: fix even when the user wrote formula_type.
        data.pop("formulaType", None)
    problems = []
    for name in CALCULATOR_BLOCKS:
        block = as_magus_reads(data.get(name))
        if stages(block) != OURS:
            continue
        data[name] = {
            **_shared(data, block),
            **{key: value for key, value in block.items() if snake_case(str(key)) not in _NOT_OURS},
        }
        for key, value in {**data, **block}.items():
            if snake_case(str(key)) in _NOT_OURS and value != _NOT_OURS[snake_case(str(key))]:
                problems.append(
                    f"{name}: {key}: {value}: calculator: mattersim does not know this key of"
                    " MAGUS's calculators; take it out"
                )
    try:
        settings = parse_settings(data)
    except InputError as error:
        raise InputError(*problems, *error.problems) from None
    if problems:
        raise InputError(*problems)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.get_chemical_formula() if isinstance(value, Atoms) else value


def _shared(data: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    wanted = set(_SHARED_KEYS) - {snake_case(str(key)) for key in block}
    return {
        snake_case(str(key)): value for key, value in data.items() if snake_case(str(key)) in wanted
    }


def calculator_settings(settings: Settings, *, learner: bool) -> CalculatorSettings:
    """The validated ``MLCalculator`` (learner) or ``MainCalculator`` block; raises InputError."""
    name, block = (
        ("MLCalculator", settings.ml_calculator)
        if learner
        else ("MainCalculator", settings.main_calculator)
    )
    return parse(CalculatorSettings, block, name)


def stop(error: InputError) -> NoReturn:
    """End the program with exit code 2 and one line per problem: stock MAGUS would print a
    traceback instead."""
    for problem in error.problems or (str(error),):
        logger.error("input error: %s", problem)
    raise SystemExit(2)
