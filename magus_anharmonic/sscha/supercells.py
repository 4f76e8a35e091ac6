"""Supercells as sublattices of the crystal's lattice: their cells, their q points, and which one to
take.

``supercell_matrix`` is either three repetitions or three rows of whole numbers, the vectors of the
supercell in those of the primitive cell. Both go through the Hermite normal form: the cells are the
remainders of lattice vectors by its rows, and the q points those of the transposed matrix (q.R is a
whole number for the rows R, so q = M^-1 m, and m counts modulo the columns of M).
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import gcd, lcm
from typing import Any

import numpy as np
from ase.geometry import minkowski_reduce

Three = tuple[int, int, int]
SupercellMatrix = Three | tuple[Three, Three, Three]

LARGEST_DENOMINATOR = 1000
"""Of the q points of a supercell that is read from files."""
COMPARED = 500
"""Most supercells of one size whose shapes are compared."""


def three(values: Iterable[Any]) -> Three:
    """Three whole numbers as plain integers."""
    first, second, third = (int(value) for value in values)
    return first, second, third


def as_supercell_matrix(values: Any) -> SupercellMatrix:
    """Three whole numbers, or three rows of them, as plain integers; a diagonal matrix as three
    numbers."""
    array = np.asarray(values)
    if array.ndim == 1:
        return three(array)
    if np.array_equal(array, np.diag(np.diag(array))) and np.all(np.diag(array) > 0):
        return three(np.diag(array))
    return three(array[0]), three(array[1]), three(array[2])


def is_diagonal(supercell_matrix: SupercellMatrix) -> bool:
    """Whether the supercell repeats the primitive cell along its own vectors."""
    return not isinstance(supercell_matrix[0], tuple)


@lru_cache(maxsize=256)
def shape_supercell_matrix(supercell_matrix: SupercellMatrix) -> np.ndarray:
    """(3, 3) whole numbers: rows are the vectors of the supercell in those of the primitive
    cell."""
    matrix = np.array(supercell_matrix, dtype=int)
    matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
    matrix.setflags(write=False)
    return matrix


def n_cells(supercell_matrix: SupercellMatrix) -> int:
    """Primitive cells in the supercell."""
    return abs(determinant(shape_supercell_matrix(supercell_matrix)))


def determinant(matrix: np.ndarray) -> int:
    """Determinant of a matrix of small whole numbers."""
    return int(np.rint(np.linalg.det(matrix)))


def adjugate(matrices: np.ndarray) -> np.ndarray:
    """(..., 3, 3) whole numbers: inverse times determinant."""
    scale = np.linalg.det(matrices)[..., None, None]
    return np.rint(np.linalg.inv(matrices) * scale).astype(int)


def hermite_form(rows: np.ndarray) -> np.ndarray:
    """Upper triangular basis (3, 3) with positive diagonal of the lattice of whole-number ``rows``
    (m, 3), unique."""
    left = [np.array(row, dtype=int) for row in rows]
    basis: list[np.ndarray] = []
    for axis in range(3):
        while True:
            left.sort(key=lambda row: abs(row[axis]) or np.inf)
            if len(left) < 2 or left[1][axis] == 0:
                break
            left[1:] = [row - row[axis] // left[0][axis] * left[0] for row in left[1:]]
        if not left or left[0][axis] == 0:
            raise ValueError(f"{np.asarray(rows).tolist()}: these vectors do not span a supercell")
        pivot = left.pop(0)
        basis.append(pivot if pivot[axis] > 0 else -pivot)
    for axis in (1, 2):
        for above in range(axis):
            basis[above] = basis[above] - basis[above][axis] // basis[axis][axis] * basis[axis]
    return np.array(basis)


@lru_cache(maxsize=256)
def _hermite(supercell_matrix: SupercellMatrix) -> np.ndarray:
    return hermite_form(shape_supercell_matrix(supercell_matrix))


def cell_offsets(supercell_matrix: SupercellMatrix) -> np.ndarray:
    """(n_cells, 3) whole-number lattice vectors of the cells of a supercell, the first one zero."""
    return np.array(list(np.ndindex(*np.diag(_hermite(supercell_matrix)))), dtype=int)


def cell_index(offsets: np.ndarray, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """Index of the cell at ``offsets`` (..., 3), folded into the supercell."""
    basis = _hermite(supercell_matrix)
    folded = np.array(offsets)
    for axis in range(3):
        folded -= (folded[..., axis] // basis[axis, axis])[..., None] * basis[axis]
    return (folded[..., 0] * basis[1, 1] + folded[..., 1]) * basis[2, 2] + folded[..., 2]


def dual(supercell_matrix: SupercellMatrix) -> SupercellMatrix:
    """What counts the q points of a supercell as ``supercell_matrix`` counts its cells."""
    return as_supercell_matrix(shape_supercell_matrix(supercell_matrix).T)


def fractional_points(numbers: np.ndarray, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """The q (..., 3), fractions of the reciprocal vectors, that whole ``numbers`` (..., 3)
    count."""
    matrix = shape_supercell_matrix(supercell_matrix)
    return np.asarray(numbers) @ adjugate(matrix).T / determinant(matrix)


def q_points(supercell_matrix: SupercellMatrix) -> np.ndarray:
    """(n_cells, 3) q points of a supercell in fractions of the reciprocal vectors, Gamma first."""
    return fractional_points(cell_offsets(dual(supercell_matrix)), supercell_matrix)


def q_index(q: np.ndarray, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """Index among `q_points` of fractional ``q`` (..., 3), up to reciprocal lattice vectors."""
    return cell_index(
        np.rint(np.asarray(q) @ shape_supercell_matrix(supercell_matrix).T).astype(int),
        dual(supercell_matrix),
    )


def compatible(rotation: np.ndarray, supercell_matrix: SupercellMatrix) -> bool:
    """Whether ``rotation`` (whole numbers, column convention) maps the lattice of the supercell
    onto itself."""
    matrix = shape_supercell_matrix(supercell_matrix)
    return bool(_kept(matrix[None], rotation, determinant(matrix))[0])


def short_basis(matrix: np.ndarray, cell: np.ndarray) -> SupercellMatrix:
    """The supercell of ``matrix`` as three numbers where it is diagonal, else by the shortest
    right-handed vectors in ``cell`` (A)."""
    basis = hermite_form(matrix)
    if np.array_equal(basis, np.diag(np.diag(basis))):
        return three(np.diag(basis))
    change = minkowski_reduce(basis @ cell)[1]
    reduced = np.rint(change @ basis).astype(int)
    return as_supercell_matrix(reduced if determinant(reduced) > 0 else -reduced)


def commensurate(q: np.ndarray, cell: np.ndarray) -> SupercellMatrix:
    """The smallest supercell that has all of ``q`` (m, 3; fractions of the reciprocal vectors of
    ``cell``) among its q points."""
    fractions = [
        [Fraction(float(value)).limit_denominator(LARGEST_DENOMINATOR) for value in point]
        for point in q
    ]
    common = lcm(*(value.denominator for point in fractions for value in point))
    rows = [[int(value * common) for value in point] for point in fractions]
    basis = hermite_form(np.array([*rows, *(common * np.eye(3, dtype=int)).tolist()]))
    return short_basis(common * adjugate(basis).T // determinant(basis), cell)


def symmetric_supercell(
    supercell_matrix: SupercellMatrix, rotations: np.ndarray, cell: np.ndarray
) -> SupercellMatrix:
    """The smallest supercell of ``supercell_matrix`` (or itself) that all ``rotations`` (m, 3, 3;
    whole numbers) map onto itself."""
    turned = [q_points(supercell_matrix) @ rotation for rotation in rotations]
    return commensurate(np.concatenate(turned), cell)


def containing_mesh(supercell_matrix: SupercellMatrix) -> Three:
    """The coarsest Gamma-centred mesh of q points along the reciprocal vectors that holds all of
    the supercell's."""
    matrix = shape_supercell_matrix(supercell_matrix)
    size = abs(determinant(matrix))
    return three(size // gcd(size, *row) for row in adjugate(matrix).tolist())


def smallest_supercell(
    cell: np.ndarray, rotations: np.ndarray, length: float, limit: SupercellMatrix
) -> SupercellMatrix:
    """The supercell of fewest cells, diagonal or not, without a lattice vector shorter than
    ``length`` (A), kept by ``rotations``.

    Of those of one size the most compact: the longest shortest vector, then the shortest sum of
    vectors. ``limit`` is the answer where there is none with fewer cells.
    """
    most = n_cells(limit)
    # no lattice is denser than the fcc one
    least = max(1, int(np.ceil(length**3 / np.sqrt(2.0) / abs(np.linalg.det(cell)) - 1e-6)))
    short = _shorter(cell, length)
    for size in range(least, most):
        found = kept_sublattices(size, rotations)
        if len(found):
            inside = np.all(short @ adjugate(found) % size == 0, axis=2)
            found = found[~inside.any(axis=1)]
        if len(found):
            return min(
                (short_basis(matrix, cell) for matrix in found[:COMPARED]),
                key=lambda supercell_matrix: _shape(supercell_matrix, cell),
            )
    return limit


def image_warning(cell: np.ndarray, cutoff: float | None) -> str:
    """One sentence when an atom of the supercell ``cell`` (A) feels its own image, else an empty
    string; ``cutoff`` of the model, A."""
    shortest = float(np.linalg.norm(minkowski_reduce(cell)[0], axis=1).min())
    if cutoff is None or shortest >= cutoff:
        return ""
    return (
        f"the supercell is too small for the model: atoms feel their own images, {shortest:.2f} A"
        f" away (cutoff {cutoff:g} A)"
    )


def _shape(
    supercell_matrix: SupercellMatrix, cell: np.ndarray
) -> tuple[float, float, tuple[int, ...]]:
    matrix = shape_supercell_matrix(supercell_matrix)
    lengths = np.linalg.norm(minkowski_reduce(matrix @ cell)[0], axis=1)
    return (
        -round(float(lengths.min()), 6),
        round(float(lengths.sum()), 6),
        tuple(matrix.ravel().tolist()),
    )


def _shorter(cell: np.ndarray, length: float) -> np.ndarray:
    """(m, 3) lattice vectors of ``cell`` other than zero that are shorter than ``length``."""
    reach = np.ceil(length * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int)
    vectors = np.array(list(product(*(range(-n, n + 1) for n in reach))))
    size = np.linalg.norm(vectors @ cell, axis=1)
    return vectors[(size > 1e-9) & (size < length - 1e-6)]


def sublattices(size: int) -> np.ndarray:
    """(m, 3, 3) all Hermite normal forms of one determinant: one basis for every sublattice of that
    index."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    forms = []
    for a, b in product(divisors, divisors):
        if size // a % b:
            continue
        c = size // a // b
        above = np.stack(np.meshgrid(range(b), range(c), range(c), indexing="ij"), axis=-1)
        some = np.zeros((b * c * c, 3, 3), dtype=int)
        some[:, range(3), range(3)] = a, b, c
        some[:, (0, 0, 1), (1, 2, 2)] = above.reshape(-1, 3)
        forms.append(some)
    return np.concatenate(forms)


def kept_sublattices(size: int, rotations: np.ndarray) -> np.ndarray:
    """Those of `sublattices` that all ``rotations`` map onto themselves, in the same order.

    A sublattice is the intersection of those of the prime powers of its index, each of which is
    kept where it is: of high symmetry a few, far fewer than there are of the whole index.
    """
    turning = [
        one for one in rotations if not np.array_equal(one[0, 0] * one, np.eye(3, dtype=int))
    ]
    if not turning or len(prime_powers := _prime_powers(size)) < 2:
        found = sublattices(size)
        for rotation in turning:
            found = found[_kept(found, rotation, size)]
        return found
    found, index = [np.eye(3, dtype=int)], 1
    for power in prime_powers:
        parts = kept_sublattices(power, rotations)
        found = [
            hermite_form(np.concatenate([power * one, index * part]))
            for one, part in product(found, parts)
        ]
        index *= power
    found.sort(key=lambda form: (*np.diag(form)[:2], *form[(0, 0, 1), (1, 2, 2)]))
    return np.array(found).reshape(-1, 3, 3)


def _prime_powers(size: int) -> list[int]:
    """The powers of different primes whose product ``size`` is."""
    powers, prime = [], 2
    while size > 1:
        power = 1
        while size % prime == 0:
            size, power = size // prime, power * prime
        if power > 1:
            powers.append(power)
        prime += 1
    return powers


def _kept(matrices: np.ndarray, rotation: np.ndarray, size: int) -> np.ndarray:
    """(m,) whether ``rotation`` maps each sublattice of index ``size`` onto itself."""
    return np.all(matrices @ np.asarray(rotation).T @ adjugate(matrices) % size == 0, axis=(1, 2))
