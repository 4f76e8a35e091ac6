"""Which keys go together where a search moves on a free-energy surface."""

from __future__ import annotations

from magus_anharmonic.settings.calculators import CalculatorSettings
from magus_anharmonic.settings.section import SCRATCH
from magus_anharmonic.settings.sscha import SschaSettings
from magus_anharmonic.settings.training import LearningSettings

LABELER = "sscha"
"""The labeler that makes labels of a free energy."""


def problem_of_surface(
    block: CalculatorSettings | None,
    learning: LearningSettings | None,
    sscha: SschaSettings | None,
    *,
    under_m: bool,
) -> str:
    """What of the keys does not go together with ``surface: free-energy``, or goes with it alone;
    empty where all is well. ``block`` : of the calculator, ``under_m`` : whether that is
    MLCalculator."""
    labels = learning is not None and learning.labeler.calculator == LABELER
    if block is None or block.surface == "static":
        return (
            "learning.labeler: calculator: sscha makes labels of a free energy, which the model"
            " then is: add surface: free-energy to MainCalculator"
            if labels and block is not None
            else ""
        )
    if under_m:
        return (
            "MLCalculator.surface: free-energy: under magus search -m labels are those of"
            " MainCalculator; take the block as MainCalculator, without -m"
        )
    if learning is not None and not labels:
        return (
            f"learning.labeler: calculator: {learning.labeler.calculator}: with surface:"
            " free-energy the labels are free energies: calculator: sscha"
        )
    if learning is not None and learning.select == "sscha":
        return (
            "learning.select: sscha labels configurations of an ensemble, on which there is no free"
            " energy; with surface: free-energy take uncertain, diverse or random"
        )
    if block.checkpoint == SCRATCH:
        return "checkpoint: scratch: a free-energy model begins from its potential; give that"
    if sscha is None:
        return ""
    if not sscha.evaluator:
        return (
            "sscha.evaluator: with surface: free-energy SSCHA certifies what is found, on the"
            " potential that the model is of: give its checkpoint"
        )
    if len(sscha.temperatures) > 1:
        return "sscha.temperature: a list: one free-energy surface has one temperature"
    return ""


def with_its_defaults(learning: LearningSettings | None) -> LearningSettings | None:
    """On a free energy ``learning.select``, where it is left out, is ``uncertain``: labels are few
    and dear, and go where the model knows least."""
    if learning is None or "select" in learning.model_fields_set:
        return learning
    return learning.model_copy(update={"select": "uncertain"})
