"""What an SSCHA run is to compute, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.begin import state_digest
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import structure_id

NOT_OF_A_RUN = (
    "temperature", "when", "max_candidates", "window", "seed_back", "allocation", "confidence", "keep_best", "budget", "hessian"
)  # fmt: skip
"""Keys of `SschaSettings` that choose among runs, or stand in `Task` by themselves."""


@dataclass(frozen=True)
class Task:
    """What to compute: a validated, immutable request.

    configurations : displacements (n, n_supercell, 3) in A that another model's run drew from ``start``: evaluated again, they are
    as good as new ones, because what they were drawn from does not depend on the model.
    """

    atoms: Atoms
    pressure: float
    temperature: float
    settings: SschaSettings
    seed: int
    masses: Mapping[str, float] | None
    start: SschaState | None
    model_id: str
    configurations: np.ndarray | None = None

    def identity(self) -> dict[str, Any]:
        """Everything on which the numbers depend; two runs with the same identity are the same run."""
        ignored = {*NOT_OF_A_RUN, "max_populations", "error_tolerance"}
        return {
            "structure": structure_id(self.atoms),
            "formula": self.atoms.get_chemical_formula(),
            "model": self.model_id,
            "pressure": self.pressure,
            "temperature": self.temperature,
            "seed": self.seed,
            "masses": dict(self.masses or {}),
            "start": None if self.start is None else state_digest(self.start),
            "configurations": None if self.configurations is None else len(self.configurations),
            "sscha": self.settings.model_dump(mode="json", exclude=ignored),
        }


@dataclass
class Progress:
    """Mutable record of a run: the table of ``convergence.csv``, and the free energies so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    gibbs: list[tuple[float, float]] = field(default_factory=list)
    n_evaluations: int = 0
