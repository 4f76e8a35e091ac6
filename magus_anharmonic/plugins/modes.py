"""Which of our features go with which mode of ``magus search``, checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import InputError
from magus_anharmonic.plugins.parameters import calculator_settings, misspelt_blocks, settings_of
from magus_anharmonic.scheduler import is_remote
from magus_anharmonic.settings import Settings

logger = logging.getLogger(__name__)

# The loops of `magus search -m` in which MAGUS trains.
ML_LOOPS = ("SelectDFTScf", "DFTScf", "DFTRelax")


def check_input(parameters: Mapping[str, Any], *, ml: bool, parallel: bool) -> Settings:
    """Settings of a search that concerns us; raises InputError with every problem of keys, values and combinations.

    ml : the search is ``magus search -m``; parallel : ``magus search -p``.
    """
    problems = misspelt_blocks(parameters)
    try:
        settings = settings_of(parameters)
        options = [calculator_settings(settings, learner=learner) for learner in (False, True) if _is_ours(settings, learner)]
    except InputError as error:
        raise InputError(*problems, *error.problems) from None
    problems += _calculator_problems(settings, ml) + _learning_problems(settings, parameters, ml)
    if parallel and any(_uses_cuda(option.device) for option in options):
        problems.append(
            "MainCalculator.device: cuda cannot be used by the forked workers of `magus search -p`; run without -p "
            "(structures are relaxed in batches in one process), or set device: cpu"
        )
    if parallel and is_remote(settings.scheduler):
        problems.append(
            f"scheduler: {settings.scheduler} does not go with `magus search -p`, whose forked workers cannot share a connection; "
            "run without -p (relaxations are sent to the workers)"
        )
    if problems:
        raise InputError(*problems)
    _warn_merging(settings, parameters)
    return settings


def _is_ours(settings: Settings, learner: bool) -> bool:
    block = settings.ml_calculator if learner else settings.main_calculator
    return block.get("calculator") == "mattersim"


def _calculator_problems(settings: Settings, ml: bool) -> list[str]:
    if settings.learning is None and settings.sscha is None:
        return []
    if ml and not _is_ours(settings, learner=True):
        return ["MLCalculator.calculator: learning and sscha under `magus search -m` need calculator: mattersim here"]
    if not ml and not _is_ours(settings, learner=False):
        named = settings.main_calculator.get("calculator", "nothing")
        return [
            f"MainCalculator.calculator: is {named}; learning and sscha need calculator: mattersim here, "
            "or in MLCalculator with `magus search -m`"
        ]
    return []


def _learning_problems(settings: Settings, parameters: Mapping[str, Any], ml: bool) -> list[str]:
    loops = [key for key in ML_LOOPS if parameters.get(key)]
    if settings.learning is None:
        if ml and loops and _is_ours(settings, learner=True):
            return [f"{loops[0]}: needs the block learning: (labeler: {{calculator: main}} and the paper's values)"]
        return []
    labeler = settings.learning.labeler.calculator
    if not ml:
        advice = "give gpaw, vasp, espresso or the import path of an ASE calculator"
        return [f"learning.labeler.calculator: main is for `magus search -m`; {advice}"] if labeler == "main" else []
    problems = []
    if labeler != "main":
        problems.append(
            f"learning.labeler.calculator: is {labeler}; under `magus search -m` MAGUS takes the labels from MainCalculator: "
            "give main, or search without -m"
        )
    if _is_ours(settings, learner=False):
        problems.append("MainCalculator.calculator: is mattersim; under `magus search -m` it makes the DFT labels: give a DFT code")
    if settings.main_calculator.get("calculator") == "espresso":
        problems.append(
            "MainCalculator.calculator: espresso of MAGUS reads relaxations only, and every single point would be lost; "
            "search without -m, with learning.labeler: {calculator: espresso}"
        )
    if not loops:
        problems.append("SelectDFTScf: is missing; learning under `magus search -m` needs SelectDFTScf: True")
    return problems


def _uses_cuda(device: str | None) -> bool:
    if device is not None:
        return device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def single_thread() -> None:
    """Keep torch at one thread: workers forked from a process whose threads have run would wait for ever."""
    import torch

    torch.set_num_threads(1)


def is_mode(search: Any, name: str) -> bool:
    """Whether the search object is MAGUS's class ``name`` (MLMagus, PaMagus) or derived from it."""
    return any(base.__name__ == name for base in type(search).__mro__)


def _warn_merging(settings: Settings, parameters: Mapping[str, Any]) -> None:
    if "SSCHA" not in settings.fitness or "dE" in parameters or "Comparator" in parameters:
        return
    logger.warning(
        "dE is not given: MAGUS takes structures of one space group within 10 meV/atom for the same, "
        "which merges near-degenerate phases before SSCHA can tell them apart; dE: 0.001 keeps them"
    )


def check_installation(settings: Settings, run_dir: Path) -> Settings:
    """Read the checkpoints and look for labeler and data set before MAGUS touches a folder; raises InputError.

    Returns the settings, without ``learning`` where its labeler is not installed and not required.
    """
    from magus_anharmonic.generation import checked_learning
    from magus_anharmonic.potential import checkpoint

    for learner in (False, True):
        if _is_ours(settings, learner):
            checkpoint.describe(checkpoint.resolve(calculator_settings(settings, learner=learner).checkpoint))
    if settings.learning is None or settings.learning.labeler.calculator == "main":
        return settings
    return checked_learning(settings, run_dir)
