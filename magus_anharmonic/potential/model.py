"""MatterSim's M3GNet without explicit triplets: the same weights, the same energies.

The three-body sum of M3GNet (Chen and Ong, doi:10.1038/s43588-022-00349-3) as MatterSim has it gates on the centre atom
alone. The addition theorem P_l(cos theta_jik) = 4 pi / (2 l + 1) sum_m Y_lm(ij) Y_lm(ik) then turns the sum over pairs of
bonds into one sum over bonds per atom:

    A_i,nlm = sum_k f(r_ik) R_ln(r_ik) Y_lm(ik)
    B_ij,ln = f(r_ij) c_l [ 4 pi / (2 l + 1) sum_m Y_lm(ij) A_i,nlm  -  f(r_ij) R_ln(r_ij) ],   c_l = sqrt((2 l + 1) / 4 pi)

where the last term takes out k = j. B is the same in all blocks; each block multiplies it by its own gate of v_i.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import linear, silu

from magus_anharmonic.potential.basis import radial_functions, smooth_cutoff, spherical_harmonics, threebody_sum
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.inference import Inference, Workspace


def _gated(network: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """A GatedMLP: the product of its two branches."""
    return network.g(values) * network.sigma(values)


class FactorisedM3GNet(nn.Module):
    """Energies, forces and stresses from the parameters of MatterSim's ``M3Gnet`` module, which it shares."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        arguments = module.model_args
        self.units: int = arguments["units"]
        self.cutoff: float = float(arguments["cutoff"])
        self.threebody_cutoff: float = float(arguments["threebody_cutoff"])
        self._workspace = Workspace()

    @contextlib.contextmanager
    def fresh_workspace(self) -> Iterator[None]:
        """Within it, memory that earlier evaluations left is not used: to measure what one takes."""
        kept, self._workspace = self._workspace, Workspace()
        try:
            yield
        finally:
            self._workspace = kept

    def forward(self, graph: Graph, create_graph: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energy (n,) eV in float64, forces (N, 3) eV/A, stress (n, 3, 3) eV/A^3 in ASE's sign.

        With ``create_graph`` the results can be differentiated again, by the parameters.
        """
        if not create_graph:
            energy, gradient, _ = self._evaluate(graph)
            return energy, *_forces_and_stress(graph, gradient)
        vector = graph.vector.detach().requires_grad_(True)
        energy = self.energy(graph, vector)
        (gradient,) = torch.autograd.grad(energy.sum(), vector, create_graph=True)
        return energy, *_forces_and_stress(graph, gradient)

    def evaluate(self, graph: Graph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, and the atom features (N, u) before the readout: what `uncertainty` needs, at no further cost."""
        energy, gradient, atom = self._evaluate(graph)
        return energy, *_forces_and_stress(graph, gradient), atom

    def atom_features(self, graph: Graph) -> torch.Tensor:
        """Atom features (N, u) after the last block, before the readout; the forward pass alone."""
        with torch.no_grad():
            radial, threebody = (value.to(graph.vector.dtype) for value in self.edge_basis(graph, graph.vector.double()))
            inference = Inference(self.module, graph, radial, threebody, self._workspace)
            atom = inference.forward()
            self._workspace.give(inference.memory)
        return atom

    def _evaluate(self, graph: Graph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energy, its gradient by the edge vectors, and the last atom features; nothing can be differentiated again.

        R_ln is computed in float64: its closed forms cancel at small r, which costs two digits of float32.
        """
        vector = graph.vector.detach().double().requires_grad_(True)
        with torch.enable_grad():
            radial, threebody = self.edge_basis(graph, vector)
        with torch.no_grad():
            inference = Inference(self.module, graph, radial.detach(), threebody.detach(), self._workspace)
            atom = inference.forward()
        with torch.enable_grad():
            atom.requires_grad_(True)
            energy = self._readout(graph, atom)
            (by_atom,) = torch.autograd.grad(energy.sum(), atom)
        with torch.no_grad():
            gradients = inference.backward(by_atom)
        (gradient,) = torch.autograd.grad((radial, threebody), vector, gradients)
        return energy.detach(), gradient, atom.detach()

    def energy(self, graph: Graph, vector: torch.Tensor) -> torch.Tensor:
        """Energies (n,) in eV, float64, as a differentiable function of the edge vectors (E, 3)."""
        module, centre = self.module, graph.centre
        radial, threebody = self.edge_basis(graph, vector)
        atom = module.atom_embedding.mlp[0].linear.weight.T.index_select(0, graph.numbers)
        edge = module.edge_encoder.mlp(radial)
        near = centre[: graph.n_near]
        for block in module.graph_conv:
            gate = block.three_body.atom_mlp(atom)
            update = _gated(block.three_body.edge_gate_mlp, gate.index_select(0, near) * threebody)
            edge = torch.cat([edge[: graph.n_near] + update, edge[graph.n_near :]])
            edge = edge + self._edge_network(block.gated_mlp_edge, atom, edge, graph) * block.edge_layer_edge(radial)
            message = self._edge_network(block.gated_mlp_atom, atom, edge, graph) * block.edge_layer_atom(radial)
            atom = atom.index_add(0, centre, message)
        return self._readout(graph, atom)

    def _readout(self, graph: Graph, atom: torch.Tensor) -> torch.Tensor:
        """Sum of the scaled and shifted atomic energies; float64, because shifts are many orders above what matters."""
        normalizer = self.module.normalizer
        atomic = _gated(self.module.final, atom).view(-1).double()
        atomic = normalizer.scale.double()[graph.numbers] * atomic + normalizer.shift.double()[graph.numbers]
        total = torch.zeros(len(graph.n_atoms), dtype=torch.float64, device=atomic.device)
        return total.index_add(0, graph.structure, atomic)

    def edge_basis(self, graph: Graph, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """e0 (E, 4), the smooth Bessel functions of all edges, and B (n_near, 16) of the module's docstring."""
        kind, n_near = graph.vector.dtype, graph.n_near
        length = torch.linalg.norm(vector, dim=1)
        near = length[:n_near]
        basis = self.module.sbf
        radial = radial_functions(basis.coef, basis.factor, near / basis.cutoff).to(kind)
        harmonics = spherical_harmonics((vector[:n_near] / near[:, None]).to(kind))
        length = length.to(kind)
        cutoff = smooth_cutoff(length[:n_near], self.threebody_cutoff)
        return self.module.rbf(length), threebody_sum(graph.centre[:n_near], len(graph.numbers), cutoff, radial, harmonics)

    def _edge_network(self, network: nn.Module, atom: torch.Tensor, edge: torch.Tensor, graph: Graph) -> torch.Tensor:
        """GatedMLP of [v_i, v_j, e_ij]; the first layer is split, so that the parts of v_i and v_j are per-atom products."""
        branches = []
        for branch in (network.g, network.sigma):
            first = branch[0].linear
            own, other, bond = first.weight.split(self.units, 1)
            hidden = linear(edge, bond, first.bias)
            hidden = hidden + linear(atom, own).index_select(0, graph.centre) + linear(atom, other).index_select(0, graph.neighbour)
            branches.append(branch[1:](silu(hidden)))
        return branches[0] * branches[1]


def _forces_and_stress(graph: Graph, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forces (N, 3) and stress (n, 3, 3) from dE/d(edge vector) (E, 3); the stress is zero where there is no volume."""
    forces = torch.zeros(len(graph.numbers), 3, dtype=gradient.dtype, device=gradient.device)
    forces = forces.index_add(0, graph.centre, gradient).index_add(0, graph.neighbour, -gradient)
    virial = torch.zeros(len(graph.n_atoms), 3, 3, dtype=gradient.dtype, device=gradient.device)
    virial = virial.index_add(0, graph.edge_structure, graph.vector[:, :, None] * gradient[:, None, :])
    return forces, virial / graph.volume[:, None, None]
