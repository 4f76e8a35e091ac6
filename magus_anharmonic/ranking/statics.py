"""Static energies of structures: evaluation with the newest model, and relaxation towards its minima."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import MagusAnharmonicError, is_trouble
from magus_anharmonic.evaluator import Evaluation, Evaluator, has_stress, set_energy_error
from magus_anharmonic.scheduler import open_scheduler
from magus_anharmonic.settings import CalculatorSettings, Settings, parse
from magus_anharmonic.structures import bare
from magus_anharmonic.units import gpa_to_ev_per_a3

log = logging.getLogger(__name__)


def reevaluate(structures: Sequence[Atoms], evaluator: Evaluator, settings: Settings, relaxation_steps: int = 0) -> None:
    """Energy (eV), its expected error and enthalpy (eV/atom), forces, stress (Voigt) and model into the ``info`` of each structure.

    Structures that another model relaxed are first brought nearer to the minimum of this one, ``relaxation_steps`` at
    most. One that cannot be evaluated gets an infinite enthalpy and the reason: it is out of every ranking.
    """
    foreign = [atoms for atoms in structures if atoms.info.get("model") != evaluator.model_id]
    if foreign and relaxation_steps > 0:
        for reason in relax_in_place(foreign, evaluator, settings, relaxation_steps):
            if reason:
                log.info("a survivor stays as it was, the new model does not relax it: %s", reason)
    for atoms, found in zip(structures, evaluate_each(structures, evaluator), strict=True):
        atoms.info["model"] = evaluator.model_id
        set_energy_error(atoms, None if isinstance(found, str) else found.error_of(0))
        if isinstance(found, str):
            log.warning("a survivor cannot be evaluated and is out of the ranking: %s", found)
            atoms.info.update(enthalpy=np.inf, reason=found)
            continue
        energy, forces, stress = float(found.energy[0]), found.forces[0], found.stress[0]
        work = gpa_to_ev_per_a3(settings.pressure) * atoms.get_volume()
        voigt = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        atoms.info.update(energy=energy, enthalpy=(energy + work) / len(atoms), forces=np.array(forces), stress=np.array(voigt))
        if atoms.calc is not None:
            _renew_results(atoms, energy, forces, voigt)


def _renew_results(atoms: Atoms, energy: float, forces: np.ndarray, stress: np.ndarray) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)


def evaluate_each(structures: Sequence[Atoms], evaluator: Evaluator) -> list[Evaluation | str]:
    """One evaluation per structure, or the reason why there is none; the batch is split only when it fails as a whole."""
    inputs = [bare(atoms) for atoms in structures]
    try:
        batch = evaluator.evaluate(inputs)
    except MagusAnharmonicError as error:
        if is_trouble(error):
            raise
        if len(inputs) == 1:
            return [str(error)]
        return [evaluate_each([atoms], evaluator)[0] for atoms in inputs]
    stress = has_stress(batch)
    return [
        _one(batch, i)
        if np.isfinite(batch.energy[i]) and np.isfinite(batch.forces[i]).all() and (not stress or np.isfinite(batch.stress[i]).all())
        else "energy, forces or stress are not finite"
        for i in range(len(inputs))
    ]


def _one(batch: Evaluation, i: int) -> Evaluation:
    errors = None if batch.energy_error is None else batch.energy_error[i : i + 1]
    return Evaluation(batch.energy[i : i + 1], [batch.forces[i]], batch.stress[i : i + 1], errors)


def relax_in_place(structures: Sequence[Atoms], evaluator: Evaluator, settings: Settings, max_steps: int | None = None) -> list[str]:
    """Relax cell and positions at the target pressure as the block of the calculator says, in ``max_steps`` at most (None: the block's).

    Returns one reason per structure, empty where it went well; a structure that dissolves, overlaps or runs away stays
    as it was.
    """
    from magus_anharmonic.potential.portable import relax_on, relax_options

    options = relax_options(settings.calculator or parse(CalculatorSettings, {}))
    if max_steps is not None:
        options["max_steps"] = max_steps
    with open_scheduler(settings) as scheduler:
        relaxed = relax_on(scheduler, evaluator, [bare(atoms, constraints=True) for atoms in structures], settings.pressure, **options)
    for atoms, result in zip(structures, relaxed, strict=True):
        if not result.failed:
            atoms.set_cell(result.atoms.cell.array, scale_atoms=False)
            atoms.positions = result.atoms.positions
    return [(result.reason or "the relaxation failed") if result.failed else "" for result in relaxed]
