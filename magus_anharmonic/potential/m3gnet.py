"""The factorised M3GNet: its basis functions and its layers.

The functions of the edges on which M3GNet is built: R_ln(r), Y_lm and their three-body sum, as few
tensor operations.

Plain torch operations: differentiable as often as needed.

MatterSim's M3GNet without explicit triplets: the same weights, the same energies.

The three-body sum of M3GNet (Chen and Ong, doi:10.1038/s43588-022-00349-3) as MatterSim has it
gates on the centre atom alone. The addition theorem P_l(cos theta_jik) = 4 pi / (2 l + 1) sum_m
Y_lm(ij) Y_lm(ik) then turns the sum over pairs of bonds into one sum over bonds per atom:

    A_i,nlm = sum_k f(r_ik) R_ln(r_ik) Y_lm(ik)
    B_ij,ln = f(r_ij) c_l [ 4 pi / (2 l + 1) sum_m Y_lm(ij) A_i,nlm  -  f(r_ij) R_ln(r_ij) ],
    c_l = sqrt((2 l + 1) / 4 pi)

where the last term takes out k = j. B is the same in all blocks; each block multiplies it by its
own gate of v_i.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.inference import Inference, Workspace

_DEGENERACY = (1, 3, 5, 7)
N_RADIAL = 4


def smooth_cutoff(length: Tensor, cutoff: float) -> Tensor:
    """f(r) = 1 - 6 x^5 + 15 x^4 - 10 x^3 with x = r / cutoff, and 0 beyond."""
    x = length / cutoff
    return torch.clamp(1 - x * x * x * (10 - x * (15 - 6 * x)), min=0.0)


def radial_functions(coefficients: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    """R_ln(r) at x = r / cutoff, (E, 16) with column 4 l + n, from the ``coef`` buffer of
    MatterSim's SphericalBasisLayer.

    Its closed forms of the spherical Bessel functions, ordered as S_l(1/x) sin(z_ln x) + C_l(1/x)
    cos(z_ln x).
    """
    c = coefficients.to(x.dtype)
    zero, one = torch.zeros_like(c[0, 0]), torch.ones_like(c[0, 0])
    roots = torch.cat([c[0, 0], c[1, 1], c[2, 1], c[3, 1]])
    by_power = [
        [one, zero, c[2, 0], zero],
        [zero, c[1, 2], zero, -c[3, 2]],
        [zero, zero, c[2, 4], zero],
        [zero, zero, zero, c[3, 6]],
    ]
    sine = torch.stack([torch.cat(row) for row in by_power])
    by_power = [
        [zero, c[1, 0], zero, c[3, 0]],
        [zero, zero, -c[2, 2], zero],
        [zero, zero, zero, -c[3, 4]],
        [zero] * 4,
    ]
    cosine = torch.stack([torch.cat(row) for row in by_power])
    inverse = 1 / x
    square = inverse * inverse
    powers = torch.stack([inverse, square, square * inverse, square * square], 1)
    angle = x[:, None] * roots
    return factor * ((powers @ sine) * torch.sin(angle) + (powers @ cosine) * torch.cos(angle))


def spherical_harmonics(unit: Tensor) -> Tensor:
    """Real, orthonormal Y_lm of unit vectors (E, 3) for l = 0 to 3: (E, 16), ordered by l;
    polynomials of the components."""
    factors, first_order, second_order, third_order = (
        tuple(table.to(unit) for table in tables) for tables in _polynomials()
    )
    second = (unit @ factors[0]) * (unit @ factors[1])
    third = (second @ factors[2]) * (unit @ factors[3])
    constant = torch.full_like(unit[:, :1], 0.5 / math.sqrt(math.pi))
    return torch.cat(
        [constant, unit @ first_order[0], second @ second_order[0], third @ third_order[0]], 1
    )


@functools.cache
def _polynomials() -> tuple[tuple[Tensor, ...], ...]:
    """Tables that make the monomials of degree 2 and 3 as products, and the coefficients of Y_1m,
    Y_2m and Y_3m in them.

    r^2 = 1 makes the polynomials homogeneous. Matrix products, because their derivatives are matrix
    products too.
    """
    pi = math.pi
    c1, c2, c3 = math.sqrt(3 / (4 * pi)), 0.5 * math.sqrt(15 / pi), 0.25 * math.sqrt(5 / pi)
    c4, c5 = 0.25 * math.sqrt(35 / (2 * pi)), 0.5 * math.sqrt(105 / pi)
    c6, c7 = 0.25 * math.sqrt(21 / (2 * pi)), 0.25 * math.sqrt(7 / pi)
    pairs = ["".join(pair) for pair in itertools.combinations_with_replacement("xyz", 2)]
    triples = ["".join(triple) for triple in itertools.combinations_with_replacement("xyz", 3)]
    factors = (
        _table("xyz", [{pair[0]: 1.0} for pair in pairs]),
        _table("xyz", [{pair[1]: 1.0} for pair in pairs]),
        _table(pairs, [{triple[:2]: 1.0} for triple in triples]),
        _table("xyz", [{triple[2]: 1.0} for triple in triples]),
    )
    first = [{"y": c1}, {"z": c1}, {"x": c1}]
    second = [
        {"xy": c2},
        {"yz": c2},
        {"zz": 2 * c3, "xx": -c3, "yy": -c3},
        {"xz": c2},
        {"xx": 0.5 * c2, "yy": -0.5 * c2},
    ]
    third = [
        {"xxy": 3 * c4, "yyy": -c4},
        {"xyz": c5},
        {"yzz": 4 * c6, "xxy": -c6, "yyy": -c6},
        {"zzz": 2 * c7, "xxz": -3 * c7, "yyz": -3 * c7},
        {"xzz": 4 * c6, "xxx": -c6, "xyy": -c6},
        {"xxz": 0.5 * c5, "yyz": -0.5 * c5},
        {"xxx": c4, "xyy": -3 * c4},
    ]
    return factors, (_table("xyz", first),), (_table(pairs, second),), (_table(triples, third),)


def _table(names: Sequence[str], columns: list[dict[str, float]]) -> Tensor:
    """(names, columns): the coefficients of each column."""
    return torch.tensor(
        [[column.get(name, 0.0) for column in columns] for name in names], dtype=torch.float64
    )


@functools.cache
def _spreading() -> tuple[Tensor, Tensor, Tensor]:
    """From (l, n) and from (l, m) to the 64 columns (l, n, m) as 0 and 1, (16, 64) each; and c_l of
    the 16 columns (l, n)."""
    by_radial, by_harmonic = (
        torch.zeros(16, 64, dtype=torch.float64),
        torch.zeros(16, 64, dtype=torch.float64),
    )
    column = 0
    for order, count in enumerate(_DEGENERACY):
        for n in range(N_RADIAL):
            for m in range(count):
                by_radial[4 * order + n, column] = by_harmonic[order * order + m, column] = 1.0
                column += 1
    normal = torch.tensor(
        [math.sqrt(count / (4 * math.pi)) for count in _DEGENERACY], dtype=torch.float64
    ).repeat_interleave(N_RADIAL)
    return by_radial, by_harmonic, normal


def threebody_sum(
    centre: Tensor, n_atoms: int, cutoff: Tensor, radial: Tensor, harmonics: Tensor
) -> Tensor:
    """B (E, 16) of the docstring of `magus_anharmonic.potential.m3gnet`, from f (E,), R_ln (E, 16)
    and Y_lm (E, 16) of the bonds."""
    by_radial, by_harmonic, normal = (table.to(radial) for table in _spreading())
    weighted = cutoff[:, None] * radial
    spread = harmonics @ by_harmonic
    density = torch.zeros(n_atoms, 64, dtype=radial.dtype, device=radial.device)
    density = density.index_add(0, centre, (weighted @ by_radial) * spread)
    # c_l * 4 pi / (2 l + 1) = 1 / c_l
    total = (density.index_select(0, centre) * spread) @ (by_radial.T / normal)
    return cutoff[:, None] * (total - normal * weighted)


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
        self._workspace = Workspace()

    def forward(self, graph: Graph, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Energy (n,) eV in float64, forces (N, 3) eV/A, stress (n, 3, 3) eV/A^3 in ASE's sign.

        With ``create_graph`` the results can be differentiated again, by the parameters.
        """
        if not create_graph:
            return self.evaluate(graph)[:3]
        vector = graph.vector.detach().requires_grad_(True)
        energy = self.energy(graph, vector)
        (gradient,) = torch.autograd.grad(energy.sum(), vector, create_graph=True)
        return energy, *_forces_and_stress(graph, gradient)

    def atom_features(self, graph: Graph) -> Tensor:
        """Atom features (N, u) after the last block, before the readout; the forward pass alone."""
        with torch.no_grad():
            radial, threebody = (
                value.to(graph.vector.dtype)
                for value in self.edge_basis(graph, graph.vector.double())
            )
            inference = Inference(self.module, graph, radial, threebody, self._workspace)
            atom = inference.forward()
            self._workspace.give(inference.memory)
        return atom

    def evaluate(self, graph: Graph) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `forward`, and the atom features (N, u) before the readout: what `uncertainty` needs,
        at no further cost. Nothing can be differentiated again.

        R_ln is computed in float64: its closed forms cancel at small r, which costs two digits of
        float32.
        """
        vector = graph.vector.detach().double().requires_grad_(True)
        with torch.enable_grad():
            radial, threebody = self.edge_basis(graph, vector)
        with torch.no_grad():
            inference = Inference(
                self.module, graph, radial.detach(), threebody.detach(), self._workspace
            )
            atom = inference.forward()
        with torch.enable_grad():
            atom.requires_grad_(True)
            energy = self._readout(graph, atom)
            (by_atom,) = torch.autograd.grad(energy.sum(), atom)
        with torch.no_grad():
            gradients = inference.backward(by_atom)
        (gradient,) = torch.autograd.grad((radial, threebody), vector, gradients)
        return energy.detach(), *_forces_and_stress(graph, gradient), atom.detach()

    def energy(self, graph: Graph, vector: Tensor) -> Tensor:
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
            edge = edge + self._edge_network(
                block.gated_mlp_edge, atom, edge, graph
            ) * block.edge_layer_edge(radial)
            message = self._edge_network(
                block.gated_mlp_atom, atom, edge, graph
            ) * block.edge_layer_atom(radial)
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

    def edge_basis(self, graph: Graph, vector: Tensor) -> tuple[Tensor, Tensor]:
        """e0 (E, 4), the smooth Bessel functions of all edges, and B (n_near, 16) of the module's
        docstring."""
        kind, n_near = graph.vector.dtype, graph.n_near
        length = torch.linalg.norm(vector, dim=1)
        near = length[:n_near]
        basis = self.module.sbf
        radial = radial_functions(basis.coef, basis.factor, near / basis.cutoff).to(kind)
        harmonics = spherical_harmonics((vector[:n_near] / near[:, None]).to(kind))
        length = length.to(kind)
        cutoff = smooth_cutoff(length[:n_near], self.threebody_cutoff)
        return self.module.rbf(length), threebody_sum(
            graph.centre[:n_near], len(graph.numbers), cutoff, radial, harmonics
        )

    def _edge_network(self, network: nn.Module, atom: Tensor, edge: Tensor, graph: Graph) -> Tensor:
        """GatedMLP of [v_i, v_j, e_ij]; the first layer is split, so that the parts of v_i and v_j
        are per-atom products."""
        branches = []
        for branch in (network.g, network.sigma):
            first = branch[0].linear
            own, other, bond = first.weight.split(self.units, 1)
            hidden = linear(edge, bond, first.bias)
            hidden = (
                hidden
                + linear(atom, own).index_select(0, graph.centre)
                + linear(atom, other).index_select(0, graph.neighbour)
            )
            branches.append(branch[1:](silu(hidden)))
        return branches[0] * branches[1]


def _forces_and_stress(graph: Graph, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Forces (N, 3) and stress (n, 3, 3) from dE/d(edge vector) (E, 3); the stress is zero where
    there is no volume."""
    forces = torch.zeros(len(graph.numbers), 3, dtype=gradient.dtype, device=gradient.device)
    forces = forces.index_add(0, graph.centre, gradient).index_add(0, graph.neighbour, -gradient)
    virial = torch.zeros(len(graph.n_atoms), 3, 3, dtype=gradient.dtype, device=gradient.device)
    virial = virial.index_add(
        0, graph.edge_structure, graph.vector[:, :, None] * gradient[:, None, :]
    )
    return forces, virial / graph.volume[:, None, None]
