"""The first model of a search that begins without any: ``checkpoint: scratch``.

Nothing can be relaxed without a model, so random crystals are labelled as they were drawn, and a
model with new weights is trained on them. With it fresh random crystals are followed downhill for a
few steps, labelled and added: the labels come to where relaxations go (as in Pickard, PRB 106,
014102 (2022), doi:10.1103/PhysRevB.106.014102). Labels of ``learning.dataset`` take part from the
start: with them the first crystals are followed too. What comes out is round 0 of the search.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.io.files import remove
from magus_anharmonic.labelers.base import Labeler
from magus_anharmonic.learning.choose import SIDES
from magus_anharmonic.learning.dataset import LabelStore, on_side, read_dataset
from magus_anharmonic.learning.learn import DATASET, Sets, end_round, label_planned, scores_of_sets
from magus_anharmonic.learning.round import Purpose, Round
from magus_anharmonic.potential.label_check import sound
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings import LearningSettings
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa

if TYPE_CHECKING:
    from magus_anharmonic.potential import Potential
    from magus_anharmonic.potential.labelled import Scores

log = logging.getLogger(__name__)

GENERATION = 0
DESCENT = 15
"""Relaxation steps before the second batch, twice as many before the third, ...: to where a model
of so few labels errs, not to where it runs away."""


def first_model(
    crystals: Callable[[int, int], list[Atoms]],
    *,
    pressure: GPa,
    settings: LearningSettings,
    labeler: Labeler,
    store: LabelStore,
    run_dir: str | Path,
    seed: int,
    device: str | None = None,
) -> Path:
    """Label, train, follow, label, ...: `learning.scratch.batches` times; the model's file,
    ``run_dir/checkpoints/gen0.pth``, beside its line in ``metrics.jsonl``.

    crystals : ``crystals(batch, n)`` draws n random crystals, the same ones for the same batch.
    Interrupted, it goes on with the labels and the trainings that there are. Raises ``InputError``
    (labels of other DFT settings) and ``MagusAnharmonicError`` (no label could be made).
    """
    folder, began = Path(run_dir), time.monotonic()
    store.check(labeler.settings_hash)
    dataset = read_dataset(settings.dataset, labeler.settings_hash) if settings.dataset else []
    store.adopt(dataset, settings.split)
    now = Round(GENERATION, settings.model_copy(update={"n_perturb": 1}), store, seed)
    scratch, ids = settings.scratch, set[str]()
    n_failures, in_training = 0, 0.0
    model: Potential | None = None
    labels: list[Atoms] = []
    if (sets := _sets([], dataset, settings)).train:
        began_training = time.monotonic()
        model, _ = _trained(sets, now, SearchFolder(folder).training / "first0.pth", device)
        in_training += time.monotonic() - began_training
    followed = 0 if model is None else DESCENT
    for batch in range(1, scratch.batches + 1):
        found = crystals(batch, scratch.n_structures)
        if model is not None:
            found = _followed(found, model, pressure, followed + DESCENT * (batch - 1))
        known = now.known_sides() | {
            str(one.info["family"]): str(one.info["side"]) for one in labels
        }
        planned = now.plan(found, range(len(found)), known)
        n_failures += label_planned(planned, GENERATION, labeler, store, folder)
        # not those that a later batch of an interrupted run has left: the same sides and training
        ids |= {str(atoms.info["id"]) for atoms in planned}
        labels = [one for one in store.labels(generation=GENERATION) if one.info["id"] in ids]
        sets = _sets(labels, dataset, settings)
        if not sets.train:
            raise MagusAnharmonicError(
                f"checkpoint: scratch: none of {len(ids)} random crystals could be labelled; the"
                f" reasons are in {folder / 'failures.jsonl'}"
            )
        started = time.monotonic()
        model, found_scores = _trained(
            sets, now, SearchFolder(folder).training / f"first{batch}.pth", device
        )
        in_training += time.monotonic() - started
        log.info(
            "first model, batch %d of %d: %d labels, %d failed; %s on %d of them held back",
            batch,
            scratch.batches,
            len(labels),
            n_failures,
            found_scores,
            len(sets.validation),
        )
        target = settings.target_rmse
        if batch > 1 and target is not None and found_scores.energy_rmse < target:
            break
    assert model is not None
    metrics = {
        "generation": GENERATION,
        "settings_hash": labeler.settings_hash,
        "n_labels": len(labels),
        "n_failures": n_failures,
        "seconds_labels": time.monotonic() - began - in_training,
        "seconds_training": in_training,
    }
    return _kept(model, sets, settings, folder, metrics)


def _followed(found: Sequence[Atoms], model: Potential, pressure: GPa, steps: int) -> list[Atoms]:
    """The structures after ``steps`` of a relaxation; those that run away are left out."""
    results = model.relax([stripped(atoms) for atoms in found], pressure, max_steps=steps)
    kept = [result.atoms for result in results if not result.failed]
    log.info("%d of %d random crystals were followed for %d steps", len(kept), len(found), steps)
    return kept


def _sets(labels: Sequence[Atoms], dataset: Sequence[Atoms], settings: LearningSettings) -> Sets:
    new, _ = sound(labels, None, "first model")
    old, _ = sound(dataset, None, "learning.dataset")
    train, validation, test = (on_side([*new, *old], side, settings.split) for side in SIDES)
    n_old = len(on_side(old, "train", settings.split))
    origin = f"this round and {DATASET}" if dataset else "this round"
    return Sets(train, validation, test, len(train) - n_old, n_old, origin, origin)


def _trained(sets: Sets, now: Round, out: Path, device: str | None) -> tuple[Potential, Scores]:
    """New weights trained on ``sets``, and their errors on the validation side."""
    from magus_anharmonic.potential import checkpoint, load
    from magus_anharmonic.potential.resources import chosen_device
    from magus_anharmonic.potential.train import TrainRecipe, train_stages
    from magus_anharmonic.potential.trainer import from_scratch

    scratch, seed = now.settings.scratch, int(now.random(Purpose.TRAIN).integers(2**31))
    recipe = TrainRecipe(seed=seed, architecture=scratch.architecture, stages=scratch.stages)
    module = from_scratch(sets.train, scratch.architecture, seed=seed, device=chosen_device(device))
    stages = train_stages(
        module,
        sets.train,
        sets.validation,
        recipe,
        out,
        parent_id=checkpoint.model_id(module),
        species={int(number) for atoms in sets.train for number in atoms.numbers},
    )
    return load(stages[-1].path, device=device), stages[-1].after


def _kept(
    model: Potential, sets: Sets, settings: LearningSettings, folder: Path, metrics: dict[str, Any]
) -> Path:
    """Write the line of metrics, then the checkpoint, whose presence ends the round."""
    metrics |= {
        **sets.counts(),
        "reason": "the first model, from new weights",
        "old_model": None,
        "new_model": model.model_id,
        "changed": True,
        "new": scores_of_sets(model, sets, settings),
    }
    file = end_round(model, metrics, folder, Path(str(model.path)))
    remove(SearchFolder(folder).training)
    return file
