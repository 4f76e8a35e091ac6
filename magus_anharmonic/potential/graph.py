"""Neighbours of a batch of structures as arrays of edges, found by vesin (compiled)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from vesin import NeighborList

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.cells import cell_volume, complete_cell, search_cell

MAX_ATOMIC_NUMBER = 94
COINCIDENT = 1e-3  # Angstrom
MIN_VOLUME = 0.05  # A^3 per atom, a tenth of hydrogen's at 10 TPa


@dataclass(frozen=True)
class Neighbours:
    """Edges of one structure: centre i, neighbour j, the vector from i to j (Angstrom) and its length; float64."""

    centre: np.ndarray
    neighbour: np.ndarray
    vector: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Graph:
    """Edges of n structures with N atoms and E edges together, as tensors.

    The first ``n_near`` edges are those within the three-body cutoff, so that they are a slice of every edge array.
    centre, neighbour, edge_structure : (E,); vector : (E, 3) from centre to neighbour, Angstrom; numbers, structure : (N,);
    volume : (n,) A^3, infinite where the structure has no cell; n_atoms : tuple of n.
    """

    centre: torch.Tensor
    neighbour: torch.Tensor
    vector: torch.Tensor
    n_near: int
    edge_structure: torch.Tensor
    numbers: torch.Tensor
    structure: torch.Tensor
    volume: torch.Tensor
    n_atoms: tuple[int, ...]


def check(atoms: Atoms, where: str = "structure 0") -> None:
    """Raise InputError, naming ``where``, for a structure that no M3GNet model can evaluate."""
    if len(atoms) == 0:
        raise InputError(f"{where} has no atoms")
    wrong = sorted(set(atoms.numbers[(atoms.numbers < 1) | (atoms.numbers > MAX_ATOMIC_NUMBER)].tolist()))
    if wrong:
        raise InputError(f"{where}: atomic number {wrong[0]} is outside 1 to {MAX_ATOMIC_NUMBER}, which MatterSim knows")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise InputError(f"{where}: positions or cell are not finite")
    if any(atoms.pbc) and abs(complete_cell(atoms).volume) < 1e-3:
        raise InputError(f"{where}: the cell is flat (volume {complete_cell(atoms).volume:.1e} A^3) but periodic")
    if atoms.pbc.all() and atoms.cell.volume < MIN_VOLUME * len(atoms):
        raise InputError(f"{where}: {atoms.cell.volume / len(atoms):.1e} A^3 per atom; below {MIN_VOLUME} no matter is like that")


def expected_pairs(atoms: Atoms, cutoff: float) -> float:
    """About how many pairs are closer than ``cutoff`` (Angstrom), from the density; all of them without periodicity."""
    n_atoms = len(atoms)
    if not atoms.pbc.all():
        return float(n_atoms**2)
    return n_atoms**2 * 4.0 / 3.0 * np.pi * cutoff**3 / abs(atoms.cell.volume)


def find_neighbours(atoms: Atoms, cutoff: float, where: str = "structure 0", *, coincident: float = COINCIDENT) -> Neighbours:
    """All pairs closer than ``cutoff`` (Angstrom), every periodic image on its own; both directions, sorted by centre.

    Only the directions with ``pbc`` set are periodic. Raises InputError when two atoms are closer than ``coincident``, or the cell is
    too skewed to be searched.
    """
    finder = NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)
    centre, neighbour, vector, length = finder.compute(atoms.positions, search_cell(atoms, where), atoms.pbc, "ijDd")
    if len(length) and length.min() < coincident:
        pair = int(length.argmin())
        raise InputError(f"{where}: atoms {centre[pair]} and {neighbour[pair]} coincide (distance {length[pair]:.1e} A)")
    return Neighbours(centre.astype(np.int64), neighbour.astype(np.int64), vector, length)


def build_graph(
    structures: Sequence[Atoms],
    cutoff: float = 5.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    threebody_cutoff: float = 4.0,
    neighbours: Sequence[Neighbours] | None = None,
) -> Graph:
    """Join structures to one graph; ``neighbours`` saves finding them again. Raises InputError with the structure's index."""
    if neighbours is None:
        for index, atoms in enumerate(structures):
            check(atoms, f"structure {index}")
        neighbours = [find_neighbours(atoms, cutoff, f"structure {index}") for index, atoms in enumerate(structures)]
    n_atoms = np.array([len(atoms) for atoms in structures], dtype=np.int64)
    n_edges = np.array([len(edges.length) for edges in neighbours], dtype=np.int64)
    first = np.repeat(np.cumsum(n_atoms) - n_atoms, n_edges)
    near = _concatenate([edges.length for edges in neighbours], (0,)) <= threebody_cutoff
    order = np.argsort(~near, kind="stable")

    def edge_tensor(values: np.ndarray, kind: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values[order], dtype=kind, device=device)

    volume = [cell_volume(atoms) for atoms in structures]
    return Graph(
        centre=edge_tensor(_concatenate([edges.centre for edges in neighbours], (0,)) + first, torch.long),
        neighbour=edge_tensor(_concatenate([edges.neighbour for edges in neighbours], (0,)) + first, torch.long),
        vector=edge_tensor(_concatenate([edges.vector for edges in neighbours], (0, 3)), dtype),
        n_near=int(near.sum()),
        edge_structure=edge_tensor(np.repeat(np.arange(len(n_atoms)), n_edges), torch.long),
        numbers=torch.as_tensor(np.concatenate([atoms.numbers for atoms in structures]), dtype=torch.long, device=device),
        structure=torch.as_tensor(np.repeat(np.arange(len(n_atoms)), n_atoms), dtype=torch.long, device=device),
        volume=torch.as_tensor(volume, dtype=dtype, device=device),
        n_atoms=tuple(n_atoms.tolist()),
    )


def _concatenate(parts: list[np.ndarray], empty_shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(empty_shape)
