"""MatterSim's M3GNet without explicit triplets: the same weights, the same energies.

The three-body sum of M3GNet (Chen and Ong, doi:10.1038/s43588-022-00349-3) as MatterSim has it gates on the centre atom
alone. The addition theorem P_l(cos theta_jik) = 4 pi / (2 l + 1) sum_m Y_lm(ij) Y_lm(ik) then turns the sum over pairs of
bonds into one sum over bonds per atom:

    A_i,nlm = sum_k f(r_ik) R_ln(r_ik) Y_lm(ik)
    B_ij,ln = f(r_ij) c_l [ 4 pi / (2 l + 1) sum_m Y_lm(ij) A_i,nlm  -  f(r_ij) R_ln(r_ij) ],   c_l = sqrt((2 l + 1) / 4 pi)

where the last term takes out k = j. B is the same in all blocks; each block multiplies it by its own gate of v_i.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import linear, silu

from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.inference import Inference, Workspace

_DEGENERACY = (1, 3, 5, 7)


def spherical_harmonics(unit: torch.Tensor) -> torch.Tensor:
    """Real, orthonormal Y_lm of unit vectors (E, 3) for l = 0 to 3: (E, 16), ordered by l."""
    x, y, z = unit.unbind(-1)
    x2, y2, z2 = x * x, y * y, z * z
    pi = math.pi
    c1, c2, c3 = math.sqrt(3 / (4 * pi)), 0.5 * math.sqrt(15 / pi), 0.25 * math.sqrt(5 / pi)
    c4, c5, c6, c7 = (
        0.25 * math.sqrt(35 / (2 * pi)),
        0.5 * math.sqrt(105 / pi),
        0.25 * math.sqrt(21 / (2 * pi)),
        0.25 * math.sqrt(7 / pi),
    )
    values = [torch.full_like(x, 0.5 / math.sqrt(pi)), c1 * y, c1 * z, c1 * x]
    values += [c2 * x * y, c2 * y * z, c3 * (3 * z2 - 1), c2 * x * z, 0.5 * c2 * (x2 - y2)]
    values += [c4 * y * (3 * x2 - y2), c5 * x * y * z, c6 * y * (5 * z2 - 1), c7 * z * (5 * z2 - 3)]
    values += [c6 * x * (5 * z2 - 1), 0.5 * c5 * z * (x2 - y2), c4 * x * (x2 - 3 * y2)]
    return torch.stack(values, -1)


def smooth_cutoff(length: torch.Tensor, cutoff: float) -> torch.Tensor:
    """f(r) = 1 - 6 x^5 + 15 x^4 - 10 x^3 with x = r / cutoff, and 0 beyond."""
    x = length / cutoff
    return torch.clamp(1 - x * x * x * (10 - x * (15 - 6 * x)), min=0.0)


def radial_functions(coefficients: torch.Tensor, factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """R_ln(r), MatterSim's closed forms of the spherical Bessel functions, at x = r / cutoff: (E, 4 l, 4 n)."""
    c, x = coefficients, x[:, None]
    x2 = x * x
    order0 = torch.sin(c[0, 0] * x) / x
    order1 = (c[1, 0] * x * torch.cos(c[1, 1] * x) + c[1, 2] * torch.sin(c[1, 3] * x)) / x2
    sine, cosine = torch.sin(c[2, 1] * x), torch.cos(c[2, 1] * x)
    order2 = (c[2, 0] * x2 * sine - c[2, 2] * x * cosine + c[2, 4] * sine) / (x2 * x)
    sine, cosine = torch.sin(c[3, 1] * x), torch.cos(c[3, 1] * x)
    order3 = (c[3, 0] * x2 * x * cosine - c[3, 2] * x2 * sine - c[3, 4] * x * cosine + c[3, 6] * sine) / (x2 * x2)
    return torch.stack([order0, order1, order2, order3], 1) * factor


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

    def forward(self, graph: Graph, create_graph: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energy (n,) eV in float64, forces (N, 3) eV/A, stress (n, 3, 3) eV/A^3 in ASE's sign.

        With ``create_graph`` the results can be differentiated again, by the parameters.
        """
        if not create_graph:
            energy, gradient = self._evaluate(graph)
            return energy, *_forces_and_stress(graph, gradient)
        vector = graph.vector.detach().requires_grad_(True)
        energy = self.energy(graph, vector)
        (gradient,) = torch.autograd.grad(energy.sum(), vector, create_graph=True)
        return energy, *_forces_and_stress(graph, gradient)

    def _evaluate(self, graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy and its gradient by the edge vectors through `Inference`; nothing can be differentiated again.

        The edge basis is computed in float64: the closed forms of R_ln cancel at small r, which costs two digits of float32.
        """
        kind, vector = graph.vector.dtype, graph.vector.detach().double().requires_grad_(True)
        with torch.enable_grad():
            radial, threebody = (value.to(kind) for value in self.edge_basis(graph, vector))
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
        return energy.detach(), gradient

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
        length = torch.linalg.norm(vector, dim=1)
        near = length[: graph.n_near]
        basis = self.module.sbf
        radial = radial_functions(basis.coef, basis.factor, near / basis.cutoff)
        harmonics = spherical_harmonics(vector[: graph.n_near] / near[:, None])
        cutoff = smooth_cutoff(near, self.threebody_cutoff)
        weighted = cutoff[:, None, None] * radial
        return self.module.rbf(length), self._threebody(graph, cutoff, weighted, harmonics)

    @staticmethod
    def _threebody(graph: Graph, cutoff: torch.Tensor, weighted: torch.Tensor, harmonics: torch.Tensor) -> torch.Tensor:
        centre, columns = graph.centre[: graph.n_near], harmonics.split(_DEGENERACY, 1)
        products = [(weighted[:, order, :, None] * y[:, None, :]).flatten(1) for order, y in enumerate(columns)]
        density = torch.zeros(len(graph.numbers), 64, dtype=weighted.dtype, device=weighted.device)
        density = density.index_add(0, centre, torch.cat(products, 1)).index_select(0, centre)
        parts = density.split([4 * count for count in _DEGENERACY], 1)
        result = []
        for order, (part, y) in enumerate(zip(parts, columns, strict=True)):
            count = 2 * order + 1
            total = torch.einsum("enm,em->en", part.view(-1, 4, count), y) * (4 * math.pi / count)
            result.append(math.sqrt(count / (4 * math.pi)) * cutoff[:, None] * (total - weighted[:, order]))
        return torch.cat(result, 1)

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
