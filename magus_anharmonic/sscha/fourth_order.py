"""The fourth-order term of the free-energy Hessian, without the fourth-order tensor.

R = L (1 - D4 L)^-1 D3 (Bianco et al., PRB 96, 014111 (2017), Eq. 20) is solved for iteratively; D4 = <d4V> acts on a
matrix as an average over the ensemble, which costs N n^2 instead of the n^4 numbers of the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import LinearOperator, gmres

from magus_anharmonic.errors import SschaError
from magus_anharmonic.sscha.third_order import ThirdOrder
from magus_anharmonic.sscha.wavevectors import Representation, Samples, Wavevectors

TOLERANCE = 1e-12
"""Relative residual at which an equation is solved."""
ITERATIONS = 400


@dataclass(frozen=True)
class FourthOrder:
    """<d4V>, symmetric in its indices, under translations and under the space group, as an action on matrices.

    < (v_a v_b v_c - Y_ab v_c - Y_ac v_b - Y_bc v_a) f_d > with a minus sign, averaged over the places of f.
    """

    modes: Wavevectors
    data: Samples
    representation: Representation

    def apply(self, q: int, matrix: np.ndarray) -> np.ndarray:
        """D4 on ``matrix`` (n_q, 3n, 3n): entry q1 couples the modes at q1 and at -(q + q1); symmetric as a whole."""
        representation = self.representation
        if len(representation) == 1:
            return self._raw(q, matrix)
        total = np.zeros_like(matrix)
        seconds = [self.modes.third(q, first) for first in range(len(matrix))]
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
        modes, v, f = self.modes, self.data.scaled, self.data.odd
        count = len(self.data)
        seconds = [modes.third(q, first) for first in range(len(matrix))]
        stiffness = np.where(modes.moving, 1.0 / modes.variance, 0.0)
        with_v = np.stack([v[second].conj() @ block.T for second, block in zip(seconds, matrix, strict=True)])
        with_f = np.stack([f[second].conj() @ block.T for second, block in zip(seconds, matrix, strict=True)])
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
            block = left.T @ v[second] + v[first].T @ right - 2.0 * (f[first].T @ with_v[second] + with_v[first].T @ f[second])
            if q == 0:
                block -= 2.0 * vf.sum() * np.diag(stiffness[first])
            result[first] = block / (-4.0 * count)
        return result


def dressed_rows(fourth: FourthOrder, tensor: ThirdOrder, response: np.ndarray, q: int) -> np.ndarray:
    """R (3n, n_q, 3n, 3n) at one q: row, second q, modes there, modes at the third q; in the units of L D.

    Solved in the symmetric form (1 + S D4 S) y = S D3, S = sqrt(-L), R = -S y. Raises ``SschaError`` when that does not
    converge, which noise in D4 can cause.
    """
    modes = tensor.modes
    n_q, size = modes.quantum.shape
    root = np.stack([np.sqrt(-response[first, modes.third(q, first)]) for first in range(n_q)])
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
        solution, failed = gmres(operator, right, rtol=TOLERANCE, atol=0.0, restart=60, maxiter=max(1, ITERATIONS // 60))
        if failed:
            residual = float(np.linalg.norm(action(solution) - right) / np.linalg.norm(right))
            raise SschaError(f"include_v4: the equation of fourth order is not solved (residual {residual:.1e}); take more configurations")
        rows[row] = -root * solution.reshape(shape)
    return rows
