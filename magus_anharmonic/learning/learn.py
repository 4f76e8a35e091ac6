"""One round of learning: population -> labels -> finetuned model (Fig. 1a of the paper)."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from magus_anharmonic.energy_surface import FreeEnergySurface, check_start, surface_in_use
from magus_anharmonic.errors import CheckpointError
from magus_anharmonic.io.files import append_jsonl, read_jsonl, remove, replacing, set_aside
from magus_anharmonic.labelers.base import Failure, Label, Labeler
from magus_anharmonic.learning.choose import SIDES, Contender
from magus_anharmonic.learning.dataset import LabelStore, labelled, on_side, read_dataset
from magus_anharmonic.learning.round import Purpose, Round
from magus_anharmonic.potential.label_check import outliers, sound
from magus_anharmonic.potential.labelled import FEW, Scores, score, weights_by_error
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.runs.record import record_failure
from magus_anharmonic.settings import LearningSettings
from magus_anharmonic.structures import structure_id

if TYPE_CHECKING:
    from magus_anharmonic.potential import Potential

log = logging.getLogger(__name__)

MAX_FORCE = 50.0
"""eV/A; a label with a larger force is kept but not learned from (MAGUS drops such structures
too)."""

CONTEXT = 200
"""Earlier labels beside which those of a round are judged, at most."""

METRICS = ("generation", "new_model", "n_labels", "n_failures", "changed")
"""What every line of ``metrics.jsonl`` has."""

DATASET = "the dataset"
"""``validation_from`` where only ``learning.dataset`` has labels on that side: its errors say
nothing about this search."""


@dataclass(frozen=True)
class Learned:
    """The model after a round; ``metrics`` is the line of ``metrics.jsonl``."""

    potential: Potential
    metrics: dict[str, Any]

    @property
    def model_id(self) -> str:
        return self.potential.model_id

    @property
    def n_labels(self) -> int:
        return self.metrics["n_labels"]

    @property
    def n_failures(self) -> int:
        return self.metrics["n_failures"]

    @property
    def changed(self) -> bool:
        """Whether the model is a new one."""
        return self.metrics["changed"]


@dataclass(frozen=True)
class Sets:
    """What a round trains on and is judged by. ``validation_from`` and ``test_from``: rounds,
    `DATASET`, training, or none."""

    train: list[Atoms] = field(default_factory=list)
    validation: list[Atoms] = field(default_factory=list)
    test: list[Atoms] = field(default_factory=list)
    n_new: int = 0
    n_replay: int = 0
    validation_from: str = "none"
    test_from: str = "none"

    def parts(self) -> dict[str, list[Atoms]]:
        """The three sets by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def counts(self) -> dict[str, Any]:
        """Sizes and origins, as in ``metrics.jsonl``."""
        return {
            "n_new": self.n_new,
            "n_replay": self.n_replay,
            **{f"n_{part}": len(frames) for part, frames in self.parts().items()},
            "validation_from": self.validation_from,
            "test_from": self.test_from,
        }


def learn(
    population: Sequence[Atoms],
    *,
    generation: int,
    potential: Potential,
    settings: LearningSettings,
    labeler: Labeler,
    store: LabelStore,
    run_dir: str | Path,
    seed: int,
    contenders: Sequence[Contender] = (),
) -> Learned:
    """Choose, distort, label, finetune, and keep the better of the old and the new model.

    Parameters
    ----------
    population
        Relaxed structures, duplicates kept.
    run_dir
        ``results/anharmonic``; gets ``checkpoints/gen{N}.pth``, ``metrics.jsonl`` and
        ``failures.jsonl``.
    contenders
        For ``learning.select: sscha``: candidates whose order is undecided, with their ensembles,
        the lowest first.
    seed
        Same seed, population and labels: same result. A round that is finished is returned without
        work; one that was interrupted uses the labels that it has.

    Raises ``InputError`` (labels of other DFT settings in the store or in ``settings.dataset``) and
    ``LabelerError``.
    """
    folder = Path(run_dir)
    earlier = finished(folder, generation, potential)
    if earlier is not None:
        return earlier
    store.check(labeler.settings_hash)
    check_start(surface_in_use(labeler), potential.surface, potential.model_id)
    dataset = read_dataset(settings.dataset, labeler.settings_hash) if settings.dataset else []
    store.adopt(dataset, settings.split)
    began = time.monotonic()
    now = Round(generation, settings, store, seed)
    planned = _plan(now, population, contenders, potential, dataset, folder)
    n_failures = label_planned(planned, generation, labeler, store, folder)
    if surface_in_use(labeler) is not None:
        _gather(now, labeler, folder)
    n_failures += _quarantine(generation, potential, store, folder)
    dataset, _ = sound(dataset, potential, "learning.dataset")
    labels = store.labels(generation=generation)
    sets = training_sets(
        labels, store.labels(before=generation), dataset, settings, now.random(Purpose.REPLAY)
    )
    metrics: dict[str, Any] = {
        "generation": generation,
        "settings_hash": labeler.settings_hash,
        "n_labels": len(labels),
        "n_failures": n_failures,
        **sets.counts(),
        "seconds_labels": time.monotonic() - began,
    }
    candidate = None
    if labels and sets.train:
        candidate, found = _train(potential, sets, now, folder)
        metrics |= found
    else:
        metrics["reason"] = (
            "no label could be made"
            if not labels
            else "no label is on the training side, and there is none to replay"
        )
        log.warning("the model stays as it is: %s", metrics["reason"])
    return _conclude(potential, candidate, sets, settings, folder, metrics)


def _plan(
    now: Round,
    population: Sequence[Atoms],
    contenders: Sequence[Contender],
    potential: Potential,
    dataset: Sequence[Atoms],
    folder: Path,
) -> list[Atoms]:
    if now.settings.select == "sscha":
        if planned := now.plan_ensembles(contenders, folder):
            return [*planned, *now.plan_beside(planned, population)]
        log.info(
            "learning.select: sscha: no two candidates with SSCHA ensembles are undecided; this"
            " choice is random"
        )
    return now.plan(population, now.choose(population, potential, dataset))


def finished(folder: Path, generation: int, potential: Potential) -> Learned | None:
    """The result of a round that an earlier run finished: its line of metrics and its checkpoint
    are there."""
    records = _recorded(folder, generation)
    file = SearchFolder(folder).checkpoint(generation)
    if not records or not file.is_file():
        return None
    metrics, current = records[-1], potential
    if potential.model_id != metrics["new_model"] or potential.error_model is None:
        from magus_anharmonic.potential import load

        try:
            current = load(file, device=potential.device)
        except CheckpointError as error:
            set_aside(file, str(error))
            return None
        if current.model_id != metrics["new_model"]:
            log.warning(
                "%s is not the model that metrics.jsonl names; the round is done again", file
            )
            return None
    for left in SearchFolder(folder).training.glob(
        f"gen{generation}.pth*"
    ):  # killed between the checkpoint and its tidying up
        remove(left)
    log.info("round %d has learned already: model %s", generation, current.model_id)
    return Learned(current, metrics)


def _recorded(folder: Path, generation: int) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` about a round."""
    records = read_jsonl(SearchFolder(folder).metrics, METRICS)
    return [record for record in records if record["generation"] == generation]


def label_planned(
    planned: Sequence[Atoms], generation: int, labeler: Labeler, store: LabelStore, folder: Path
) -> int:
    """Label what is not labelled yet; returns the number of failures."""
    waiting = store.without_label(planned)
    n_failures = sum(
        atoms.info["id"] in store and "excluded" in store.get(atoms.info["id"]).info
        for atoms in planned
    )

    def keep(index: int, result: Label | Failure) -> None:
        nonlocal n_failures
        reason = keep_label(waiting[index], result, store)
        if reason is not None:
            n_failures += 1
            _record_failure(folder, waiting[index], result.settings_hash, reason)

    if waiting:
        log.info("labelling %d structures with %s", len(waiting), labeler.description)
        labeler.label(waiting, keep)
    store.close_batch(generation)
    return n_failures


def _gather(now: Round, labeler: Labeler, folder: Path) -> None:
    """Take in the labels that SSCHA runs in ``folder`` hold without having been asked for them:
    their families keep their sides, and new ones train."""
    known = now.known_sides()
    have = {structure_id(atoms) for atoms in now.store.labels(quarantined=True)}
    for atoms, label in labeler.found(SearchFolder(folder).sscha, frozenset(have)):
        if structure_id(atoms) in have:
            continue
        have.add(structure_id(atoms))
        now.plan_of(atoms, atoms, known, kind="population", distortion_seed="none")
        keep_label(atoms, label, now.store)
    now.store.close_batch(now.generation)


def _quarantine(generation: int, potential: Potential, store: LabelStore, folder: Path) -> int:
    """Set aside the labels of this round that cannot be right, judged beside the newest earlier
    ones; returns how many are new there."""
    new = store.labels(
        generation=generation, quarantined=True
    )  # a round that is taken up again must judge as it did before
    frames = [*new, *store.labels(before=generation)[-CONTEXT:]]
    reasons = (
        {i: reason for i, reason in outliers(frames, potential).items() if i < len(new)}
        if new
        else {}
    )
    for i, reason in reasons.items():
        store.quarantine(str(new[i].info["id"]), reason)
        _record_failure(folder, new[i], str(new[i].info["settings_hash"]), reason)
    return store.n_quarantined(generation)


def keep_label(atoms: Atoms, result: Label | Failure, store: LabelStore) -> str | None:
    """Save one result; returns the reason when it cannot be learned from."""
    if isinstance(result, Failure):
        return result.reason
    numbers = (np.asarray(result.energy), result.forces, result.stress)
    if not all(np.isfinite(values).all() for values in numbers):
        return "NaN or infinite energy, forces or stress"
    largest = float(np.linalg.norm(result.forces, axis=1).max())
    frame = labelled(atoms, result, seconds=round(result.seconds, 2))
    reason = None
    if largest > MAX_FORCE:
        reason = f"unphysical: a force of {largest:.0f} eV/A, more than {MAX_FORCE:g}"
        frame.info["excluded"] = reason
    store.add(frame)
    return reason


def _record_failure(folder: Path, atoms: Atoms, settings_hash: str, reason: str) -> None:
    log.warning("label %s (%s) failed: %s", atoms.info["id"], atoms.get_chemical_formula(), reason)
    record = {
        key: atoms.info.get(key, "") for key in ("generation", "id", "parent", "distortion_seed")
    }
    what = {**record, "formula": atoms.get_chemical_formula(), "settings_hash": settings_hash}
    record_failure(
        folder, "label", reason, **what, cell=atoms.cell.array, positions=atoms.positions
    )


def training_sets(
    labels: Sequence[Atoms],
    earlier: Sequence[Atoms],
    dataset: Sequence[Atoms],
    settings: LearningSettings,
    rng: np.random.Generator,
) -> Sets:
    """Training, validation and test set of a round.

    Training: the training side of this round's ``labels`` and ``n_replay`` drawn from the training
    side of ``earlier`` rounds and of ``dataset``. Validation and test: those of this round, and of
    rounds before it until they are `FEW` or more; those of ``dataset`` only where no round has any.
    """
    split = settings.split
    new = on_side(labels, "train", split)
    previous = on_side([*dataset, *earlier], "train", split)
    sampled = sorted(rng.permutation(len(previous))[: settings.n_replay])
    replay = [previous[index] for index in sampled]
    sides: dict[str, list[Atoms]] = {}
    origin: dict[str, str] = {}
    for name in SIDES[1:]:
        own, rounds = _newest(on_side(labels, name, split), on_side(earlier, name, split))
        sides[name] = own or on_side(dataset, name, split)
        origin[name] = rounds or (DATASET if sides[name] else "none")
    if not sides["validation"]:
        origin["validation"] = "training"
    return Sets(
        [*new, *replay],
        sides["validation"],
        sides["test"],
        len(new),
        len(replay),
        origin["validation"],
        origin["test"],
    )


def _newest(labels: Sequence[Atoms], earlier: Sequence[Atoms]) -> tuple[list[Atoms], str]:
    """``labels``, and those of whole ``earlier`` rounds, the newest first, until there are enough;
    and from which rounds they are."""
    found, rounds = list(labels), []
    for generation in sorted({int(atoms.info["generation"]) for atoms in earlier}, reverse=True):
        if len(found) >= FEW:
            break
        found += [atoms for atoms in earlier if atoms.info["generation"] == generation]
        rounds.append(generation)
    before = (
        f"round {rounds[0]}"
        if len(rounds) == 1
        else f"rounds {rounds[-1]} to {rounds[0]}"
        if rounds
        else ""
    )
    return found, " and ".join(filter(None, ("this round" if labels else "", before)))


def _train(
    potential: Potential, sets: Sets, now: Round, folder: Path
) -> tuple[Potential, dict[str, Any]]:
    """Refit the shift, finetune; returns the new model (not yet the one in use) and what there is
    to report."""
    from magus_anharmonic.potential import load
    from magus_anharmonic.potential.finetune import finetune
    from magus_anharmonic.potential.trainer import refit_shift

    began = time.monotonic()
    module = copy.deepcopy(potential.module)
    shift = refit_shift(module, sets.train)
    result = finetune(
        module,
        sets.train,
        sets.validation,
        now.settings,
        out=SearchFolder(folder).trained(now.generation),
        seed=int(now.random(Purpose.TRAIN).integers(2**31)),
        parent_id=potential.model_id,
        species=potential.species_seen,
        weights=weights_by_error(sets.train),
    )
    found = {
        "shift": shift,
        "best_epoch": result.best_epoch,
        "stopped": result.stopped,
        "seconds_training": time.monotonic() - began,
    }
    return load(result.path, device=potential.device), found


def _conclude(
    potential: Potential,
    candidate: Potential | None,
    sets: Sets,
    settings: LearningSettings,
    folder: Path,
    metrics: dict[str, Any],
) -> Learned:
    """Compare old and new, keep the better one, write metrics and then the checkpoint (its presence
    ends the round)."""
    from magus_anharmonic.potential import uncertainty

    old = scores_of_sets(potential, sets, settings)
    trained = {} if candidate is None else scores_of_sets(candidate, sets, settings)
    changed = False
    if candidate is not None:
        judge = "validation" if sets.validation else "train"
        before, after = old[judge]["loss"], trained[judge]["loss"]
        changed = bool(np.isfinite(after)) and not after >= before
        verdict = (
            "the new model is kept"
            if changed
            else "the old model is kept: the new one is not better"
        )
        metrics["reason"] = (
            f"{verdict} (loss {before:.4g} -> {after:.4g} on {old[judge]['n']} labels of"
            f" {sets.validation_from})"
        )
        log.info("%s; %s there", metrics["reason"], Scores(**(trained if changed else old)[judge]))
    current = candidate if changed and candidate is not None else potential
    if current.error_model is None and sets.train:
        current.error_model = uncertainty.fit(current.module, sets.train, sets.validation)
    metrics |= {
        "old_model": potential.model_id,
        "new_model": current.model_id,
        "changed": changed,
        "old": old,
        "new": trained if changed else old,
    }
    if candidate is not None and not changed:
        metrics["rejected"] = {"model": candidate.model_id, **trained}
    trained_file = SearchFolder(folder).trained(int(metrics["generation"]))
    file = end_round(current, metrics, folder, trained_file)
    if changed:
        current.path = file
    return Learned(current, metrics)


def end_round(model: Potential, metrics: dict[str, Any], folder: Path, trained: Path) -> Path:
    """Write the line of ``metrics``, once, and then the checkpoint, which is returned: ``trained``
    where the model changed."""
    from magus_anharmonic.potential import checkpoint, uncertainty

    generation = int(metrics["generation"])
    recorded = _recorded(folder, generation)
    if not recorded or recorded[-1]["new_model"] != model.model_id:
        append_jsonl(SearchFolder(folder).metrics, metrics)
    file = SearchFolder(folder).checkpoint(generation)
    if metrics["changed"]:
        with replacing(file) as temporary:
            shutil.copyfile(trained, temporary)
    else:
        extra = uncertainty.for_checkpoint(model.error_model)
        extra |= FreeEnergySurface.for_checkpoint(model.surface)
        checkpoint.save(
            model.module, file, parent_id=model.model_id, species=model.species_seen, **extra
        )
    remove(trained)
    return file


def scores_of_sets(potential: Potential, sets: Sets, settings: LearningSettings) -> dict[str, Any]:
    """Loss and RMSE of energy (eV/atom), forces (eV/A) and stress (GPa) on each set that is not
    empty; errors of few labels."""
    return {
        name: score(potential, frames, settings).as_dict()
        for name, frames in sets.parts().items()
        if frames
    }
