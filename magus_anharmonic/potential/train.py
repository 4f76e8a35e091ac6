"""From files of labels and a recipe to a checkpoint and a report of its errors: the library behind
``magus-anharmonic train``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from ase import Atoms
from pydantic import Field, model_validator

from magus_anharmonic.energy_surface import FreeEnergySurface, check_start, surface_of_labels
from magus_anharmonic.errors import InputError
from magus_anharmonic.gate import read_structures
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import remove, write_json
from magus_anharmonic.potential import checkpoint
from magus_anharmonic.potential.evaluate import Potential
from magus_anharmonic.potential.finetune import FinetuneResult, finetune
from magus_anharmonic.potential.label_check import sound
from magus_anharmonic.potential.labelled import (
    Scores,
    labels_of,
    parent_of,
    score,
    scores_by,
    split_by_parent,
    weights_by_error,
)
from magus_anharmonic.potential.loading import check_once, surface_in
from magus_anharmonic.potential.resources import chosen_device
from magus_anharmonic.potential.trainer import from_scratch, refit_shift
from magus_anharmonic.potential.uncertainty import for_checkpoint
from magus_anharmonic.runs import lock
from magus_anharmonic.settings import (
    Architecture,
    FinetuneSettings,
    InsidePath,
    Section,
    TrainingKeys,
    absolute_file,
    load_settings,
    load_yaml,
    parse,
)
from magus_anharmonic.settings.section import Share
from magus_anharmonic.units import ev_to_mev

logger = logging.getLogger(__name__)


class TrainRecipe(Section):
    """How a checkpoint is made; the keys of a recipe file."""

    seed: int = Field(
        0,
        ge=0,
        description=(
            "of the weights and of the order of the batches; same labels, recipe and seed: same"
            " checkpoint"
        ),
    )
    checkpoint: InsidePath | None = Field(
        None,
        description="what to start from: a name or a path; left out: new weights of `architecture`",
    )
    architecture: Architecture | None = Field(None, description="shape of a new model")
    refit_shift: bool = Field(
        True,
        description=(
            "fit the energy shift per species to the training labels first (checkpoint only)"
        ),
    )
    split: tuple[Share, Share, Share] = Field(
        (8, 1, 1), description="train : validation : test, by a hash of info['parent']"
    )
    validation: InsidePath | None = Field(
        None,
        description=(
            "extxyz of its own for validation, relative to the recipe; the split's share trains"
        ),
    )
    test: InsidePath | None = Field(
        None,
        description=(
            "extxyz of its own for the test, relative to the recipe; the split's share trains"
        ),
    )
    kind: str = Field(
        "kind", description="info key by which errors are reported, and to which `weights` refers"
    )
    weights: dict[str, Annotated[float, Field(gt=0, le=10)]] = Field(
        default_factory=dict,
        description=(
            "how often a training structure of a kind is seen per epoch, on average; 1 where not"
            " named"
        ),
    )
    stages: list[FinetuneSettings] = Field(
        default_factory=lambda: [FinetuneSettings()],
        min_length=1,
        description="one after the other",
    )

    @model_validator(mode="after")
    def _one_start(self) -> TrainRecipe:
        if self.checkpoint is not None and self.architecture is not None:
            raise ValueError("give checkpoint (finetune) or architecture (new weights), not both")
        if self.split[0] == 0:
            raise ValueError("split: the training share must be at least 1")
        return self


@dataclass
class TrainReport:
    """What `train_file` made: the checkpoint, and errors by set ("train", "validation", "test") and
    kind ("all" first)."""

    path: Path
    model_id: str
    start: str
    shift_change: dict[str, float]
    scores: dict[str, dict[str, Scores]]
    stages: list[FinetuneResult] = field(repr=False)
    seconds: float = 0.0
    excluded: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the history of every stage."""
        return {
            **vars(self),
            "path": str(self.path),
            "scores": _plain(self.scores),
            "stages": [
                {**stage.as_dict(), "history": [asdict(epoch) for epoch in stage.history]}
                for stage in self.stages
            ],
        }

    def __str__(self) -> str:
        lines = [f"model {self.model_id} in {self.path} (from {self.start})"]
        lines += [f"left out: {reason}" for reason in self.excluded]
        if self.shift_change:
            lines.append(
                "energy shift: "
                + ", ".join(
                    f"{symbol} {value:+.4f} eV" for symbol, value in self.shift_change.items()
                )
            )
        for number, stage in enumerate(self.stages, 1):
            kept = (
                f"epoch {stage.best_epoch}"
                if stage.improved
                else "the model from before (training did not lower the validation loss)"
            )
            lines.append(
                f"stage {number}: validation loss {stage.before.loss:.4g} ->"
                f" {stage.after.loss:.4g}, kept {kept}; {stage.stopped}"
            )
        errors = self.stages[-1].error_model
        lines.append(f"error estimate: {'none' if errors is None else errors}")
        lines.append(
            f"{'set':<12}{'kind':<12}{'n':>5}{'E meV/atom':>12}{'F eV/A':>9}{'S GPa':>8}   (RMSE)"
        )
        for part, kinds in self.scores.items():
            for kind, found in kinds.items():
                numbers = (
                    f"{found.n:>5}{ev_to_mev(found.energy_rmse):>12.2f}"
                    f"{found.force_rmse:>9.4f}{found.stress_rmse:>8.3f}"
                )
                few = "" if found.energy_rmse_error is None else f"   few: {found}"
                lines.append(f"{part:<12}{kind:<12}{numbers}{few}")
        return "\n".join(lines)


def _plain(scores: dict[str, dict[str, Scores]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores by set and kind, for JSON."""
    return {
        part: {kind: found.as_dict() for kind, found in kinds.items()}
        for part, kinds in scores.items()
    }


def load_recipe(path: str | Path) -> TrainRecipe:
    """Read a recipe; files in it are relative to it. Raises InputError with key paths."""
    folder = Path(path).resolve().parent
    recipe = parse(TrainRecipe, load_yaml(path), Path(path).name)
    files = {
        name: str(folder / value)
        for name in ("validation", "test")
        if (value := getattr(recipe, name)) is not None
    }
    start = recipe.checkpoint
    if start is not None and (folder / start).is_file():
        files["checkpoint"] = str(folder / start)
    return recipe.model_copy(update=files)


def read_labels(*paths: str | Path) -> list[Atoms]:
    """All labelled structures of extended-XYZ (or other ASE) files; raises InputError naming the
    file and structure."""
    structures: list[Atoms] = []
    for path in paths:
        if not Path(path).is_file():
            raise InputError(
                f"{path}: no such file (labels are extended XYZ with energy, forces and stress)"
            )
        found = read_structures(path, crystal=False)
        for index, atoms in enumerate(found):
            atoms.info["_frame"] = f"{index} of {path}"
            try:
                labels_of(atoms)
            except InputError as error:
                raise InputError(f"{path}, frame {index}: {error}") from None
        structures += found
    return structures


def train_file(
    labels: Sequence[str | Path], out: str | Path, recipe: TrainRecipe, *, device: str | None = None
) -> TrainReport:
    """Train by ``recipe`` on files of ``labels``; writes the checkpoint ``out`` and ``<out
    stem>.json`` beside it.

    Interrupted, it goes on where it was when called again with the same inputs
    (``<stem>.stageN.pth`` and ``*.state`` hold what is done). Raises InputError (also while another
    process trains the same checkpoint) and CheckpointError.
    """
    out = Path(out)
    if out.is_dir():  # else known only once everything is trained
        raise InputError(f"{out}: is a folder; give the file of the checkpoint to write")
    with lock.locked(out.parent, "magus-anharmonic train", f"{out.stem}.{lock.NAME}"):
        return _train(labels, out, recipe, device)


def _train(
    labels: Sequence[str | Path], out: Path, recipe: TrainRecipe, device: str | None
) -> TrainReport:
    began = time.perf_counter()
    module, start, known, surface = _start(recipe, device)
    train, validation, test, excluded = _sound(labels, recipe, module, surface)
    trained = surface_of_labels([*train, *validation, *test])
    if module is not None:
        check_start(trained, surface, checkpoint.model_id(module))
    species = frozenset(number for atoms in train for number in atoms.numbers.tolist())
    change: dict[str, float] = {}
    if module is None:
        module = from_scratch(
            train, recipe.architecture, seed=recipe.seed, device=chosen_device(device)
        )
    else:
        change = refit_shift(module, train) if recipe.refit_shift else {}
        species = None if known is None else known | species
    parent_id = checkpoint.model_id(module)
    provenance = {
        "labels": {Path(path).name: _sha256(path) for path in labels},
        "start": start,
        "recipe": recipe.model_dump(mode="json"),
    }
    stages = train_stages(
        module,
        train,
        validation,
        recipe,
        out,
        parent_id=parent_id,
        species=species,
        weights=_weights(train, recipe),
    )
    module, errors = stages[-1].module, stages[-1].error_model
    parts = {"train": train, "validation": validation, "test": test}
    potential = Potential(module, device=str(next(module.parameters()).device), species=species)
    check_once(potential)
    scores = {part: _scores(potential, found, recipe) for part, found in parts.items() if found}
    metrics = {"n_train": len(train), "n_validation": len(validation), "scores": _plain(scores)}
    model = checkpoint.save(
        module,
        out,
        parent_id=parent_id,
        metrics=metrics,
        species=species,
        provenance=provenance,
        **for_checkpoint(errors),
        **FreeEnergySurface.for_checkpoint(trained),
    )
    report = TrainReport(
        out, model.model_id, start, change, scores, stages, time.perf_counter() - began, excluded
    )
    write_json(out.with_suffix(".json"), {**report.as_dict(), "provenance": provenance})
    for stage in stages:
        remove(stage.path)
    return report


def train_stages(
    module: torch.nn.Module,
    train: list[Atoms],
    validation: list[Atoms],
    recipe: TrainRecipe,
    out: Path,
    **options: Any,
) -> list[FinetuneResult]:
    """The ``recipe``'s stages after each other, into ``<out stem>.stageN.pth``; ``options`` are
    those of `finetune`. Stages that are there already are not done again."""
    stages: list[FinetuneResult] = []
    for number, settings in enumerate(recipe.stages, 1):
        logger.info(
            "stage %d of %d: %d epochs, learning rate %g",
            number,
            len(recipe.stages),
            settings.epochs,
            settings.learning_rate,
        )
        target = out.with_name(f"{out.stem}.stage{number}.pth")
        last = number == len(recipe.stages)
        stages.append(
            finetune(
                module,
                train,
                validation,
                settings,
                out=target,
                seed=recipe.seed,
                error_estimate=last,
                **options,
            )
        )
        module = stages[-1].module
    return stages


def _sets(
    labels: Sequence[str | Path], recipe: TrainRecipe
) -> tuple[list[Atoms], list[Atoms], list[Atoms]]:
    labelled = read_labels(*labels)
    own = {
        part: read_labels(file)
        for part in ("validation", "test")
        if (file := getattr(recipe, part)) is not None
    }
    train, validation, test = split_by_parent(labelled, recipe.split)
    train += [*(validation if "validation" in own else []), *(test if "test" in own else [])]
    validation, test = own.get("validation", validation), own.get("test", test)
    if not train:
        raise InputError(
            f"{', '.join(map(str, labels))}: no structure is left for training ({len(labelled)}"
            f" labels, split {recipe.split})"
        )
    parents = {parent_of(atoms) for atoms in train}
    for part, found in (("validation", validation), ("test", test)):
        shared = parents.intersection(parent_of(atoms) for atoms in found)
        if shared:
            logger.warning(
                "%d parents are in both the training and the %s set: its errors are too low",
                len(shared),
                part,
            )
    logger.info(
        "%d structures for training, %d for validation, %d for the test",
        len(train),
        len(validation),
        len(test),
    )
    return train, validation, test


def _start(
    recipe: TrainRecipe, device: str | None
) -> tuple[torch.nn.Module | None, str, frozenset[int] | None, FreeEnergySurface | None]:
    """The module of the recipe's checkpoint (None: new weights), what it is in words, the species
    that it has seen (None: unknown), and what it is a free energy of."""
    if recipe.checkpoint is None:
        return None, f"new weights, seed {recipe.seed}", None, None
    path = checkpoint.resolve(recipe.checkpoint)
    module, content = checkpoint.read(path, chosen_device(device))
    start = f"{Path(recipe.checkpoint).name}, model {checkpoint.model_id(module)}"
    return module, start, checkpoint.species_of(content), surface_in(content, path)


def _sound(
    labels: Sequence[str | Path],
    recipe: TrainRecipe,
    module: torch.nn.Module | None,
    surface: FreeEnergySurface | None,
) -> tuple[list[Atoms], list[Atoms], list[Atoms], list[str]]:
    """The three sets without labels that cannot be right, and what was left out and why."""
    sets = _sets(labels, recipe)
    model = None
    if module is not None:
        device = str(next(module.parameters()).device)
        model = Potential(module, device=device, surface=surface)
    kept, excluded = sound([atoms for part in sets for atoms in part], model, "training")
    for atoms in kept:
        atoms.info.pop("_frame", None)
    known = set(map(id, kept))
    train, validation, test = ([atoms for atoms in part if id(atoms) in known] for part in sets)
    if not train:
        raise InputError(
            f"{', '.join(map(str, labels))}: no label for training is left: {excluded[0]}"
        )
    return train, validation, test, excluded


def _weights(train: list[Atoms], recipe: TrainRecipe) -> list[float] | None:
    """Of each training structure, by its kind and its statistical error; raises InputError for a
    kind that no label has."""
    kinds = [str(atoms.info.get(recipe.kind, "other")) for atoms in train]
    unknown = sorted(set(recipe.weights) - set(kinds))
    if unknown:
        raise InputError(
            f"weights: no training label is of the {recipe.kind} {unknown[0]} (there are"
            f" {', '.join(sorted(set(kinds)))})"
        )
    by_error = weights_by_error(train)
    if not recipe.weights and by_error is None:
        return None
    by_kind = [recipe.weights.get(kind, 1.0) for kind in kinds]
    return list(by_kind if by_error is None else by_error * by_kind)


def _scores(potential: Potential, labelled: list[Atoms], recipe: TrainRecipe) -> dict[str, Scores]:
    kinds = scores_by(potential, labelled, recipe.kind, recipe.stages[-1])
    return {"all": score(potential, labelled, recipe.stages[-1]), **kinds}


def _sha256(path: str | Path) -> str:
    return digest(Path(path), length=None)


def train_command(
    labels: Sequence[Path],
    output: Path,
    *,
    checkpoint: str | None = None,
    recipe: Path | None = None,
    input_file: Path | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> str:
    """`train_file` with the options of the command line laid over the recipe, and that over the
    keys of a search in ``input_file``; returns the report as text.

    ``checkpoint`` replaces the recipe's start; ``epochs`` or ``learning_rate`` make its first stage
    the only one. Without recipe, file and checkpoint a small model is trained from new weights.
    """
    update = load_recipe(recipe).model_dump(exclude_unset=True) if recipe is not None else {}
    if input_file is not None:
        settings = load_settings(input_file)
        if settings.calculator is not None and "architecture" not in update:
            update.setdefault("checkpoint", settings.calculator.checkpoint)
        device = device or (settings.calculator.device if settings.calculator else None)
        update.setdefault("seed", settings.seed or 0)
        if settings.learning is not None:
            of_a_stage = set(TrainingKeys.model_fields)
            update.setdefault("stages", [settings.learning.model_dump(include=of_a_stage)])
    if checkpoint is not None:
        update |= {"checkpoint": absolute_file(checkpoint), "architecture": None}
    if seed is not None:
        update["seed"] = seed
    given = {"epochs": epochs, "learning_rate": learning_rate}
    if stage := {name: value for name, value in given.items() if value is not None}:
        update["stages"] = [(update.get("stages") or [{}])[0] | stage]
    return str(train_file(list(labels), output, parse(TrainRecipe, update, "train"), device=device))
