"""Which of our features go with which mode of ``magus search``, checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magus.fitness import fit_dict

from magus_anharmonic.errors import InputError
from magus_anharmonic.plugins.parameters import calculator_settings, misspelt_blocks, settings_of
from magus_anharmonic.scheduler import is_remote
from magus_anharmonic.search.keys import WITHOUT_EFFECT, fold, unknown_to_magus
from magus_anharmonic.settings import Settings, snake_case, stages

logger = logging.getLogger(__name__)

# The loops of `magus search -m` in which MAGUS trains.
ML_LOOPS = ("SelectDFTScf", "DFTScf", "DFTRelax")

# Read by MAGUS in this spelling alone; in snake_case they would be zero, or the default, without a
# word.
_CAMEL_ONLY = (
    "numGen popSize saveGood initSize structureType formulaType molMode initNum minNum poolSize"
).split()

_OF_OTHER_FILES = ("Ercs", "Age")
"""Fitnesses that MAGUS registers for surfaces and for ``-smfr``."""

NO_POINTS = "espresso of MAGUS reads relaxations only, and every single point would be lost"

_NEEDED_BY = {"XRD": ("waveLength", "targetXrd")}


def check_input(parameters: Mapping[str, Any], *, ml: bool, parallel: bool) -> Settings:
    """Settings of a search that concerns us; raises InputError with every problem of keys, values
    and combinations.

    ml : the search is ``magus search -m``; parallel : ``magus search -p``.
    """
    problems = [*misspelt_blocks(parameters), *_spelling_problems(parameters)]
    try:
        settings = settings_of(parameters)
        options = [
            calculator_settings(settings, learner=learner)
            for learner in (False, True)
            if is_ours(settings, learner=learner)
        ]
    except InputError as error:
        raise InputError(*problems, *error.problems) from None
    problems += _calculator_problems(settings, ml) + _learning_problems(settings, parameters, ml)
    problems += _structure_problems(settings, parameters) + _fitness_problems(
        settings, parameters, ours=bool(options)
    )
    if parallel and any(_uses_cuda(option.device) for option in options):
        problems.append(
            "MainCalculator.device: cuda cannot be used by the forked workers of `magus search -p`;"
            " run without -p (structures are relaxed in batches in one process), or set device: cpu"
        )
    if parallel and is_remote(settings.scheduler):
        problems.append(
            f"scheduler: {settings.scheduler} does not go with `magus search -p`, whose forked"
            " workers cannot share a connection; run without -p (relaxations are sent to the"
            " workers)"
        )
    if problems:
        raise InputError(*problems)
    _warn(settings, parameters)
    return settings


def _spelling_problems(parameters: Mapping[str, Any]) -> list[str]:
    wanted = {snake_case(name): name for name in _CAMEL_ONLY}
    return [
        f"{key}: MAGUS reads {wanted[key]} only"
        for key in map(str, parameters)
        if key in wanted and key != wanted[key]
    ]


def check_structure_type(parameters: Mapping[str, Any]) -> None:
    """Raise InputError where the structure type has no free energy, or nothing to learn from; also
    for wrong values of our keys."""
    problems = _structure_problems(settings_of(parameters), parameters)
    if problems:
        raise InputError(*problems)


def _structure_problems(settings: Settings, parameters: Mapping[str, Any]) -> list[str]:
    """Only a crystal has a free energy here; SSCHA would fail, or take the vacuum for a crystal."""
    kind = parameters["structureType"] if "structureType" in parameters else "bulk"
    dimension = parameters["dimension"] if "dimension" in parameters else 3
    if kind == "bulk" and dimension == 3:
        return []
    named = f"structureType: {kind}" if kind != "bulk" else f"dimension: {dimension}"
    problems = []
    if settings.sscha is not None or "SSCHA" in settings.fitness:
        problems.append(
            f"{named}: SSCHA needs crystals, periodic in three directions (structureType: bulk,"
            " dimension: 3); take out sscha: and Fitness: [SSCHA]"
        )
    if settings.learning is not None:
        problems.append(
            f"{named}: learning needs structureType: bulk and dimension: 3; take out learning:"
        )
    return problems


def _fitness_problems(
    settings: Settings, parameters: Mapping[str, Any], *, ours: bool
) -> list[str]:
    problems = []
    for name in settings.fitness:
        missing = [key for key in _NEEDED_BY.get(name, ()) if key not in parameters]
        if name not in fit_dict and name not in _OF_OTHER_FILES:
            problems.append(f"Fitness: {name}: unknown fitness; MAGUS has {', '.join(fit_dict)}")
        elif name == "Gap" and ours:
            problems.append(
                "Fitness: Gap: MatterSim gives no band gap, and MAGUS keeps what it relaxed; take"
                " Gap out"
            )
        elif missing:
            problems.append(f"Fitness: {name}: needs {' and '.join(missing)}")
    return problems


def is_ours(settings: Settings, *, learner: bool) -> bool:
    """Whether ``MLCalculator`` (learner) or ``MainCalculator`` is ours."""
    block = settings.ml_calculator if learner else settings.main_calculator
    return stages(block) == ["mattersim"]


def _calculator_problems(settings: Settings, ml: bool) -> list[str]:
    if settings.learning is None or is_ours(settings, learner=ml):
        needs_points = settings.sscha is not None and settings.evaluator is None and not ml
        if needs_points and stages(settings.main_calculator)[-1:] == ["espresso"]:
            return [
                f"MainCalculator.calculator: {NO_POINTS}; name another calculator for SSCHA as"
                " sscha.evaluator"
            ]
        return []
    name, block = (
        ("MLCalculator", settings.ml_calculator)
        if ml
        else ("MainCalculator", settings.main_calculator)
    )
    return [
        f"{name}.calculator: is {block.get('calculator', 'nothing')}; learning: needs calculator:"
        " mattersim here; without learning: any calculator of MAGUS searches and ranks"
    ]


def _learning_problems(settings: Settings, parameters: Mapping[str, Any], ml: bool) -> list[str]:
    loops = [key for key in ML_LOOPS if parameters.get(key)]
    if settings.learning is None:
        if ml and loops and is_ours(settings, learner=True):
            return [
                f"{loops[0]}: needs the block learning: (labeler: {{calculator: main}} and the"
                " paper's values)"
            ]
        return []
    labeler = settings.learning.labeler.calculator
    if not ml:
        advice = "give gpaw, vasp, espresso or the import path of an ASE calculator"
        return (
            [f"learning.labeler.calculator: main is for `magus search -m`; {advice}"]
            if labeler == "main"
            else []
        )
    problems = []
    if labeler != "main":
        problems.append(
            f"learning.labeler.calculator: is {labeler}; under `magus search -m` MAGUS takes the"
            " labels from MainCalculator: give main, or search without -m"
        )
    if is_ours(settings, learner=False):
        problems.append(
            "MainCalculator.calculator: is mattersim; under `magus search -m` it makes the DFT"
            " labels: give a DFT code"
        )
    if stages(settings.main_calculator)[-1:] == ["espresso"]:
        problems.append(
            f"MainCalculator.calculator: {NO_POINTS}; search without -m, with learning.labeler:"
            " {calculator: espresso}"
        )
    if not loops:
        problems.append(
            "SelectDFTScf: is missing; learning under `magus search -m` needs SelectDFTScf: True"
        )
    return problems


def _uses_cuda(device: str | None) -> bool:
    if device is not None:
        return device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def single_thread() -> None:
    """Keep torch at one thread: workers forked from a process whose threads have run would wait for
    ever."""
    import torch

    torch.set_num_threads(1)


def is_mode(search: Any, name: str) -> bool:
    """Whether the search object is MAGUS's class ``name`` (MLMagus, PaMagus) or derived from it."""
    return any(base.__name__ == name for base in type(search).__mro__)


def _warn(settings: Settings, parameters: Mapping[str, Any]) -> None:
    """What would be ignored without a word, or merge what SSCHA is to tell apart."""
    for line in unknown_to_magus(settings):
        logger.warning("%s (MAGUS ignores it)", line)
    added = {
        "goodSize": parameters.get("popSize"),
        "volRatio": 2,
        "diffE": 0.01,
        "diffV": 0.05,
        "chkSeed": True,
    }  # by magusParameters
    for key, value in settings.host.items():
        if fold(key) in WITHOUT_EFFECT and (key not in added or value != added[key]):
            logger.warning(
                "%s: has no effect: MAGUS never reads it; %s", key, WITHOUT_EFFECT[fold(key)]
            )
    if settings.sscha is not None and "SSCHA" not in settings.fitness:
        logger.warning(
            "sscha: without Fitness: [SSCHA]: free energies are computed and listed, but the search"
            " does not go by them"
        )
    if "SSCHA" in settings.fitness and (why := merges_near_phases(parameters)):
        logger.warning(
            "%s, which merges near-degenerate phases before SSCHA can tell them apart; "
            "Comparator: {comparator_list: [naive]} and dE: 0.001 keep them",
            why,
        )


def merges_near_phases(parameters: Mapping[str, Any]) -> str:
    """Why MAGUS takes phases of different space groups, or within 10 meV/atom of each other, for
    one; empty where it does not.

    Its default is naive OR zurek: naive compares space group, volume and energy (``dE``), zurek
    shapes alone, within 5 %.
    """
    block = parameters.get("Comparator") or {}
    names = block.get("comparator_list", ["naive", "zurek"])
    if "naive" not in names or (len(names) > 1 and block.get("connect", "or") == "or"):
        return (
            f"Comparator: {' or '.join(names)} takes structures of nearly one shape for one,"
            " whatever their space groups and energies"
        )
    tolerance = (block.get("naive") or {}).get("dE", parameters.get("dE", 0.01))
    return (
        ""
        if tolerance < 0.01
        else (
            f"dE: {tolerance:g} takes structures of one space group within that (eV/atom) for the"
            " same"
        )
    )


def check_installation(settings: Settings, run_dir: Path) -> Settings:
    """Read the checkpoints and look for evaluator, labeler and data set before MAGUS touches a
    folder; raises InputError.

    Returns the settings, without ``learning`` where its labeler is not installed and not required.
    """
    from magus_anharmonic.generation import checked_labelers
    from magus_anharmonic.potential import checkpoint
    from magus_anharmonic.ranking.evaluators import ranking_evaluators

    for learner in (False, True):
        if is_ours(settings, learner=learner) and not settings.from_scratch:
            checkpoint.describe(
                checkpoint.resolve(calculator_settings(settings, learner=learner).checkpoint)
            )
    if settings.evaluator is not None or settings.on_free_energy:
        ranking_evaluators(settings)
    if settings.learning is not None and settings.learning.labeler.calculator == "main":
        checked_labelers(settings.model_copy(update={"learning": None}), run_dir)
        return settings
    return checked_labelers(settings, run_dir)
