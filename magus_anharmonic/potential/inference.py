"""Energy of a factorised M3GNet and its gradient by the edge basis, in blocks of edges that stay in the cache.

The same numbers as `FactorisedM3GNet.energy` with autograd, for evaluation only: the backward pass is written out, so that of
each edge only what it needs is kept, the two branches of every gated network share one matrix product, and all temporary
arrays have the size of a block. Symbols: v atom features (N, u), e edge features (E, u), e0 the edge basis (E, 4).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import embedding_bag, linear, silu

from magus_anharmonic.potential.graph import Graph

_silu_backward = torch.ops.aten.silu_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward

_Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Size of one array (edges, 2 u) of a block; a GPU works on all edges at once."""


class _EdgeNetwork:
    """Weights of a GatedMLP of [v_i, v_j, e_ij] and of the linear layer on e0 beside it, both branches joined."""

    def __init__(self, network: nn.Module, beside: nn.Linear, beside_silu: bool, units: int) -> None:
        gate, sigma = network.g, network.sigma
        first = torch.cat([gate[0].linear.weight, sigma[0].linear.weight])
        self.own, self.other, self.bond = first.split(units, 1)
        self.bias = torch.cat([gate[0].linear.bias, sigma[0].linear.bias])
        self.second = (gate[1].linear.weight, sigma[1].linear.weight)
        self.second_bias = (gate[1].linear.bias, sigma[1].linear.bias)
        self.beside, self.beside_silu, self.units = beside.weight, beside_silu, units

    def atom_table(self, atom: torch.Tensor) -> torch.Tensor:
        """(2 N, 2 u): what v adds to the first layer as centre (with the bias), then as neighbour."""
        return torch.cat([torch.addmm(self.bias, atom, self.own.T), atom @ self.other.T])

    def forward(self, table: torch.Tensor, pairs: torch.Tensor, edge: torch.Tensor, basis: torch.Tensor, kept: _Kept) -> torch.Tensor:
        """Output (B, u); ``kept`` is filled with what `backward` needs."""
        before, inner, gate = kept
        u = self.units
        torch.addmm(embedding_bag(pairs, table, mode="sum"), edge, self.bond.T, out=before)
        hidden = silu(before)
        torch.addmm(self.second_bias[0], hidden[:, :u], self.second[0].T, out=inner)
        torch.addmm(self.second_bias[1], hidden[:, u:], self.second[1].T, out=gate)
        weight = linear(basis, self.beside)
        if self.beside_silu:
            weight = silu(weight, inplace=True)
        return weight.mul_(gate.sigmoid_()).mul_(silu(inner))

    def backward(self, gradient: torch.Tensor, basis: torch.Tensor, kept: _Kept) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients by the first layer's sum (B, 2 u) and by e0 (B, 4), from the gradient by the output (B, u)."""
        before, inner, gate = kept
        u = self.units
        raw = linear(basis, self.beside)
        weight = silu(raw) if self.beside_silu else raw
        active = silu(inner)
        by_weight = gradient * active
        by_gate = by_weight * weight
        by_weight.mul_(gate)
        if self.beside_silu:
            by_weight = _silu_backward(by_weight, raw)
        by_inner = _silu_backward((gradient * gate).mul_(weight), inner)
        by_gate = _sigmoid_backward(by_gate, gate)
        by_hidden = torch.empty_like(before)
        torch.mm(by_inner, self.second[0], out=by_hidden[:, :u])
        torch.mm(by_gate, self.second[1], out=by_hidden[:, u:])
        return _silu_backward(by_hidden, before), by_weight @ self.beside


class _Layer:
    """Weights of one of the network's main blocks."""

    def __init__(self, block: nn.Module, units: int) -> None:
        three = block.three_body
        self.gate_weight, self.gate_bias = three.atom_mlp.linear.weight, three.atom_mlp.linear.bias
        self.three = torch.cat([three.edge_gate_mlp.g[0].linear.weight, three.edge_gate_mlp.sigma[0].linear.weight])
        self.edge = _EdgeNetwork(block.gated_mlp_edge, block.edge_layer_edge.linear, False, units)
        self.atom = _EdgeNetwork(block.gated_mlp_atom, block.edge_layer_atom.linear, True, units)

    def gates(self, atom: torch.Tensor) -> torch.Tensor:
        """(N, 16)"""
        return torch.addmm(self.gate_bias, atom, self.gate_weight.T).sigmoid_()


class Workspace:
    """Memory for what the backward pass needs, kept from call to call: to touch fresh pages costs as much as to fill them."""

    LIMIT = 1 << 30
    """Bytes; more is given back after the call."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """A flat tensor of ``size`` numbers. It is handed out once, so that two threads never share it."""
        memory, self._memory = self._memory, None
        if memory is None or memory.numel() < size or memory.dtype != like.dtype or memory.device != like.device:
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
        return memory

    def give(self, memory: torch.Tensor) -> None:
        """Hand it back."""
        if memory.numel() * memory.element_size() <= self.LIMIT:
            self._memory = memory


class Inference:
    """One pass over a graph."""

    def __init__(self, module: nn.Module, graph: Graph, radial: torch.Tensor, threebody: torch.Tensor, workspace: Workspace) -> None:
        self.module, self.graph, self.radial, self.threebody = module, graph, radial, threebody
        self.units = int(module.model_args["units"])
        self.layers = [_Layer(block, self.units) for block in module.graph_conv]
        rows = max(64, BLOCK_BYTES.get(radial.device.type, BLOCK_BYTES["cpu"]) // (2 * self.units * radial.element_size()))
        self.blocks = list(_blocks(graph.n_near, len(radial), rows))
        self.pairs = torch.stack([graph.centre, graph.neighbour + len(graph.numbers)], 1)
        self.gate_values: list[torch.Tensor] = []
        self.workspace = workspace
        self.memory = workspace.take(2 * self.units * (4 * len(radial) + graph.n_near) * len(self.layers), radial)
        self.kept = [self._carve(index) for index in range(len(self.layers))]

    def _carve(self, layer: int) -> dict[str, _Kept]:
        """The arrays of one layer as views of the workspace."""
        u, n_edges, n_near = self.units, len(self.radial), self.graph.n_near
        shapes = [(n_edges, 2 * u), (n_edges, u), (n_edges, u)] * 2 + [(n_near, u), (n_near, u)]
        sizes = [rows * columns for rows, columns in shapes]
        part = self.memory[layer * sum(sizes) : (layer + 1) * sum(sizes)]
        arrays = [view.view(shape) for view, shape in zip(part.split(sizes), shapes, strict=True)]
        return {"edge": tuple(arrays[:3]), "atom": tuple(arrays[3:6]), "three": tuple(arrays[6:])}

    def forward(self) -> torch.Tensor:
        """Atom features (N, u) after the last block."""
        module = self.module
        atom = module.atom_embedding.mlp[0].linear.weight.T.index_select(0, self.graph.numbers)
        edge = silu(linear(self.radial, module.edge_encoder.mlp[0].linear.weight), inplace=True)
        for layer, kept in zip(self.layers, self.kept, strict=True):
            atom = self._forward_layer(layer, kept, atom, edge)
        return atom

    def _forward_layer(self, layer: _Layer, kept: dict[str, _Kept], atom: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
        """New atom features; the edge features change in place."""
        gates = layer.gates(atom)
        self.gate_values.append(gates)
        edge_table, atom_table = layer.edge.atom_table(atom), layer.atom.atom_table(atom)
        # Over a hundred nearly equal messages reach an atom: their sum in float32 would lose a digit or two.
        result = atom.double()
        for rows, near in self.blocks:
            e, basis, pairs, centre = edge[rows], self.radial[rows], self.pairs[rows], self.graph.centre[rows]
            if near:
                inner, sigma = (array[rows] for array in kept["three"])
                product = gates.index_select(0, centre).mul_(self.threebody[rows])
                torch.mm(product, layer.three[: self.units].T, out=inner)
                torch.mm(product, layer.three[self.units :].T, out=sigma)
                e.addcmul_(silu(inner), sigma.sigmoid_())
            e += layer.edge.forward(edge_table, pairs, e, basis, _rows(kept["edge"], rows))
            message = layer.atom.forward(atom_table, pairs, e, basis, _rows(kept["atom"], rows))
            _add_rows(result, centre, message.double())
        return result.to(atom.dtype)

    def backward(self, by_atom: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients by e0 (E, 4) and by B (n_near, 16), from that by the last atom features (N, u)."""
        by_radial, by_threebody = torch.zeros_like(self.radial), torch.zeros_like(self.threebody)
        by_edge = torch.zeros(len(self.radial), self.units, dtype=self.radial.dtype, device=self.radial.device)
        for layer, kept, gates in zip(reversed(self.layers), reversed(self.kept), reversed(self.gate_values), strict=True):
            by_atom = self._backward_layer(layer, kept, gates, by_atom, by_edge, by_radial, by_threebody)
        encoder = self.module.edge_encoder.mlp[0].linear.weight
        for rows, _ in self.blocks:
            by_radial[rows] += _silu_backward(by_edge[rows], linear(self.radial[rows], encoder)) @ encoder
        self.workspace.give(self.memory)
        return by_radial, by_threebody

    def _backward_layer(
        self,
        layer: _Layer,
        kept: dict[str, _Kept],
        gates: torch.Tensor,
        by_atom: torch.Tensor,
        by_edge: torch.Tensor,
        by_radial: torch.Tensor,
        by_threebody: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient by the atom features before the layer; those by edges, e0 and B change in place."""
        by_gates = torch.zeros_like(gates)
        shape = (len(gates), 2 * self.units)
        tables = {name: (gates.new_zeros(shape), gates.new_zeros(shape)) for name in ("atom", "edge")}
        for rows, near in self.blocks:
            basis, centre, neighbour = self.radial[rows], self.graph.centre[rows], self.graph.neighbour[rows]
            e = by_edge[rows]
            for name, network, gradient in (("atom", layer.atom, by_atom.index_select(0, centre)), ("edge", layer.edge, e)):
                by_first, by_basis = network.backward(gradient, basis, _rows(kept[name], rows))
                by_radial[rows] += by_basis
                e.addmm_(by_first, network.bond)
                _add_rows(tables[name][0], centre, by_first)
                _add_rows(tables[name][1], neighbour, by_first)
            if near:
                inner, sigma = (array[rows] for array in kept["three"])
                by_inner = _silu_backward(e * sigma, inner)
                by_sigma = _sigmoid_backward(silu(inner).mul_(e), sigma)
                by_product = torch.addmm(by_inner @ layer.three[: self.units], by_sigma, layer.three[self.units :])
                by_threebody[rows].addcmul_(by_product, gates.index_select(0, centre))
                _add_rows(by_gates, centre, by_product.mul_(self.threebody[rows]))
        by_atom = torch.addmm(by_atom, _sigmoid_backward(by_gates, gates), layer.gate_weight)
        for name, network in (("atom", layer.atom), ("edge", layer.edge)):
            by_atom.addmm_(tables[name][0], network.own).addmm_(tables[name][1], network.other)
        return by_atom


def _rows(kept: _Kept, rows: slice) -> _Kept:
    return kept[0][rows], kept[1][rows], kept[2][rows]


def _add_rows(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """``target[index] += rows``; with an expanded index scatter_add is faster than index_add on a CPU."""
    target.scatter_add_(0, index[:, None].expand_as(rows), rows)


def _blocks(n_near: int, n_edges: int, rows: int) -> Iterator[tuple[slice, bool]]:
    """Slices of at most ``rows`` edges, and whether they lie within the three-body cutoff."""
    for first, last, near in ((0, n_near, True), (n_near, n_edges, False)):
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last)), near
