"""The evaluator that an input names, and whether it is of the surface that the rest of the input
is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.energy_surface import FreeEnergySurface, require_kind, surface_in_use
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator, Evaluator
from magus_anharmonic.io.digests import to_json
from magus_anharmonic.labelers import code_of
from magus_anharmonic.labelers.codes import make_calculator
from magus_anharmonic.settings import (
    AseCalculatorSettings,
    CalculatorSettings,
    RelaxationSettings,
    Settings,
    parse_calculator,
)
from magus_anharmonic.settings.search import LABELER
from magus_anharmonic.sscha.surrogate import surrogate_of


def open_evaluator(
    block: RelaxationSettings,
    at: str,
    elements: Sequence[str] = (),
    checkpoint: Path | None = None,
    check: Callable[[Any], None] | None = None,
) -> Evaluator:
    """The potential or the ASE calculator that a block of the input at the key ``at`` names.

    ``elements``: symbols of the compound; ``checkpoint``: instead of the block's, where learning
    made one; ``check`` : of the model, instead of `require_kind`. Raises ``InputError`` when it
    cannot be used.
    """
    if isinstance(block, CalculatorSettings):
        from magus_anharmonic.potential import load

        model = load(checkpoint or block.checkpoint, device=block.device)
        if check is None:
            require_kind(model, block.surface, at)
        else:
            check(model)
        return model
    assert isinstance(block, AseCalculatorSettings)
    made = make_calculator(block, at)
    return made if isinstance(made, Evaluator) else CalculatorEvaluator(made, elements=elements)


def evaluator_of(
    settings: Settings, checkpoint: Path | None = None
) -> tuple[Evaluator, RelaxationSettings]:
    """What ``MLCalculator`` or ``MainCalculator`` names, and its block; see `open_evaluator`."""
    block, at = settings.calculator, "MainCalculator"
    if block is None and settings.ml_calculator:
        raise InputError(
            f"MLCalculator.calculator: {settings.ml_calculator.get('calculator')!r}: without MAGUS"
            " it is mattersim"
        )
    block = block or parse_calculator(settings.main_calculator, at)
    check = partial(require_surface, settings=settings, at=at) if settings.on_free_energy else None
    return open_evaluator(block, at, settings.symbols, checkpoint, check), block


def ranking_evaluator(settings: Settings, own: Evaluator | None = None) -> Evaluator:
    """Whose energies SSCHA asks for: what ``sscha.evaluator`` names, else ``own``, the search's,
    else what `evaluator_of` makes. Raises ``InputError`` for a ``sscha.surrogate`` that is none,
    before anything is computed."""
    if settings.sscha is not None:
        surrogate_of(settings.sscha.surrogate, Atoms(settings.symbols))
    if settings.evaluator is not None:
        return open_evaluator(settings.evaluator, "sscha.evaluator", settings.symbols)
    return own or evaluator_of(settings)[0]


def ranking_evaluators(
    settings: Settings, own: Evaluator | None = None
) -> tuple[Evaluator, Evaluator | None]:
    """What a search ranks by, `ranking_evaluator`, and None; on a free energy its model, ``own`` or
    what `evaluator_of` makes, and the potential with which SSCHA certifies (None: it does not)."""
    if not settings.on_free_energy:
        return ranking_evaluator(settings, own), None
    model = own or evaluator_of(settings)[0]
    if settings.sscha is None:
        return model, None
    certifier = ranking_evaluator(settings, own)
    surface = surface_in_use(model)
    potential = model.model_id if surface is None else surface.potential
    if certifier.model_id != potential:
        raise InputError(
            f"sscha.evaluator: model {certifier.model_id}, and the free energy of the search is of"
            f" the potential {potential}: SSCHA on another potential certifies nothing of it"
        )
    return model, certifier


def surface_of_labels(settings: Settings) -> FreeEnergySurface | None:
    """What the labeler of a search makes labels of; None: there is none."""
    if settings.learning is None or not settings.on_free_energy:
        return None
    code = code_of(LABELER)
    return code.surface(code.recipe(settings.learning.labeler))


def require_surface(model: Any, settings: Settings, at: str = "MainCalculator") -> None:
    """Raise ``InputError`` unless ``model`` is what the block at the key ``at`` says, and of the
    temperature, supercell and masses of ``sscha``, ``learning.labeler`` and the structures.

    A search that makes its own labels may begin with their potential: it relaxes on that until the
    first round has made a model.
    """
    block = settings.calculator
    assert block is not None
    labels, surface = surface_of_labels(settings), surface_in_use(model)
    begins = labels is not None and surface is None and labels.potential == model.model_id
    if not begins:
        require_kind(model, block.surface, at)
    surface = surface or labels
    if surface is None:
        return
    if labels is not None and (different := surface.difference(labels)):
        raise InputError(
            f"{at}.checkpoint: model {model.model_id} is of another free-energy surface than the"
            f" labels of learning.labeler ({different})"
        )
    if settings.symbols:
        surface.require([Atoms(settings.symbols)])
    if settings.sscha is not None:
        surface.require([], settings.sscha.temperatures[0])
        own = settings.sscha.supercell
        if to_json(own) != to_json(surface.supercell):
            raise InputError(
                f"sscha.supercell: {to_json(own)}, and the free-energy model {model.model_id} is of"
                f" {to_json(surface.supercell)}: what SSCHA certifies must be of one supercell"
            )
