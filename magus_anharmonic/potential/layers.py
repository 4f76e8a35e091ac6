"""The main blocks of a factorised M3GNet over all edges, forward and backward, with torch.

For every device and precision, in blocks of edges; `magus_anharmonic.potential.kernels` does the
same compiled, for single precision on a CPU. The backward pass is written out, so that of each edge
only the sums before each nonlinearity are kept, and the two branches of every gated network share
one matrix product.

Symbols: v atom features (N, u), e edge features (E, u), e0 the edge basis (E, 4), B the three-body
sum (n_near, 16). A gated network of u units has a first layer, whose sums ``before`` (E, 2 u) hold
both branches side by side, and a second, whose sums ``y`` (E, 2 u) are again (inner | gate); its
output is silu(inner) * sigmoid(gate) * weight, with weight = e0 @ beside, or the silu of that for
the network of the atoms. What v adds to the first layers is in ``tables`` (4, N, 2 u): of the edge
and of the atom network, as centre (with the bias) and as neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from magus_anharmonic.potential.graph import Graph

_silu_backward = torch.ops.aten.silu_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Size of one array (edges, 2 u) of a block; a GPU works on all edges at once."""


class EdgeNetwork:
    """A GatedMLP of [v_i, v_j, e_ij] and the linear layer on e0 beside it, both branches joined.

    first (2 u, 3 u) with bias (2 u,); second (2, u, u) with second_bias (2, u); beside (4, u).
    """

    def __init__(
        self, first: Tensor, bias: Tensor, second: Tensor, second_bias: Tensor, beside: Tensor
    ) -> None:
        self.own, self.other, self.bond = first.split(len(first) // 2, 1)
        self.bias, self.second, self.second_bias = bias, second, second_bias
        self.beside = beside

    @classmethod
    def of(cls, network: nn.Module, beside: nn.Linear) -> EdgeNetwork:
        """From MatterSim's modules."""
        first, second = (
            [branch[i].linear for branch in (network.g, network.sigma)] for i in (0, 1)
        )
        return cls(
            torch.cat([one.weight for one in first]),
            torch.cat([one.bias for one in first]),
            torch.stack([one.weight for one in second]),
            torch.stack([one.bias for one in second]),
            beside.weight.T.contiguous(),
        )


class Layer:
    """Weights of one of the network's main blocks.

    gate_weight (16, u) and gate_bias (16,) make the gates of v; three (2 u, 16) takes gates * B.
    """

    def __init__(
        self,
        gate_weight: Tensor,
        gate_bias: Tensor,
        three: Tensor,
        edge: EdgeNetwork,
        atom: EdgeNetwork,
    ) -> None:
        self.gate_weight, self.gate_bias, self.three = gate_weight, gate_bias, three
        self.edge, self.atom = edge, atom
        self._tables = torch.stack([part for one in (edge, atom) for part in (one.own, one.other)])
        none = torch.zeros_like(edge.bias)
        self._bias = torch.stack([edge.bias, none, atom.bias, none])[:, None]

    @classmethod
    def of(cls, block: nn.Module) -> Layer:
        """From MatterSim's module."""
        three = block.three_body
        gate, network = three.atom_mlp.linear, three.edge_gate_mlp
        return cls(
            gate.weight,
            gate.bias,
            torch.cat([network.g[0].linear.weight, network.sigma[0].linear.weight]),
            EdgeNetwork.of(block.gated_mlp_edge, block.edge_layer_edge.linear),
            EdgeNetwork.of(block.gated_mlp_atom, block.edge_layer_atom.linear),
        )

    def gates(self, atom: Tensor) -> Tensor:
        """(N, 16)"""
        return torch.addmm(self.gate_bias, atom, self.gate_weight.T).sigmoid_()

    def tables(self, atom: Tensor) -> Tensor:
        """(4, N, 2 u)"""
        return torch.baddbmm(self._bias, atom.expand(4, -1, -1), self._tables.mT)

    def backward(self, gates: Tensor, by_gates: Tensor, by_tables: Tensor) -> Tensor:
        """What gradients by gates (N, 16) and tables (4, N, 2 u) add to that by v."""
        by_atom = torch.bmm(by_tables, self._tables).sum(0)
        return by_atom.addmm_(_sigmoid_backward(by_gates, gates), self.gate_weight)


class TorchLayers:
    """Passes through one layer after the other of a graph."""

    def __init__(self, graph: Graph, radial: Tensor, threebody: Tensor, units: int) -> None:
        self.graph, self.radial, self.threebody, self.units = graph, radial, threebody, units
        limit = BLOCK_BYTES.get(radial.device.type, BLOCK_BYTES["cpu"])
        rows = max(64, limit // (2 * units * radial.element_size()))
        self.blocks = list(blocks(graph.n_near, len(radial), rows))
        self.hidden, self.by_y = (
            radial.new_empty(min(rows, len(radial)), 2 * units) for _ in range(2)
        )

    @staticmethod
    def n_kept(graph: Graph, units: int) -> int:
        """Numbers that a layer keeps for its backward pass."""
        return 2 * units * (4 * len(graph.centre) + graph.n_near)

    def _views(self, kept: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """``before`` and ``y`` of the edge and the atom network; ``y`` of the three-body one."""
        width, n_edges, n_near = 2 * self.units, len(self.radial), self.graph.n_near
        sizes = [width * n_edges] * 4 + [width * n_near]
        *views, three = (view.view(-1, width) for view in kept[: sum(sizes)].split(sizes))
        return [(views[0], views[1]), (views[2], views[3])], three

    def encode(self, beside: Tensor, edge: Tensor) -> None:
        """edge_ (E, u) becomes the first edge features."""
        torch.mm(self.radial, beside, out=edge)
        silu(edge, inplace=True)

    def encode_backward(self, beside: Tensor, by_edge: Tensor, by_radial: Tensor) -> None:
        """by_radial_ grows by the gradient through the first edge features."""
        for rows, _ in self.blocks:
            by_raw = _silu_backward(by_edge[rows], self.radial[rows] @ beside)
            by_radial[rows].addmm_(by_raw, beside.T)

    def forward(
        self, layer: Layer, kept: Tensor, gates: Tensor, tables: Tensor, edge: Tensor, atom: Tensor
    ) -> None:
        """edge_ (E, u) becomes the new edge features; the messages are added to atom_ (N, u),
        float64."""
        networks, three = self._views(kept)
        for rows, near in self.blocks:
            e, basis, centre = edge[rows], self.radial[rows], self.graph.centre[rows]
            neighbour = self.graph.neighbour[rows]
            if near:
                product = gates.index_select(0, centre).mul_(self.threebody[rows])
                torch.mm(product, layer.three.T, out=three[rows])
                e += _gated(three[rows])
            for index, network in enumerate((layer.edge, layer.atom)):
                before, y = (array[rows] for array in networks[index])
                own, other = tables[2 * index], tables[2 * index + 1]
                torch.mm(e, network.bond.T, out=before)
                before += own.index_select(0, centre)
                before += other.index_select(0, neighbour)
                hidden = silu(before)
                for part, weight, bias in self._halves(network):
                    torch.addmm(bias, hidden[:, part], weight.T, out=y[:, part])
                weight = basis @ network.beside
                if index == 0:
                    e.addcmul_(weight, _gated(y))
                else:
                    message = silu(weight, inplace=True).mul_(_gated(y))
                    add_rows(atom, centre, message.to(atom.dtype))

    def _halves(self, network: EdgeNetwork) -> Iterator[tuple[slice, Tensor, Tensor]]:
        parts = slice(None, self.units), slice(self.units, None)
        return zip(parts, network.second, network.second_bias, strict=True)

    def backward(
        self,
        layer: Layer,
        kept: Tensor,
        gates: Tensor,
        by_atom: Tensor,
        by_edge: Tensor,
        by_radial: Tensor,
        by_threebody: Tensor,
        constant: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Gradients by gates and tables from that by v (N, u), None of a ``constant`` v; those by
        e, e0 and B (``by_edge_``, ``by_radial_``, ``by_threebody_``) change in place."""
        networks, three = self._views(kept)
        by_gates = torch.zeros_like(gates)
        by_tables = gates.new_zeros(4, len(gates), 2 * self.units)
        for rows, near in self.blocks:
            basis, centre = self.radial[rows], self.graph.centre[rows]
            neighbour = self.graph.neighbour[rows]
            e, by_basis = by_edge[rows], by_radial[rows]
            by_y, by_hidden = self.by_y[: len(e)], self.hidden[: len(e)]
            for index, network in ((1, layer.atom), (0, layer.edge)):
                before, y = (array[rows] for array in networks[index])
                raw = basis @ network.beside
                if index:
                    by_weight = _gated_backward(y, silu(raw), by_atom.index_select(0, centre), by_y)
                    by_weight = _silu_backward(by_weight, raw)
                else:
                    by_weight = _gated_backward(y, raw, e, by_y)
                by_basis.addmm_(by_weight, network.beside.T)
                for part, weight, _ in self._halves(network):
                    torch.mm(by_y[:, part], weight, out=by_hidden[:, part])
                _silu_backward.grad_input(by_hidden, before, grad_input=by_hidden)
                add_rows(by_tables[2 * index], centre, by_hidden)
                add_rows(by_tables[2 * index + 1], neighbour, by_hidden)
                e.addmm_(by_hidden, network.bond)
            if near:
                _gated_backward(three[rows], None, e, by_y)
                by_product = by_y @ layer.three
                by_threebody[rows].addcmul_(by_product, gates.index_select(0, centre))
                add_rows(by_gates, centre, by_product.mul_(self.threebody[rows]))
        return None if constant else (by_gates, by_tables)


def edge_network(network: nn.Module, atom: Tensor, edge: Tensor, graph: Graph) -> Tensor:
    """MatterSim's GatedMLP of [v_i, v_j, e_ij], differentiable; the first layer is split, so that
    the parts of v_i and v_j are per-atom products."""
    branches = []
    for branch in (network.g, network.sigma):
        first = branch[0].linear
        own, other, bond = first.weight.split(edge.shape[1], 1)
        hidden = linear(edge, bond, first.bias)
        hidden = (
            hidden
            + linear(atom, own).index_select(0, graph.centre)
            + linear(atom, other).index_select(0, graph.neighbour)
        )
        branches.append(branch[1:](silu(hidden)))
    return branches[0] * branches[1]


def _gated(y: Tensor) -> Tensor:
    inner, gate = y.chunk(2, 1)
    return silu(inner).mul_(gate.sigmoid())


def _gated_backward(y: Tensor, weight: Tensor | None, gradient: Tensor, by_y: Tensor) -> Tensor:
    """Gradient by the weight (B, u); by_y is filled."""
    inner, gate = y.chunk(2, 1)
    by_inner, by_gate = by_y.chunk(2, 1)
    sigma = gate.sigmoid()
    by_weight = gradient * silu(inner)
    weighted = gradient if weight is None else gradient * weight
    by_inner.copy_(_silu_backward(weighted * sigma, inner))
    by_gate.copy_(_sigmoid_backward(by_weight if weight is None else by_weight * weight, sigma))
    return by_weight.mul_(sigma)


def add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """``target[index] += rows``; with an expanded index scatter_add is faster than index_add on a
    CPU."""
    target.scatter_add_(0, index[:, None].expand_as(rows), rows)


def blocks(n_near: int, n_edges: int, rows: int) -> Iterator[tuple[slice, bool]]:
    """Slices of at most ``rows`` edges, and whether they lie within the three-body cutoff."""
    for first, last, near in ((0, n_near, True), (n_near, n_edges, False)):
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last)), near
