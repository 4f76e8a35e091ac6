"""The only code that imports MAGUS: calculator, learning and ranking hook, fitness, and their
registration."""

from __future__ import annotations

import functools
import logging
from typing import Any

from magus_anharmonic import third_party

logger = logging.getLogger(__name__)

CALCULATOR = "mattersim"
FITNESS = "SSCHA"


def register() -> None:
    """Entry point of the group ``magus.plugins``: make MAGUS know calculator, fitness and hook;
    repeated calls are harmless."""
    import magus.calculators
    from magus.fitness import fit_dict

    from magus_anharmonic.plugins import hook
    from magus_anharmonic.plugins.calculator import NamedFitness

    _register_calculator()
    fit_dict[FITNESS] = NamedFitness
    for name in third_party.declared("fitness"):
        fit_dict.setdefault(name, functools.partial(NamedFitness, name=name))
    _register_again_after_magus(magus.calculators)
    hook.attach()


def mattersim(**parameters: Any) -> Any:
    """What MAGUS builds for ``calculator: mattersim``: with learning for ``MLCalculator``, which
    alone gets ``query_calculator``."""
    if "query_calculator" in parameters:
        from magus_anharmonic.plugins.learner import MatterSimLearner

        return MatterSimLearner(**parameters)
    from magus_anharmonic.plugins.calculator import MatterSimCalculator

    return MatterSimCalculator(**parameters)


def _register_calculator() -> None:
    from magus.utils import CALCULATOR_PLUGIN

    if CALCULATOR in CALCULATOR_PLUGIN and CALCULATOR_PLUGIN[CALCULATOR] is not mattersim:
        other = getattr(CALCULATOR_PLUGIN[CALCULATOR], "__module__", "elsewhere")
        logger.warning(
            "calculator %s of %s is replaced by the one of magus-anharmonic", CALCULATOR, other
        )
    CALCULATOR_PLUGIN.register(CALCULATOR)(mattersim)


def _register_again_after_magus(calculators: Any) -> None:
    # MAGUS imports every file of magus/calculators before each look-up, and a file with our name
    # would overwrite us.
    original = calculators.load_plugins
    if getattr(original, "by_magus_anharmonic", False):
        return

    def load_plugins(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        _register_calculator()

    load_plugins.by_magus_anharmonic = True  # type: ignore[attr-defined]
    calculators.load_plugins = load_plugins
