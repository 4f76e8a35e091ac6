"""The functions of the edges on which M3GNet is built: e0, R_ln(r), Y_lm and their three-body sum.

The three-body sum of M3GNet (Chen and Ong, doi:10.1038/s43588-022-00349-3) as MatterSim has it
gates on the centre atom alone. The addition theorem P_l(cos theta_jik) = 4 pi / (2 l + 1) sum_m
Y_lm(ij) Y_lm(ik) then turns the sum over pairs of bonds into one sum over bonds per atom:

    A_i,nlm = sum_k f(r_ik) R_ln(r_ik) Y_lm(ik)
    B_ij,ln = f(r_ij) c_l [ 4 pi / (2 l + 1) sum_m Y_lm(ij) A_i,nlm  -  f(r_ij) R_ln(r_ij) ],
    c_l = sqrt((2 l + 1) / 4 pi)

where the last term takes out k = j. B is the same in all blocks; each block multiplies it by its
own gate of v_i.

`edge_basis` is plain torch: differentiable as often as needed. For evaluation `basis_for` gives the
same with its first derivative, compiled (``edge_basis.c``) for single precision on a CPU.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.kernels import (
    address,
    agreeing,
    largest_difference,
    pointed,
    pointers,
    structure,
)

_DEGENERACY = (1, 3, 5, 7)
N_RADIAL = 4
_AGREEMENT = 1e-5


def smooth_cutoff(length: Tensor, cutoff: float) -> Tensor:
    """f(r) = 1 - 6 x^5 + 15 x^4 - 10 x^3 with x = r / cutoff, and 0 beyond."""
    x = length / cutoff
    return torch.clamp(1 - x * x * x * (10 - x * (15 - 6 * x)), min=0.0)


def radial_functions(coefficients: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    """R_ln(r) at x = r / cutoff, (E, 16) with column 4 l + n, from the ``coef`` buffer of
    MatterSim's SphericalBasisLayer."""
    roots, sine, cosine = _closed_forms(coefficients.to(x.dtype))
    inverse = 1 / x
    square = inverse * inverse
    powers = torch.stack([inverse, square, square * inverse, square * square], 1)
    angle = x[:, None] * roots
    return factor * ((powers @ sine) * torch.sin(angle) + (powers @ cosine) * torch.cos(angle))


def _closed_forms(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MatterSim's closed forms of the spherical Bessel functions, ordered as S_l(1/x) sin(z_ln x) +
    C_l(1/x) cos(z_ln x): z (16,), and the coefficients of S and C, (4, 16) for powers 1 to 4."""
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
    return roots, sine, torch.stack([torch.cat(row) for row in by_power])


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
    """B (E, 16) of the docstring of this module, from f (E,), R_ln (E, 16)
    and Y_lm (E, 16) of the bonds."""
    by_radial, by_harmonic, normal = (table.to(radial) for table in _spreading())
    weighted = cutoff[:, None] * radial
    spread = harmonics @ by_harmonic
    density = torch.zeros(n_atoms, 64, dtype=radial.dtype, device=radial.device)
    density = density.index_add(0, centre, (weighted @ by_radial) * spread)
    # c_l * 4 pi / (2 l + 1) = 1 / c_l
    total = (density.index_select(0, centre) * spread) @ (by_radial.T / normal)
    return cutoff[:, None] * (total - normal * weighted)


def edge_basis(module: nn.Module, graph: Graph, vector: Tensor) -> tuple[Tensor, Tensor]:
    """e0 (E, 4), the smooth Bessel functions of all edges, and B (n_near, 16) of the module's
    docstring, of MatterSim's ``module``.

    In float64 ``vector`` (E, 3) makes R_ln in float64: its closed forms cancel at small r, which
    costs two digits of float32.
    """
    kind, n_near = graph.vector.dtype, graph.n_near
    length = torch.linalg.norm(vector, dim=1)
    near = length[:n_near]
    basis = module.sbf
    radial = radial_functions(basis.coef, basis.factor, near / basis.cutoff).to(kind)
    harmonics = spherical_harmonics((vector[:n_near] / near[:, None]).to(kind))
    length = length.to(kind)
    cutoff = smooth_cutoff(length[:n_near], float(module.model_args["threebody_cutoff"]))
    return module.rbf(length), threebody_sum(
        graph.centre[:n_near], len(graph.numbers), cutoff, radial, harmonics
    )


def forces_and_virial(graph: Graph, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Forces (N, 3) and virial (n, 3, 3), eV, from dE/d(edge vector) (E, 3)."""
    forces = torch.zeros(len(graph.numbers), 3, dtype=gradient.dtype, device=gradient.device)
    forces = forces.index_add(0, graph.centre, gradient).index_add(0, graph.neighbour, -gradient)
    virial = torch.zeros(len(graph.n_atoms), 3, 3, dtype=gradient.dtype, device=gradient.device)
    return forces, virial.index_add(
        0, graph.edge_structure, graph.vector[:, :, None] * gradient[:, None, :]
    )


class TorchBasis:
    """``radial`` (E, 4), e0, and ``threebody`` (n_near, 16), B, of a graph, with their gradient."""

    radial: Tensor
    threebody: Tensor

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        self._graph, self._vector = graph, graph.vector.detach().double().requires_grad_(True)
        with torch.enable_grad():
            self._values = edge_basis(module, graph, self._vector)
        self.radial, self.threebody = (value.detach().contiguous() for value in self._values)

    def backward(
        self, by_radial: Tensor, by_threebody: Tensor, by_length: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Forces (N, 3) and virial (n, 3, 3) from the gradients by e0, B and, float64, the lengths
        of the edges beyond the three-body cutoff."""
        (gradient,) = torch.autograd.grad(self._values, self._vector, (by_radial, by_threebody))
        if by_length is not None:
            unit = torch.nn.functional.normalize(self._vector.detach()[self._graph.n_near :])
            gradient[self._graph.n_near :] += by_length[:, None] * unit
        return forces_and_virial(self._graph, gradient)


_Functions = structure(
    "functions",
    **dict.fromkeys(("cutoff", "factor", "near_cutoff"), ctypes.c_double),
    **pointers("roots sine cosine waves smooth"),
)
_Bonds = structure(
    "bonds",
    **dict.fromkeys(("n_edges", "near", "n_atoms", "threads"), ctypes.c_long),
    **pointers("centre neighbour structure vector"),
)
_Kept = structure("kept", **pointers("smooth radial density"))


class NativeBasis(TorchBasis):
    """The compiled form, with as many threads as torch uses."""

    def __init__(self, module: nn.Module, graph: Graph, functions: ctypes.CDLL) -> None:
        self._graph, self._native = graph, functions
        n_edges, n_atoms = len(graph.centre), len(graph.numbers)
        basis = module.sbf
        self._arrays = [
            *(one.contiguous() for one in _closed_forms(basis.coef.double())), *_waves(module.rbf),
        ]  # fmt: skip
        scales = (
            float(basis.cutoff),
            float(basis.factor),
            float(module.model_args["threebody_cutoff"]),
        )
        self._functions = _Functions(*scales, *map(address, self._arrays))
        edges = graph.centre, graph.neighbour, graph.edge_structure, graph.vector
        self._bonds = _Bonds(
            n_edges, graph.n_near, n_atoms, torch.get_num_threads(), *map(address, edges)
        )
        self._kept = [
            torch.empty(size, dtype=torch.float64)
            for size in (4 * n_edges, 32 * graph.n_near, 64 * n_atoms)
        ]
        self._struct = _Kept(*map(address, self._kept))
        self.radial, self.threebody = torch.empty(n_edges, 4), torch.empty(graph.n_near, 16)
        self._call("basis_forward", self.radial, self.threebody)

    def _call(self, name: str, *arrays: Tensor | None) -> int:
        structs = self._bonds, self._functions, self._struct
        return int(getattr(self._native, name)(*map(ctypes.byref, structs), *pointed(*arrays)))

    def backward(
        self, by_radial: Tensor, by_threebody: Tensor, by_length: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        forces = torch.zeros(len(self._graph.numbers), 3, dtype=torch.float64)
        virial = torch.zeros(len(self._graph.n_atoms), 3, 3, dtype=torch.float64)
        if self._call("basis_backward", by_radial, by_threebody, by_length, forces, virial):
            raise MemoryError("no memory for the gradients of the edge basis")
        return forces, virial


def _waves(rbf: nn.Module) -> tuple[Tensor, Tensor]:
    """MatterSim's SmoothBesselBasis as e0_n = sum_k smooth_nk sin(w_k r) / (w_k r): w (5,) and
    smooth (4, 5); its recurrence is linear."""
    dn, en, weights = (getattr(rbf, name).double() for name in ("dn", "en", "fnr_weights"))
    waves = torch.cat([rbf.n_1_pi_cutoff[0], rbf.n_2_pi_cutoff[0, -1:]]).double()
    rows: list[Tensor] = []
    for n in range(len(dn)):
        row = torch.zeros(len(waves), dtype=torch.float64)
        row[n : n + 2] = weights[0, n]
        if n:
            row = (row + torch.sqrt(en[0, n] / dn[n - 1]) * rows[-1]) / torch.sqrt(dn[n])
        rows.append(row)
    return waves, torch.stack(rows)


def basis_for(module: nn.Module, graph: Graph) -> TorchBasis:
    """The fastest form for the graph."""
    if graph.vector.device.type == "cpu" and graph.vector.dtype == torch.float32:
        functions = _checked_functions()
        if functions is not None:
            return NativeBasis(module, graph, functions)
    return TorchBasis(module, graph)


@functools.cache
def _checked_functions() -> ctypes.CDLL | None:
    """See `agreeing`, once per process."""

    def difference(functions: ctypes.CDLL) -> float:
        return disagreement(functools.partial(NativeBasis, functions=functions))

    return agreeing("edge basis", difference, _AGREEMENT)


def disagreement(form: Callable[[Any, Graph], TorchBasis], seed: int = 0) -> float:
    """Largest difference between a basis of ``form`` and torch's, relative to the largest number of
    an array, on a random graph; NaN counts as infinite."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator))
    length = torch.cat([torch.linspace(0.8, 4.0, 25), torch.linspace(4.0, 5.0, 15)])
    graph = Graph(
        centre=torch.arange(40) % 3,
        neighbour=torch.randint(0, 3, (40,), generator=generator),
        vector=unit * length[:, None],
        n_near=25,
        edge_structure=torch.zeros(40, dtype=torch.long),
        numbers=torch.ones(3, dtype=torch.long),
        structure=torch.zeros(3, dtype=torch.long),
        volume=torch.ones(1),
        n_atoms=(3,),
    )
    module = _stock_functions()
    gradients = (torch.randn(*shape, generator=generator) for shape in ((40, 4), (25, 16)))
    by_radial, by_threebody = gradients
    by_length = torch.randn(15, generator=generator).double()
    results = []
    for one in (form, TorchBasis):
        basis = one(module, graph)
        found = basis.backward(by_radial, by_threebody, by_length)
        results.append([basis.radial, basis.threebody, *found])
    return largest_difference(*results)


def _stock_functions() -> Any:
    """What a basis reads of MatterSim's M3Gnet, with the cutoffs of its foundation models."""
    from mattersim.forcefield.m3gnet.modules import SmoothBesselBasis, SphericalBasisLayer

    return SimpleNamespace(
        rbf=SmoothBesselBasis(r_max=5.0, max_n=4),
        sbf=SphericalBasisLayer(max_n=4, max_l=4, cutoff=5.0),
        model_args={"threebody_cutoff": 4.0},
    )
