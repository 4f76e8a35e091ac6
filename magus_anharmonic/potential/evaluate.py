"""``Potential``: a loaded checkpoint that evaluates structures in batches."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from magus_anharmonic.energy_surface import FreeEnergySurface
from magus_anharmonic.errors import InputError, MachineError, NotFinite, is_out_of_memory
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.potential import checkpoint, uncertainty
from magus_anharmonic.potential.graph import (
    Graph,
    Neighbours,
    Topology,
    build_graph,
    check,
    find_neighbours,
    find_topology,
)
from magus_anharmonic.potential.guards import expected_pairs
from magus_anharmonic.potential.m3gnet import FactorisedM3GNet
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.potential.resources import (
    SHARE,
    available_bytes,
    memory_model,
    run_side_by_side,
)
from magus_anharmonic.potential.uncertainty import ErrorModel, Uncertainty
from magus_anharmonic.units import ev_to_mev

logger = logging.getLogger(__name__)

# Edges times units of a batch: large enough to spread the cost of calling torch. On a CPU a larger
# batch gains nothing; on CUDA the free memory decides.
EDGE_UNITS_PER_BATCH = {"cpu": 1_500_000, "cuda": 500_000_000}
MAX_EDGES_PER_BATCH = {"cpu": 24_000, "cuda": 10_000_000}
SHARED_FROM = 4
"""So many structures with the same atoms in one call share one neighbour list where they can."""
LEAST_EDGES_OF_A_THREAD = 1_000
"""Fewer, and the time to call torch counts."""
_CHECKED_FROM = 2e8  # bytes; what is smaller is tried without a look at the free memory

FAR = 2.0
"""Times the error that 95 % of its labels stay below."""

Batch = tuple[list[int], int, Callable[[list[int]], Graph]]
"""Places of structures, about how many edges they have, and what makes the graph of some."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Potential:
    """A MatterSim checkpoint: an `Evaluator` for batches of structures of any size and species.

    ``surface`` : what it is a free energy of; None: a potential. Directions without ``pbc`` are not
    periodic; the stress of a structure without a cell is zero. ``module`` is MatterSim's own
    ``M3Gnet``, ``model`` the factorised form that shares its parameters.

    edges_per_batch
        Left out, the processor's cache (CPU) and the free memory decide; either way memory that
        runs out halves it.
    """

    surrogate = "polynomial"
    """What SSCHA on it takes most configurations from, unless told (`sscha.surrogate`)."""

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
        surface: FreeEnergySurface | None = None,
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
        self.surface = surface
        self._farthest = 0.0
        self._edges_per_batch = edges_per_batch
        self.memory = memory_model(self.model, self.dtype)
        self._warned: set[int] = set()
        self._said_no_estimate = False

    def __repr__(self) -> str:
        return f"Potential({self.model_id}, {self.path}, {self.device}, {self.dtype})"

    def double(self) -> Potential:
        """The same model in float64, for finite differences: itself if it is, else a copy, made
        once."""
        return self if self.dtype == torch.float64 else self._in_double

    @cached_property
    def _in_double(self) -> Potential:
        species = None if self.species_seen is None else frozenset(self.species_seen)
        return Potential(
            copy.deepcopy(self.module),
            path=self.path,
            species=species,
            device=self.device,
            dtype="float64",
            edges_per_batch=self._edges_per_batch,
            error_model=self.error_model,
            surface=self.surface,
        )

    @property
    def edges_per_batch(self) -> int:
        """Edges that one batch may have."""
        if self._edges_per_batch is None:
            kind = "cuda" if self.device.startswith("cuda") else "cpu"
            efficient = min(
                MAX_EDGES_PER_BATCH[kind], EDGE_UNITS_PER_BATCH[kind] // self.model.units
            )
            at_once = torch.get_num_threads() if kind == "cpu" else 1
            fitting = SHARE * available_bytes(self.device) / (at_once * self.memory.per_edge)
            self._edges_per_batch = max(1, int(min(efficient, fitting)))
        return self._edges_per_batch

    @property
    def atoms_per_batch(self) -> int:
        """Atoms that one batch may have: where there are few edges, they are what fills the
        memory."""
        return max(
            1, int(self.edges_per_batch * max(1.0, self.memory.per_edge / self.memory.per_atom))
        )

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """Energies, forces and stresses in the order of the input, with ``energy_error`` where the
        model has an estimate.

        The structures are not changed. Those that are displaced or strained copies of one supercell
        share one neighbour list; that changes no result. Raises InputError (no atoms, unknown
        species, coincident atoms) and MagusAnharmonicError (result not finite, or a structure that
        does not fit the memory), all with the index of the structure.
        """
        structures = self._checked(structures)
        results = _Results(len(structures), self.error_model)
        lone, shared = self._share(structures)
        n_threads = torch.get_num_threads() if self.device == "cpu" else 1
        share = self._edges_of_a_thread(structures, n_threads)
        if share is None:
            n_threads, share = 1, self.edges_per_batch
        batches = itertools.chain(
            *(self._shared(structures, topology, places, share) for topology, places in shared),
            self._lone(structures, lone, share),
        )
        run_side_by_side(
            (partial(self._evaluate_batch, structures, results, *batch) for batch in batches),
            n_threads,
        )
        self._say_how_far(results.energy_error)
        return Evaluation(results.energy, results.forces, results.stress, results.energy_error)

    def _checked(self, structures: Sequence[Atoms]) -> list[Atoms]:
        if isinstance(structures, Atoms):
            raise InputError(
                "a list of structures is evaluated, and this is one structure: [atoms] instead of"
                " atoms"
            )
        structures = list(structures)
        for index, atoms in enumerate(structures):
            if not isinstance(atoms, Atoms):
                raise InputError(
                    f"structure {index} is of the type {type(atoms).__name__}, not ASE's Atoms"
                )
            check(atoms, f"structure {index}")
            self._warn_unseen(atoms)
        if self.surface is not None:
            self.surface.require(structures)
        return structures

    def _say_how_far(self, energy_error: np.ndarray | None) -> None:
        """Of a free-energy model, which has few labels: how many structures are far from them."""
        if self.surface is None or self.error_model is None or energy_error is None:
            return
        usual = self.error_model.usual_energy_error
        far = energy_error > FAR * usual
        # not at every step of a relaxation
        if far.any() and energy_error.max() > 2.0 * self._farthest:
            self._farthest = float(energy_error.max())
            logger.warning(
                "free-energy model %s: %d of %d structures are far from its labels: expected"
                " error of F up to %.0f meV/atom, usually below %.1f; make labels there",
                self.model_id, far.sum(), len(far), ev_to_mev(energy_error.max()), ev_to_mev(usual),
            )  # fmt: skip

    def atomic_energies(self, structures: Sequence[Atoms]) -> list[np.ndarray]:
        """Energies (N_i,) eV of the atoms of each structure, which add up to its energy; a forward
        pass of its own.

        Raises InputError as `evaluate` does.
        """
        found: list[np.ndarray] = []
        for graph in self._graphs(structures):
            with torch.no_grad():
                atomic = self.model.atomic_energies(graph, self.model.atom_features(graph))
            found += np.split(atomic.cpu().numpy(), np.cumsum(graph.n_atoms)[:-1])
        return found

    def uncertainty(self, structures: Sequence[Atoms]) -> Uncertainty | None:
        """Expected errors against the model's DFT, without evaluating energies and forces; None
        when it has no estimate.

        Raises InputError as `evaluate` does.
        """
        if self.error_model is None:
            self._say_once_that_there_is_no_estimate()
            return None
        found = [
            self.error_model.predict(self.model.atom_features(graph), graph)
            for graph in self._graphs(structures)
        ]
        nothing = Uncertainty(np.empty((0, len(self.error_model.whitening))), np.empty(0))
        vectors, force = (
            [getattr(part, name) for part in (nothing, *found)]
            for name in ("vectors", "force_error")
        )
        return Uncertainty(np.concatenate(vectors), np.concatenate(force))

    def energy_error_spread(self, structures: Sequence[Atoms], group_size: int = 1) -> float | None:
        """How much the energy error is expected to vary among ``structures``, eV/atom
        (`ErrorModel.spread`); None without an estimate.

        Raises InputError as `evaluate` does, and ValueError for fewer than two structures (groups
        of ``together``).
        """
        return (
            None
            if self.error_model is None
            else self.error_model.spread(self.mean_features(structures), group_size)
        )

    def mean_features(self, structures: Sequence[Atoms]) -> np.ndarray:
        """(n, u): features before the readout, means over the atoms of each structure; alike
        structures have alike ones."""
        found = [uncertainty.mean_features(self.model, graph) for graph in self._graphs(structures)]
        return np.concatenate([np.empty((0, self.model.units)), *found])

    def _say_once_that_there_is_no_estimate(self) -> None:
        if not self._said_no_estimate:
            self._said_no_estimate = True
            where = self.path or f"model {self.model_id}"
            logger.info(
                "%s comes without an error estimate; one is made when the model is trained or"
                " finetuned here",
                where,
            )

    def _graphs(self, structures: Sequence[Atoms]) -> Iterator[Graph]:
        """Batches in the order of the input."""
        structures = self._checked(structures)
        for indices, _, graph_of in self._lone(structures, range(len(structures)), math.inf):
            yield graph_of(indices)

    def _share(
        self, structures: Sequence[Atoms]
    ) -> tuple[list[int], list[tuple[Topology, list[int]]]]:
        """Indices of the structures on their own, and those that share a neighbour list."""
        groups: dict[tuple[bytes, bytes], list[int]] = {}
        for index, atoms in enumerate(structures):
            groups.setdefault((atoms.numbers.tobytes(), atoms.pbc.tobytes()), []).append(index)
        lone: list[int] = []
        shared: list[tuple[Topology, list[int]]] = []
        for indices in groups.values():
            members = [structures[index] for index in indices]
            # Found anew in each call: what is computed must not depend on what was computed before,
            # or a restart would change it.
            topology = find_topology(members, self.cutoff) if len(indices) >= SHARED_FROM else None
            if topology is None:
                lone += indices
            else:
                shared.append((topology, indices))
        return sorted(lone), shared

    def _edges_of_a_thread(self, structures: Sequence[Atoms], n_threads: int) -> int | None:
        """Edges of a batch such that there is one for each thread; None where that would be too
        little to be worth it."""
        if n_threads == 1:
            return None
        share = int(sum(expected_pairs(atoms, self.cutoff) for atoms in structures)) // n_threads
        enough = share >= LEAST_EDGES_OF_A_THREAD and len(structures) >= n_threads
        return min(share, self.edges_per_batch) if enough else None

    def _lone(
        self, structures: Sequence[Atoms], chosen: Sequence[int], limit: float
    ) -> Iterator[Batch]:
        """Batches of structures each with its own neighbours, in the order of ``chosen``."""
        for indices, neighbours in self._batches(structures, chosen, limit):
            found = dict(zip(indices, neighbours, strict=True))
            n_edges = sum(len(edges.length) for edges in neighbours)
            yield indices, n_edges, lambda part, found=found: self._join(structures, part, found)

    def _shared(
        self, structures: Sequence[Atoms], topology: Topology, indices: list[int], limit: int
    ) -> Iterator[Batch]:
        """Batches of structures with common neighbours."""

        def graph(part: list[int]) -> Graph:
            members = [structures[index] for index in part]
            names = [f"structure {index}" for index in part]
            near = self.model.threebody_cutoff
            return topology.graph(members, near, self.dtype, self.device, names)

        n_edges, start = max(1, topology.n_inside), 0
        while start < len(indices):
            # both may fall on the way, where memory runs out
            by_edges = min(limit, self.edges_per_batch) // n_edges
            size = max(1, min(by_edges, self.atoms_per_batch // len(topology.reference)))
            part = indices[start : start + size]
            yield part, n_edges * len(part), graph
            start += size

    def _evaluate_batch(
        self,
        structures: Sequence[Atoms],
        results: _Results,
        indices: list[int],
        n_edges: int,
        graph_of: Callable[[list[int]], Graph],
    ) -> None:
        """Evaluate a batch; memory that runs out halves it and all batches after it."""
        try:
            needed = self.memory.bytes(n_edges, sum(len(structures[index]) for index in indices))
            if needed > _CHECKED_FROM and needed > available_bytes(self.device):
                raise MemoryError(f"{needed:.1e} bytes are not free")
            graph = graph_of(indices)
            *values, features = self.model.evaluate(graph)
            results.store(
                indices, graph, *(value.cpu().numpy().astype(float) for value in values), features
            )
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(indices) == 1:
                size = self.memory.bytes(n_edges, len(structures[indices[0]])) / 1e9
                raise MachineError(
                    f"structure {indices[0]} ({len(structures[indices[0]])} atoms, {n_edges}"
                    f" neighbour pairs) does not fit the memory of {self.device}: it needs"
                    f" {size:.1f} GB; take a smaller cell or supercell, or a machine with more"
                    " memory"
                ) from error
        self._edges_per_batch = max(1, min(self.edges_per_batch, n_edges) // 2)
        logger.warning(
            "memory of %s ran out with %d structures: batches of %d edges from now",
            self.device,
            len(indices),
            self._edges_per_batch,
        )
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        middle = len(indices) // 2
        for part in (indices[:middle], indices[middle:]):
            rest = max(1, n_edges * len(part) // len(indices))
            self._evaluate_batch(structures, results, part, rest, graph_of)

    def _join(
        self, structures: Sequence[Atoms], indices: list[int], found: dict[int, Neighbours]
    ) -> Graph:
        return build_graph(
            [structures[index] for index in indices],
            self.cutoff,
            self.dtype,
            self.device,
            threebody_cutoff=self.model.threebody_cutoff,
            neighbours=[found[index] for index in indices],
        )

    def _batches(
        self, structures: Sequence[Atoms], chosen: Sequence[int], limit: float
    ) -> Iterator[tuple[list[int], list[Neighbours]]]:
        """Chosen structures in their order whose edges and atoms fit one batch together; at least
        one structure each."""
        indices: list[int] = []
        neighbours: list[Neighbours] = []
        n_edges = n_atoms = 0
        for index in chosen:
            found = find_neighbours(structures[index], self.cutoff, f"structure {index}")
            full = (
                n_edges + len(found.length) > min(limit, self.edges_per_batch)
                or n_atoms + len(structures[index]) > self.atoms_per_batch
            )
            if indices and full:
                yield indices, neighbours
                indices, neighbours, n_edges, n_atoms = [], [], 0, 0
            indices.append(index)
            neighbours.append(found)
            n_edges += len(found.length)
            n_atoms += len(structures[index])
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
            logger.warning(
                "checkpoint %s was never trained on %s (only on %s): its numbers mean nothing"
                " there",
                self.path,
                names,
                seen,
            )

    relax = relax


class _Results:
    """Results of n structures, filled batch by batch."""

    def __init__(self, count: int, error_model: ErrorModel | None) -> None:
        self.error_model = error_model
        self.energy_error = None if error_model is None else np.empty(count)
        self.energy = np.empty(count)
        self.stress = np.empty((count, 3, 3))
        self.forces: list[np.ndarray] = [np.empty((0, 3))] * count

    def store(
        self,
        indices: Sequence[int],
        graph: Graph,
        energy: np.ndarray,
        forces: np.ndarray,
        stress: np.ndarray,
        features: torch.Tensor,
    ) -> None:
        """Raises NotFinite, with the index, for a result that is not finite."""
        parts = energy, np.split(forces, np.cumsum(graph.n_atoms)[:-1]), stress
        for index, *numbers in zip(indices, *parts, strict=True):
            if not all(np.isfinite(part).all() for part in numbers):
                raise NotFinite(
                    f"structure {index}: the potential gives an energy, force or stress that is not"
                    " finite"
                )
            self.energy[index], self.forces[index], self.stress[index] = numbers
        if self.error_model is not None and self.energy_error is not None:
            self.energy_error[indices] = self.error_model.predict(features, graph).energy_error
