"""``Potential``: a loaded checkpoint that evaluates structures in batches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.potential import checkpoint, uncertainty
from magus_anharmonic.potential.graph import Graph, Neighbours, build_graph, check, find_neighbours
from magus_anharmonic.potential.model import FactorisedM3GNet
from magus_anharmonic.potential.uncertainty import ErrorModel, Uncertainty

if TYPE_CHECKING:
    from magus_anharmonic.potential.relax import Relaxation

logger = logging.getLogger(__name__)

# Edges times units of a batch: large enough to spread the cost of calling torch, small enough for 200 MB (CPU) or 10 GB (CUDA).
EDGE_UNITS_PER_BATCH = {"cpu": 1_500_000, "cuda": 50_000_000}
MAX_EDGES_PER_BATCH = {"cpu": 24_000, "cuda": 1_000_000}

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Potential:
    """A MatterSim checkpoint: an `Evaluator` for batches of structures of any size and species.

    Directions without ``pbc`` are not periodic; the stress of a structure without a cell is zero.
    ``module`` is MatterSim's own ``M3Gnet``, ``model`` the factorised form that shares its parameters.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        path: str | Path | None = None,
        species: frozenset[int] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        edges_per_batch: int | None = None,
        error_model: ErrorModel | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise InputError(f"dtype {dtype}: only {' and '.join(_DTYPES)} are possible")
        self.model_id = checkpoint.model_id(module)
        self.path = None if path is None else Path(path)
        self.species_seen = None if species is None else set(species)
        self.device, self.dtype = device, _DTYPES[dtype]
        self.module = module.to(device=device, dtype=self.dtype).eval()
        self.model = FactorisedM3GNet(self.module)
        self.cutoff = self.model.cutoff
        self.error_model = error_model
        kind = "cuda" if device.startswith("cuda") else "cpu"
        self.edges_per_batch = edges_per_batch or min(MAX_EDGES_PER_BATCH[kind], EDGE_UNITS_PER_BATCH[kind] // self.model.units)
        self._warned: set[int] = set()
        self._said_no_estimate = False

    def __repr__(self) -> str:
        return f"Potential({self.model_id}, {self.path}, {self.device}, {self.dtype})"

    def double(self) -> Potential:
        """The same model in float64, for finite differences; a copy, unless this one is float64 already."""
        if self.dtype == torch.float64:
            return self
        species = None if self.species_seen is None else frozenset(self.species_seen)
        return Potential(
            copy.deepcopy(self.module),
            path=self.path,
            species=species,
            device=self.device,
            dtype="float64",
            edges_per_batch=self.edges_per_batch,
            error_model=self.error_model,
        )

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """Energies, forces and stresses in the order of the input, with ``energy_error`` where the model has an estimate.

        The structures are not changed.
        Raises InputError (no atoms, unknown species, coincident atoms) and MagusAnharmonicError (result not finite),
        both with the index of the structure.
        """
        structures = list(structures)
        energy = np.empty(len(structures))
        stress = np.empty((len(structures), 3, 3))
        forces: list[np.ndarray] = []
        errors = None if self.error_model is None else np.empty(len(structures))
        for indices, graph in self._graphs(structures):
            *values, features = self.model.evaluate(graph)
            e, f, s = (value.cpu().numpy().astype(float) for value in values)
            energy[indices], stress[indices] = e, s
            forces += np.split(f, np.cumsum(graph.n_atoms)[:-1])
            _require_finite(indices, e, forces[indices[0] :], s)
            if errors is not None and self.error_model is not None:
                errors[indices] = self.error_model.predict(features, graph).energy_error
        return Evaluation(energy, forces, stress, errors)

    def uncertainty(self, structures: Sequence[Atoms]) -> Uncertainty | None:
        """Expected errors against the model's DFT, without evaluating energies and forces; None when it has no estimate.

        Raises InputError as `evaluate` does.
        """
        if self.error_model is None:
            self._say_once_that_there_is_no_estimate()
            return None
        found = [self.error_model.predict(self.model.atom_features(graph), graph) for _, graph in self._graphs(list(structures))]
        energy, force = ([getattr(part, name) for part in found] for name in ("energy_error", "force_error"))
        return Uncertainty(np.concatenate([np.empty(0), *energy]), np.concatenate([np.empty(0), *force]))

    def mean_features(self, structures: Sequence[Atoms]) -> np.ndarray:
        """(n, u): features before the readout, means over the atoms of each structure; alike structures have alike ones."""
        found = [uncertainty.mean_features(self.model, graph) for _, graph in self._graphs(list(structures))]
        return np.concatenate([np.empty((0, self.model.units)), *found])

    def _say_once_that_there_is_no_estimate(self) -> None:
        if not self._said_no_estimate:
            self._said_no_estimate = True
            where = self.path or f"model {self.model_id}"
            logger.info("%s comes without an error estimate; one is made when the model is trained or finetuned here", where)

    def _graphs(self, structures: Sequence[Atoms]) -> Iterator[tuple[list[int], Graph]]:
        """The batches of `_batches` as graphs, with the indices of their structures."""
        near = self.model.threebody_cutoff
        for indices, neighbours in self._batches(structures):
            batch = [structures[index] for index in indices]
            yield indices, build_graph(batch, self.cutoff, self.dtype, self.device, threebody_cutoff=near, neighbours=neighbours)

    def _batches(self, structures: Sequence[Atoms]) -> Iterator[tuple[list[int], list[Neighbours]]]:
        """Consecutive structures whose edges fit ``edges_per_batch`` together; at least one structure each."""
        indices: list[int] = []
        neighbours: list[Neighbours] = []
        n_edges = 0
        for index, atoms in enumerate(structures):
            check(atoms, f"structure {index}")
            self._warn_unseen(atoms)
            found = find_neighbours(atoms, self.cutoff, f"structure {index}")
            if indices and n_edges + len(found.length) > self.edges_per_batch:
                yield indices, neighbours
                indices, neighbours, n_edges = [], [], 0
            indices.append(index)
            neighbours.append(found)
            n_edges += len(found.length)
        if indices:
            yield indices, neighbours

    def _warn_unseen(self, atoms: Atoms) -> None:
        if self.species_seen is None:
            return
        unseen = set(atoms.numbers.tolist()) - self.species_seen - self._warned
        if unseen:
            self._warned |= unseen
            names = ", ".join(chemical_symbols[number] for number in sorted(unseen))
            seen = ", ".join(chemical_symbols[number] for number in sorted(self.species_seen))
            logger.warning("checkpoint %s was never trained on %s (only on %s): its numbers mean nothing there", self.path, names, seen)

    def relax(self, structures: Sequence[Atoms], pressure: float = 0.0, **options: Any) -> list[Relaxation]:
        """Relax structures at ``pressure`` (GPa), all at once; see `magus_anharmonic.potential.relax.relax`."""
        from magus_anharmonic.potential.relax import relax

        return relax(self, structures, pressure, **options)


def _require_finite(indices: Sequence[int], energy: np.ndarray, forces: Sequence[np.ndarray], stress: np.ndarray) -> None:
    for position, index in enumerate(indices):
        if not (np.isfinite(energy[position]) and np.isfinite(forces[position]).all() and np.isfinite(stress[position]).all()):
            raise MagusAnharmonicError(f"structure {index}: the potential gives an energy, force or stress that is not finite")


def load(name_or_path: str | Path, device: str | None = None, *, dtype: str = "float32", edges_per_batch: int | None = None) -> Potential:
    """Load a checkpoint: a name MatterSim knows, one that this package ships, or a path.

    device
        ``cpu``, ``cuda``, ...; None takes cuda where there is one.
    dtype
        ``float32`` as MatterSim, or ``float64`` for finite differences.

    Raises CheckpointError, and InputError for a device that is not there.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {chosen}: this machine has no CUDA device, or torch was built without CUDA")
    path = checkpoint.resolve(name_or_path)
    module, content = checkpoint.read(path, chosen)
    return Potential(
        module,
        path=path,
        species=checkpoint.species_of(content),
        device=chosen,
        dtype=dtype,
        edges_per_batch=edges_per_batch,
        error_model=uncertainty.error_model_of(content, int(content["model_args"]["units"])),
    )
