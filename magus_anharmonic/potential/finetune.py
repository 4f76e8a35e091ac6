"""Training of a MatterSim (M3GNet) model through the factorised form, with second derivatives.

Same loss, optimiser, clipping and averaging as ``Potential.train_model`` of mattersim 1.2.3, step
for step; different are what is kept (the best of start and training on the validation set, by exact
averages instead of means of batch means), the epoch counter (always from zero: a restored counter
must not end training before it began) and the restart.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from magus_anharmonic.energy_surface import FreeEnergySurface, check_start, surface_of_labels
from magus_anharmonic.errors import CheckpointError, DamagedFile, InputError
from magus_anharmonic.io.digests import digest, versions
from magus_anharmonic.io.files import remove, set_aside
from magus_anharmonic.potential import checkpoint, uncertainty
from magus_anharmonic.potential.evaluate import Potential
from magus_anharmonic.potential.labelled import LabelledGraphs, Scores, labels_of
from magus_anharmonic.potential.loading import check_once, surface_in
from magus_anharmonic.potential.resources import chosen_device, threads_for_training
from magus_anharmonic.potential.trainer import (
    Epoch,
    Trainer,
    TrainingState,
    copy_state,
    read_state,
    write_state,
)
from magus_anharmonic.runs.record import Progress
from magus_anharmonic.settings import FinetuneSettings, TrainingKeys, parse
from magus_anharmonic.structures import structure_id

logger = logging.getLogger(__name__)

LOG_INTERVAL = 10.0
"""Seconds between two lines of progress."""


@dataclass
class FinetuneResult:
    """The model that was kept (file, id and module in memory), and how it came about.

    improved : whether training lowered the validation loss; if not, the kept weights are the
    initial ones. before, after : validation scores of the initial and of the kept model; stopped :
    why training ended.
    """

    path: Path
    model_id: str
    parent_id: str
    improved: bool
    best_epoch: int
    before: Scores
    after: Scores
    stopped: str
    n_train: int
    n_validation: int
    seconds: float
    module: Any = field(repr=False)
    history: list[Epoch] = field(default_factory=list, repr=False)
    error_model: uncertainty.ErrorModel | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but module, history and error model, for JSON."""
        left_out = ("module", "history", "error_model", "before", "after")
        plain = {name: value for name, value in vars(self).items() if name not in left_out}
        return {
            **plain,
            "path": str(self.path),
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
        }


def finetune(
    start: torch.nn.Module | str | Path,
    train: Sequence[Atoms],
    validation: Sequence[Atoms],
    settings: Any,
    *,
    out: str | Path,
    seed: int,
    device: str | None = None,
    parent_id: str | None = None,
    species: Iterable[int] | None = None,
    weights: Sequence[float] | None = None,
    progress: Callable[[Epoch], None] | None = None,
    error_estimate: bool = True,
) -> FinetuneResult:
    """Train ``start`` (a checkpoint, or a stock module, which is not changed) and write the better
    of old and new to ``out``.

    Labels are Atoms that carry energy (eV), forces (eV/A) and stress (eV/A^3, ASE's sign).
    ``settings`` is a `FinetuneSettings`, a mapping of its keys, or ``LearningSettings``. Better
    means the lower validation loss; without validation structures the training set decides. After
    every epoch the whole state goes to ``<out>.state``; a run with the same start, labels, settings
    and seed resumes from it (a damaged one is set aside), and one that had finished returns what is
    in ``out``. For a module, ``parent_id`` and ``species`` (atomic numbers it was trained on; None:
    unknown, as for MatterSim's own) may be given; a checkpoint knows them. ``weights`` says how
    often each training structure is seen per epoch on average (default: once). ``progress`` is
    called after every epoch. Labels of a free energy make a model of it, which starts from the
    potential that they are of, or from an earlier model (of a module, the caller knows). Without
    ``error_estimate`` the model gets none (a stage that another one follows does not need it).

    What comes out is compared with stock MatterSim, alone and in a batch, as by `load`
    (`magus_anharmonic.potential.loading`).

    Raises InputError (no training structure, a label missing or not finite, wrong settings or
    weights, ``out`` is a folder), CheckpointError, and MagusAnharmonicError when that comparison
    fails.
    """
    settings = _stage(settings)
    _check_arguments(train, validation, weights, Path(out))
    surface = surface_of_labels([*train, *validation])
    module, known = _start(start, device, surface)
    species = known if species is None else species
    if species is not None:
        species = set(species).union(*(atoms.numbers.tolist() for atoms in train))
    labels = list(train)
    run = _Run(
        module,
        labels,
        list(validation) or labels,
        settings,
        Path(out),
        seed,
        None if weights is None else np.asarray(weights, dtype=float),
        parent_id or checkpoint.model_id(module),
        species,
        error_estimate,
        surface,
    )
    if not validation:
        logger.warning(
            "no validation structures: the best of %d epochs is chosen on the training set",
            settings.epochs,
        )
    result = run.finished() or run.train(progress)
    _check_result(result, species)
    return result


def _check_arguments(
    train: Sequence[Atoms], validation: Sequence[Atoms], weights: Sequence[float] | None, out: Path
) -> None:
    """Raise InputError for what would otherwise show only after epochs of training, or not at
    all."""
    if isinstance(train, Atoms) or isinstance(validation, Atoms):
        raise InputError(
            "training and validation structures are lists, and this is one structure: [atoms]"
            " instead of atoms"
        )
    if not train:
        raise InputError("no training structures: at least one label is needed")
    if out.is_dir():
        raise InputError(f"{out} is a folder; the trained model needs the name of a file")
    if weights is None:
        return
    if len(weights) != len(train):
        raise InputError(f"{len(weights)} weights for {len(train)} training structures")
    wrong = [
        weight
        for weight in weights
        if not (isinstance(weight, int | float | np.number) and 0 <= weight < np.inf)
    ]
    if wrong:
        raise InputError(
            f"weights: {wrong[0]!r} is not allowed, only finite numbers that are not negative"
        )


def _stage(settings: Any) -> FinetuneSettings:
    if isinstance(settings, FinetuneSettings):
        return settings
    if isinstance(settings, TrainingKeys):
        settings = {name: getattr(settings, name) for name in TrainingKeys.model_fields}
    return parse(FinetuneSettings, settings, "settings")


def _check_result(result: FinetuneResult, species: Iterable[int] | None) -> None:
    seen = None if species is None else frozenset(species)
    # A copy, because in other precision a Potential changes its module.
    check_once(
        Potential(
            copy.deepcopy(result.module),
            path=result.path,
            species=seen,
            device=str(_device(result.module)),
        )
    )


def _start(
    start: torch.nn.Module | str | Path, device: str | None, labels: FreeEnergySurface | None
) -> tuple[torch.nn.Module, Iterable[int] | None]:
    if isinstance(start, torch.nn.Module):
        module = copy.deepcopy(start)
        return (module if device is None else module.to(device)), None
    path = checkpoint.resolve(start)
    module, content = checkpoint.read(path, chosen_device(device))
    check_start(labels, surface_in(content, path), checkpoint.model_id(module))
    return module, checkpoint.species_of(content)


@dataclass
class _Run:
    """One call of `finetune`: what is trained on what, and what of it is already on disk."""

    module: torch.nn.Module
    train_set: list[Atoms]
    validation_set: list[Atoms]
    settings: FinetuneSettings
    out: Path
    seed: int
    weights: np.ndarray | None
    parent_id: str
    species: Iterable[int] | None
    error_estimate: bool
    surface: FreeEnergySurface | None = None
    best_epoch: int = 0
    history: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state_file = self.out.with_name(self.out.name + ".state")
        self.key = self._key()
        self.best_state = copy_state(self.module)

    def _key(self) -> str:
        parts: list[Any] = [
            f"{versions()} {checkpoint.model_id(self.module)} {self.settings.model_dump_json()}"
            f" {self.seed}"
        ]
        for part in (self.train_set, self.validation_set):
            parts.append(f"{len(part)} structures")
            for atoms in part:
                energy, forces, stress = labels_of(atoms)
                numbers = np.concatenate([[energy], forces.ravel(), stress.ravel()])
                parts += [structure_id(atoms), numbers]
        if self.weights is not None:
            parts.append(self.weights)
        return digest(*parts)

    def finished(self) -> FinetuneResult | None:
        """The result of an earlier run with the same inputs, if ``out`` holds it."""
        if not self.out.is_file():
            return None
        try:
            module, record = checkpoint.read(self.out, str(_device(self.module)))
        except CheckpointError as error:
            logger.warning("%s is not readable and will be replaced: %s", self.out, error)
            return None
        metrics = record.get("metrics") or {}
        if metrics.get("training_key") != self.key:
            return None
        try:
            found = self._result(
                module,
                [Epoch.of(epoch) for epoch in metrics["history"]],
                metrics["best_epoch"],
                metrics["stopped"],
            )
        except (KeyError, TypeError, IndexError) as error:
            logger.warning(
                "%s lacks a part of its record (%s): training starts anew", self.out, error
            )
            return None
        logger.info("%s was trained from the same inputs: nothing to do", self.out)
        remove(self.state_file)  # of a run that was killed just before it did this
        found.error_model = uncertainty.error_model_of(
            record, module.model_args["units"]
        ) or self._error_model(module)
        return found

    def _result(
        self, module: Any, history: list[Epoch], best_epoch: int, stopped: str
    ) -> FinetuneResult:
        return FinetuneResult(
            path=self.out,
            model_id=checkpoint.model_id(module),
            parent_id=self.parent_id,
            improved=best_epoch > 0,
            best_epoch=best_epoch,
            before=history[0].validation,
            after=history[best_epoch].validation,
            stopped=stopped,
            n_train=len(self.train_set),
            n_validation=len(self.validation_set),
            seconds=sum(epoch.seconds for epoch in history),
            module=module,
            history=history,
        )

    def train(self, progress: Callable[[Epoch], None] | None) -> FinetuneResult:
        """Train, keep the best, write the checkpoint, remove the state."""
        with threads_for_training(self.module):
            return self._train(progress)

    def _train(self, progress: Callable[[Epoch], None] | None) -> FinetuneResult:
        began = time.perf_counter()
        data, held_out = (
            LabelledGraphs(self.train_set, self.module),
            LabelledGraphs(self.validation_set, self.module),
        )
        trainer = Trainer(self.module, self.settings)
        if not self._restore(trainer):
            scores = trainer.scores(held_out)
            self.history = [
                Epoch(0, self.settings.learning_rate, None, scores, time.perf_counter() - began)
            ]
            logger.info(
                "before training on %d structures: validation loss %.4g (%s)",
                len(data),
                scores.loss,
                scores,
            )
        stopped = self._epochs(trainer, data, held_out, progress)
        if self.settings.keep == "last" and np.isfinite(self.history[-1].validation.loss):
            self.best_epoch, self.best_state = len(self.history) - 1, trainer.averaged_state()
        return self._keep_best(stopped)

    def _epochs(
        self,
        trainer: Trainer,
        data: LabelledGraphs,
        held_out: LabelledGraphs,
        progress: Callable[[Epoch], None] | None,
    ) -> str:
        ticker = Progress(self.settings.epochs, len(self.history) - 1, LOG_INTERVAL)
        for number in range(len(self.history), self.settings.epochs + 1):
            if (
                self.settings.patience is not None
                and number - 1 - self.best_epoch >= self.settings.patience
            ):
                return f"no improvement in {self.settings.patience} epochs"
            began, rate = time.perf_counter(), trainer.scheduler.get_last_lr()[0]
            loss = self._one_epoch(trainer, data, number, ticker)
            if not np.isfinite(loss):
                return f"the loss was not finite in epoch {number}"
            with trainer.ema.average_parameters():
                scores = trainer.scores(held_out)
            trainer.scheduler.step()
            epoch = Epoch(number, rate, loss, scores, time.perf_counter() - began)
            self.history.append(epoch)
            if (
                np.isfinite(scores.loss)
                and not scores.loss >= self.history[self.best_epoch].validation.loss
            ):
                self.best_epoch, self.best_state = number, trainer.averaged_state()
            self._save(trainer)
            if ticker.due() or number == self.settings.epochs:
                text = "epoch %d/%d: loss %.4g, validation %.4g (%s)%s"
                left = ticker.left(number)
                logger.info(text, number, ticker.total, loss, scores.loss, scores, left)
            if progress is not None:
                progress(epoch)
        return "all epochs done"

    def _one_epoch(
        self, trainer: Trainer, data: LabelledGraphs, number: int, ticker: Progress
    ) -> float:
        """Mean loss per structure over one shuffled pass."""
        order = self._order(len(data), number)
        total, seen = 0.0, 0
        for graph, targets in data.batches(self.settings.batch_size, order):
            loss = trainer.step(graph, targets)
            if not np.isfinite(loss):
                return loss
            total, seen = total + loss * len(targets.energy), seen + len(targets.energy)
            if ticker.due():
                part = seen / len(order)
                text, left = "epoch %d/%d, %.0f %%: loss %.4g%s", ticker.left(number - 1 + part)
                logger.info(text, number, ticker.total, 100 * part, total / seen, left)
        return total / seen

    def _order(self, count: int, number: int) -> np.ndarray:
        """Indices of the structures of epoch ``number``: each once, or as often as its weight says
        (chance rounds it)."""
        rng = np.random.default_rng([self.seed, number])
        if self.weights is None:
            return rng.permutation(count)
        times = np.floor(self.weights + rng.random(count)).astype(int)
        times[rng.integers(count)] += not times.any()
        return rng.permutation(np.repeat(np.arange(count), times))

    def _keep_best(self, stopped: str) -> FinetuneResult:
        self.module.load_state_dict(self.best_state)
        self.module.eval()
        result = self._result(self.module, self.history, self.best_epoch, stopped)
        metrics = {
            **result.as_dict(),
            "training_key": self.key,
            "history": [asdict(epoch) for epoch in self.history],
        }
        result.error_model = self._error_model(self.module)
        extra = uncertainty.for_checkpoint(result.error_model)
        checkpoint.save(
            self.module,
            self.out,
            parent_id=self.parent_id,
            metrics=metrics,
            species=self.species,
            **extra,
            **FreeEnergySurface.for_checkpoint(self.surface),
        )
        remove(self.state_file)
        kept = (
            f"epoch {self.best_epoch} kept"
            if result.improved
            else "training did not lower it: the weights from before are kept"
        )
        logger.info(
            "%s; validation loss %.4g before, %.4g after (%s); %s; model %s in %s",
            stopped, result.before.loss, result.after.loss, result.after,
            kept, result.model_id, self.out,
        )  # fmt: skip
        return result

    def _error_model(self, module: torch.nn.Module) -> uncertainty.ErrorModel | None:
        held_out = [] if self.validation_set is self.train_set else self.validation_set
        return uncertainty.fit(module, self.train_set, held_out) if self.error_estimate else None

    def _save(self, trainer: Trainer) -> None:
        write_state(
            self.state_file,
            TrainingState(
                self.key, trainer.state(), self.best_epoch, self.best_state, self.history
            ),
        )

    def _restore(self, trainer: Trainer) -> bool:
        if not self.state_file.is_file():
            return False
        try:
            state = read_state(self.state_file, trainer, self.key)
        except DamagedFile as error:
            set_aside(self.state_file, f"{error}; training starts anew")
            return False
        if state is None:
            logger.info("%s belongs to other inputs; training starts anew", self.state_file)
            return False
        trainer.restore(state.trainer)
        self.best_epoch, self.best_state, self.history = (
            state.best_epoch,
            state.best_state,
            state.history,
        )
        logger.info(
            "training resumes after epoch %d from %s", len(self.history) - 1, self.state_file
        )
        return True


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
