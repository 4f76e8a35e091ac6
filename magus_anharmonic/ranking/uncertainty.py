"""Errors of differences of G, and how sure the order is.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from magus_anharmonic.errors import DamagedFile
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.io.files import read_whole
from magus_anharmonic.ranking.candidate import Candidate, by_composition
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.result import (
    PROGRESS,
    SschaResult,
    final_populations,
    read_population_file,
    read_progress_file,
)
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import symbol_of

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
    """Those of the run in ``folder``; None where it keeps no whole populations, or some of two
    levels, which are taken as independent of all others."""
    try:
        populations = _last_populations(folder)
    except DamagedFile as error:
        log.warning("%s; the errors of this run are taken as independent of all others", error)
        return None
    excess, size = {}, 0
    for number, (state, ensemble) in populations.items():
        if ensemble.two_level:
            return None
        excess[number] = ensemble.excess(state) / len(state.atoms)
        size = 3 * len(state.supercell)
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
    with standard error, and the free energy of the electrons minus their energy (`Electronic`)
    where it was measured; eV/atom."""

    correction: float
    error: float
    electronic: Electronic | None = None


@dataclass(frozen=True)
class Electronic:
    """<F_el - E_0> of an ensemble with its standard error, eV/atom, at a temperature, K."""

    energy: float
    error: float
    temperature: float


def with_electronic(
    candidates: Sequence[Candidate], measured: Mapping[str, ModelTerm]
) -> list[Candidate]:
    """Put the free energy of the electrons into G, where labels say it of every phase at its
    temperature; where they do of some only, into none, so that all stay comparable."""
    phases = [c for c in candidates if c.phase_ranked]
    found: dict[str, Electronic] = {}
    for c, term in zip(phases, model_terms(phases, measured), strict=True):
        if term and term.electronic and abs(term.electronic.temperature - c.temperature) < 1e-6:
            found[c.id] = term.electronic
    lacking = [c.label for c in phases if c.id not in found]
    if lacking and found:
        log.warning(
            "free energy of the electrons: in no G, because it is not measured of %s",
            ", ".join(lacking),
        )
    if lacking:
        return list(candidates)
    return [_added(c, found[c.id]) if c.id in found else c for c in candidates]


def _added(candidate: Candidate, term: Electronic) -> Candidate:
    return candidate.updated(
        gibbs=_number(candidate.gibbs) + term.energy,
        gibbs_error=math.hypot(_number(candidate.gibbs_error), term.error),
        electronic=term.energy,
    )


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


def probability_lowest(gibbs: Sequence[float], errors: Sequence[float]) -> np.ndarray:
    """Probability of each candidate to be the lowest, for independent Gaussian errors; (n,), sums
    to 1.

    P_i = integral of p_i(g) prod_{j != i} [1 - Phi((g - G_j) / s_j)] dg, on a grid of the lowest
    candidates' errors.
    """
    values, widths = (
        np.asarray(gibbs, dtype=float),
        np.maximum(np.asarray(errors, dtype=float), 1e-9),
    )
    if len(values) == 0:
        return np.zeros(0)
    edge = float((values + 8.0 * widths).min())
    result, steps = np.zeros(len(values)), np.linspace(-8.0, 8.0, 2001)
    for index in np.flatnonzero(values - 8.0 * widths <= edge):
        grid = values[index] + widths[index] * steps
        log_above = log_ndtr((values - grid[:, None]) / widths)
        log_above[:, index] = 0.0
        density = np.exp(log_above.sum(axis=1) - 0.5 * steps**2)
        result[index] = np.trapezoid(density, steps)
    return result / result.sum()


FINITE_SIZE_PART = 0.5
"""Of the finite-size terms' difference, as its error: the interpolation takes out the larger part
of what it corrects."""

N_SAMPLES = 2**15
"""Of the model's errors where phases share them: probabilities to 0.003."""
_SEED = 109


def with_probabilities(
    candidates: Sequence[Candidate],
    model_error: float | None,
    measured: Mapping[str, ModelTerm] | None = None,
    common: Callable[[Candidate, Candidate], float] = lambda one, other: 0.0,
) -> list[Candidate]:
    """Fill in the difference of G to the lowest phase of the composition, its errors, and the
    probabilities; energies in eV/atom.

    sampling : both standard errors together, less what ``common`` (the covariance of two free
    energies, eV^2/atom^2) says they share; the probabilities take them as independent, which for
    candidates that share errors is on the safe side. finite size : half the difference of the two
    interpolation terms, together with the spreads of both phases over supercells. model : see
    below. Phases that another candidate stands for, estimates and failures get none.

    The model term of a phase in ``measured`` (by candidate id, or by the space-group symbol that it
    alone has) is measured: the error of the difference is that of the two corrections together with
    their difference, which G itself does not contain, and the total probabilities are those of the
    corrected G. Elsewhere it is what the model expects of itself over the two ensembles, what they
    share left out (`uncertainty`). Where a phase has no such estimate it is the expected error of
    its static energy, or ``model_error``, the validation RMSE of the energy (None: unknown, and no
    total), an upper estimate. A phase without a measurement is taken to be shifted as the measured
    ones are on average.
    """
    phases = sorted((c for c in candidates if c.phase_ranked), key=lambda c: (c.gibbs, c.id))
    terms = dict(zip((c.id for c in phases), model_terms(phases, measured or {}), strict=True))
    filled: dict[str, Candidate] = {}
    for block in by_composition(phases):
        filled |= _with_probabilities(block, [terms[c.id] for c in block], model_error, common)
    return [filled.get(c.id, c) for c in candidates]


def _with_probabilities(
    phases: Sequence[Candidate],
    terms: Sequence[ModelTerm | None],
    model_error: float | None,
    common: Callable[[Candidate, Candidate], float],
) -> dict[str, Candidate]:
    """By id the phases of one composition, the lowest first, against the first of them."""
    best = phases[0]
    gibbs, sampling = [_number(c.gibbs) for c in phases], [_number(c.gibbs_error) for c in phases]
    finite = [0.0 if c is best else _finite_size_error(c, best) for c in phases]
    probability = probability_lowest(gibbs, sampling)
    shift = _shifts(terms)
    errors = model_errors(phases, terms, model_error)
    total = (
        _total_probabilities(np.add(gibbs, shift), np.hypot(sampling, finite), errors)
        if errors.known
        else None
    )
    return {
        c.id: replace(
            c,
            difference=_number(c.gibbs) - _number(best.gibbs),
            difference_sampling_error=0.0
            if c is best
            else difference_error(
                _number(c.gibbs_error), _number(best.gibbs_error), common(c, best)
            ),
            difference_finite_size_error=finite[index],
            difference_model_error=_with_shift(
                errors.of_difference(index, 0), shift[index] - shift[0]
            ),
            model_correction=None if term is None else term.correction,
            model_correction_error=None if term is None else term.error,
            p_lowest_sampling=float(probability[index]),
            p_lowest_total=None if total is None else float(total[index]),
        )
        for index, (c, term) in enumerate(zip(phases, terms, strict=True))
    }


def model_terms(
    phases: Sequence[Candidate], measured: Mapping[str, ModelTerm]
) -> list[ModelTerm | None]:
    """The measured term of each phase: by its id, by that of its run, or by a space-group symbol
    that no other phase has."""
    symbols = [symbol_of(c.free_energy.space_group) for c in phases]
    found: list[ModelTerm | None] = []
    for c, symbol in zip(phases, symbols, strict=True):
        alone = symbol if symbols.count(symbol) == 1 else ""
        found.append(
            next(
                (
                    measured[key]
                    for key in (c.id, c.run.structure if c.run else "", alone)
                    if key and key in measured
                ),
                None,
            )
        )
    return found


def _shifts(terms: Sequence[ModelTerm | None]) -> list[float]:
    corrections = [term.correction for term in terms if term is not None]
    mean = float(np.mean(corrections)) if corrections else 0.0
    return [mean if term is None else term.correction for term in terms]


def _total_probabilities(gibbs: np.ndarray, others: np.ndarray, errors: ModelErrors) -> np.ndarray:
    """Probabilities of being the lowest with the errors by sampling and size (``others``) and those
    of the model, (n,)."""
    widths = np.hypot(others, errors.own)
    if errors.independent:
        return probability_lowest(gibbs, widths)
    rng = np.random.default_rng(_SEED)
    sampled = (
        gibbs + widths * rng.normal(size=(N_SAMPLES, len(gibbs))) + errors.sample(N_SAMPLES, rng)
    )
    return np.bincount(sampled.argmin(axis=1), minlength=len(gibbs)) / N_SAMPLES


def _with_shift(error: float | None, shift: float) -> float | None:
    return None if error is None else math.hypot(error, shift)


def _finite_size_error(one: Candidate, other: Candidate) -> float:
    by_interpolation = FINITE_SIZE_PART * abs(
        _number(one.free_energy.finite_size) - _number(other.free_energy.finite_size)
    )
    return math.hypot(
        by_interpolation, _number(one.duplicate_spread), _number(other.duplicate_spread)
    )


def _number(value: float | None) -> float:
    return 0.0 if value is None else value
