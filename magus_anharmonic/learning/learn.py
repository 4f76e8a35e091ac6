"""One round of learning: population -> labels -> finetuned model (Fig. 1a of the paper)."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import CheckpointError, MagusAnharmonicError
from magus_anharmonic.io.files import append_jsonl, read_jsonl, remove, replacing, set_aside
from magus_anharmonic.labelers.base import Failure, Label, Labeler
from magus_anharmonic.learning.choose import (
    Contender,
    choose,
    distort,
    hold_back,
    plan_ensembles,
    quotas,
    select,
)
from magus_anharmonic.learning.dataset import (
    LabelStore,
    labelled,
    on_side,
    plan_label,
    read_dataset,
)
from magus_anharmonic.learning.families import SIDES, parent_name, sides_of_families
from magus_anharmonic.potential.label_check import in_words, outliers, without_outliers
from magus_anharmonic.potential.labelled import FEW, Scores
from magus_anharmonic.runs.failures import record_failure
from magus_anharmonic.settings import LearningSettings
from magus_anharmonic.structures import stripped

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

_CHOOSE, _DISTORT, _REPLAY, _TRAIN, _HOLD_BACK = 101, 102, 103, 104, 110

DATASET = "the dataset"
"""``validation_from`` where only ``learning.dataset`` has labels on that side: its errors say
nothing about this search."""


@dataclass(frozen=True)
class Learned:
    """The model after a round. ``metrics`` is the line of ``metrics.jsonl``; ``changed`` says
    whether the model is a new one."""

    potential: Potential
    model_id: str
    metrics: dict[str, Any]
    n_labels: int
    n_failures: int
    changed: bool


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
    dataset = read_dataset(settings.dataset, labeler.settings_hash) if settings.dataset else []
    store.adopt(dataset, settings.split)
    began = time.monotonic()
    planned = (
        plan_ensembles(contenders, generation, settings, store, folder)
        if settings.select == "sscha"
        else []
    )
    if planned:
        planned = [*planned, *_plan_beside(planned, population, generation, settings, store, seed)]
    else:
        if settings.select == "sscha":
            log.info(
                "learning.select: sscha: no two candidates with SSCHA ensembles are undecided; this"
                " choice is random"
            )
        chosen = _choose(population, generation, settings, store, seed, potential, dataset)
        planned = plan(population, generation, settings, store, seed, chosen)
    n_failures = _label(planned, generation, labeler, store, folder)
    n_failures += _quarantine(generation, potential, store, folder)
    dataset = _sound(dataset, potential)
    labels = store.labels(generation=generation)
    sets = training_sets(
        labels,
        store.labels(before=generation),
        dataset,
        settings,
        np.random.default_rng([seed, generation, _REPLAY]),
    )
    metrics: dict[str, Any] = {
        "generation": generation,
        "settings_hash": labeler.settings_hash,
        "n_labels": len(labels),
        "n_failures": n_failures,
        "n_new": sets.n_new,
        "n_replay": sets.n_replay,
        "n_train": len(sets.train),
        "n_validation": len(sets.validation),
        "n_test": len(sets.test),
        "validation_from": sets.validation_from,
        "test_from": sets.test_from,
        "seconds_labels": time.monotonic() - began,
    }
    if labels and sets.train:
        candidate, found = _train(potential, sets, settings, folder, generation, seed)
    else:
        reason = (
            "no label could be made"
            if not labels
            else "no label is on the training side, and there is none to replay"
        )
        candidate, found = None, {"reason": reason}
        log.warning("the model stays as it is: %s", reason)
    return _conclude(potential, candidate, sets, settings, folder, {**metrics, **found})


def finished(folder: Path, generation: int, potential: Potential) -> Learned | None:
    """The result of a round that an earlier run finished: its line of metrics and its checkpoint
    are there."""
    records = [
        record
        for record in read_jsonl(folder / "metrics.jsonl", METRICS)
        if record["generation"] == generation
    ]
    file = checkpoint_file(folder, generation)
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
    for left in (folder / "training").glob(
        f"gen{generation}.pth*"
    ):  # killed between the checkpoint and its tidying up
        remove(left)
    log.info("round %d has learned already: model %s", generation, current.model_id)
    return Learned(
        current,
        current.model_id,
        metrics,
        metrics["n_labels"],
        metrics["n_failures"],
        metrics["changed"],
    )


def checkpoint_file(folder: Path, generation: int) -> Path:
    """Where the model after a round is."""
    return folder / "checkpoints" / f"gen{generation}.pth"


def _choose(
    population: Sequence[Atoms],
    generation: int,
    settings: LearningSettings,
    store: LabelStore,
    seed: int,
    potential: Potential,
    dataset: Sequence[Atoms],
) -> list[int]:
    """Indices of the structures to label by ``learning.select``."""
    rng = np.random.default_rng([seed, generation, _CHOOSE])
    known = [*dataset, *store.labels(before=generation)] if settings.select == "diverse" else []
    chosen = select(population, settings.n_sample, rng, settings.select, potential, known)
    return held_back(population, chosen, generation, settings, store, seed)


def held_back(
    population: Sequence[Atoms],
    chosen: Sequence[int],
    generation: int,
    settings: LearningSettings,
    store: LabelStore,
    seed: int,
) -> list[int]:
    """`hold_back` for the round ``generation``."""
    rng = np.random.default_rng([seed, generation, _HOLD_BACK])
    return hold_back(
        population,
        chosen,
        store.families,
        store.sides(settings.split, before=generation),
        settings.split,
        rng,
    )


def _plan_beside(
    planned: Sequence[Atoms],
    population: Sequence[Atoms],
    generation: int,
    settings: LearningSettings,
    store: LabelStore,
    seed: int,
) -> list[Atoms]:
    """Distorted structures for validation and test, by their quotas, beside ensembles that
    train."""
    known = store.sides(settings.split, before=generation) | {
        str(atoms.info["family"]): str(atoms.info["side"]) for atoms in planned
    }
    names = store.families.would_be([stripped(atoms) for atoms in population])
    order = (
        np.random.default_rng([seed, generation, _HOLD_BACK]).permutation(len(population)).tolist()
    )
    chosen: list[int] = []
    for side, n in quotas(settings.n_sample, settings.split).items():
        for index in [
            index
            for index in order
            if known.get(names[index], side) == side and index not in chosen
        ][:n]:
            parent = stripped(population[index])
            known[names[index]] = known[store.families.family(parent_name(parent), parent)] = side
            chosen.append(index)
    return plan(population, generation, settings, store, seed, chosen, known)


def plan(
    population: Sequence[Atoms],
    generation: int,
    settings: LearningSettings,
    store: LabelStore,
    seed: int,
    chosen: Sequence[int] | None = None,
    known: Mapping[str, str] | None = None,
) -> list[Atoms]:
    """The distorted structures to label, with everything about them in ``info``; the same for the
    same seed and population.

    ``chosen``: indices into the population; None draws them at random. Every family is on one side
    for life (``known``; None: that of its labels); those that are new are shared out so that
    validation and test get some of this round.
    """
    distorted = []
    if chosen is None:
        chosen = choose(
            population, settings.n_sample, np.random.default_rng([seed, generation, _CHOOSE])
        )
    parents = [stripped(population[index]) for index in chosen]
    families = [store.families.family(parent_name(parent), parent) for parent in parents]
    sides = sides_of_families(
        families,
        settings.split,
        store.sides(settings.split, before=generation) if known is None else known,
    )
    for draw, (parent, family) in enumerate(zip(parents, families, strict=True)):
        name = parent_name(parent)
        for number in range(settings.n_perturb):
            key = [seed, generation, _DISTORT, draw, number]
            try:
                atoms = distort(
                    parent,
                    np.random.default_rng(key),
                    atom_displacement=settings.atom_displacement,
                    strain=settings.strain,
                )
            except MagusAnharmonicError as error:
                log.warning("%s is not distorted: %s", name, error)
                break
            seed_text = "-".join(map(str, key))
            plan_label(
                atoms,
                generation=generation,
                parent=name,
                family=family,
                side=sides[family],
                kind="distorted",
                distortion_seed=seed_text,
            )
            distorted.append(atoms)
    return distorted


def _label(
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


def _sound(dataset: list[Atoms], potential: Potential) -> list[Atoms]:
    """Labels of earlier work without those that cannot be right."""
    reasons = outliers(dataset, potential)
    for i, reason in reasons.items():
        log.warning("learning.dataset: %s; it is left out", in_words(dataset[i], i + 1, reason))
    return without_outliers(dataset, reasons)


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
    potential: Potential,
    sets: Sets,
    settings: LearningSettings,
    folder: Path,
    generation: int,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
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
        settings,
        out=folder / "training" / f"gen{generation}.pth",
        seed=int(np.random.default_rng([seed, generation, _TRAIN]).integers(2**31)),
        parent_id=potential.model_id,
        species=potential.species_seen,
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

    old = _scores(potential, sets, settings)
    trained = {} if candidate is None else _scores(candidate, sets, settings)
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
    generation = int(metrics["generation"])
    recorded = [
        record
        for record in read_jsonl(folder / "metrics.jsonl", METRICS)
        if record["generation"] == generation
    ]
    if not recorded or recorded[-1]["new_model"] != current.model_id:
        append_jsonl(folder / "metrics.jsonl", metrics)
    file = checkpoint_file(folder, generation)
    _write_checkpoint(current, changed, file, folder / "training" / f"gen{generation}.pth")
    if changed:
        current.path = file
    return Learned(
        current, current.model_id, metrics, metrics["n_labels"], metrics["n_failures"], changed
    )


def _write_checkpoint(model: Potential, changed: bool, file: Path, trained: Path) -> None:
    from magus_anharmonic.potential import checkpoint, uncertainty

    if changed:
        with replacing(file) as temporary:
            shutil.copyfile(trained, temporary)
    else:
        extra = uncertainty.for_checkpoint(model.error_model)
        checkpoint.save(
            model.module, file, parent_id=model.model_id, species=model.species_seen, **extra
        )
    remove(trained)


def _scores(potential: Potential, sets: Sets, settings: LearningSettings) -> dict[str, Any]:
    """Loss and RMSE of energy (eV/atom), forces (eV/A) and stress (GPa) on each set that is not
    empty; errors of few labels."""
    from magus_anharmonic.potential.labelled import score

    parts = {"train": sets.train, "validation": sets.validation, "test": sets.test}
    return {
        name: score(potential, frames, settings).as_dict()
        for name, frames in parts.items()
        if frames
    }
