"""The first block's edges beyond the three-body cutoff, interpolated.

There the first block knows nothing but two species and a length: edge features and message are
smooth functions of r for each pair of species, of which compiled code (``far_edges.c``) takes
polynomials of degree 5 in intervals of r. They are made in float64 for the species of a graph, with
intervals halved until the interpolation is as good as float64 is used for: `TOLERANCE`, far below
the rounding of the networks themselves.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.kernels import (
    address,
    largest_difference,
    library,
    pointed,
    pointers,
    structure,
)
from magus_anharmonic.potential.layers import edge_network

logger = logging.getLogger(__name__)

POWERS = 6
INTERVALS = (8, 16, 32, 64)
TOLERANCE = 1e-9
"""Of the largest value, between the nodes; of the slopes it leaves about 1e-6 per Angstrom."""
MOST_SPECIES = 6
"""More have too many pairs for the cache."""
_AGREEMENT = 1e-5

_Far = structure(
    "far",
    **dict.fromkeys(("units", "n_edges", "intervals", "species"), ctypes.c_long),
    **dict.fromkeys(("start", "width"), ctypes.c_double),
    **pointers("centre neighbour kind vector table"),
)


@dataclass(frozen=True)
class Table:
    """coefficients (S^2, intervals, POWERS, 2 u) for lengths from ``start`` in steps of ``width``;
    kind (95,): place of an atomic number among the S species."""

    species: frozenset[int]
    start: float
    width: float
    kind: Tensor
    coefficients: Tensor


class FarEdges:
    """The table of a model, for the species of the last graphs; made anew when weights change."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._made: tuple[Tensor, Table | None] | None = None

    def of(self, graph: Graph) -> Table | None:
        """None where there is nothing to interpolate, or not well enough."""
        species = frozenset(torch.unique(graph.numbers).tolist())
        if len(graph.centre) == graph.n_near or len(species) > MOST_SPECIES:
            return None
        weights, made = self._weights(), self._made
        known: frozenset[int] = frozenset()
        if made is not None and torch.equal(made[0], weights):
            if made[1] is None or species <= made[1].species:
                return made[1]
            known = made[1].species
        wanted = species | known if len(species | known) <= MOST_SPECIES else species
        table = make(self._module, sorted(wanted))
        if table is not None and (wrong := disagreement(self._module, table)) > _AGREEMENT:
            logger.warning(
                "interpolated edges differ from the model by %.1e and are not used (compiler of"
                " this machine?)",
                wrong,
            )
            table = None
        self._made = weights, table
        return table

    def _weights(self) -> Tensor:
        """All that a table depends on."""
        module = self._module
        parts = module.atom_embedding, module.edge_encoder, module.graph_conv[0], module.rbf
        state = (value for part in parts for value in part.state_dict().values())
        return torch.cat([value.reshape(-1).float() for value in state])


def first_block(module: nn.Module, centre: Tensor, neighbour: Tensor, length: Tensor) -> Tensor:
    """Edge features and message (E, 2 u) of edges beyond the three-body cutoff between atoms of
    these numbers."""
    radial = module.rbf(length)
    edge = module.edge_encoder.mlp(radial)
    atom = module.atom_embedding.mlp[0].linear.weight.T
    pair = SimpleNamespace(centre=centre, neighbour=neighbour)
    block = module.graph_conv[0]
    edge = edge + edge_network(block.gated_mlp_edge, atom, edge, pair) * block.edge_layer_edge(
        radial
    )
    message = edge_network(block.gated_mlp_atom, atom, edge, pair) * block.edge_layer_atom(radial)
    return torch.cat([edge, message], 1)


def make(module: nn.Module, species: list[int]) -> Table | None:
    """None where even the shortest intervals leave more than `TOLERANCE`."""
    arguments = module.model_args
    start, end = float(arguments["threebody_cutoff"]), float(arguments["cutoff"])
    double, numbers = copy.deepcopy(module).double(), torch.tensor(species)
    pairs = torch.cartesian_prod(numbers, numbers).view(-1, 2)

    def values(x: Tensor, count: int) -> Tensor:
        """(pairs, intervals, len(x), 2 u) at places -1 to 1 of each interval."""
        width = (end - start) / count
        length = start + width * (torch.arange(count)[:, None] + 0.5 * (x + 1)).reshape(-1)
        centre, neighbour = (column.repeat_interleave(len(length)) for column in pairs.unbind(1))
        found = first_block(double, centre, neighbour, length.repeat(len(pairs)))
        return found.view(len(pairs), count, len(x), -1)

    nodes = torch.as_tensor(np.cos(np.pi * (np.arange(POWERS) + 0.5) / POWERS))
    between = torch.cat(
        [nodes.new_tensor([-1.0, 1.0]), *((a + b).view(1) / 2 for a, b in pairwise(nodes))]
    )
    fit, check = (torch.stack([x**p for p in range(POWERS)], 1) for x in (nodes, between))
    with torch.no_grad():
        for count in INTERVALS:
            coefficients = torch.linalg.inv(fit) @ values(nodes, count)
            exact = values(between, count)
            if (check @ coefficients - exact).abs().max() <= TOLERANCE * exact.abs().max():
                break
        else:
            return None
    kind = torch.zeros(95, dtype=torch.long)
    kind[numbers] = torch.arange(len(numbers))
    return Table(
        frozenset(species), start, (end - start) / count, kind, coefficients.float().contiguous()
    )


def _n_intervals(table: Table) -> int:
    return int(table.coefficients.shape[1])


class Interpolation:
    """The far edges of a graph."""

    def __init__(self, table: Table, graph: Graph, units: int) -> None:
        near = graph.n_near
        self._arrays = [
            graph.centre[near:], graph.neighbour[near:], table.kind[graph.numbers],
            graph.vector[near:], table.coefficients,
        ]  # fmt: skip
        self.n_edges = len(graph.centre) - near
        self._struct = _Far(
            units, self.n_edges, _n_intervals(table), len(table.species), table.start, table.width,
            *map(address, self._arrays),
        )  # fmt: skip
        self._native = library()

    def _call(self, name: str, *arrays: Tensor) -> None:
        getattr(self._native, name)(ctypes.byref(self._struct), *pointed(*arrays))

    def forward(self, edge: Tensor, atom: Tensor) -> None:
        """edge_ (E, u) is filled; the messages are added to atom_ (N, u), float64."""
        self._call("far_forward", edge, atom)

    def backward(self, by_edge: Tensor, by_atom: Tensor) -> Tensor:
        """Gradient by the lengths (E,), float64."""
        by_length = torch.empty(self.n_edges, dtype=torch.float64)
        self._call("far_backward", by_edge, by_atom, by_length)
        return by_length


def disagreement(module: nn.Module, table: Table, per_pair: int = 23) -> float:
    """Largest difference between what the compiled functions take from ``table`` and the module in
    float64, relative to the largest number of an array; NaN counts as infinite."""
    double, generator = copy.deepcopy(module).double(), torch.Generator().manual_seed(0)
    numbers = torch.tensor(sorted(table.species))
    pairs = torch.cartesian_prod(numbers, numbers).view(-1, 2).repeat_interleave(per_pair, 0)
    places, far = torch.rand(len(pairs), generator=generator), table.width * _n_intervals(table)
    length = (table.start + far * places).double().requires_grad_(True)
    with torch.enable_grad():
        values = first_block(double, *pairs.unbind(1), length)
        by = torch.randn(values.shape, generator=generator)
        (slopes,) = torch.autograd.grad((values * by).sum(), length)
    units = values.shape[1] // 2
    # every edge has two atoms of its own
    nothing = torch.empty(0, dtype=torch.long)
    vector = length.detach().float()[:, None] * torch.tensor([1.0, 0.0, 0.0])
    centre = 2 * torch.arange(len(pairs))
    graph = Graph(
        centre, centre + 1, vector, 0, nothing, pairs.reshape(-1), nothing, torch.ones(1),
        (2 * len(pairs),),
    )  # fmt: skip
    compiled = Interpolation(table, graph, units)
    edge, atom = (torch.empty(len(pairs), units), torch.zeros(2 * len(pairs), units).double())
    compiled.forward(edge, atom)
    by_edge, by_atom = by[:, :units].contiguous(), torch.zeros(2 * len(pairs), units)
    by_atom[centre] = by[:, units:]
    ours = edge, atom[centre], compiled.backward(by_edge, by_atom)
    values = values.detach()
    theirs = values[:, :units], values[:, units:], slopes
    return largest_difference(ours, theirs)
