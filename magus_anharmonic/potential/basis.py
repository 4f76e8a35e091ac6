"""The functions of the edges on which M3GNet is built: R_ln(r), Y_lm and their three-body sum, as few tensor operations.

Plain torch operations: differentiable as often as needed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch

_DEGENERACY = (1, 3, 5, 7)
N_RADIAL = 4


def smooth_cutoff(length: torch.Tensor, cutoff: float) -> torch.Tensor:
    """f(r) = 1 - 6 x^5 + 15 x^4 - 10 x^3 with x = r / cutoff, and 0 beyond."""
    x = length / cutoff
    return torch.clamp(1 - x * x * x * (10 - x * (15 - 6 * x)), min=0.0)


def radial_functions(coefficients: torch.Tensor, factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """R_ln(r) at x = r / cutoff, (E, 16) with column 4 l + n, from the ``coef`` buffer of MatterSim's SphericalBasisLayer.

    Its closed forms of the spherical Bessel functions, ordered as S_l(1/x) sin(z_ln x) + C_l(1/x) cos(z_ln x).
    """
    c = coefficients.to(x.dtype)
    zero, one = torch.zeros_like(c[0, 0]), torch.ones_like(c[0, 0])
    roots = torch.cat([c[0, 0], c[1, 1], c[2, 1], c[3, 1]])
    by_power = [[one, zero, c[2, 0], zero], [zero, c[1, 2], zero, -c[3, 2]], [zero, zero, c[2, 4], zero], [zero, zero, zero, c[3, 6]]]
    sine = torch.stack([torch.cat(row) for row in by_power])
    by_power = [[zero, c[1, 0], zero, c[3, 0]], [zero, zero, -c[2, 2], zero], [zero, zero, zero, -c[3, 4]], [zero] * 4]
    cosine = torch.stack([torch.cat(row) for row in by_power])
    inverse = 1 / x
    square = inverse * inverse
    powers = torch.stack([inverse, square, square * inverse, square * square], 1)
    angle = x[:, None] * roots
    return factor * ((powers @ sine) * torch.sin(angle) + (powers @ cosine) * torch.cos(angle))


def spherical_harmonics(unit: torch.Tensor) -> torch.Tensor:
    """Real, orthonormal Y_lm of unit vectors (E, 3) for l = 0 to 3: (E, 16), ordered by l; polynomials of the components."""
    factors, first_order, second_order, third_order = (tuple(table.to(unit) for table in tables) for tables in _polynomials())
    second = (unit @ factors[0]) * (unit @ factors[1])
    third = (second @ factors[2]) * (unit @ factors[3])
    constant = torch.full_like(unit[:, :1], 0.5 / math.sqrt(math.pi))
    return torch.cat([constant, unit @ first_order[0], second @ second_order[0], third @ third_order[0]], 1)


@functools.cache
def _polynomials() -> tuple[tuple[torch.Tensor, ...], ...]:
    """Tables that make the monomials of degree 2 and 3 as products, and the coefficients of Y_1m, Y_2m and Y_3m in them.

    r^2 = 1 makes the polynomials homogeneous. Matrix products, because their derivatives are matrix products too.
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
    second = [{"xy": c2}, {"yz": c2}, {"zz": 2 * c3, "xx": -c3, "yy": -c3}, {"xz": c2}, {"xx": 0.5 * c2, "yy": -0.5 * c2}]
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


def _table(names: Sequence[str], columns: list[dict[str, float]]) -> torch.Tensor:
    """(names, columns): the coefficients of each column."""
    return torch.tensor([[column.get(name, 0.0) for column in columns] for name in names], dtype=torch.float64)


@functools.cache
def _spreading() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From (l, n) and from (l, m) to the 64 columns (l, n, m) as 0 and 1, (16, 64) each; and c_l of the 16 columns (l, n)."""
    by_radial, by_harmonic = torch.zeros(16, 64, dtype=torch.float64), torch.zeros(16, 64, dtype=torch.float64)
    column = 0
    for order, count in enumerate(_DEGENERACY):
        for n in range(N_RADIAL):
            for m in range(count):
                by_radial[4 * order + n, column] = by_harmonic[order * order + m, column] = 1.0
                column += 1
    normal = torch.tensor([math.sqrt(count / (4 * math.pi)) for count in _DEGENERACY], dtype=torch.float64).repeat_interleave(N_RADIAL)
    return by_radial, by_harmonic, normal


def threebody_sum(centre: torch.Tensor, n_atoms: int, cutoff: torch.Tensor, radial: torch.Tensor, harmonics: torch.Tensor) -> torch.Tensor:
    """B (E, 16) of the docstring of `magus_anharmonic.potential.model`, from f (E,), R_ln (E, 16) and Y_lm (E, 16) of the bonds."""
    by_radial, by_harmonic, normal = (table.to(radial) for table in _spreading())
    weighted = cutoff[:, None] * radial
    spread = harmonics @ by_harmonic
    density = torch.zeros(n_atoms, 64, dtype=radial.dtype, device=radial.device)
    density = density.index_add(0, centre, (weighted @ by_radial) * spread)
    # c_l * 4 pi / (2 l + 1) = 1 / c_l
    total = (density.index_select(0, centre) * spread) @ (by_radial.T / normal)
    return cutoff[:, None] * (total - normal * weighted)
