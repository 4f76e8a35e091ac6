"""Ensembles of a state: configurations drawn from it, or given, and evaluated in one call."""

from __future__ import annotations

import numpy as np

from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.start import CountingEvaluator
from magus_anharmonic.sscha.state import SschaState, displaced, sample


def sample_ensemble(
    state: SschaState, n_configs: int, seed: list[int], evaluator: Evaluator, what: str
) -> Ensemble:
    """``n_configs`` configurations drawn from the state with ``seed`` and evaluated; ``what`` is
    for the messages."""
    return evaluated(state, sample(state, n_configs, np.random.default_rng(seed)), evaluator, what)


def evaluated(
    state: SschaState, displacements: np.ndarray, evaluator: Evaluator, what: str
) -> Ensemble:
    """The ensemble of ``displacements`` (n_configs, n_supercell, 3), A. Raises ``SschaError`` for
    numbers that are not finite, or none."""
    try:
        found = CountingEvaluator(evaluator).evaluate(displaced(state, displacements))
    except InputError as error:
        raise SschaError(f"{what}: a sampled configuration cannot be evaluated: {error}") from error
    return Ensemble(
        displacements,
        np.asarray(found.energy, dtype=float),
        np.array(found.forces, dtype=float),
        np.array(found.stress, dtype=float).reshape(-1, 3, 3),
    )
