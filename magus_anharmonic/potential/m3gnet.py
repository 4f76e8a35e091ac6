"""MatterSim's M3GNet without explicit triplets: the same weights, the same energies.

The three-body sum factorises (`magus_anharmonic.potential.edge_basis`), and of the first layer of
an edge network the parts of v_i and v_j are products per atom. `FactorisedM3GNet.energy` is plain
torch and can be differentiated as often as needed; `FactorisedM3GNet.evaluate` is for evaluation
only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magus_anharmonic.potential.edge_basis import (
    TorchBasis,
    basis_for,
    edge_basis,
    forces_and_virial,
)
from magus_anharmonic.potential.far_edges import FarEdges
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.inference import Inference, Workspace
from magus_anharmonic.potential.layers import edge_network


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
