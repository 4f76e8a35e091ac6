"""Step ``final``: the foundation model finetuned on the merged labels in stages, and the errors of both (Table I, Fig. 3)."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.campaign.context import FINAL, Context, Outcome
from magus_anharmonic.campaign.merging import LABELS, labels_on_side
from magus_anharmonic.campaign.plan import Step
from magus_anharmonic.campaign.tables import write_part
from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.files import replacing, write_json

log = logging.getLogger(__name__)

SETS = {"training": "train", "validation": "validation", "test": "test"}
PARITY_ROWS = 20_000


def final(context: Context, step: Step) -> Outcome:
    """Finetune from the foundation; leaves ``final/cycle<N>.pth``, ``final/final.pth`` and ``final/errors.json``."""
    from magus_anharmonic.potential import load
    from magus_anharmonic.potential.score import Scores

    folder, merged = context.folder(step), context.folder(step.needs[0]) / LABELS
    sets = {public: labels_on_side(merged, side) for public, side in SETS.items()}
    if not sets["training"]:
        raise MagusAnharmonicError("final: no label is on the training side; more structures are needed (learning.settings.n_sample)")
    stages = _train(context, step, sets["training"], sets["validation"])
    out = folder / f"cycle{step.cycle}.pth"
    with replacing(out) as temporary:
        shutil.copyfile(stages[-1].path, temporary)
    finetuned = load(out, device=context.settings.device)
    scores = write_errors(folder, {"foundation": context.foundation, "finetuned": finetuned}, sets, context.settings.seed)
    write_json(folder / f"errors-cycle{step.cycle}.json", scores)
    with replacing(context.root / FINAL) as temporary:
        shutil.copyfile(out, temporary)
    found = scores["finetuned"].get("validation")
    kept = (
        ""
        if any(stage.improved for stage in stages)
        else "no stage lowered the validation loss: the model is the foundation with new shifts"
    )
    if found is not None:
        log.info("final model %s: validation RMSE %s on %d labels", finetuned.model_id, Scores(**found), found["n"])
    return Outcome(n_structures=sum(map(len, sets.values())), output=finetuned.model_id, reason=kept)


def _train(context: Context, step: Step, training: Sequence[Atoms], validation: Sequence[Atoms]) -> list[Any]:
    """One `FinetuneResult` per stage; a stage that was finished before is read from its file."""
    from magus_anharmonic.potential.finetune import finetune
    from magus_anharmonic.potential.shift import refit_shift

    folder, foundation = context.folder(step), context.foundation
    module = copy.deepcopy(foundation.module)
    if context.settings.final.refit_shift:
        refit_shift(module, training)
    stages = []
    for number, stage in enumerate(context.settings.final.stages, start=1):
        log.info("stage %d of %d: %d epochs on %d labels", number, len(context.settings.final.stages), stage.epochs, len(training))
        result = finetune(
            module, training, validation, _finetune_settings(stage), out=folder / f"cycle{step.cycle}.stage{number}.pth",
            seed=context.settings.seed + number, parent_id=foundation.model_id, species=foundation.species_seen,
        )  # fmt: skip
        stages.append(result)
        module = result.module
    return stages


def _finetune_settings(stage: Any) -> Any:
    from magus_anharmonic.potential.trainer import FinetuneSettings

    return FinetuneSettings(**stage.model_dump())


def write_errors(folder: Path, models: dict[str, Any], sets: dict[str, list[Atoms]], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """``model_errors.csv`` and ``parity.csv``; returns the scores by model and set (sets without labels are left out)."""
    from magus_anharmonic.potential.score import score

    scores = {name: {public: score(model, labels).as_dict() for public, labels in sets.items() if labels} for name, model in models.items()}
    write_part(
        folder, "model_errors",
        [
            (name, models[name].model_id, public, found["n"], found["energy_rmse"], found["force_rmse"], found["stress_rmse"])
            for name, by_set in scores.items()
            for public, found in by_set.items()
        ],
    )  # fmt: skip
    rows = [row for name, model in models.items() for public, labels in sets.items() for row in parity_rows(name, model, public, labels)]
    if len(rows) > PARITY_ROWS:
        rows = [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), PARITY_ROWS, replace=False))]
    write_part(folder, "parity", rows)
    return scores


def parity_rows(name: str, model: Any, public: str, labels: Sequence[Atoms]) -> Iterator[tuple[object, ...]]:
    """Energy per atom, every force component and the six stress components of every label, by DFT and by the model."""
    from magus_anharmonic.potential.score import labels_of
    from magus_anharmonic.units import EV_PER_A3_IN_GPA

    if not labels:
        return
    found = model.evaluate(list(labels))
    upper = np.triu_indices(3)
    for index, atoms in enumerate(labels):
        energy, forces, stress = labels_of(atoms)
        yield name, public, "energy", "eV/atom", energy / len(atoms), float(found.energy[index]) / len(atoms)
        for reference, predicted in zip(forces.ravel(), np.asarray(found.forces[index]).ravel(), strict=True):
            yield name, public, "force", "eV/A", float(reference), float(predicted)
        for reference, predicted in zip(stress[upper], np.asarray(found.stress[index])[upper], strict=True):
            yield name, public, "stress", "GPa", float(reference) * EV_PER_A3_IN_GPA, float(predicted) * EV_PER_A3_IN_GPA
