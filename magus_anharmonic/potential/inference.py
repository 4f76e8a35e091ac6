"""Energy of a factorised M3GNet and its gradient by the edge basis, for evaluation only.

The same numbers as `FactorisedM3GNet.energy` with autograd. The main blocks are passes over all
edges: compiled where that is possible (`magus_anharmonic.potential.kernels`), else with torch
(`magus_anharmonic.potential.layers`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.kernels import layers_for
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
    ) -> None:
        self.module, self.graph = module, graph
        self.radial, self.threebody = radial.contiguous(), threebody.contiguous()
        self.units = int(module.model_args["units"])
        self.encoder = module.edge_encoder.mlp[0].linear.weight.T.contiguous()
        self.layers = [Layer.of(block) for block in module.graph_conv]
        self.passes = layers_for(graph, self.radial, self.threebody, self.units)
        self.gate_values: list[Tensor] = []
        self.workspace = workspace
        size = self.passes.n_kept(graph, self.units)
        self.memory = workspace.take(size * len(self.layers), radial)
        self.kept = [self.memory[size * index :] for index in range(len(self.layers))]

    def forward(self) -> Tensor:
        """Atom features (N, u) after the last block."""
        module = self.module
        atom = module.atom_embedding.mlp[0].linear.weight.T.index_select(0, self.graph.numbers)
        edge = self.passes.encode(self.encoder)
        for layer, kept in zip(self.layers, self.kept, strict=True):
            gates = layer.gates(atom)
            self.gate_values.append(gates)
            # Over a hundred nearly equal messages reach an atom: their sum in float32 would lose a
            # digit or two.
            result = atom.double()
            self.passes.forward(layer, kept, gates, layer.tables(atom), edge, result)
            atom = result.to(atom.dtype)
        return atom

    def backward(self, by_atom: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by e0 (E, 4) and by B (n_near, 16), from that by the last atom features (N,
        u)."""
        by_radial, by_threebody = torch.zeros_like(self.radial), torch.zeros_like(self.threebody)
        by_edge = self.radial.new_zeros(len(self.radial), self.units)
        for layer, kept, gates in zip(
            reversed(self.layers), reversed(self.kept), reversed(self.gate_values), strict=True
        ):
            found = self.passes.backward(
                layer, kept, gates, by_atom.contiguous(), by_edge, by_radial, by_threebody
            )
            by_atom = by_atom + layer.backward(gates, *found)
        self.passes.encode_backward(self.encoder, by_edge, by_radial)
        self.workspace.give(self.memory)
        return by_radial, by_threebody
