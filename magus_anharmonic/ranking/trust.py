"""Whether an SSCHA run walked where its model was not trained: the expected errors over its final ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from magus_anharmonic.evaluator import Evaluator

N_CONFIGS = 20
"""Configurations drawn anew from the final state: a mean over them is what a mean over a thousand is, within a few percent."""


@dataclass(frozen=True)
class EnsembleTrust:
    """Mean expected errors of the final ensemble, and what 95 % of the labelled structures stay below.

    force_error, usual : eV/A, root mean square over components; error_vector : eV/atom, of the mean energy (`ErrorModel.vectors`).
    """

    force_error: float
    usual: float
    error_vector: tuple[float, ...] = ()

    @property
    def warning(self) -> str:
        """Why the free energy is not to be trusted; empty where the ensemble is as near to the labels as they are to one another."""
        if self.force_error <= self.usual:
            return ""
        return (
            f"the ensemble is where the model was not trained: expected error of the forces {self.force_error:.2f} eV/A, "
            f"95 % of its labels are below {self.usual:.2f}"
        )


def ensemble_trust(result: Any, evaluator: Evaluator, rng: np.random.Generator) -> EnsembleTrust | None:
    """Expected errors over the ensemble of an ``SschaResult``'s final state; None without state, or without an estimate in the model.

    By the forces, because their estimate does not fall with the size of the supercell.
    """
    error_model = getattr(evaluator, "error_model", None)
    if error_model is None or getattr(result, "force_constants", None) is None:
        return None
    from magus_anharmonic.sscha.state import displaced, sample

    state = result.state
    found = evaluator.uncertainty(displaced(state, sample(state, N_CONFIGS, rng)))  # type: ignore[attr-defined]
    return EnsembleTrust(float(found.force_error.mean()), error_model.usual_force_error, tuple(found.vectors.mean(axis=0).tolist()))
