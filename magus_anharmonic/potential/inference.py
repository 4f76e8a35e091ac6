"""Energy of a factorised M3GNet and its gradient by the edge basis, for evaluation only.

The same numbers as `FactorisedM3GNet.energy` with autograd. The main blocks are passes over all
edges: compiled where that is possible (`magus_anharmonic.potential.kernels`), else with torch
(`magus_anharmonic.potential.layers`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from magus_anharmonic.potential.far_edges import FarEdges, Interpolation
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.kernels import NativeLayers, layers_for
from magus_anharmonic.potential.layers import Layer


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
        far: FarEdges,
    ) -> None:
        self.module, self.graph = module, graph
        self.radial, self.threebody = radial.contiguous(), threebody.contiguous()
        self.units = int(module.model_args["units"])
        self.encoder = module.edge_encoder.mlp[0].linear.weight.T.contiguous()
        self.layers = [Layer.of(block) for block in module.graph_conv]
        passes = layers_for(graph, self.radial, self.threebody, self.units)
        self.passes, graphs = [passes] * len(self.layers), [graph] * len(self.layers)
        table = far.of(graph) if isinstance(passes, NativeLayers) else None
        self.far = None if table is None else Interpolation(table, graph, self.units)
        if self.far is not None:
            near, n_near = graph, graph.n_near
            names = ("centre", "neighbour", "vector", "edge_structure")
            near = replace(graph, **{name: getattr(graph, name)[:n_near] for name in names})
            self.passes[0] = layers_for(near, self.radial[:n_near], self.threebody, self.units)
            graphs[0] = near
        self.gate_values: list[Tensor] = []
        self.workspace = workspace
        sizes = [passes.n_kept(one, self.units) for one in graphs]
        self.memory = workspace.take(sum(sizes), radial)
        self.kept = self.memory[: sum(sizes)].split(sizes)

    def forward(self) -> Tensor:
        """Atom features (N, u) after the last block."""
        module = self.module
        atom = module.atom_embedding.mlp[0].linear.weight.T.index_select(0, self.graph.numbers)
        edge = self.radial.new_empty(len(self.radial), self.units)
        self.passes[0].encode(self.encoder, edge)
        for layer, passes, kept in zip(self.layers, self.passes, self.kept, strict=True):
            gates = layer.gates(atom)
            self.gate_values.append(gates)
            # Over a hundred nearly equal messages reach an atom: their sum in float32 would lose a
            # digit or two.
            result = atom.double()
            passes.forward(layer, kept, gates, layer.tables(atom), edge, result)
            if self.far is not None and layer is self.layers[0]:
                self.far.forward(edge[self.graph.n_near :], result)
            atom = result.to(atom.dtype)
        return atom

    def backward(self, by_atom: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients by e0 (E, 4), by B (n_near, 16) and by the lengths of the far edges where they
        are interpolated, from that by the last atom features (N, u)."""
        by_radial, by_threebody = torch.zeros_like(self.radial), torch.zeros_like(self.threebody)
        by_edge = self.radial.new_zeros(len(self.radial), self.units)
        for index in reversed(range(len(self.layers))):
            layer, gates = self.layers[index], self.gate_values[index]
            by_atom = by_atom.contiguous()
            # the first atom features are constants
            found = self.passes[index].backward(
                layer, self.kept[index], gates, by_atom, by_edge, by_radial, by_threebody,
                constant=index == 0,
            )  # fmt: skip
            if found is not None:
                by_atom = by_atom + layer.backward(gates, *found)
        self.passes[0].encode_backward(self.encoder, by_edge, by_radial)
        self.workspace.give(self.memory)
        if self.far is None:
            return by_radial, by_threebody, None
        by_length = self.far.backward(by_edge[self.graph.n_near :], by_atom)
        return by_radial, by_threebody, by_length
