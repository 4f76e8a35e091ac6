"""Labels of the free-energy surface F(R, cell): SSCHA at fixed centroids on a potential.

energy : F of the supercell in eV per cell at the given cell, without finite-size term (which is in
``info``): forces, -dF/dR, and stress are its very derivatives. Statistical errors: ``info`` of a
label, see `of_result`. Populations of any relaxing run whose force constants had come to their
minimum are such labels too (`labels_of_run`): they are of centroids and a cell on the way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from magus_anharmonic.energy_surface import (
    FORCE_ERROR,
    LABEL_ERROR,
    LABEL_KEY,
    FreeEnergySurface,
    masses_of,
    require_potential,
)
from magus_anharmonic.errors import DamagedFile, InputError, LabelerError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import read_whole
from magus_anharmonic.labelers.base import Code, Label, Recipe
from magus_anharmonic.settings import LabelerSettings, SschaSettings, parse
from magus_anharmonic.sscha import SschaResult, free_energy
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.result import read_population_file
from magus_anharmonic.sscha.start import SYMMETRY_OF_A_STATE
from magus_anharmonic.sscha.supercells import as_supercell_matrix
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import correctable
from magus_anharmonic.structures import structure_id

ARGUMENTS = "learning.labeler.arguments"
MODEL = "model"
"""Name of the potential's id among the files of a recipe: part of the settings hash."""
RUNS = "runs"
"""Argument: the folder in which the runs of labels are kept."""
OWN = ("masses", "seed")
"""Arguments besides the keys of ``sscha`` that a run has."""


class SschaLabels(Code):
    """Labels from SSCHA at fixed centroids: ``evaluator`` (a checkpoint), ``temperature`` (K),
    ``masses`` (amu by symbol), ``seed``, ``runs`` (a folder that keeps them), and the keys of
    ``sscha`` that change a run."""

    defaults = {"temperature": 0.0, "supercell": [2, 2, 2], "n_configs": 200, "seed": 0}
    execution_keys = frozenset({"evaluator", "device", RUNS})

    def available(self, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
        return True, "SSCHA is part of this package"

    def recipe(self, settings: LabelerSettings) -> Recipe:
        """See `Code`; the file is the potential, by the id of its weights. Raises ``LabelerError``
        also where that is a free-energy model itself."""
        if settings.k_spacing is not None:
            raise LabelerError("learning.labeler.k_spacing: a potential has no k-points")
        made = super().recipe(settings)
        try:
            run_settings(made.arguments)
            model = _potential(made.execution)
            require_potential(model, f"{ARGUMENTS}.evaluator")
        except InputError as error:
            raise LabelerError(str(error)) from None
        # labels are made in folders of their own
        runs = {key: os.path.abspath(made.execution[key]) for key in {RUNS} & set(made.execution)}
        execution = {**made.execution, **runs}
        return replace(made, files={MODEL: model.model_id}, execution=execution)

    def calculator(self, recipe: Recipe, atoms: Atoms, directory: Path) -> Calculator:
        model = _potential(recipe.execution)
        if model.model_id != recipe.files[MODEL]:
            raise LabelerError(
                f"{ARGUMENTS}.evaluator: {recipe.execution['evaluator']} holds model"
                f" {model.model_id} now, and {recipe.files[MODEL]} when the labels began"
            )
        runs = recipe.execution.get(RUNS)
        return FixedCentroids(model, recipe.arguments, None if runs is None else Path(runs))

    def writes_to(self, recipe: Recipe) -> list[Path]:
        return [Path(recipe.execution[RUNS])] if RUNS in recipe.execution else []

    def surface(self, recipe: Recipe) -> FreeEnergySurface:
        return surface_of(recipe.arguments, recipe.files[MODEL])

    def found(self, recipe: Recipe, folder: Path, known: Set[str]) -> Iterator[tuple[Atoms, Label]]:
        """See `labels_of_run`."""
        surface = self.surface(recipe)
        for result in sorted(folder.glob("**/result.json")):
            yield from labels_of_run(result.parent, surface, recipe.settings_hash, known)


def run_settings(arguments: Mapping[str, Any]) -> SschaSettings:
    """The keys of ``sscha`` in ``arguments``, with fixed centroids; raises ``InputError``."""
    given = {name: value for name, value in arguments.items() if name not in OWN}
    if unknown := sorted(set(given) - {"temperature", *SschaSettings().of_a_run()}):
        raise InputError(
            f"{ARGUMENTS}.{unknown[0]}: is no key of SSCHA labels; known: evaluator, device, runs,"
            f" temperature, {', '.join([*OWN, *SschaSettings().of_a_run()])}"
        )
    if isinstance(arguments["temperature"], list):
        raise InputError(f"{ARGUMENTS}.temperature: one surface has one temperature, in K")
    return parse(SschaSettings, {**given, "centroids": "fixed"}, ARGUMENTS)


def surface_of(
    arguments: Mapping[str, Any], potential: str, atoms: Atoms | None = None
) -> FreeEnergySurface:
    """What labels with these ``arguments`` are of; ``atoms``: whose masses to name."""
    settings, masses = run_settings(arguments), dict(arguments.get("masses") or {})
    supercell = settings.supercell
    return FreeEnergySurface(
        settings.temperatures[0],
        {**(masses_of(atoms) if atoms else {}), **masses},
        dict(supercell) if isinstance(supercell, Mapping) else np.array(supercell).tolist(),
        potential,
    )


@functools.lru_cache(maxsize=1)
def _loaded(checkpoint: str, device: str | None, changed: float) -> Any:
    from magus_anharmonic.potential import load

    return load(checkpoint, device=device)


def _potential(execution: Mapping[str, Any]) -> Any:
    """The model of a recipe, loaded once in a process while its file does not change."""
    from magus_anharmonic.potential import checkpoint

    named = execution.get("evaluator")
    if not isinstance(named, str):
        raise InputError(
            f"{ARGUMENTS}.evaluator: {named!r}: must be the checkpoint of a potential, by its path"
            " or a name that is shipped"
        )
    path = checkpoint.resolve(named)
    return _loaded(str(path), execution.get("device"), path.stat().st_mtime)


class FixedCentroids(Calculator):
    """ASE calculator of F at fixed centroids; ``label_info`` has what a label says besides.

    ``runs`` : keeps the SSCHA runs, by structure. One of the same structure with other masses there
    is reweighted where that is enough (`isotopes`), and else the start.
    """

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(
        self, evaluator: Evaluator, arguments: Mapping[str, Any], runs: Path | None = None
    ) -> None:
        super().__init__()
        self.evaluator, self.arguments, self.runs = evaluator, arguments, runs
        self.label_info: dict[str, Any] = {}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Any = ("energy",),
        system_changes: Any = all_changes,
    ) -> None:
        """Raises ``LabelerError`` with the reason where the run fails or does not converge."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        settings = run_settings(self.arguments)
        # a draw of its own for every structure: what one for all got wrong would be learned
        key = [int(self.arguments["seed"]), int(structure_id(self.atoms), 16)]
        own = np.random.default_rng(key)
        directory, start = self._folders()
        result = free_energy(
            self.atoms,
            self.evaluator,
            temperature=settings.temperatures[0],
            masses=self.arguments.get("masses"),
            seed=int(own.integers(2**31)),
            directory=directory,
            start=start,
            any_start=True,
            **settings.of_a_run(),
        )
        if not result.converged:
            raise LabelerError(f"SSCHA at fixed centroids {result.status}: {result.reason}")
        surface = surface_of(self.arguments, self.evaluator.model_id, result.centroids)
        self.results, self.label_info = of_result(result, surface)

    def _folders(self) -> tuple[Path | None, Path | None]:
        """The folder of the run, and that of one of the same structure, temperature and model."""
        if self.runs is None:
            return None, None
        assert self.atoms is not None
        natural = self.atoms.copy()
        natural.set_masses("defaults")
        mine = self.runs / structure_id(natural)
        own = mine / str(digest(self.arguments, masses_of(self.atoms), self.evaluator.model_id))
        temperature = run_settings(self.arguments).temperatures[0]
        for folder in sorted(path.parent for path in mine.glob("*/result.json")):
            other = SschaResult.read(folder)
            same = other.model_id == self.evaluator.model_id and other.temperature == temperature
            if folder != own and other.converged and same:
                return own, folder
        return own, None


def of_result(
    result: SschaResult, surface: FreeEnergySurface
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Energy (eV per cell), forces and stress of a run with fixed centroids; and the ``info`` of
    the label, see `_errors`, with finite_size (eV/atom, not in the energy) and n_evaluations."""
    n = len(result.centroids)
    assert result.gibbs_raw is not None and result.gibbs_error is not None
    assert result.force is not None and result.force_error is not None
    if not np.isfinite(result.stress).all():
        raise LabelerError("SSCHA at fixed centroids: the potential gives no stress")
    energy = n * result.gibbs_raw
    numbers = {"energy": energy, "forces": result.force, "stress": result.stress}
    info = _errors(n * result.gibbs_error, result.force_error, result.stress_error, surface)
    own = {"finite_size": result.finite_size or 0.0, "n_evaluations": result.n_evaluations}
    return numbers, info | own


def _errors(
    energy: float, force: np.ndarray, stress: np.ndarray, surface: FreeEnergySurface
) -> dict[str, Any]:
    """label_energy_error (eV per cell), label_force_error (eV/A) and label_stress_error (eV/A^3;
    both root mean square over components), and the surface."""
    return {
        LABEL_ERROR: float(energy),
        FORCE_ERROR: float(np.sqrt(np.mean(np.square(force)))),
        "label_stress_error": float(np.sqrt(np.mean(np.square(stress)))),
        LABEL_KEY: surface.as_dict(),
    }


def labels_of_run(
    folder: Path, surface: FreeEnergySurface, settings_hash: str, known: Set[str] = frozenset()
) -> Iterator[tuple[Atoms, Label]]:
    """Structures and labels of the populations in the ``folder`` of an SSCHA run whose force
    constants were at their minimum, so far as their own ensemble tells: centroids and cell may be
    anywhere.

    Only of the ``surface``: model, temperature, masses and supercell the same; none of a run that
    is damaged or of another version, or of structures whose ids are ``known``.
    """
    try:
        result = SschaResult.read(folder)
    except (InputError, DamagedFile):
        return
    same = result.model_id == surface.potential and result.temperature == surface.temperature
    if not same or isinstance(surface.supercell, Mapping):
        return
    for path in sorted(folder.glob("population_*.npz")):
        stored = read_whole(path, read_population_file)
        if stored is None or structure_id(stored[0].atoms) in known:
            continue
        state, ensemble = stored
        own = replace(surface, masses={**masses_of(state.atoms), **surface.masses})
        if state.supercell_matrix != as_supercell_matrix(surface.supercell) or own.difference(
            replace(own, masses=masses_of(state.atoms))
        ):
            continue
        still = Symmetry(state.atoms, state.supercell_matrix, SYMMETRY_OF_A_STATE, movable=False)
        averages, n = average(state, ensemble, still), len(state.atoms)
        left, error = averages.predicted_decrease, averages.minimum_error
        if not (correctable(averages, n) and left <= max(AT_MINIMUM * n, error)):
            continue
        if not np.isfinite(averages.stress).all():
            continue
        yield (
            state.atoms.copy(),
            Label(
                state.atoms.copy(),
                averages.helmholtz - left,
                None,
                averages.force,
                averages.stress,
                settings_hash,
                0.0,
                info=_errors(error, averages.force_error, averages.stress_error, own),
            ),
        )


AT_MINIMUM = 0.2e-3
"""eV/atom that the force constants alone may still lower F by, or the error of that."""
