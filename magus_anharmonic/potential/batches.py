"""Labelled structures as batches of graphs.

Training moves no atom, so the neighbours of every structure are found once; a batch is only a concatenation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms

from magus_anharmonic.potential.graph import Graph, build_graph, check, find_neighbours
from magus_anharmonic.potential.score import labels_of, name_of
from magus_anharmonic.units import EV_PER_A3_IN_GPA


@dataclass(frozen=True)
class Targets:
    """Labels of a batch: energy per atom (n,) eV in float64, forces (N, 3) eV/A, stress (n, 3, 3) GPa; n_atoms (n,)."""

    energy: torch.Tensor
    forces: torch.Tensor
    stress: torch.Tensor
    n_atoms: torch.Tensor


class LabelledGraphs:
    """Neighbours and targets of labelled structures, for models with the cutoffs of ``module``.

    Raises InputError, naming the structure, when a label is missing or a structure cannot be evaluated.
    """

    def __init__(self, labelled: Sequence[Atoms], module: torch.nn.Module) -> None:
        reference = next(module.parameters())
        self._dtype, self._device = reference.dtype, reference.device
        arguments: Any = module.model_args
        self._cutoff, self._threebody_cutoff = float(arguments["cutoff"]), float(arguments["threebody_cutoff"])
        self._structures = list(labelled)
        labels = [labels_of(atoms) for atoms in self._structures]
        for atoms in self._structures:
            check(atoms, name_of(atoms))
        self._neighbours = [find_neighbours(atoms, self._cutoff, name_of(atoms)) for atoms in self._structures]
        self._count = self._tensor([len(atoms) for atoms in self._structures], torch.float64)
        self._energy = self._tensor([energy for energy, _, _ in labels], torch.float64) / self._count
        self._forces = [self._tensor(forces) for _, forces, _ in labels]
        self._stress = self._tensor([stress * EV_PER_A3_IN_GPA for _, _, stress in labels]).reshape(-1, 3, 3)

    def _tensor(self, values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=float), dtype=dtype or self._dtype, device=self._device)

    def __len__(self) -> int:
        return len(self._structures)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Graph, Targets]:
        """The structures ``indices`` as one graph with its targets."""
        chosen = [int(i) for i in indices]
        graph = build_graph(
            [self._structures[i] for i in chosen],
            self._cutoff,
            self._dtype,
            self._device,
            threebody_cutoff=self._threebody_cutoff,
            neighbours=[self._neighbours[i] for i in chosen],
        )
        index = torch.as_tensor(chosen, device=self._device)
        forces = torch.cat([self._forces[i] for i in chosen])
        return graph, Targets(self._energy[index], forces, self._stress[index], self._count[index])

    def batches(self, batch_size: int, order: np.ndarray | None = None) -> Iterator[tuple[Graph, Targets]]:
        """All structures in ``order`` (default: as given), ``batch_size`` at a time, the last batch smaller."""
        order = np.arange(len(self)) if order is None else order
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])
