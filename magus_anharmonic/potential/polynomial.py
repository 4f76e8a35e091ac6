"""A linear potential for one phase, fitted in a second to a few dozen configurations of one
supercell and a twentieth of the price of a graph network: the surrogate of a sampling.

With v the vectors from atom i to its neighbours of species s within the cutoff,

    A_i(s, n, m) = sum_v R_n(|v|) Y_m(v / |v|),

R_n Gaussians times (1 - (r/rc)^2)^2 and Y_m the monomials x^a y^b z^c of degree l = a + b + c up to
`DEGREE` (the moment tensors of Shapeev, Multiscale Model. Simul. 14, 1153 (2016),
doi:10.1137/15M1054183). The energy is

    E = N e_0 + sum_i [ sum_p c_p A_i(p, 0) + sum_l sum_pq Q^l_pq A_i(p) : A_i(q) ],

p = (s, n), with the full contraction of two tensors of rank l and coefficients of their own for
each species of atom i: all terms of two and three bodies up to these degrees. Terms of four bodies
made it no more accurate for Im-3m H3S, and a polynomial of second order in A costs matrix products
alone (docs/performance.md compares it with libraries). Energies, forces and stresses determine the
coefficients by ridge regression, whose strength is that of least generalised cross-validation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluation, has_stress
from magus_anharmonic.io.digests import digest
from magus_anharmonic.potential.graph import Graph, build_graph, find_topology
from magus_anharmonic.potential.guards import expected_pairs

DEGREE = 3
RADIAL = (7, 5)
"""Numbers of radial functions: the first for which there are `ROWS` numbers for each coefficient,
or the last. 7 leave 0.9 of what 5 do and take twice the time to be fitted, 9 leave no less (60 and
100 configurations of 32 atoms): 70 take 7."""
ROWS = 8.0
REACH = 2.6
"""Cutoff over (V/N)^(1/3): 74 neighbours at any density, 4.0 A in H3S at 150 GPa."""
ENERGY_WEIGHT = 10.0
"""Of an energy over sqrt(N) beside a force component; a stress counts as a virial over sqrt(N)."""
AT_ONCE = 40_000
"""Pairs of a batch: what fits the cache of a processor."""
RIDGES = 10.0 ** np.arange(-12.0, 1.0, 0.5)
"""Strengths that are tried, of the largest eigenvalue."""

_POWERS = [
    (a, b, degree - a - b)
    for degree in range(DEGREE + 1)
    for a in range(degree, -1, -1)
    for b in range(degree - a, -1, -1)
]
_DEGREES = [sum(powers) for powers in _POWERS]
_PARTS = [
    slice(_DEGREES.index(degree), _DEGREES.index(degree) + _DEGREES.count(degree))
    for degree in range(DEGREE + 1)
]
_MULTIPLICITY = torch.tensor(
    [
        float(math.factorial(sum(powers)) / math.prod(map(math.factorial, powers)))
        for powers in _POWERS
    ],
    dtype=torch.float64,
)
"""How many components of a tensor a monomial stands for."""
_LOWER = [
    [
        (one, _POWERS.index((*powers[:axis], powers[axis] - 1, *powers[axis + 1 :])), powers[axis])
        for one, powers in enumerate(_POWERS)
        if powers[axis]
    ]
    for axis in range(3)
]
"""By axis: a monomial, its derivative's monomial, and that one's factor."""
_PRODUCTS = [
    next((one, low, axis) for axis in range(3) for other, low, _ in _LOWER[axis] if other == one)
    for one in range(1, len(_POWERS))
]
"""A monomial, and that of one degree less times the component of which axis it is."""
_SIX = [0, 4, 8, 5, 2, 1]
"""Of nine components of a symmetric tensor, those that differ."""


@dataclass(frozen=True)
class _Shell:
    """Neighbours of one species of B atoms, filled up to equal numbers K: neighbour (B, K) counts
    all atoms of the batch; what fills up lies beyond the cutoff."""

    neighbour: Tensor
    vector: Tensor

    @classmethod
    def all_of(cls, graph: Graph, species: Sequence[int], cutoff: float) -> list[_Shell]:
        """By species."""
        shells, number = [], graph.numbers.index_select(0, graph.neighbour)
        for one in species:
            chosen = torch.nonzero(number == one).view(-1)
            centre = graph.centre.index_select(0, chosen)
            sizes = torch.bincount(centre, minlength=len(graph.numbers))
            place = torch.arange(len(chosen)) - (sizes.cumsum(0) - sizes).index_select(0, centre)
            shape = len(sizes), max(1, int(sizes.max()))
            neighbour = torch.zeros(shape, dtype=torch.long)
            vector = torch.full((*shape, 3), 2.0 * cutoff, dtype=graph.vector.dtype)
            neighbour[centre, place] = graph.neighbour.index_select(0, chosen)
            vector[centre, place] = graph.vector.index_select(0, chosen)
            shells.append(cls(neighbour, vector))
        return shells


class PolynomialPotential:
    """An `Evaluator` for the species that it was fitted to; see the module.

    cutoff : A; shift : eV/atom; linear : (S, C) eV, by species of the atom, C = S n;
    quadratic : (S, `DEGREE` + 1, C, C) eV, symmetric.
    """

    relative_cost = 0.05
    """Of the price of an evaluation by the smallest graph network (1.6 against 42 ms for 32 atoms):
    what SSCHA divides its samples by."""

    def __init__(
        self,
        species: Sequence[int],
        cutoff: float,
        shift: float,
        linear: np.ndarray,
        quadratic: np.ndarray,
    ) -> None:
        self.species, self.cutoff, self.shift = list(species), cutoff, shift
        self.linear, self.quadratic = linear, quadratic

    @cached_property
    def model_id(self) -> str:
        """Of the coefficients, twelve hexadecimal digits."""
        numbers = np.array([self.cutoff, self.shift]), self.linear, self.quadratic
        parts = [np.ascontiguousarray(part, dtype=float).tobytes() for part in numbers]
        return f"polynomial-{digest(bytes(self.species) + b''.join(parts))}"

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See `Evaluator`; configurations of one supercell share one neighbour list. Raises
        ``InputError`` for other species, coincident atoms and cells too skewed to be searched."""
        energy, stress = np.zeros(len(structures)), np.zeros((len(structures), 3, 3))
        forces = [np.zeros((len(atoms), 3)) for atoms in structures]
        for places, graph in _graphs(structures, self.species, self.cutoff):
            energy[places], pull, virial = self._evaluate(graph)
            volume = graph.volume.numpy()[:, None, None]
            stress[places] = virial / volume
            for place, one in zip(places, np.split(pull, np.cumsum(graph.n_atoms)), strict=False):
                forces[place] = one
        return Evaluation(energy, forces, stress)

    def _evaluate(self, graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies (n,), forces (N, 3) and virials (n, 3, 3), eV and A, of a batch."""
        shells = _Shell.all_of(graph, self.species, self.cutoff)
        radial = self.linear.shape[1] // len(self.species)
        bases = [_Basis(shell.vector, self.cutoff, radial) for shell in shells]
        moments = torch.cat([basis.moments() for basis in bases], 1)
        gradient, atomic = torch.empty_like(moments), torch.empty(len(moments), dtype=torch.float64)
        for number, one in enumerate(self.species):
            chosen = torch.nonzero(graph.numbers == one).view(-1)
            own = moments.index_select(0, chosen)
            found = torch.empty_like(own)
            for matrix, part in zip(torch.as_tensor(self.quadratic[number]), _PARTS, strict=True):
                found[..., part] = torch.matmul(matrix, own[..., part] * _MULTIPLICITY[part])
            linear = torch.as_tensor(self.linear[number])
            of_terms = (own * found).sum((1, 2)) + own[..., 0] @ linear
            atomic.index_copy_(0, chosen, of_terms + self.shift)
            found *= 2.0
            found[..., 0] += linear
            gradient.index_copy_(0, chosen, found)
        n = len(graph.n_atoms)
        energy = torch.zeros(n, dtype=torch.float64).index_add_(0, graph.structure, atomic)
        forces = torch.zeros(len(moments), 3, dtype=torch.float64)
        virial = torch.zeros(n, 3, 3, dtype=torch.float64)
        for number, (shell, basis) in enumerate(zip(shells, bases, strict=True)):
            pull = basis.derivative(gradient[:, number * radial : (number + 1) * radial])
            forces += pull.sum(1)
            forces.index_add_(0, shell.neighbour.view(-1), pull.view(-1, 3), alpha=-1.0)
            virial.index_add_(0, graph.structure, pull.mT @ shell.vector)
        return energy.numpy(), forces.numpy(), 0.5 * (virial + virial.mT).numpy()


class _Basis:
    """``radial`` functions of the distance (B, n, K) and monomials (B, M, K) of ``vector`` (B, K,
    3)."""

    def __init__(self, vector: Tensor, cutoff: float, radial: int) -> None:
        length = torch.linalg.norm(vector, dim=2)
        self.length, self.unit = length, vector.mT / length[:, None]
        centres = cutoff * torch.linspace(0.2, 0.8, radial, dtype=vector.dtype)
        sharp = 0.7 / float(centres[1] - centres[0]) ** 2
        inside = (1.0 - (length / cutoff) ** 2).clamp_(min=0.0)[:, None]
        away = length[:, None] - centres[:, None]
        gauss = torch.exp(away.square().mul_(-sharp))
        gauss *= inside
        self.radial = gauss * inside
        away *= self.radial
        self.slope = gauss.mul_(length[:, None] * (-4.0 / cutoff**2)).sub_(away, alpha=2.0 * sharp)
        self.angular = vector.new_empty(len(vector), len(_POWERS), vector.shape[1])
        self.angular[:, 0] = 1.0
        for one, lower, axis in _PRODUCTS:
            torch.mul(self.angular[:, lower], self.unit[:, axis], out=self.angular[:, one])

    def moments(self) -> Tensor:
        """(B, n, M)."""
        return self.radial @ self.angular.mT

    def derivative(self, by_moments: Tensor) -> Tensor:
        """(B, K, 3) by the vectors, of what has the derivatives ``by_moments`` (B, n, M)."""
        by_angular = by_moments.mT @ self.radial
        along = ((by_moments @ self.angular) * self.slope).sum(1)
        across = torch.zeros_like(self.unit)
        for axis, rows in enumerate(_LOWER):
            for one, lower, factor in rows:
                across[:, axis].addcmul_(by_angular[:, one], self.angular[:, lower], value=factor)
        across /= self.length[:, None]
        along -= (across * self.unit).sum(1)
        return across.addcmul_(self.unit, along[:, None]).mT.contiguous()

    def jacobian(self) -> Tensor:
        """(B, K, 3, n, M): derivatives of the terms of the moments by the vectors."""
        angular, unit = self.angular.mT, self.unit.mT
        slopes = torch.zeros(*unit.shape, len(_POWERS), dtype=unit.dtype)
        for axis, rows in enumerate(_LOWER):
            for one, lower, factor in rows:
                slopes[..., axis, one] = factor * angular[..., lower]
        along = (slopes * unit[..., None]).sum(2, keepdim=True)
        slopes = (slopes - unit[..., None] * along) / self.length[..., None, None]
        radial, slope = self.radial.mT[:, :, None, :, None], self.slope.mT[:, :, None, :, None]
        found = radial * slopes[..., None, :]
        return found.addcmul_(slope * unit[..., None, None], angular[:, :, None, None])


def _graphs(
    structures: Sequence[Atoms], species: Sequence[int], cutoff: float
) -> Iterator[tuple[list[int], Graph]]:
    """Places of structures, and the graph of them, in batches."""
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for place, atoms in enumerate(structures):
        if not set(atoms.numbers) <= set(species):
            raise InputError(
                f"structure {place}: the polynomial potential was fitted to the atomic numbers"
                f" {', '.join(map(str, species))} and not to those of"
                f" {atoms.get_chemical_formula()}"
            )
        groups.setdefault((atoms.numbers.tobytes(), atoms.pbc.tobytes()), []).append(place)
    for places in groups.values():
        topology = find_topology([structures[place] for place in places], cutoff)
        each = topology.n_inside if topology else expected_pairs(structures[places[0]], cutoff)
        size = max(1, int(AT_ONCE // max(1.0, each)))
        for start in range(0, len(places), size):
            part = places[start : start + size]
            members = [structures[place] for place in part]
            if topology is None:
                graph = build_graph(members, cutoff, torch.float64)
            else:
                names = [f"structure {place}" for place in part]
                graph = topology.graph(members, cutoff, torch.float64, "cpu", names)
            yield part, graph


def fit(structures: Sequence[Atoms], found: Evaluation) -> PolynomialPotential:
    """The potential whose energies, forces and stresses (where there are any) are nearest to
    ``found``, of configurations of one supercell.

    Raises ``InputError`` for fewer than two structures, or other compositions.
    """
    if len(structures) < 2 or len({tuple(sorted(atoms.numbers)) for atoms in structures}) > 1:
        raise InputError("a polynomial potential is fitted to two or more cells of one composition")
    n = len(structures[0])
    species = sorted(set(structures[0].numbers.tolist()))
    cutoff = REACH * float(np.mean([atoms.get_volume() / n for atoms in structures]) ** (1 / 3))
    n_rows = len(structures) * (1 + 3 * n + len(_SIX) * has_stress(found))
    radial = next(
        (one for one in RADIAL if n_coefficients(len(species), one) * ROWS <= n_rows), RADIAL[-1]
    )
    energies = np.asarray(found.energy, dtype=float)
    rows, targets, by_energy = [], [], []
    for place, atoms in enumerate(structures):
        energy, forces, virial = _features(atoms, species, cutoff, radial)
        by_energy.append(energy)
        rows.append(forces)
        targets.append(np.asarray(found.forces[place], dtype=float).ravel())
        if has_stress(found):
            rows.append(virial[_SIX] / math.sqrt(n))
            stress = found.stress[place].ravel()[_SIX]
            targets.append(stress * atoms.get_volume() / math.sqrt(n))
    mean, level = np.mean(by_energy, axis=0), energies.mean()
    weight = ENERGY_WEIGHT / math.sqrt(n)
    matrix = np.concatenate([weight * (np.array(by_energy) - mean), *rows])
    target = np.concatenate([weight * (energies - level), *targets])
    coefficients = ridge(matrix, target)
    linear, quadratic = _unpacked(coefficients, len(species), radial)
    return PolynomialPotential(
        species, cutoff, float(level - mean @ coefficients) / n, linear, quadratic
    )


def n_coefficients(n_species: int, radial: int) -> int:
    """Of the potential with so many radial functions, without the shift."""
    width = n_species * radial
    return n_species * (width + (DEGREE + 1) * width * (width + 1) // 2)


def ridge(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Coefficients (k,) of least squares with a penalty on those of the scaled columns, its
    strength that of least generalised cross-validation (Golub, Heath, Wahba, Technometrics 21, 215
    (1979), doi:10.1080/00401706.1979.10489751)."""
    scale = np.sqrt(np.mean(matrix**2, axis=0))
    scale[scale == 0] = np.inf
    scaled = matrix / scale
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    values = values.clip(0.0)
    right = vectors.T @ (scaled.T @ target)
    n_rows, square = len(target), float(target @ target)

    def tried(strength: float) -> tuple[float, np.ndarray]:
        found = right / (values + strength)
        left = square - 2.0 * float(found @ right) + float(found**2 @ values)
        return left / (n_rows - float(np.sum(values / (values + strength)))) ** 2, found

    best = min((tried(part * values[-1]) for part in RIDGES), key=lambda one: one[0])
    return (vectors @ best[1]) / scale


def _features(
    atoms: Atoms, species: Sequence[int], cutoff: float, radial: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one structure: what the coefficients multiply in its energy (k,), forces (3 N, k) and
    virial (9, k), eV."""
    ((_, graph),) = _graphs([atoms], species, cutoff)
    shells = _Shell.all_of(graph, species, cutoff)
    bases = [_Basis(shell.vector, cutoff, radial) for shell in shells]
    moments = torch.cat([basis.moments() for basis in bases], 1)
    n, width, last = len(atoms), moments.shape[1], (DEGREE + 1) * moments.shape[1]
    # (N, M, columns): what a moment is multiplied with: those of its degree, and 1 if a scalar
    other = torch.zeros(n, len(_POWERS), last + 1, dtype=torch.float64)
    for degree, part in enumerate(_PARTS):
        block = slice(degree * width, (degree + 1) * width)
        other[:, part, block] = (moments[..., part] * _MULTIPLICITY[part]).mT
    other[:, 0, last] = 1.0
    kind = torch.searchsorted(torch.as_tensor(species), graph.numbers)
    energy = torch.zeros(len(species), width, last + 1, dtype=torch.float64)
    energy.index_add_(0, kind, moments @ other)
    energy[..., :last] *= 0.5
    forces = torch.zeros(n, 3, *energy.shape, dtype=torch.float64)
    virial = torch.zeros(3, 3, *energy.shape, dtype=torch.float64)
    for number, (shell, basis) in enumerate(zip(shells, bases, strict=True)):
        block, jacobian = slice(number * radial, (number + 1) * radial), basis.jacobian()
        for atom in range(n):
            slope = jacobian[atom] @ other[atom]
            at = int(kind[atom])
            forces[atom, :, at, block] += slope.sum(0)
            forces[:, :, at, block].index_add_(0, shell.neighbour[atom], slope, alpha=-1.0)
            one = shell.vector[atom].T @ slope.flatten(1)
            virial[:, :, at, block] += one.view(3, *slope.shape[1:])
    virial = 0.5 * (virial + virial.transpose(0, 1))
    return (
        _packed(energy).numpy(),
        _packed(forces.flatten(0, 1)).numpy(),
        _packed(virial.flatten(0, 1)).numpy(),
    )


def _packed(tensor: Tensor) -> Tensor:
    """(..., S, C, (`DEGREE` + 1) C + 1) to (..., k): the linear terms, and of the others those with
    p <= q."""
    width, lead = tensor.shape[-2], tensor.shape[:-3]
    parts = tensor[..., :-1].unflatten(-1, (-1, width)).transpose(-2, -3)
    first, second = torch.triu_indices(width, width)
    both = parts[..., first, second] + parts[..., second, first]
    return torch.cat([tensor[..., -1].reshape(*lead, -1), both.reshape(*lead, -1)], -1)


def _unpacked(
    coefficients: np.ndarray, n_species: int, radial: int
) -> tuple[np.ndarray, np.ndarray]:
    """``linear`` and ``quadratic`` of `PolynomialPotential`."""
    width = n_species * radial
    linear = coefficients[: n_species * width].reshape(n_species, width)
    first, second = np.triu_indices(width)
    quadratic = np.zeros((n_species, DEGREE + 1, width, width))
    rest = coefficients[linear.size :].reshape(n_species, DEGREE + 1, len(first))
    quadratic[:, :, first, second] = 0.5 * rest
    quadratic += quadratic.swapaxes(2, 3)
    return linear, quadratic
