"""A linear potential for one phase, fitted in a second to a few dozen configurations of one
supercell and a twentieth of the price of a graph network: the surrogate of a sampling.

With v the vectors from atom i to its neighbours of species s within the cutoff,

    A_i(s, n, m) = sum_v R_n(|v|) Y_m(v / |v|),

R_n Gaussians of sqrt(r) times (1 - (r/rc)^2)^2, their centres from a little below the shortest pair
(molecules in a crystal are resolved too) to `LAST` of the cutoff, and Y_m the monomials x^a y^b z^c
of degree l = a + b + c up to `DEGREE` (the moment tensors of Shapeev, Multiscale Model. Simul. 14,
1153 (2016), doi:10.1137/15M1054183). The energy is

    E = N e_0 + sum_i [ sum_p c_p A_i(p, 0) + sum_l sum_pq Q^l_pq A_i(p) : A_i(q) ],

p = (s, n), with the full contraction of two tensors of rank l and coefficients of their own for
each species of atom i: all terms of two and three bodies up to these degrees. Terms of four bodies
made it no more accurate for Im-3m H3S, and a polynomial of second order in A costs matrix products
alone (docs/performance.md compares it with libraries). Energies, forces and stresses determine the
coefficients by ridge regression, whose strength is that of least generalised cross-validation.

`moments` works out the sums, compiled where the machine has a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluation, has_stress
from magus_anharmonic.io.digests import digest
from magus_anharmonic.potential.guards import cell_volume
from magus_anharmonic.potential.moments import (
    DEGREE,
    SIX,
    Coefficients,
    batches,
    features,
    shortest,
    sums,
)

RADIAL = (7, 5)
"""Numbers of radial functions: the first for which there are `ROWS` numbers for each coefficient,
or the last. 7 leave 0.9 of what 5 do and take twice the time to be fitted, 9 leave no less (60 and
100 configurations of 32 atoms): 70 take 7."""
ROWS = 8.0
REACH = 2.6
"""Cutoff over (V/N)^(1/3): 74 neighbours at any density, 4.0 A in H3S at 150 GPa."""
NEAREST = 0.8
"""Centre of the first radial function over the shortest pair that it is fitted to."""
ENERGY_WEIGHT = 10.0
"""Of an energy over sqrt(N) beside a force component; a stress counts as a virial over sqrt(N)."""
RIDGES = 10.0 ** np.arange(-12.0, 1.0, 0.5)
"""Strengths that are tried, of the largest eigenvalue."""


class PolynomialPotential:
    """An `Evaluator` for the species that it was fitted to; see the module.

    cutoff, first : A; shift : eV/atom; linear : (S, C) eV, by species of the atom, C = S n;
    quadratic : (S, `DEGREE` + 1, C, C) eV, symmetric.
    """

    relative_cost = 0.05
    """Of the price of an evaluation by the smallest graph network (32 atoms: 1.6 ms by torch, a
    fourth compiled, against 42): what SSCHA divides its samples by."""

    def __init__(
        self,
        species: Sequence[int],
        cutoff: float,
        first: float,
        shift: float,
        linear: np.ndarray,
        quadratic: np.ndarray,
    ) -> None:
        self.species, self.cutoff, self.first = list(species), cutoff, first
        self.shift, self.linear, self.quadratic = shift, linear, quadratic

    @cached_property
    def model_id(self) -> str:
        """Of the coefficients, twelve hexadecimal digits."""
        numbers = np.array([self.cutoff, self.first, self.shift]), self.linear, self.quadratic
        parts = [np.ascontiguousarray(part, dtype=float).tobytes() for part in numbers]
        return f"polynomial-{digest(bytes(self.species) + b''.join(parts))}"

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See `Evaluator`; configurations of one supercell share one neighbour list. Raises
        ``InputError`` for other species, coincident atoms and cells too skewed to be searched."""
        energy, stress = np.zeros(len(structures)), np.zeros((len(structures), 3, 3))
        forces = [np.zeros((len(atoms), 3)) for atoms in structures]
        of = self.species, self.cutoff, self.first, self.linear, self.quadratic
        coefficients = Coefficients(*of)
        for batch in batches(structures, self.species, self.cutoff):
            terms, pull, virial = sums(coefficients, batch)
            energy[batch.places] = terms + self.shift * pull.shape[1]
            volumes = np.array([cell_volume(atoms) for atoms in batch.structures])
            stress[batch.places] = virial / volumes[:, None, None]
            for place, one in zip(batch.places, pull, strict=True):
                forces[place] = one
        return Evaluation(energy, forces, stress)


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
    n_rows = len(structures) * (1 + 3 * n + len(SIX) * has_stress(found))
    radial = next(
        (one for one in RADIAL if n_coefficients(len(species), one) * ROWS <= n_rows), RADIAL[-1]
    )
    energies = np.asarray(found.energy, dtype=float)
    first = min(NEAREST * shortest(structures, species, cutoff), 0.5 * cutoff)
    by_energy, forces, virials = features(structures, species, cutoff, first, radial)
    mean, level = by_energy.mean(axis=0), energies.mean()
    weight = ENERGY_WEIGHT / math.sqrt(n)
    rows = [weight * (by_energy - mean), forces.reshape(-1, len(mean))]
    targets = [weight * (energies - level), np.array(found.forces, dtype=float).ravel()]
    if has_stress(found):
        volumes = np.array([atoms.get_volume() for atoms in structures]) / math.sqrt(n)
        rows.append(virials.reshape(-1, len(mean)) / math.sqrt(n))
        stresses = np.array(found.stress, dtype=float).reshape(-1, 9)[:, SIX]
        targets.append((stresses * volumes[:, None]).ravel())
    coefficients = ridge(np.concatenate(rows), np.concatenate(targets))
    linear, quadratic = _unpacked(coefficients, len(species), radial)
    return PolynomialPotential(
        species, cutoff, first, float(level - mean @ coefficients) / n, linear, quadratic
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
