"""Averages of third and fourth order of an SSCHA state, by wave vector (Bianco, Errea, Paulatto,
Calandra, Mauri, PRB 96, 014111 (2017), doi:10.1103/PhysRevB.96.014111).

Third order, Eq. 21: D(x, y, z) = < (Y_yz - v_y v_z) f_x >, symmetric in all three, with v = Y u, Y
= <uu>^-1 and f the residual force. Only triples of wave vectors that add up to zero are computed,
one for each set of equal permutations and complex conjugates.

Fourth order, without its tensor: R = L (1 - D4 L)^-1 D3 (Eq. 20) is solved for iteratively; D4 =
<d4V> acts on a matrix as an average over the ensemble, which costs N n^2 instead of the n^4 numbers
of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import LinearOperator, gmres

from magus_anharmonic.errors import SschaError
from magus_anharmonic.sscha.reciprocal import Representation, Samples, Wavevectors

CHUNK = 2**21
"""Numbers in one intermediate array."""

Triple = tuple[int, int, int]


class ThirdOrder:
    """D in modes, eV/A^3/amu^1.5: ``block(q1, q2)`` is (3n, 3n, 3n) for the modes at q1, q2 and
    -(q1 + q2)."""

    def __init__(self, modes: Wavevectors, blocks: dict[Triple, np.ndarray]) -> None:
        self.modes = modes
        self.blocks = blocks

    def block(self, first: int, second: int) -> np.ndarray:
        """(3n, 3n, 3n) for the modes at q ``first``, ``second`` and the third that makes the sum
        zero."""
        return self.of((first, second, self.modes.third(first, second)))

    def of(self, triple: Triple) -> np.ndarray:
        """The same for three q whose sum is zero; a view where possible."""
        key, conjugate = canonical(triple, self.modes)
        wanted = tuple(int(self.modes.minus[q]) for q in triple) if conjugate else triple
        order = np.argsort(np.argsort(wanted, kind="stable"), kind="stable")
        block = self.blocks[key].transpose(order)
        return block.conj() if conjugate else block

    def symmetrised(self, representation: Representation) -> ThirdOrder:
        """Averaged over the operations of the space group."""
        if len(representation) == 1:
            return self
        done: dict[Triple, np.ndarray] = {}
        for key in self.blocks:
            if key in done:
                continue
            images: list[Triple] = [
                tuple(row) for row in representation.images[:, list(key)].tolist()
            ]
            average = np.zeros_like(self.blocks[key])
            for operation, image in enumerate(images):
                back = [representation.matrix(operation, q).conj().T for q in key]
                average += transformed(self.of(image), back)
            average /= len(representation)
            for operation, image in enumerate(images):
                name, conjugate = canonical(image, self.modes)
                if name not in done:
                    turned = transformed(
                        average, [representation.matrix(operation, q) for q in key]
                    )
                    wanted = [int(self.modes.minus[q]) for q in image] if conjugate else image
                    done[name] = (turned.conj() if conjugate else turned).transpose(
                        np.argsort(wanted, kind="stable")
                    )
        return ThirdOrder(self.modes, done)

    def mixed(self, other: ThirdOrder, own: float, others: float) -> ThirdOrder:
        """own * self + others * other."""
        return ThirdOrder(
            self.modes,
            {key: own * block + others * other.blocks[key] for key, block in self.blocks.items()},
        )


def canonical(triple: Triple, modes: Wavevectors) -> tuple[Triple, bool]:
    """The name under which a triple is kept, and whether that holds the complex conjugate."""
    own = tuple(sorted(triple))
    negative = tuple(sorted(int(modes.minus[q]) for q in triple))
    return (negative, True) if negative < own else (own, False)


def transformed(block: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Apply a matrix to each of the three indices."""
    for matrix in matrices:
        block = np.tensordot(block, matrix, axes=(0, 1))
    return block


def triples(modes: Wavevectors) -> Iterator[Triple]:
    """Every kept triple once."""
    for first in range(len(modes.points)):
        for second in range(first, len(modes.points)):
            triple = (first, second, modes.third(first, second))
            if triple[2] >= second and canonical(triple, modes) == (triple, False):
                yield triple


def third_order(ensemble: Samples) -> ThirdOrder:
    """The tensor of an ensemble, symmetric in its indices and under translations; see
    `ThirdOrder.symmetrised`."""
    modes = ensemble.modes
    return ThirdOrder(modes, {triple: _block(ensemble, triple) for triple in triples(modes)})


def _block(ensemble: Samples, triple: Triple) -> np.ndarray:
    """Minus the average of (f v v + v f v + v v f) / 3 plus the Y terms, by matrix products over
    slices of the second index."""
    v1, v2, v3 = (ensemble.scaled[q] for q in triple)
    f1, f2, f3 = (ensemble.even[q] for q in triple)
    count, size = v1.shape
    left = np.concatenate([f1, v1]).T / (-3.0 * count)
    block = np.empty((size, size, size), dtype=v1.dtype)
    step = max(1, CHUNK // (2 * count * size))
    for offset in range(0, size, step):
        part = slice(offset, offset + step)
        pairs = v2[:, part, None] * v3[:, None, :]
        crossed = f2[:, part, None] * v3[:, None, :]
        crossed += v2[:, part, None] * f3[:, None, :]
        right = np.concatenate([pairs, crossed]).reshape(2 * count, -1)
        block[:, part] = (left @ right).reshape(size, -1, size)
    # <Y_yz f_x> / 3 for each index at q = 0, where Y is diagonal
    force = ensemble.even[0].mean(axis=0) / 3.0
    for axis, q in enumerate(triple):
        if q == 0:
            stiffness = np.diag(ensemble.modes.precision[triple[(axis + 1) % 3]])
            block += np.moveaxis(force[:, None, None] * stiffness[None], 0, axis)
    return block


TOLERANCE = 1e-12
"""Relative residual at which an equation is solved."""
ITERATIONS = 400


@dataclass(frozen=True)
class FourthOrder:
    """<d4V>, symmetric in its indices, under translations and under the space group, as an action
    on matrices.

    < (v_a v_b v_c - Y_ab v_c - Y_ac v_b - Y_bc v_a) f_d > with a minus sign, averaged over the
    places of f.
    """

    data: Samples
    representation: Representation

    def apply(self, q: int, matrix: np.ndarray) -> np.ndarray:
        """D4 on ``matrix`` (n_q, 3n, 3n): entry q1 couples the modes at q1 and at -(q + q1);
        symmetric as a whole."""
        representation = self.representation
        if len(representation) == 1:
            return self._raw(q, matrix)
        total = np.zeros_like(matrix)
        seconds = [self.data.modes.third(q, first) for first in range(len(matrix))]
        for operation in range(len(representation)):
            image = representation.images[operation]
            turns = [representation.matrix(operation, first) for first in range(len(matrix))]
            turned = np.empty_like(matrix)
            for first, second in enumerate(seconds):
                turned[image[first]] = turns[first] @ matrix[first] @ turns[second].T
            found = self._raw(int(image[q]), turned)
            for first, second in enumerate(seconds):
                total[first] += turns[first].conj().T @ found[image[first]] @ turns[second].conj()
        return total / len(representation)

    def _raw(self, q: int, matrix: np.ndarray) -> np.ndarray:
        """The same before the space group."""
        modes, v, f = self.data.modes, self.data.scaled, self.data.odd
        count = len(self.data)
        seconds = [modes.third(q, first) for first in range(len(matrix))]
        stiffness = modes.precision
        with_v, with_f = (values[seconds].conj() @ matrix.transpose(0, 2, 1) for values in (v, f))
        vv = np.einsum("qci,qci->c", v.conj(), with_v, optimize=True)[:, None]
        vf = np.einsum("qci,qci->c", v.conj(), with_f, optimize=True)[:, None]
        if q == 0:
            vv = vv - np.einsum("qii,qi->", matrix, stiffness)
        with_v *= stiffness[:, None]
        with_f *= stiffness[:, None]
        result = np.empty_like(matrix)
        for first, second in enumerate(seconds):
            if second < first:
                result[first] = result[second].T
                continue
            left = 2.0 * vf * v[first] - 2.0 * with_f[first] + vv * f[first]
            right = vv * f[second] - 2.0 * with_f[second]
            block = (
                left.T @ v[second]
                + v[first].T @ right
                - 2.0 * (f[first].T @ with_v[second] + with_v[first].T @ f[second])
            )
            if q == 0:
                block -= 2.0 * vf.sum() * np.diag(stiffness[first])
            result[first] = block / (-4.0 * count)
        return result


def dressed_rows(fourth: FourthOrder, tensor: ThirdOrder, q: int) -> np.ndarray:
    """R (3n, n_q, 3n, 3n) at one q: row, second q, modes there, modes at the third q; in the units
    of L D.

    Solved in the symmetric form (1 + S D4 S) y = S D3, S = sqrt(-L), R = -S y. Raises
    ``SschaError`` when that does not converge, which noise in D4 can cause.
    """
    modes = tensor.modes
    n_q, size = modes.hbar_omega.shape
    response = [modes.response[first, modes.third(q, first)] for first in range(n_q)]
    root = np.sqrt(-np.stack(response))
    shape, dtype = root.shape, modes.vectors.dtype

    def action(vector: np.ndarray) -> np.ndarray:
        flat = vector.reshape(shape)
        return (flat + root * fourth.apply(q, root * flat)).ravel()

    operator = LinearOperator((root.size, root.size), matvec=action, dtype=dtype)
    rows = np.zeros((size, *shape), dtype=dtype)
    blocks = np.stack([tensor.block(q, first) for first in range(n_q)], axis=1)
    for row in range(size):
        right = (root * blocks[row]).ravel()
        if not np.any(right):
            continue
        solution, failed = gmres(
            operator, right, rtol=TOLERANCE, atol=0.0, restart=60, maxiter=max(1, ITERATIONS // 60)
        )
        if failed:
            raise SschaError(
                "include_v4: the equation of fourth order is not solved; take more configurations"
            )
        rows[row] = -root * solution.reshape(shape)
    return rows
