"""Moments of the neighbours of an atom, and what a polynomial of second order in them gives.

The functions behind `polynomial`, whose symbols these are: A and its derivatives, the energies,
forces and virials of a batch of structures (`sums`), and what the coefficients multiply there
(`features`). Both are compiled (``polynomial.c``, by `kernels`): a fifth of the time of torch's
forms, which are used where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.graph import (
    Graph,
    Topology,
    check,
    displacements,
    find_neighbours,
    find_topology,
)
from magus_anharmonic.potential.kernels import (
    address,
    agreeing,
    largest_difference,
    pointed,
    pointers,
    structure,
)

DEGREE = 3
LAST = 0.8
"""Centre of the last radial function over the cutoff."""
SHARP = 0.5
"""Minus the logarithm of a radial function at its neighbour's centre."""
AT_ONCE = 40_000
"""Pairs of a batch: what fits the cache of a processor."""
_AGREEMENT = 1e-10
_COINCIDENT = 2
"""What the compiled functions return where atoms coincide."""
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
SIX = [0, 4, 8, 5, 2, 1]
"""Of nine components of a symmetric tensor, those that differ."""


@dataclass(frozen=True)
class Coefficients:
    """species : atomic numbers, sorted; cutoff, first : A; linear : (S, C) eV, by species of the
    atom, C = S n; quadratic : (S, `DEGREE` + 1, C, C) eV, symmetric."""

    species: Sequence[int]
    cutoff: float
    first: float
    linear: np.ndarray
    quadratic: np.ndarray

    @property
    def radial(self) -> int:
        """Number of radial functions."""
        return self.linear.shape[1] // len(self.species)


@dataclass(frozen=True)
class Batch:
    """Structures that share the neighbours of a ``topology``, and their ``places`` in the list that
    they are of."""

    places: list[int]
    structures: list[Atoms]
    topology: Topology

    def graph(self) -> Graph:
        """Raises ``InputError`` where atoms coincide."""
        cutoff, names = self.topology.cutoff, [f"structure {place}" for place in self.places]
        return self.topology.graph(self.structures, cutoff, torch.float64, "cpu", names)


def batches(structures: Sequence[Atoms], species: Sequence[int], cutoff: float) -> Iterator[Batch]:
    """Raises ``InputError`` for other species, coincident atoms and cells too skewed to be
    searched."""
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
        size = max(1, AT_ONCE // max(1, topology.n_inside)) if topology else 1
        for start in range(0, len(places), size):
            part = places[start : start + size]
            members = [structures[place] for place in part]
            yield Batch(part, members, topology or _alone(members[0], cutoff, part[0]))


def _alone(atoms: Atoms, cutoff: float, place: int) -> Topology:
    check(atoms, name := f"structure {place}")
    found = find_neighbours(atoms, cutoff, name)
    arrays = map(torch.as_tensor, (found.centre, found.neighbour, found.vector))
    return Topology(atoms, cutoff, *arrays, len(found.length))


Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Energies (n,) without the shift, forces (n, N, 3) and virials (n, 3, 3) of a batch, eV and A."""
Features = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What the coefficients multiply in energies (n, k), forces (n, 3 N, k) and virials (n, 6, k) of
n structures of N atoms, eV."""


def sums(coefficients: Coefficients, batch: Batch) -> Sums:
    """Raises ``InputError`` where atoms coincide."""
    functions = _checked_functions()
    if functions is None:
        return _torch_sums(coefficients, batch)
    return _compiled_sums(functions, coefficients, batch)


def features(
    structures: Sequence[Atoms], species: Sequence[int], cutoff: float, first: float, radial: int
) -> Features:
    """See `Features`; for ``radial`` functions, ``first`` (A) the centre of the first."""
    functions, order, parts = _checked_functions(), [], []
    for batch in batches(structures, species, cutoff):
        order += batch.places
        if functions is None:
            parts.append(_torch_features(batch, species, first, radial))
        else:
            parts.append(_compiled_features(functions, batch, species, first, radial))
    back = np.argsort(order)
    energy, forces, virial = (np.concatenate(part)[back] for part in zip(*parts, strict=True))
    return energy, forces, virial


def shortest(structures: Sequence[Atoms], species: Sequence[int], cutoff: float) -> float:
    """Length of the shortest pair within the cutoff, A; the cutoff where there is none. Raises
    ``InputError`` where atoms coincide."""
    lengths = (
        torch.linalg.norm(batch.graph().vector, dim=1)
        for batch in batches(structures, species, cutoff)
    )
    return min((float(one.min()) for one in lengths if len(one)), default=cutoff)


def _torch_sums(coefficients: Coefficients, batch: Batch) -> Sums:
    graph = batch.graph()
    species, cutoff, radial = coefficients.species, coefficients.cutoff, coefficients.radial
    shells = _Shell.all_of(graph, species, cutoff)
    bases = [_Basis(shell.vector, cutoff, coefficients.first, radial) for shell in shells]
    moments = torch.cat([basis.moments() for basis in bases], 1)
    gradient, atomic = torch.empty_like(moments), torch.empty(len(moments), dtype=torch.float64)
    for number, one in enumerate(species):
        chosen = torch.nonzero(graph.numbers == one).view(-1)
        own = moments.index_select(0, chosen)
        found = torch.empty_like(own)
        for matrix, part in zip(
            torch.as_tensor(coefficients.quadratic[number]), _PARTS, strict=True
        ):
            found[..., part] = torch.matmul(matrix, own[..., part] * _MULTIPLICITY[part])
        linear = torch.as_tensor(coefficients.linear[number])
        of_terms = (own * found).sum((1, 2)) + own[..., 0] @ linear
        atomic.index_copy_(0, chosen, of_terms)
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
    return energy.numpy(), forces.view(n, -1, 3).numpy(), 0.5 * (virial + virial.mT).numpy()


def _torch_features(batch: Batch, species: Sequence[int], first: float, radial: int) -> Features:
    graph, cutoff = batch.graph(), batch.topology.cutoff
    shells = _Shell.all_of(graph, species, cutoff)
    bases = [_Basis(shell.vector, cutoff, first, radial) for shell in shells]
    moments = torch.cat([basis.moments() for basis in bases], 1)
    n, width, last = len(graph.numbers), moments.shape[1], (DEGREE + 1) * moments.shape[1]
    # (N, M, columns): what a moment is multiplied with: those of its degree, and 1 if a scalar
    other = torch.zeros(n, len(_POWERS), last + 1, dtype=torch.float64)
    for degree, part in enumerate(_PARTS):
        block = slice(degree * width, (degree + 1) * width)
        other[:, part, block] = (moments[..., part] * _MULTIPLICITY[part]).mT
    other[:, 0, last] = 1.0
    kind = torch.searchsorted(torch.as_tensor(species), graph.numbers)
    size = len(batch.structures), len(batch.structures[0])
    energy, forces, virial = _room(*size, len(species), width)
    energy.view(-1, width, last + 1).index_add_(
        0, graph.structure * len(species) + kind, moments @ other
    )
    energy[..., :last] *= 0.5
    for number, (shell, basis) in enumerate(zip(shells, bases, strict=True)):
        block, jacobian = slice(number * radial, (number + 1) * radial), basis.jacobian()
        for atom in range(n):
            slope = jacobian[atom] @ other[atom]
            at = int(kind[atom])
            forces[atom, :, at, block] += slope.sum(0)
            forces[:, :, at, block].index_add_(0, shell.neighbour[atom], slope, alpha=-1.0)
            one = shell.vector[atom].T @ slope.flatten(1)
            virial[int(graph.structure[atom]), :, :, at, block] += one.view(3, *slope.shape[1:])
    return _packed(energy, forces, 0.5 * (virial + virial.transpose(1, 2)))


def _room(n: int, n_atoms: int, n_species: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the terms of energies (n, S, C, (`DEGREE` + 1) C + 1), forces (n N, 3, ...) and
    virials (n, 3, 3, ...)."""
    shape = n_species, width, (DEGREE + 1) * width + 1
    return _zeros(n, *shape), _zeros(n * n_atoms, 3, *shape), _zeros(n, 3, 3, *shape)


def _packed(energy: Tensor, forces: Tensor, virial: Tensor) -> Features:
    """Of what has the shapes of `_room`; the upper half of the virial counts."""
    n = len(energy)
    every = energy, forces.view(n, -1, *energy.shape[1:]), virial.flatten(1, 2)[:, SIX]
    first, second, third = (_symmetric(one).numpy() for one in every)
    return first, second, third


def _symmetric(tensor: Tensor) -> Tensor:
    """(..., S, C, (`DEGREE` + 1) C + 1) to (..., k): the linear terms, and of the others those with
    p <= q."""
    width, lead = tensor.shape[-2], tensor.shape[:-3]
    parts = tensor[..., :-1].unflatten(-1, (-1, width)).transpose(-2, -3)
    first, second = torch.triu_indices(width, width)
    both = parts[..., first, second] + parts[..., second, first]
    return torch.cat([tensor[..., -1].reshape(*lead, -1), both.reshape(*lead, -1)], -1)


class _Basis:
    """``radial`` functions of the distance (B, n, K) and monomials (B, M, K) of ``vector`` (B, K,
    3)."""

    def __init__(self, vector: Tensor, cutoff: float, first: float, radial: int) -> None:
        length = torch.linalg.norm(vector, dim=2)
        self.length, self.unit = length, vector.mT / length[:, None]
        ends = math.sqrt(first), math.sqrt(LAST * cutoff)
        centres, root = torch.linspace(*ends, radial, dtype=vector.dtype), length.sqrt()
        sharp = SHARP / float(centres[1] - centres[0]) ** 2
        inside = (1.0 - (length / cutoff) ** 2).clamp_(min=0.0)[:, None]
        away = root[:, None] - centres[:, None]
        gauss = torch.exp(away.square().mul_(-sharp))
        gauss *= inside
        self.radial = gauss * inside
        away *= self.radial / root[:, None]
        self.slope = gauss.mul_(length[:, None] * (-4.0 / cutoff**2)).sub_(away, alpha=sharp)
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


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


_Shape = structure(
    "shape",
    **dict.fromkeys(("species", "radial"), ctypes.c_long),
    **dict.fromkeys(("cutoff", "first"), ctypes.c_double),
)
_Pairs = structure(
    "pairs",
    **dict.fromkeys(("n", "n_atoms", "threads"), ctypes.c_long),
    **pointers("first neighbour kind vector strain moved"),
)


def _call(
    function: Callable[..., int],
    batch: Batch,
    species: Sequence[int],
    first: float,
    radial: int,
    *arrays: Tensor,
) -> None:
    """A function of ``polynomial.c`` on a batch, with ``arrays`` after its structs."""
    topology, kinds = batch.topology, np.searchsorted(species, batch.topology.reference.numbers)
    sizes = torch.bincount(topology.centre, minlength=len(kinds))
    strain, moved = displacements(topology.reference, batch.structures)
    kept = [
        torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        topology.neighbour,
        *map(torch.as_tensor, (kinds, topology.vector.contiguous())),
        *map(torch.as_tensor, map(np.ascontiguousarray, (strain, moved))),
    ]
    counts = len(batch.structures), len(kinds), torch.get_num_threads()
    shape = _Shape(len(species), radial, topology.cutoff, first)
    pairs = _Pairs(*counts, *map(address, kept))
    failed = function(ctypes.byref(shape), ctypes.byref(pairs), *pointed(*arrays))
    if failed == _COINCIDENT:
        batch.graph()
    if failed:
        raise MemoryError("no memory for the neighbours of an atom")


def _compiled_sums(functions: ctypes.CDLL, coefficients: Coefficients, batch: Batch) -> Sums:
    n, arrays = len(batch.structures), (coefficients.linear, coefficients.quadratic)
    found = _zeros(n), _zeros(n, len(batch.structures[0]), 3), _zeros(n, 3, 3)
    given = (torch.as_tensor(np.ascontiguousarray(one)) for one in arrays)
    of = coefficients.species, coefficients.first, coefficients.radial
    _call(functions.polynomial_evaluate, batch, *of, *given, *found)
    energy, forces, virial = (one.numpy() for one in found)
    return energy, forces, virial


def _compiled_features(
    functions: ctypes.CDLL, batch: Batch, species: Sequence[int], first: float, radial: int
) -> Features:
    shape = len(batch.structures), len(batch.structures[0])
    found = _room(*shape, len(species), len(species) * radial)
    _call(functions.polynomial_features, batch, species, first, radial, *found)
    return _packed(*found)


@functools.cache
def _checked_functions() -> ctypes.CDLL | None:
    """See `agreeing`, once per process."""
    return agreeing("polynomial", disagreement, _AGREEMENT)


def disagreement(functions: ctypes.CDLL, seed: int = 0, radial: int = 5) -> float:
    """Largest difference between the compiled functions and torch's, relative to the largest number
    of an array, on random structures of two species; NaN counts as infinite."""
    rng, species, cutoff, first = np.random.default_rng(seed), [1, 16], 3.1, 0.6
    structures = [
        Atoms("HSH2", positions=rng.random((4, 3)) + 1.5 * np.eye(4, 3), cell=3 * np.eye(3), pbc=1)
        for _ in range(2)
    ]
    topology = find_topology(structures, cutoff) or _alone(structures[0], cutoff, 0)
    batch = Batch([0, 1], structures, topology)
    width = radial * len(species)
    linear, half = rng.normal(size=(2, width)), rng.normal(size=(2, DEGREE + 1, width, width))
    coefficients = Coefficients(species, cutoff, first, linear, half + half.swapaxes(2, 3))
    of = batch, species, first, radial
    ours = *_compiled_sums(functions, coefficients, batch), *_compiled_features(functions, *of)
    theirs = *_torch_sums(coefficients, batch), *_torch_features(*of)
    return largest_difference(map(torch.as_tensor, ours), map(torch.as_tensor, theirs))
