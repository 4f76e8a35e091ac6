"""Standard errors of the squared frequencies of a Hessian, to first order in the noise of the averages.

A squared frequency is l = e+ (Phi + D R) e; a configuration c moves it by 2 Re(D_c R) (+ R D4_c R), averaged over the q
points and modes that symmetry makes equal. The auxiliary Phi is as uncertain as the curvature of an ensemble of this size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from magus_anharmonic.sscha.averages import standard_error
from magus_anharmonic.sscha.third_order import CHUNK
from magus_anharmonic.sscha.wavevectors import Samples, Wavevectors
from magus_anharmonic.units import HBAR

if TYPE_CHECKING:
    from magus_anharmonic.sscha.hessian import Hessian

DEGENERATE = 1e-6
"""Relative difference of squared frequencies that symmetry makes equal."""

Rows = Callable[[int], np.ndarray]
"""q -> R (3n, n_q, 3n, 3n) in auxiliary modes."""


def square_errors(found: Hessian, modes: Wavevectors, data: Samples, rows: Rows) -> np.ndarray:
    """(n_q, 3n) standard errors in eV^2 of ``found.squares``."""
    errors = np.zeros_like(found.squares)
    for star in np.unique(found.star):
        members = np.flatnonzero(found.star == star)
        computed = [q for q in members if modes.minus[q] >= q]
        cubic, auxiliary = np.zeros((2, len(data), found.squares.shape[1]))
        for q in computed:
            one, other = contributions(found, modes, data, int(q), rows(int(q)))
            cubic += one / len(computed)
            auxiliary += other / len(computed)
        for level in levels(found.squares[members[0]]):
            parts = [standard_error(values[:, level].mean(axis=1)) for values in (cubic, auxiliary)]
            errors[np.ix_(members, level)] = np.hypot(*parts) * HBAR**2
    return errors


def levels(squares: np.ndarray) -> list[np.ndarray]:
    """Indices of the modes of each degenerate level; ``squares`` ascending."""
    steps = np.diff(squares) > DEGENERATE * np.abs(squares).max()
    return np.split(np.arange(len(squares)), np.flatnonzero(steps) + 1)


def contributions(found: Hessian, modes: Wavevectors, data: Samples, q: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What every configuration says about every squared frequency at q: through D (and D4), and through Phi; (n, 3n) each."""
    into = modes.vectors[q].conj().T @ found.vectors[q]
    v, even, odd = (values[q] @ into.conj() for values in (data.scaled, data.even, data.odd))
    turned = np.tensordot(into.conj(), rows, axes=(0, 0))
    size = turned.shape[0]
    cubic = np.empty((len(data), size))
    step = max(1, CHUNK // (len(data) * size))
    for begin in range(0, size, step):
        part = slice(begin, begin + step)
        cubic[:, part] = _cubic(modes, data, q, turned[part], v[:, part], even[:, part], into[:, part], found.fourth_order)
    return cubic, -(v * odd.conj()).real


def _cubic(
    modes: Wavevectors, data: Samples, q: int, rows: np.ndarray, v: np.ndarray, even: np.ndarray, into: np.ndarray, fourth: bool
) -> np.ndarray:
    """-2/3 Re[f (vRv - YR)* + 2 v (fRv)* - 2 (Y f R)*], and -Re[(vRv - YR)* fRv - 2 (Rv)* Y (Rf)] for the fourth order."""
    stiffness = np.where(modes.moving, 1.0 / modes.variance, 0.0)
    shape = (len(data), len(rows))
    vv, fv, odd_v, fourth_part = (np.zeros(shape, dtype=data.scaled.dtype) for _ in range(4))
    for first in range(len(modes.points)):
        second = modes.third(q, first)
        block = rows[:, first].reshape(-1, rows.shape[-1]).T
        with_v = (data.scaled[second].conj() @ block).reshape(*shape, -1)
        vv += np.einsum("cm,clm->cl", data.scaled[first].conj(), with_v)
        fv += np.einsum("cm,clm->cl", data.even[first].conj(), with_v)
        if fourth:
            with_f = (data.odd[second].conj() @ block).reshape(*shape, -1)
            odd_v += np.einsum("cm,clm->cl", data.odd[first].conj(), with_v)
            fourth_part += np.einsum("clm,clm,m->cl", with_v.conj(), with_f, stiffness[first], optimize=True)
    if q == 0:
        vv = vv - np.einsum("lqii,qi->l", rows, stiffness)
    mean = data.even[0] @ np.einsum("lmn,nl,n->ml", rows[:, 0].conj(), into.conj(), stiffness[q], optimize=True)
    result = (even * vv.conj() + 2.0 * v * fv.conj() - 2.0 * mean).real * (-2.0 / 3.0)
    if fourth:
        result -= (vv.conj() * odd_v - 2.0 * fourth_part).real
    return result
