"""What the model's errors of several free energies have in common: one Gaussian for all phases.

The error estimate of the model (`potential.uncertainty`) is the variance of a linear readout, so that the errors of two phases have
the covariance e . e' of their error vectors, each the mean over an ensemble: the error of a difference of G is |e - e'|. Phases that
look alike to the model share most of their errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magus_anharmonic.ranking.candidate import Candidate


@dataclass(frozen=True)
class ModelTerm:
    """What DFT labels of an SSCHA ensemble say about a model's G: ``correction`` = G_DFT - G_model with standard error, eV/atom."""

    correction: float
    error: float


@dataclass(frozen=True)
class ModelErrors:
    """Errors of n phases, eV/atom: ``shared`` (n, u), their vectors, and ``own`` (n,), independent; NaN in ``own`` where unknown."""

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
        """Standard error of the difference of two phases; None where one of them is unknown, 0 of a phase to itself."""
        if one == other:
            return 0.0 if math.isfinite(self.own[one]) else None
        error = math.hypot(float(np.linalg.norm(self.shared[one] - self.shared[other])), self.own[one], self.own[other])
        return error if math.isfinite(error) else None

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, n_phases) draws of the shared part."""
        return rng.normal(size=(n, self.shared.shape[1])) @ self.shared.T


def model_errors(phases: Sequence[Candidate], terms: Sequence[ModelTerm | None], model_error: float | None) -> ModelErrors:
    """The errors that are left once every phase is shifted by its measured term, or by the mean of those that are measured.

    A measured phase has the error of its measurement alone. One without labels has its own error vector, less the mean vector of the
    measured ones by which it is shifted. One without an error vector has the expected error of its static energy, or else
    ``model_error``, on its own.
    """
    vectors = [c.error_vector for c in phases]
    size = max((len(v) for v in vectors if v is not None), default=0)
    shared, own = np.zeros((len(phases), size)), np.zeros(len(phases))
    measured = [v for v, term in zip(vectors, terms, strict=True) if term is not None]
    origin = np.mean(measured, axis=0) if measured and all(v is not None for v in measured) else np.zeros(size)
    for k, (c, term) in enumerate(zip(phases, terms, strict=True)):
        if term is not None:
            own[k] = term.error
        elif c.error_vector is not None:
            shared[k] = np.asarray(c.error_vector) - origin
        else:
            alone = model_error if c.model_error is None else c.model_error
            own[k] = math.nan if alone is None else alone
    return ModelErrors(shared, own)
