"""From MAGUS's parameter dictionary to our settings, and how a run with wrong input ends."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import CalculatorSettings, Settings, parse, parse_settings, snake_case

logger = logging.getLogger(__name__)

BLOCKS = ("learning", "sscha")
CALCULATOR_BLOCKS = ("MainCalculator", "MLCalculator")

# MAGUS merges a calculator's block over the top level, so these may stand there too, as for MAGUS's own calculators.
_SHARED_KEYS = ("eps", "max_step", "max_move", "relax_lattice", "fix_symmetry")


def concerns_us(parameters: Mapping[str, Any]) -> bool:
    """Whether the input has any key of this package; everybody else's search must run exactly as without it."""
    if any(snake_case(str(key)) in BLOCKS for key in parameters):
        return True
    blocks = [parameters[name] for name in CALCULATOR_BLOCKS if name in parameters]
    if any(isinstance(block, Mapping) and block.get("calculator") == "mattersim" for block in blocks):
        return True
    fitness = parameters["Fitness"] if "Fitness" in parameters else []
    return isinstance(fitness, list | tuple | str) and "SSCHA" in fitness


def misspelt_blocks(parameters: Mapping[str, Any]) -> list[str]:
    """One line for each block of keys whose name is nearly ``learning`` or ``sscha``: MAGUS would ignore it in silence."""
    lines = []
    for key, value in parameters.items():
        name = snake_case(str(key))
        close = difflib.get_close_matches(name, BLOCKS, n=1, cutoff=0.75)
        if isinstance(value, Mapping) and close and name not in BLOCKS:
            lines.append(f"{key}: unknown block of keys; did you mean {close[0]}?")
    return lines


def settings_of(parameters: Mapping[str, Any]) -> Settings:
    """Settings from the whole parameter dictionary of MAGUS, with the defaults that MAGUS adds; raises InputError."""
    data = dict(parameters)
    if "formula_type" in data:
        # MAGUS adds formulaType: fix even when the user wrote formula_type.
        data.pop("formulaType", None)
    for name in CALCULATOR_BLOCKS:
        block = data.get(name)
        if isinstance(block, Mapping) and block.get("calculator") == "mattersim":
            data[name] = {**_shared(data, block), **block}
    return parse_settings(data)


def _shared(data: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    wanted = set(_SHARED_KEYS) - {snake_case(str(key)) for key in block}
    return {snake_case(str(key)): value for key, value in data.items() if snake_case(str(key)) in wanted}


def calculator_settings(settings: Settings, *, learner: bool) -> CalculatorSettings:
    """The validated ``MLCalculator`` (learner) or ``MainCalculator`` block; raises InputError."""
    name, block = ("MLCalculator", settings.ml_calculator) if learner else ("MainCalculator", settings.main_calculator)
    return parse(CalculatorSettings, block, name)


def stop(error: InputError) -> NoReturn:
    """End the program with exit code 2 and one line per problem: stock MAGUS would print a traceback instead."""
    for problem in error.problems or (str(error),):
        logger.error("input error: %s", problem)
    raise SystemExit(2)
