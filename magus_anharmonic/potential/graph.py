"""Neighbour lists, graphs of many structures at once, and lists that several calls share.

Neighbours of a batch of structures as arrays of edges, found by vesin (compiled).

Neighbours that configurations of one supercell share: found once, with a skin, instead of once per
configuration.

Let x0, h be positions and cell of a reference and v0_ij the vectors of its pairs. A configuration
x' with the cell h' = h F^T is described by the strain F and the rest u_i = x'_i - F x0_i, taken to
the nearest image. Its pairs are

    v_ij = F v0_ij + u_j - u_i,    |v_ij| >= s |v0_ij| - |u_i| - |u_j|,

with s the smallest singular value of F,

so that all pairs within the cutoff are among those of the reference with s |v0_ij| <= cutoff +
rho_i + rho_j as long as |u_i| <= rho_i for all atoms. Pairs of the list beyond the cutoff are
dropped, so the list changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from vesin import NeighborList

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.guards import (
    cell_volume,
    complete_cell,
    is_skewed,
    search_cell,
    why_no_structure,
)

MAX_ATOMIC_NUMBER = 94
COINCIDENT = 1e-3  # Angstrom
MIN_VOLUME = 0.05  # A^3 per atom, a tenth of hydrogen's at 10 TPa


@dataclass(frozen=True)
class Neighbours:
    """Edges of one structure: centre i, neighbour j, the vector from i to j (Angstrom) and its
    length; float64."""

    centre: np.ndarray
    neighbour: np.ndarray
    vector: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Graph:
    """Edges of n structures with N atoms and E edges together, as tensors.

    The first ``n_near`` edges are those within the three-body cutoff, so that they are a slice of
    every edge array. centre, neighbour, edge_structure : (E,); vector : (E, 3) from centre to
    neighbour, Angstrom; numbers, structure : (N,); volume : (n,) A^3, infinite where the structure
    has no cell; n_atoms : tuple of n.
    """

    centre: Tensor
    neighbour: Tensor
    vector: Tensor
    n_near: int
    edge_structure: Tensor
    numbers: Tensor
    structure: Tensor
    volume: Tensor
    n_atoms: tuple[int, ...]


def check(atoms: Atoms, where: str = "structure 0") -> None:
    """Raise InputError, naming ``where``, for a structure that no M3GNet model can evaluate."""
    if reason := why_no_structure(atoms, MIN_VOLUME):
        raise InputError(f"{where}: {reason}")
    wrong = atoms.numbers[(atoms.numbers < 1) | (atoms.numbers > MAX_ATOMIC_NUMBER)]
    if len(wrong):
        raise InputError(
            f"{where}: atomic number {wrong.min()} is outside 1 to {MAX_ATOMIC_NUMBER}, which"
            " MatterSim knows"
        )


def find_neighbours(
    atoms: Atoms, cutoff: float, where: str = "structure 0", *, coincident: float = COINCIDENT
) -> Neighbours:
    """All pairs closer than ``cutoff`` (Angstrom), every periodic image on its own; both
    directions, sorted by centre.

    Only the directions with ``pbc`` set are periodic. Raises InputError when two atoms are closer
    than ``coincident``, or the cell is too skewed to be searched.
    """
    finder = NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)
    centre, neighbour, vector, length = finder.compute(
        atoms.positions, search_cell(atoms, where), atoms.pbc, "ijDd"
    )
    if len(length) and length.min() < coincident:
        pair = int(length.argmin())
        raise InputError(
            f"{where}: atoms {centre[pair]} and {neighbour[pair]} coincide (distance"
            f" {length[pair]:.1e} A)"
        )
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
    """Join structures to one graph; ``neighbours`` saves finding them again. Raises InputError with
    the structure's index."""
    if neighbours is None:
        for index, atoms in enumerate(structures):
            check(atoms, f"structure {index}")
        neighbours = [
            find_neighbours(atoms, cutoff, f"structure {index}")
            for index, atoms in enumerate(structures)
        ]
    n_atoms = np.array([len(atoms) for atoms in structures], dtype=np.int64)
    n_edges = np.array([len(edges.length) for edges in neighbours], dtype=np.int64)
    first = np.repeat(np.cumsum(n_atoms) - n_atoms, n_edges)
    near = np.concatenate([edges.length for edges in neighbours]) <= threebody_cutoff
    order = np.argsort(~near, kind="stable")

    def edge_tensor(values: np.ndarray, kind: torch.dtype) -> Tensor:
        return torch.as_tensor(values[order], dtype=kind, device=device)

    return Graph(
        centre=edge_tensor(
            np.concatenate([edges.centre for edges in neighbours]) + first, torch.long
        ),
        neighbour=edge_tensor(
            np.concatenate([edges.neighbour for edges in neighbours]) + first, torch.long
        ),
        vector=edge_tensor(np.concatenate([edges.vector for edges in neighbours]), dtype),
        n_near=int(near.sum()),
        edge_structure=edge_tensor(np.repeat(np.arange(len(n_atoms)), n_edges), torch.long),
        **_atoms_of(structures, dtype, device),
    )


def _atoms_of(
    structures: Sequence[Atoms], dtype: torch.dtype, device: str | torch.device
) -> dict[str, Any]:
    """What a `Graph` knows of atoms and cells."""
    n_atoms = [len(atoms) for atoms in structures]
    numbers = np.concatenate([atoms.numbers for atoms in structures])
    volume = [cell_volume(atoms) for atoms in structures]
    return {
        "numbers": torch.as_tensor(numbers, dtype=torch.long, device=device),
        "structure": torch.as_tensor(np.repeat(np.arange(len(n_atoms)), n_atoms), device=device),
        "volume": torch.as_tensor(volume, dtype=dtype, device=device),
        "n_atoms": tuple(n_atoms),
    }


SKIN = 0.5
"""Angstrom; every atom may move at least half of this."""
MAX_REACH = 1.8
"""Of the cutoff: such a list is not even tried."""
MAX_GROWTH = 2.5
"""Pairs of the list by pairs within the cutoff; a longer list costs more than it saves."""


@dataclass(frozen=True)
class Topology:
    """Pairs of a reference (whose cell is complete), with room for displacements and strain.

    centre, neighbour (E,), vector (E, 3): the pairs, sorted by centre; n_inside: how many of them
    are within the cutoff in the reference, about as many as each configuration has.
    """

    reference: Atoms
    cutoff: float
    centre: Tensor
    neighbour: Tensor
    vector: Tensor
    n_inside: int

    def graph(
        self,
        structures: Sequence[Atoms],
        threebody_cutoff: float,
        dtype: torch.dtype,
        device: str | torch.device,
        names: Sequence[str] | None = None,
    ) -> Graph:
        """The graph of configurations that the list covers; InputError, with the name, when two
        atoms coincide."""
        names = names or [f"structure {index}" for index in range(len(structures))]
        strain, displacement = displacements(self.reference, structures)
        n_atoms = len(self.reference)
        centre, neighbour = self.centre.to(device), self.neighbour.to(device)
        moved = torch.as_tensor(displacement, device=device)
        vector = torch.matmul(self.vector.to(device), torch.as_tensor(strain, device=device).mT)
        vector = vector + moved.index_select(1, neighbour) - moved.index_select(1, centre)
        length = torch.linalg.norm(vector, dim=2)
        if length.numel() and length.min() < COINCIDENT:
            structure, pair = divmod(int(length.argmin()), length.shape[1])
            raise InputError(
                f"{names[structure]}: atoms {int(centre[pair])} and {int(neighbour[pair])} coincide"
                f" (distance {float(length.min()):.1e} A)"
            )
        near, inside = (length <= threebody_cutoff).view(-1), (length <= self.cutoff).view(-1)
        first, second = torch.nonzero(near).view(-1), torch.nonzero(inside & ~near).view(-1)
        chosen = torch.cat([first, second])
        which = torch.div(chosen, len(centre), rounding_mode="floor") if len(centre) else chosen
        pair = chosen - which * len(centre)
        return Graph(
            centre=centre.index_select(0, pair) + which * n_atoms,
            neighbour=neighbour.index_select(0, pair) + which * n_atoms,
            vector=vector.view(-1, 3).index_select(0, chosen).to(dtype),
            n_near=len(first),
            edge_structure=which,
            **_atoms_of(structures, dtype, device),
        )


def displacements(reference: Atoms, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Strain F (n, 3, 3) and rest u (n, N, 3) of the module's docstring, without the common shift
    of all atoms (Angstrom)."""
    origin, cell, pbc = reference.positions, complete_cell(reference).array, reference.pbc
    cells = np.array([complete_cell(atoms).array for atoms in structures])
    # rows of the cell are its vectors: h' = h F^T
    strain = (np.linalg.inv(cell) @ cells).transpose(0, 2, 1)
    rest = np.array([atoms.positions for atoms in structures]) - origin @ strain.transpose(0, 2, 1)
    # The shift is that of the first atom until all are in the nearest image; an atom at a border
    # would spoil their average.
    rest -= rest[:, :1]
    fractional = rest @ np.linalg.inv(cells)
    rest -= (np.rint(fractional) * pbc) @ cells
    return strain, rest - rest.mean(axis=1, keepdims=True)


def find_topology(structures: Sequence[Atoms], cutoff: float) -> Topology | None:
    """A list that covers all ``structures`` (same species and pbc); None where it would be longer
    than it is worth, or where rounding in a very skewed cell would count.

    The first structure is the reference, moved to the average of all.
    """
    first = structures[0]
    if is_skewed(complete_cell(first).array):
        return None
    strain, rest = displacements(first, structures)
    average = rest.mean(axis=0)
    reference = Atoms(
        first.numbers, positions=first.positions + average, cell=complete_cell(first), pbc=first.pbc
    )
    strain, rest = displacements(reference, structures)
    radius = np.maximum(np.linalg.norm(rest, axis=2).max(axis=0), SKIN / 2)
    stretch = min(float(np.linalg.svd(strain, compute_uv=False).min()), 1.0) * (1 - 1e-9)
    reach = (cutoff + 2 * radius.max()) / stretch
    if not reach <= MAX_REACH * cutoff:
        return None
    # Two atoms of the average structure may come close, which is nothing wrong.
    found = find_neighbours(reference, reach, coincident=0.0)
    kept = stretch * found.length <= cutoff + radius[found.centre] + radius[found.neighbour]
    n_inside = int((found.length <= cutoff).sum())
    if kept.sum() > MAX_GROWTH * n_inside:
        return None
    centre, neighbour, vector = (
        torch.as_tensor(values[kept]) for values in (found.centre, found.neighbour, found.vector)
    )
    return Topology(reference, cutoff, centre, neighbour, vector, n_inside)
