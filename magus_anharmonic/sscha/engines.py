"""The engines: who minimises the free energy on the ensembles at hand. One entry in `ENGINES` each.

An engine is a function ``(populations, symmetry, min_effective_sample=..., log=...) -> Minimised`` of the evaluated
populations of one cell, oldest first; the minimisation starts from the state of the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from magus_anharmonic.sscha.averages import Ensemble
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry

Population = tuple[SschaState, Ensemble]


@dataclass(frozen=True)
class Minimised:
    """The state after the minimisation, and how it went.

    effective_sample : effective sample size at the end over the number of configurations of the last population;
    decrease : eV per primitive cell, on this sample; stress : (3, 3) eV/A^3 in ASE's sign, reweighted; fc_gradient,
    centroid_gradient : moduli of the preconditioned gradients (eV/A^2, A); converged : ended at its own criterion, not
    because the sample was used up.
    """

    state: SschaState
    effective_sample: float
    decrease: float
    stress: np.ndarray
    fc_gradient: float
    centroid_gradient: float
    n_steps: int
    converged: bool


class Engine(Protocol):
    """See the module."""

    def __call__(self, populations: Sequence[Population], symmetry: Symmetry, *, min_effective_sample: float, log: Path) -> Minimised: ...


ENGINES = {
    "native": "magus_anharmonic.sscha.native:minimise",
    "python-sscha": "magus_anharmonic.sscha.python_sscha:minimise_last",
}
"""Name in the settings -> where it is; imported when it is used."""


def engine(name: str) -> Engine:
    """The engine of that name."""
    module, function = ENGINES[name].split(":")
    return getattr(import_module(module), function)
