"""Energy of a factorised M3GNet and its gradient by the edge basis, in blocks of edges that stay in
the cache.

The same numbers as `FactorisedM3GNet.energy` with autograd, for evaluation only: the backward pass
is written out, so that of each edge only the sums before each nonlinearity are kept, the two
branches of every gated network share one matrix product, all temporary arrays have the size of a
block, and what is not a matrix product is left to compiled loops where they exist.
Symbols: v atom features (N, u), e edge features (E, u), e0 the edge basis (E, 4).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.kernels import add_rows, kernels_for

_silu_backward = torch.ops.aten.silu_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward

_Kept = tuple[Tensor, Tensor]

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Size of one array (edges, 2 u) of a block; a GPU works on all edges at once."""


class _EdgeNetwork:
    """Weights of a GatedMLP of [v_i, v_j, e_ij] and of the linear layer on e0 beside it, both
    branches joined."""

    def __init__(self, network: nn.Module, beside: nn.Linear, units: int) -> None:
        gate, sigma = network.g, network.sigma
        first = torch.cat([gate[0].linear.weight, sigma[0].linear.weight])
        self.own, self.other, bond = first.split(units, 1)
        self.bond = bond.contiguous()
        self.bias = torch.cat([gate[0].linear.bias, sigma[0].linear.bias])
        self.second = (gate[1].linear.weight, sigma[1].linear.weight)
        self.second_bias = (gate[1].linear.bias, sigma[1].linear.bias)
        self.beside, self.units = beside.weight.T.contiguous(), units

    def atom_tables(self, atom: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2 u) each: what v adds to the first layer as centre (with the bias), and as
        neighbour."""
        return torch.addmm(self.bias, atom, self.own.T), atom @ self.other.T

    def second_layer(self, hidden: Tensor, y: Tensor) -> None:
        """y (B, 2 u) from hidden (B, 2 u), branch by branch."""
        for part, weight, bias in zip(
            (slice(None, self.units), slice(self.units, None)),
            self.second,
            self.second_bias,
            strict=True,
        ):
            torch.addmm(bias, hidden[:, part], weight.T, out=y[:, part])

    def second_layer_backward(self, by_y: Tensor, by_hidden: Tensor) -> None:
        """The gradient by hidden from that by y."""
        for part, weight in zip(
            (slice(None, self.units), slice(self.units, None)), self.second, strict=True
        ):
            torch.mm(by_y[:, part], weight, out=by_hidden[:, part])


class _Layer:
    """Weights of one of the network's main blocks."""

    def __init__(self, block: nn.Module, units: int) -> None:
        three = block.three_body
        self.gate_weight, self.gate_bias = three.atom_mlp.linear.weight, three.atom_mlp.linear.bias
        self.three = torch.cat(
            [three.edge_gate_mlp.g[0].linear.weight, three.edge_gate_mlp.sigma[0].linear.weight]
        )
        self.edge = _EdgeNetwork(block.gated_mlp_edge, block.edge_layer_edge.linear, units)
        self.atom = _EdgeNetwork(block.gated_mlp_atom, block.edge_layer_atom.linear, units)

    def gates(self, atom: Tensor) -> Tensor:
        """(N, 16)"""
        return torch.addmm(self.gate_bias, atom, self.gate_weight.T).sigmoid_()


class Workspace:
    """Memory for what the backward pass needs, kept from call to call: to touch fresh pages costs
    as much as to fill them."""

    LIMIT = 1 << 30
    """Bytes; more is given back after the call."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int, like: Tensor) -> Tensor:
        """A flat tensor of at least ``size`` numbers. It is handed out once, so that two threads
        never share it."""
        try:
            memory = self._free.pop()
        except IndexError:
            return torch.empty(size, dtype=like.dtype, device=like.device)
        if memory.numel() < size or memory.dtype != like.dtype or memory.device != like.device:
            return torch.empty(size, dtype=like.dtype, device=like.device)
        return memory

    def give(self, memory: Tensor) -> None:
        """Hand it back."""
        if sum(kept.numel() * kept.element_size() for kept in [*self._free, memory]) <= self.LIMIT:
            self._free.append(memory)


class Inference:
    """One pass over a graph."""

    def __init__(
        self,
        module: nn.Module,
        graph: Graph,
        radial: Tensor,
        threebody: Tensor,
        workspace: Workspace,
    ) -> None:
        self.module, self.graph = module, graph
        self.radial, self.threebody = radial.contiguous(), threebody.contiguous()
        self.units = int(module.model_args["units"])
        self.layers = [_Layer(block, self.units) for block in module.graph_conv]
        rows = max(
            64,
            BLOCK_BYTES.get(radial.device.type, BLOCK_BYTES["cpu"])
            // (2 * self.units * radial.element_size()),
        )
        self.blocks = list(_blocks(graph.n_near, len(radial), rows))
        self.kernels = kernels_for(radial)
        self.scratch = [radial.new_empty(min(rows, len(radial)), 2 * self.units) for _ in range(2)]
        self.gate_values: list[Tensor] = []
        self.workspace = workspace
        self.memory = workspace.take(
            2 * self.units * (4 * len(radial) + graph.n_near) * len(self.layers), radial
        )
        self.kept = [self._carve(index) for index in range(len(self.layers))]

    def _carve(self, layer: int) -> dict[str, _Kept]:
        """The arrays of one layer as views of the workspace."""
        u, n_edges, n_near = self.units, len(self.radial), self.graph.n_near
        sizes = [2 * u * rows for rows in (n_edges, n_edges, n_edges, n_edges, n_near)]
        part = self.memory[layer * sum(sizes) : (layer + 1) * sum(sizes)]
        edge_before, edge_y, atom_before, atom_y, three = (
            view.view(-1, 2 * u) for view in part.split(sizes)
        )
        return {
            "edge": (edge_before, edge_y),
            "atom": (atom_before, atom_y),
            "three": (three, three),
        }

    def forward(self) -> Tensor:
        """Atom features (N, u) after the last block."""
        module = self.module
        atom = module.atom_embedding.mlp[0].linear.weight.T.index_select(0, self.graph.numbers)
        edge = silu(linear(self.radial, module.edge_encoder.mlp[0].linear.weight), inplace=True)
        for layer, kept in zip(self.layers, self.kept, strict=True):
            atom = self._forward_layer(layer, kept, atom, edge)
        return atom

    def _forward_layer(
        self, layer: _Layer, kept: dict[str, _Kept], atom: Tensor, edge: Tensor
    ) -> Tensor:
        """New atom features; the edge features change in place."""
        gates = layer.gates(atom)
        self.gate_values.append(gates)
        tables = {"edge": layer.edge.atom_tables(atom), "atom": layer.atom.atom_tables(atom)}
        # Over a hundred nearly equal messages reach an atom: their sum in float32 would lose a
        # digit or two.
        result = atom.double()
        for rows, near in self.blocks:
            e, basis, centre, neighbour = (
                edge[rows],
                self.radial[rows],
                self.graph.centre[rows],
                self.graph.neighbour[rows],
            )
            hidden = self.scratch[0][: len(e)]
            if near:
                y = kept["three"][0][rows]
                torch.mm(
                    gates.index_select(0, centre).mul_(self.threebody[rows]), layer.three.T, out=y
                )
                self.kernels.three_forward(y, e)
            for name, network in (("edge", layer.edge), ("atom", layer.atom)):
                before, y = (array[rows] for array in kept[name])
                torch.mm(e, network.bond.T, out=before)
                self.kernels.first_forward(centre, neighbour, *tables[name], before, hidden)
                network.second_layer(hidden, y)
                if name == "edge":
                    self.kernels.edge_forward(basis, network.beside, y, e)
                else:
                    self.kernels.atom_forward(basis, network.beside, y, centre, result)
        return result.to(atom.dtype)

    def backward(self, by_atom: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by e0 (E, 4) and by B (n_near, 16), from that by the last atom features (N,
        u)."""
        by_atom = by_atom.contiguous()
        by_radial, by_threebody = torch.zeros_like(self.radial), torch.zeros_like(self.threebody)
        by_edge = torch.zeros(
            len(self.radial), self.units, dtype=self.radial.dtype, device=self.radial.device
        )
        for layer, kept, gates in zip(
            reversed(self.layers), reversed(self.kept), reversed(self.gate_values), strict=True
        ):
            by_atom = self._backward_layer(
                layer, kept, gates, by_atom, by_edge, by_radial, by_threebody
            )
        encoder = self.module.edge_encoder.mlp[0].linear.weight
        for rows, _ in self.blocks:
            by_radial[rows] += (
                _silu_backward(by_edge[rows], linear(self.radial[rows], encoder)) @ encoder
            )
        self.workspace.give(self.memory)
        return by_radial, by_threebody

    def _backward_layer(
        self,
        layer: _Layer,
        kept: dict[str, _Kept],
        gates: Tensor,
        by_atom: Tensor,
        by_edge: Tensor,
        by_radial: Tensor,
        by_threebody: Tensor,
    ) -> Tensor:
        """Gradient by the atom features before the layer; those by edges, e0 and B change in
        place."""
        by_gates = torch.zeros_like(gates)
        shape = (len(gates), 2 * self.units)
        tables = {
            name: (gates.new_zeros(shape), gates.new_zeros(shape)) for name in ("atom", "edge")
        }
        for rows, near in self.blocks:
            basis, centre, neighbour = (
                self.radial[rows],
                self.graph.centre[rows],
                self.graph.neighbour[rows],
            )
            e, by_basis = by_edge[rows], by_radial[rows]
            by_y, by_hidden = (array[: len(e)] for array in self.scratch)
            for name, network in (("atom", layer.atom), ("edge", layer.edge)):
                before, y = (array[rows] for array in kept[name])
                if name == "edge":
                    self.kernels.edge_backward(basis, network.beside, y, e, None, by_y, by_basis)
                else:
                    self.kernels.atom_backward(
                        basis, network.beside, y, by_atom, centre, by_y, by_basis
                    )
                network.second_layer_backward(by_y, by_hidden)
                self.kernels.first_backward(centre, neighbour, before, by_hidden, *tables[name])
                e.addmm_(by_hidden, network.bond)
            if near:
                self.kernels.three_backward(kept["three"][0][rows], e, by_y)
                by_product = by_y @ layer.three
                by_threebody[rows].addcmul_(by_product, gates.index_select(0, centre))
                add_rows(by_gates, centre, by_product.mul_(self.threebody[rows]))
        by_atom = torch.addmm(by_atom, _sigmoid_backward(by_gates, gates), layer.gate_weight)
        for name, network in (("atom", layer.atom), ("edge", layer.edge)):
            by_atom.addmm_(tables[name][0], network.own).addmm_(tables[name][1], network.other)
        return by_atom


def _blocks(n_near: int, n_edges: int, rows: int) -> Iterator[tuple[slice, bool]]:
    """Slices of at most ``rows`` edges, and whether they lie within the three-body cutoff."""
    for first, last, near in ((0, n_near, True), (n_near, n_edges, False)):
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last)), near
