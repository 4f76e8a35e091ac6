"""``MLCalculator`` with ``calculator: mattersim``: what ``magus search -m`` calls to choose,
distort, keep labels and train."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from magus.populations.populations import Population

from magus_anharmonic.generation import validation_rmse
from magus_anharmonic.labelers.pool import CallableLabeler
from magus_anharmonic.learning.choose import parent_name, sides_of_families
from magus_anharmonic.learning.dataset import LabelStore, on_side, read_dataset
from magus_anharmonic.learning.learn import finished, keep_label, learn
from magus_anharmonic.learning.round import Purpose, Round
from magus_anharmonic.plugins.calculator import (
    RESULT_KEYS,
    MatterSimCalculator,
    evaluate_each,
    result_in,
    surface_settings,
)
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings import LearningSettings
from magus_anharmonic.structures import stripped, structure_id

logger = logging.getLogger(__name__)


# What identifies a label and its history; a label carries nothing else of MAGUS's info.
_HISTORY = ("id", "generation", "parent", "family", "side", "kind", "distortion_seed")


class MatterSimLearner(MatterSimCalculator):
    """The learning calculator; the labels come from MAGUS's own ``MainCalculator``.

    Per round MAGUS calls ``relax``, ``select``, ``expand_perturb``, (``MainCalculator.scf``),
    ``updatedataset``, ``train`` (``SelectDFTScf``), or ``get_loss`` and ``calc_efs`` around its own
    choice (``DFTScf``, ``DFTRelax``).
    """

    is_learner = True

    init_times = 0
    """Trainings on random structures before the first round: none, because the checkpoint is a
    trained model already."""

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.energy_rmse: float | None = None
        self._main = parameters["query_calculator"]
        self._main_settings = surface_settings(self._main, parameters.get("MainCalculator"))
        self._selected: list[Atoms] = []
        self._reasons: dict[str, str] = {}
        self._labels: LabelStore | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_labels": None}

    @property
    def learning(self) -> LearningSettings:
        """The block ``learning``; the input check has made sure that a search that trains has
        it."""
        return self.settings.learning or LearningSettings.model_validate(
            {"labeler": {"calculator": "main"}}
        )

    @property
    def store(self) -> LabelStore:
        """All labels of this search."""
        if self._labels is None:
            self._labels = LabelStore(SearchFolder(self.run_dir).labels)
            if self.learning.dataset:
                self._labels.adopt(
                    read_dataset(self.learning.dataset, self.labeler.settings_hash),
                    self.learning.split,
                )
        return self._labels

    @property
    def labeler(self) -> CallableLabeler:
        """Reads the results that ``MainCalculator`` left in ``info``."""
        return CallableLabeler(
            self._results,
            description=f"MainCalculator ({type(self._main).__name__})",
            settings=self._main_settings,
        )

    def _results(self, structures: Sequence[Atoms]) -> list[Mapping[str, Any] | str]:
        return [
            result_in(atoms)
            or self._reasons.get(str(atoms.info.get("id")), "MainCalculator gave no result")
            for atoms in structures
        ]

    @property
    def trainset(self) -> list[Atoms]:
        """The labelled structures of the training side, energy, forces and stress in ``info``
        too."""
        frames = []
        for atoms in on_side(self.store.labels(), "train", self.learning.split):
            copy = atoms.copy()
            copy.info.update(
                {key: atoms.calc.results[key] for key in ("energy", "forces", "stress")}
            )
            frames.append(copy)
        return frames

    def select(self, pop: Any) -> Any:
        """``n_sample`` members by ``learning.select``; copies, of the same kind (Population or
        list)."""
        individuals = list(pop)
        picked = self._round().choose(individuals, self.potential, purpose=Purpose.SELECT)
        chosen = [individuals[index].copy() for index in picked]
        logger.info("%d of %d structures are chosen for labels", len(chosen), len(individuals))
        return _like(pop, chosen)

    def _round(self) -> Round:
        return Round(self.generation, self.learning, self.store, self.seed)

    def expand_perturb(self, pop: Any) -> Any:
        """``n_perturb`` distortions of each chosen structure, without old results, with their
        history in ``info``.

        Those that have their label are left out, and all of them when this round has learned:
        MAGUS's restart repeats its last round.
        """
        self._selected = [stripped(individual) for individual in pop]
        if finished(self.run_dir, self.generation, self.potential) is not None:
            return _like(pop, [])
        planned = self._round().plan(self._selected)
        return _like(pop, self.store.without_label(planned))

    def updatedataset(self, frames: Iterable[Atoms]) -> None:
        """Save the labels that ``MainCalculator`` has put into ``info``."""
        asked = {atoms.info["id"] for atoms in self._round().plan(self._selected)}
        self._reasons = {}
        labelled = []
        given = list(frames)
        relaxed = [stripped(atoms) for atoms in given if "id" not in atoms.info]
        families = [self.store.families.family(parent_name(atoms), atoms) for atoms in relaxed]
        sides = sides_of_families(
            families, self.learning.split, self.store.sides(self.learning.split)
        )
        for atoms in given:
            if "id" in atoms.info and atoms.info["id"] not in asked:
                # MAGUS's cluster calculators hand the previous file back when a job fails.
                logger.warning(
                    "a label of an earlier batch (%s) came back and is not taken", atoms.info["id"]
                )
            else:
                labelled.append(self._with_history(atoms, sides))
        clean = [_only(atoms, _HISTORY) for atoms in labelled]
        for atoms, result in zip(clean, self.labeler.label(labelled), strict=True):
            reason = keep_label(atoms, result, self.store)
            if reason is not None:
                self._reasons[str(atoms.info["id"])] = reason
        logger.info(
            "%d labels from MainCalculator, %d of them unusable", len(clean), len(self._reasons)
        )

    def _with_history(self, atoms: Atoms, sides: Mapping[str, str]) -> Atoms:
        if "id" in atoms.info:
            return atoms
        copy, name = atoms.copy(), parent_name(atoms)
        family = self.store.families.family(name, stripped(atoms))
        copy.info.update(
            id=f"g{self.generation}-{structure_id(atoms)}",
            generation=self.generation,
            parent=name,
            family=family,
            side=sides[family],
            kind="relaxed",
            distortion_seed="",
        )
        return copy

    def train(self) -> None:
        """Finetune on the labels of this round and a replay of earlier ones; the better of old and
        new model is used from now on."""
        learned = learn(
            self._selected,
            generation=self.generation,
            potential=self.potential,
            settings=self.learning,
            labeler=self.labeler,
            store=self.store,
            run_dir=self.run_dir,
            seed=self.seed,
        )
        self._selected = []
        self.use(learned.potential)
        self.energy_rmse = validation_rmse(learned.metrics)
        logger.info(
            "round %d: model %s, %d labels, %d failed",
            self.generation,
            learned.model_id,
            learned.n_labels,
            learned.n_failures,
        )

    def calc_efs(self, frames: Any) -> list[Atoms]:
        """Copies with the model's energy, forces and stress, one per frame and in order; NaN where
        the model has no result."""
        given = [frames] if isinstance(frames, Atoms) else list(frames)
        copies = [
            _only(atoms, [key for key in atoms.info if key not in RESULT_KEYS]) for atoms in given
        ]
        for copy, outcome in zip(copies, evaluate_each(self.potential, copies), strict=True):
            if isinstance(outcome, str):
                copy.info["energy"] = np.nan
            else:
                self._store_result(copy, *outcome)
        return copies

    def get_loss(self, frames: Any) -> list[float]:
        """Mean absolute error of the energy (eV/atom) on labelled frames, in a list as MAGUS
        expects; 0 without frames."""
        given = list(frames)
        errors = [
            abs(_energy(target) - predicted.info["energy"]) / len(target)
            for target, predicted in zip(given, self.calc_efs(given), strict=True)
        ]
        finite = [error for error in errors if np.isfinite(error)]
        return [float(np.mean(finite)) if finite else 0.0]


def _energy(atoms: Atoms) -> float:
    return float(atoms.info["energy"] if "energy" in atoms.info else atoms.get_potential_energy())


def _only(atoms: Atoms, keys: Iterable[str]) -> Atoms:
    copy = stripped(atoms)
    copy.info = {key: atoms.info[key] for key in keys if key in atoms.info}
    return copy


def _like(pop: Any, individuals: list[Atoms]) -> Any:
    return type(pop)(individuals) if isinstance(pop, Population) else individuals
