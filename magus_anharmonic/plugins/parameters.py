"""From MAGUS's parameter dictionary to our settings; MAGUS's log and its run, and how a run with
wrong input ends."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from ase import Atoms

from magus_anharmonic import autoload
from magus_anharmonic.errors import InputError, printable
from magus_anharmonic.search.keys import HostKeys, fold
from magus_anharmonic.settings import (
    CalculatorSettings,
    In,
    Settings,
    as_magus_reads,
    load_yaml,
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


def _texts_with_units(data: Mapping[str, Any]) -> list[str]:
    """One line for each of MAGUS's own keys whose value is a text with a unit: MAGUS itself reads
    numbers."""
    fields = {"pressure": Settings.model_fields["pressure"], **HostKeys.model_fields}
    found = []
    for key, value in data.items():
        field = fields.get(fold(str(key)))
        units = [item.unit for item in field.metadata if isinstance(item, In)] if field else []
        if units and isinstance(value, str):
            found.append(
                f"{key}: {value!r}: MAGUS itself reads this key, as a number in {units[0]} (with"
                " --host embedded it may have a unit)"
            )
    return found


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
    problems = _texts_with_units(data)
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


# `magus search -r` takes the last line with one of these words, whoever wrote it (a path in a
# message is enough).
RESERVED = {"Generation": "generation", "volRatio": "volume ratio"}

_NOISY = (
    "matplotlib",
    "asyncio",
    "h5py",
    "numba",
    "PIL",
    "urllib3",
    "filelock",
    "fsspec",
    "torch",
    "jax",
    "pymatgen",
    "e3nn",
    "loguru",
)


class RestartSafe(logging.Filter):
    """Rewrites the reserved words, and what would control a terminal, in every record that MAGUS
    itself has not written."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in ("magus", "root", "__main__"):
            return True
        message = printable(record.getMessage())
        for word, replacement in RESERVED.items():
            message = message.replace(word, replacement)
        if message != record.getMessage():
            record.msg, record.args = message, ()
        return True


def tame() -> None:
    """Quiet the noisy libraries and guard the handlers of the root logger; repeated calls change
    nothing."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, RestartSafe) for known in handler.filters):
            handler.addFilter(RestartSafe())


def check_restart(log_file: Path) -> None:
    """Raise InputError where ``magus search -r`` would end with a traceback: its log names no round
    after the first.

    Nothing is said about a missing log: MAGUS says that itself.
    """
    if not log_file.exists():
        return
    with log_file.open(encoding="utf-8", errors="replace") as lines:
        begun = [line.split() for line in lines if "Generation" in line]
    last = begun[-1][-2] if begun and len(begun[-1]) > 1 else ""
    if last == "1":
        raise InputError(
            "-r: MAGUS cannot go on within its first round. Start without -r: results/ moves to"
            " results1/ (or the next free number), and learning.dataset:"
            " results1/anharmonic/labels/gen001.xyz takes a finished batch of labels along"
        )
    if not last:
        raise InputError(
            f"-r: {log_file} names no round to go on with (was the search run with -ll WARNING?);"
            " start without -r"
        )


def run_stock_magus(input_file: str | Path, *, restart: bool = False, use_ml: bool = False) -> None:
    """The same as ``magus search -i input_file [-r] [-m]`` in the current folder.

    Raises InputError for wrong input, and when the package called ``magus`` is not the structure
    searcher.
    """
    data = load_yaml(input_file)
    parse_settings(data)
    if problems := _texts_with_units(data):
        raise InputError(*problems)
    if not autoload.is_magus():
        raise InputError(
            "MAGUS is not installed; use --host embedded, or pip install"
            " git+https://gitlab.com/bigd4/magus.git"
        )
    if restart and not (Path("results").is_dir() and Path("log.txt").is_file()):
        raise InputError(
            "-r: no results/ and log.txt in this folder to go on with; start without -r (a search"
            " of the embedded host: --host embedded)"
        )
    _log_as_magus_does()
    autoload.install()
    from magus.entrypoints.search import search

    autoload.load_plugins()
    search(input_file=data, use_ml=use_ml, restart=restart)


def _log_as_magus_does() -> None:
    from magus.logger import set_logger

    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    # A restart reads log.txt, so it must be written here too.
    set_logger(level="INFO", log_path="log.txt")
