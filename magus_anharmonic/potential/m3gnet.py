"""MatterSim's M3GNet without explicit triplets: the same weights, the same energies.

The three-body sum factorises (`magus_anharmonic.potential.edge_basis`), and of the first layer of
an edge network the parts of v_i and v_j are products per atom. `FactorisedM3GNet.energy` is plain
torch and can be differentiated as often as needed; `FactorisedM3GNet.evaluate` is for evaluation
only: the same energy and its gradient by the edge basis, with main blocks that are passes over all
edges, compiled where that is possible (`magus_anharmonic.potential.kernels`), else with torch
(`magus_anharmonic.potential.layers`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from magus_anharmonic.potential.edge_basis import (
    TorchBasis,
    basis_for,
    edge_basis,
    forces_and_virial,
)
from magus_anharmonic.potential.far_edges import FarEdges, Interpolation
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.kernels import NativeLayers, layers_for
from magus_anharmonic.potential.layers import Layer, edge_network


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


def _gated(network: nn.Module, values: Tensor) -> Tensor:
    """A GatedMLP: the product of its two branches."""
    return network.g(values) * network.sigma(values)


class FactorisedM3GNet(nn.Module):
    """Energies, forces and stresses from the parameters of MatterSim's ``M3Gnet`` module, which it
    shares."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        arguments = module.model_args
        self.units: int = arguments["units"]
        self.cutoff: float = float(arguments["cutoff"])
        self.threebody_cutoff: float = float(arguments["threebody_cutoff"])
        self._workspace, self._far = Workspace(), FarEdges(module)

    def forward(self, graph: Graph, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Energy (n,) eV in float64, forces (N, 3) eV/A, stress (n, 3, 3) eV/A^3 in ASE's sign.

        With ``create_graph`` the results can be differentiated again, by the parameters.
        """
        if not create_graph:
            return self.evaluate(graph)[:3]
        vector = graph.vector.detach().requires_grad_(True)
        energy = self.energy(graph, vector)
        (gradient,) = torch.autograd.grad(energy.sum(), vector, create_graph=True)
        forces, virial = forces_and_virial(graph, gradient)
        return energy, forces, virial / graph.volume[:, None, None]

    def atom_features(self, graph: Graph) -> Tensor:
        """Atom features (N, u) after the last block, before the readout; the forward pass alone."""
        with torch.no_grad():
            basis = basis_for(self.module, graph)
            inference = self._inference(graph, basis)
            atom = inference.forward()
            self._workspace.give(inference.memory)
        return atom

    def _inference(self, graph: Graph, basis: TorchBasis) -> Inference:
        return Inference(
            self.module, graph, basis.radial, basis.threebody, self._workspace, self._far
        )

    def evaluate(self, graph: Graph) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `forward`, and the atom features (N, u) before the readout: what `uncertainty` needs,
        at no further cost. Nothing can be differentiated again."""
        with torch.no_grad():
            basis = basis_for(self.module, graph)
            inference = self._inference(graph, basis)
            atom = inference.forward()
        with torch.enable_grad():
            atom.requires_grad_(True)
            energy = self._readout(graph, atom)
            (by_atom,) = torch.autograd.grad(energy.sum(), atom)
        with torch.no_grad():
            forces, virial = basis.backward(*inference.backward(by_atom))
        stress = virial / graph.volume[:, None, None]
        return energy.detach(), forces, stress, atom.detach()

    def energy(self, graph: Graph, vector: Tensor) -> Tensor:
        """Energies (n,) in eV, float64, as a differentiable function of the edge vectors (E, 3)."""
        module, centre = self.module, graph.centre
        radial, threebody = edge_basis(module, graph, vector)
        atom = module.atom_embedding.mlp[0].linear.weight.T.index_select(0, graph.numbers)
        edge = module.edge_encoder.mlp(radial)
        near = centre[: graph.n_near]
        for block in module.graph_conv:
            gate = block.three_body.atom_mlp(atom)
            update = _gated(block.three_body.edge_gate_mlp, gate.index_select(0, near) * threebody)
            edge = torch.cat([edge[: graph.n_near] + update, edge[graph.n_near :]])
            edge = edge + edge_network(
                block.gated_mlp_edge, atom, edge, graph
            ) * block.edge_layer_edge(radial)
            message = edge_network(block.gated_mlp_atom, atom, edge, graph) * block.edge_layer_atom(
                radial
            )
            atom = atom.index_add(0, centre, message)
        return self._readout(graph, atom)

    def atomic_energies(self, graph: Graph, atom: Tensor) -> Tensor:
        """(N,) eV from the last atom features (N, u), scaled and shifted; float64, because shifts
        are many orders above what matters."""
        normalizer = self.module.normalizer
        atomic = _gated(self.module.final, atom).view(-1).double()
        return (
            normalizer.scale.double()[graph.numbers] * atomic
            + normalizer.shift.double()[graph.numbers]
        )

    def _readout(self, graph: Graph, atom: Tensor) -> Tensor:
        atomic = self.atomic_energies(graph, atom)
        total = torch.zeros(len(graph.n_atoms), dtype=torch.float64, device=atomic.device)
        return total.index_add(0, graph.structure, atomic)
