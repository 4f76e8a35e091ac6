"""Errors of differences of G.

Whether an SSCHA run walked where its model was not trained: the expected errors over its final
ensemble.

Free energies of alike candidates from the same random numbers: their errors cancel in the
difference.

All runs of a ranking sample with one seed, so that the same population of two candidates with as
many atoms in the supercell are the same normal deviates, turned into displacements by each one's
own square root of the covariance. How much two free energies have in common is measured, not
assumed: by the covariance of the pairs of configurations that came from the same deviates.

What the model's errors of several free energies have in common: one Gaussian for all phases.

The error estimate of the model (`potential.uncertainty`) is the variance of a linear readout, so
that the errors of two phases have the covariance e . e' of their error vectors, each the mean over
an ensemble: the error of a difference of G is |e - e'|. Phases that look alike to the model share
most of their errors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magus_anharmonic.errors import DamagedFile
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.io.files import read_whole
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.sscha.ensemble import Ensemble, pair_means
from magus_anharmonic.sscha.result import (
    PROGRESS,
    SschaResult,
    final_populations,
    read_population_file,
    read_progress_file,
)
from magus_anharmonic.sscha.state import SschaState

N_CONFIGS = 20
"""Configurations sampled anew from the final state: a mean over them is what a mean over a thousand
is, within a few percent."""


@dataclass(frozen=True)
class EnsembleTrust:
    """Mean expected errors of the final ensemble, and what 95 % of the labelled structures stay
    below.

    force_error, usual : eV/A, root mean square over components; error_vector : eV/atom, of the mean
    energy (`ErrorModel.vectors`).
    """

    force_error: float
    usual: float
    error_vector: tuple[float, ...] = ()

    @property
    def warning(self) -> str:
        """Why the free energy is not to be trusted; empty where the ensemble is as near to the
        labels as they are to one another."""
        if self.force_error <= self.usual:
            return ""
        return (
            "the ensemble is where the model was not trained: expected error of the forces"
            f" {self.force_error:.2f} eV/A, 95 % of its labels are below {self.usual:.2f}"
        )


def ensemble_trust(
    result: Any, evaluator: Evaluator, rng: np.random.Generator
) -> EnsembleTrust | None:
    """Expected errors over the ensemble of an ``SschaResult``'s final state; None without state, or
    without an estimate in the model.

    By the forces, because their estimate does not fall with the size of the supercell.
    """
    error_model = getattr(evaluator, "error_model", None)
    if error_model is None or getattr(result, "force_constants", None) is None:
        return None
    from magus_anharmonic.sscha.state import displaced, sample

    state = result.state
    found = evaluator.uncertainty(displaced(state, sample(state, N_CONFIGS, rng)))  # type: ignore[attr-defined]
    return EnsembleTrust(
        float(found.force_error.mean()),
        error_model.usual_force_error,
        tuple(found.vectors.mean(axis=0).tolist()),
    )


log = logging.getLogger(__name__)

SIGNIFICANT = 2.0
"""Times 1/sqrt(pairs): a smaller correlation counts as none."""


@dataclass(frozen=True)
class Samples:
    """What the populations of a run's last state say about F.

    excess : number of the population -> (n_pairs,) mean energy minus auxiliary energy of each +u/-u
    pair, eV/atom; size : coordinates of the supercell.
    """

    excess: Mapping[int, np.ndarray]
    size: int

    @property
    def n_pairs(self) -> int:
        return sum(len(values) for values in self.excess.values())


def samples_of(folder: Path) -> Samples | None:
    """Those of the run in ``folder``; None where it keeps no whole populations."""
    try:
        populations = _last_populations(folder)
    except DamagedFile as error:
        log.warning("%s; the errors of this run are taken as independent of all others", error)
        return None
    excess, size = {}, 0
    for number, (state, ensemble) in populations.items():
        u = ensemble.displacements.reshape(len(ensemble.energies), -1)
        harmonic = 0.5 * np.einsum("ci,ci->c", u @ state.full, u)
        excess[number] = pair_means(ensemble.energies - harmonic) / len(state.supercell)
        size = u.shape[1]
    return Samples(excess, size) if excess else None


def _last_populations(folder: Path) -> dict[int, tuple[SschaState, Ensemble]]:
    """By their numbers; none where one is missing. Without a whole ``progress.json``, those of the
    state of the result."""
    progress = read_whole(folder / PROGRESS, read_progress_file)
    if progress is not None:
        files = {number: folder / f"population_{number:03d}.npz" for number in progress.pooled[-1]}
        there = all(file.is_file() for file in files.values())
        return (
            {number: read_population_file(file) for number, file in files.items()} if there else {}
        )
    if not (folder / "result.json").is_file():
        return {}
    return final_populations(folder, SschaResult.read(folder))


def covariance(one: Samples | None, other: Samples | None) -> float:
    """Of the two free energies, eV^2/atom^2: from the pairs with the same deviates; 0 where they
    have nothing in common."""
    if one is None or other is None or one.size != other.size:
        return 0.0
    pairs = [
        np.stack([one.excess[number][:n_both], other.excess[number][:n_both]])
        for number in sorted(one.excess.keys() & other.excess.keys())
        if (n_both := min(len(one.excess[number]), len(other.excess[number])))
    ]
    common = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0))
    n_common = common.shape[1]
    if n_common < 2:
        return 0.0
    moments = np.cov(common)
    if moments[0, 1] <= SIGNIFICANT / math.sqrt(n_common) * math.sqrt(
        moments[0, 0] * moments[1, 1]
    ):
        return 0.0
    return float(moments[0, 1]) * n_common / one.n_pairs / other.n_pairs


def difference_error(error: float, other: float, common: float) -> float:
    """Standard error of a difference of two free energies with standard errors and a covariance."""
    return math.sqrt(max(error**2 + other**2 - 2.0 * common, 0.0))


class CommonNumbers:
    """Covariances of the free energies of runs below ``root``, their populations read once for
    every new one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[int, Samples | None]] = {}

    def covariance(self, folder: str, other: str) -> float:
        """Of two runs by their folders, eV^2/atom^2; 0 where one keeps no populations."""
        return covariance(self._samples(folder), self._samples(other)) if folder and other else 0.0

    def _samples(self, folder: str) -> Samples | None:
        path = self.root / folder / PROGRESS
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if self._known.get(folder, (None, None))[0] != stamp:
            self._known[folder] = stamp, samples_of(self.root / folder)
        return self._known[folder][1]


@dataclass(frozen=True)
class ModelTerm:
    """What DFT labels of an SSCHA ensemble say about a model's G: ``correction`` = G_DFT - G_model
    with standard error, eV/atom."""

    correction: float
    error: float


@dataclass(frozen=True)
class ModelErrors:
    """Errors of n phases, eV/atom: ``shared`` (n, u), their vectors, and ``own`` (n,), independent;
    NaN in ``own`` where unknown."""

    shared: np.ndarray
    own: np.ndarray

    @property
    def known(self) -> bool:
        """Whether every phase has an error."""
        return bool(np.isfinite(self.own).all())

    @property
    def independent(self) -> bool:
        """Whether nothing is shared."""
        return not self.shared.any()

    def of_difference(self, one: int, other: int) -> float | None:
        """Standard error of the difference of two phases; None where one of them is unknown, 0 of a
        phase to itself."""
        if one == other:
            return 0.0 if math.isfinite(self.own[one]) else None
        error = math.hypot(
            float(np.linalg.norm(self.shared[one] - self.shared[other])),
            self.own[one],
            self.own[other],
        )
        return error if math.isfinite(error) else None

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, n_phases) samples of the shared part."""
        return rng.normal(size=(n, self.shared.shape[1])) @ self.shared.T


def model_errors(
    phases: Sequence[Candidate], terms: Sequence[ModelTerm | None], model_error: float | None
) -> ModelErrors:
    """The errors that are left once every phase is shifted by its measured term, or by the mean of
    those that are measured.

    A measured phase has the error of its measurement alone. One without labels has its own error
    vector, less the mean vector of the measured ones by which it is shifted. One without an error
    vector has the expected error of its static energy, or else ``model_error``, on its own.
    """
    vectors = [c.free_energy.error_vector for c in phases]
    size = max((len(v) for v in vectors if v is not None), default=0)
    shared, own = np.zeros((len(phases), size)), np.zeros(len(phases))
    measured = [v for v, term in zip(vectors, terms, strict=True) if term is not None]
    origin = (
        np.mean(measured, axis=0)
        if measured and all(v is not None for v in measured)
        else np.zeros(size)
    )
    for k, (c, term) in enumerate(zip(phases, terms, strict=True)):
        if term is not None:
            own[k] = term.error
        elif c.free_energy.error_vector is not None:
            shared[k] = np.asarray(c.free_energy.error_vector) - origin
        else:
            alone = model_error if c.model_error is None else c.model_error
            own[k] = math.nan if alone is None else alone
    return ModelErrors(shared, own)
