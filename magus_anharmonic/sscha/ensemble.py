"""Averages over samples of a state, and its entropy.

An ensemble that was drawn from the very state that it describes needs no weights and has no bias.
Formulas: Errea, Calandra, Mauri, PRB 89, 064302 (2014), doi:10.1103/PhysRevB.89.064302; stress:
Monacelli et al., PRB 98, 024106 (2018), doi:10.1103/PhysRevB.98.024106. Error bars are standard
errors of +u/-u pair means, because the two members of a pair are correlated; they do not contain
the error of the energy surface or of the supercell.

Entropy: F[rho; T] = <K + V>_rho - T S[rho] is stationary in rho, so that dF/dT = -S[rho], that of
the Gaussian density matrix (Hellmann-Feynman; the first paper), and at the relaxed cell dG/dT at
constant P is the same.

Two levels: averages are linear in V, f and sigma, so that those of the truth t are <X_t> = <X_s> +
<X_t - X_s> with any surrogate s: the first over a large sample (level 0, where the harmonic terms
count), the second over a small one (level 1), both of the same Gaussian, drawn independently
(control variate with an estimated mean; two levels of Giles, Acta Numerica 24, 259 (2015),
doi:10.1017/S096249291500001X). A surrogate that has not seen the configurations of level 1 costs
no bias, however wrong it is; variances add up.

Not used, because neither pays: the harmonic energy as control variate (V - V_0 is uncorrelated with
every quadratic form at the minimum), scrambled Sobol' numbers (3 to 7 per cent of the error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import ndtr, stdtrit

from magus_anharmonic.errors import InputError
from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.state import SschaState, expand, fold, variance
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR, KELVIN


def oscillator_entropy(hbar_omega: np.ndarray, temperature: float) -> np.ndarray:
    """k [x / (e^x - 1) - ln(1 - e^-x)] with x = hbar omega / kT, eV/K; zero at 0 K."""
    hbar_omega = np.asarray(hbar_omega, dtype=float)
    if temperature == 0:
        return np.zeros_like(hbar_omega)
    x = hbar_omega / (KELVIN * temperature)
    decay = np.exp(-x)
    return KELVIN * (x * decay / (-np.expm1(-x)) - np.log1p(-decay))


def entropy_slope(hbar_omega: np.ndarray, temperature: float) -> np.ndarray:
    """dS/d(omega^2) = -k x^2 / (8 omega^2 sinh^2(x/2)), eV/K per (eV/A^2/amu); zero at 0 K."""
    hbar_omega = np.asarray(hbar_omega, dtype=float)
    if temperature == 0:
        return np.zeros_like(hbar_omega)
    half = hbar_omega / (2.0 * KELVIN * temperature)
    with np.errstate(over="ignore"):
        return -KELVIN * (half / np.sinh(half)) ** 2 / (2.0 * (hbar_omega / HBAR) ** 2)


def entropy(state: SschaState) -> float:
    """Entropy of the auxiliary oscillators of the supercell, eV/K per atom; no finite-size term."""
    return float(oscillator_entropy(state.modes.hbar_omega, state.temperature).sum()) / len(
        state.supercell
    )


def entropy_with_error(
    state: SschaState, ensemble: Ensemble, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Entropy (eV/K per atom) of the self-consistent force constants that an ensemble of ``state``
    points to, and its standard error.

    The force constants of a state carry the noise of the ensembles it was minimised on. A fresh
    ensemble estimates what is left to the self-consistent ones, K = <d2V> - Phi (Eq. 7 of the
    paper), without that noise; to first order S changes by sum_m S'(omega_m^2) K_mm over the modes.
    One value per +u/-u pair gives mean and error. Left out: the answer of K to its own step, and
    the shift of the centroids, which is of second order. ``weights`` (n,): see `average`.
    """
    u, residual = ensemble.residual(state)
    vectors = state.patterns
    curvature = -((u @ state.precision) @ vectors) * (residual @ vectors)
    slope = entropy_slope(state.modes.hbar_omega, state.temperature)
    changes = pair_means(curvature @ slope, weights, ensemble.level) / len(state.supercell)
    return entropy(state) + float(changes.mean()), float(standard_error(changes))


BLOCKS = 10
"""Parts of an ensemble between which the square of a noisy matrix is taken."""
MISFIT = 0.2
"""Standard error of the predicted decrease by centroids and force constants, in parts of it: it
leaves out <d4V>."""
STIFFEST_REDUCTION = 0.9
"""Most of the auxiliary stiffness of a centroid that the third order takes away."""


@dataclass(frozen=True)
class Ensemble:
    """n configurations of the supercell, +u and -u next to each other.

    displacements (n, N, 3) A; energies (n,) eV; forces (n, N, 3) eV/A; stresses (n, 3, 3) eV/A^3,
    ASE's sign. level (n,) : 0, or 1 where the numbers are those of the truth minus those of the
    surrogate that level 0 is of (module docstring); all 0 where left out.
    """

    displacements: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    stresses: np.ndarray
    level: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        level = np.zeros(len(self.energies)) if self.level is None else self.level
        object.__setattr__(self, "level", np.asarray(level, dtype=np.int8))

    @property
    def two_level(self) -> bool:
        """Whether it is of a surrogate, and of the truth minus the surrogate."""
        return bool(self.level.any())

    @property
    def n_truth(self) -> int:
        """Configurations at which the truth was evaluated."""
        return int(self.level.sum()) if self.two_level else len(self.energies)

    def of_the_truth(self, where: str) -> Ensemble:
        """Itself; raises ``InputError`` that begins with ``where`` when it is of two levels."""
        if self.two_level:
            raise InputError(
                f"{where}: an ensemble of two levels (sscha.surrogate) is of no one energy surface;"
                " run with surrogate: none"
            )
        return self

    def part(self, chosen: np.ndarray | slice) -> Ensemble:
        """Some of the configurations, in the order of ``chosen``."""
        return Ensemble(*(values[chosen] for values in vars(self).values()))

    def residual(self, state: SschaState) -> tuple[np.ndarray, np.ndarray]:
        """Displacements (A) and forces beyond the harmonic ones of ``state`` (eV/A), (n, 3N)."""
        u = self.displacements.reshape(len(self.energies), -1)
        return u, self.forces.reshape(u.shape) + self.pull(state)

    def pull(self, state: SschaState) -> np.ndarray:
        """(n, 3N) Phi u, minus the harmonic forces of ``state``; in level 0 alone, eV/A."""
        pull = self.displacements.reshape(len(self.energies), -1) @ state.full
        pull[self.level > 0] = 0.0
        return pull

    def excess(self, state: SschaState, weights: np.ndarray | None = None) -> np.ndarray:
        """V - V_0 of the pairs (`pair_means`), eV per primitive cell; of level 1 alone, V - V_s."""
        pull = self.pull(state)
        harmonic = 0.5 * np.einsum("ci,ci->c", self.displacements.reshape(pull.shape), pull)
        return pair_means(self.energies - harmonic, weights, self.level) / state.n_cells


@dataclass(frozen=True)
class Averages:
    """What one fresh ensemble says about its state, and about the minimum that the state is near.

    helmholtz, helmholtz_error : eV per primitive cell, of the state. predicted_decrease : eV per
    primitive cell, by how much F (F + P V with a `CellStiffness`) lies above its minimum: an
    unbiased estimate, below zero by noise alone. minimum_error : standard error of helmholtz -
    predicted_decrease, what is not known of the stiffness included. stress, stress_error : (3, 3),
    eV/A^3, ASE's sign, symmetrised. force, force_error : (n, 3), on the centroids, eV/A. shift,
    position_error : (n, 3) A, from the centroids to the minimum, and its standard error;
    shift_covariance : (3n, 3n) A^2. excess, noise : (k,) eV/A^3 stress beyond the target's along
    the strains of the `CellStiffness`, centroids relaxed, and its covariance (k, k); strain,
    strain_error : (k,) the strain that removes it; empty without one.
    """

    helmholtz: float
    helmholtz_error: float
    predicted_decrease: float
    minimum_error: float
    stress: np.ndarray
    stress_error: np.ndarray
    force: np.ndarray
    force_error: np.ndarray
    shift: np.ndarray
    position_error: np.ndarray
    shift_covariance: np.ndarray
    excess: np.ndarray
    noise: np.ndarray
    strain: np.ndarray
    strain_error: np.ndarray


def joined(ensembles: Sequence[Ensemble]) -> Ensemble:
    """Ensembles of one state as one, in this order."""
    parts = zip(*(vars(ensemble).values() for ensemble in ensembles), strict=True)
    return Ensemble(*(np.concatenate(part) for part in parts))


def pair_means(
    values: np.ndarray, weights: np.ndarray | None = None, level: np.ndarray | None = None
) -> np.ndarray:
    """(n, ...) to (n/2, ...): the mean of each +u/-u pair.

    With ``weights`` (n,): numbers whose mean is sum(w x) / sum(w), and whose scatter is that of
    this ratio to first order. With ``level`` (n,) of two levels (two pairs or more of each):
    numbers whose mean is the sum of those of the levels, and whose scatter gives the covariance of
    this sum: what `standard_error`, `covariance_of_mean` and `quadratic_decrease` make of them is
    unbiased.
    """
    if level is not None and level.any() and not level.all():
        mean, pairs = 0.0, np.empty((len(values) // 2, *values.shape[1:]))
        for own in (level == 0, level > 0):
            found = pair_means(values[own], None if weights is None else weights[own])
            mean, pairs[own[0::2]] = mean + found.mean(axis=0), found
        return mean + level_deviations(pairs, level[0::2])
    if weights is None:
        return 0.5 * (values[0::2] + values[1::2])
    share = weights / weights.mean()
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    mean = (share * values).mean(axis=0)
    return mean + pair_means(share * (values - mean))


def level_deviations(values: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Of ``values`` (n, ...) from the mean of their own level (n,), times what makes them count as
    in the sum of the levels' means."""
    total, found = len(level), np.empty_like(values)
    for own in (level == 0, level > 0):
        n, part = int(own.sum()), values[own]
        scale = np.sqrt(total * (total - 1.0) / (n * (n - 1.0)))
        found[own] = scale * (part - part.mean(axis=0))
    return found


def _parts(level: np.ndarray, n_parts: int) -> list[list[np.ndarray]]:
    """The rows of ``n_parts`` parts, level by level: whole pairs, and a share of both levels."""
    rows = [np.flatnonzero(level == number) for number in range(int(level.max()) + 1)]
    return [list(part) for part in zip(*(_blocks(row, n_parts) for row in rows), strict=True)]


def _blocks(rows: np.ndarray, n_blocks: int) -> list[np.ndarray]:
    """``rows`` in blocks of whole pairs."""
    number = np.arange(len(rows)) // 2 % n_blocks
    return [rows[number == block] for block in range(n_blocks)]


def standard_error(pairs: np.ndarray, level: np.ndarray | None = None) -> np.ndarray:
    """Standard error of the mean over the first axis; infinite for a single pair. The few pairs of
    level 1 count by Student's distribution: ten do not know their scatter."""
    if len(pairs) < 2:
        return np.full(pairs.shape[1:], np.inf)
    if level is not None and level.any():
        own, mean = level[0::2] > 0, pairs.mean(axis=0)
        factor = stdtrit(own.sum() - 1, ndtr(1.0))
        pairs = np.concatenate([pairs[~own], mean + factor * (pairs[own] - mean)])
    return pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs))


def covariance_of_mean(pairs: np.ndarray) -> np.ndarray:
    """(k, k) covariance of the mean of (n_pairs, k); infinite for a single pair."""
    if len(pairs) < 2:
        return np.full((pairs.shape[1],) * 2, np.inf)
    deviations = pairs - pairs.mean(axis=0)
    return deviations.T @ deviations / (len(pairs) * (len(pairs) - 1))


def average(
    state: SschaState,
    ensemble: Ensemble,
    symmetry: Symmetry,
    weights: np.ndarray | None = None,
    cell: CellStiffness | None = None,
) -> Averages:
    """F = F_0 + <V - V_0>, stress = <sigma + f u / Omega>, gradients (Eqs. 5-8 of the paper), what
    they leave to fall, and the errors.

    ``weights`` (n,): density of the state over that from which the configurations were drawn; None:
        they were drawn from the state.
    ``cell``: how stiff the cell is, where it may change.
    """
    n_configs, level = len(ensemble.energies), ensemble.level
    u, residual = ensemble.residual(state)
    excess = ensemble.excess(state, weights)
    volume = state.supercell.get_volume()
    virial = np.einsum("cai,caj->cij", ensemble.forces, ensemble.displacements) / volume
    stresses = symmetry.tensor(
        pair_means(ensemble.stresses + 0.5 * (virial + virial.transpose(0, 2, 1)), weights, level)
    )
    centroid = residual.reshape(n_configs, state.n_cells, -1, 3).mean(axis=1)
    forces = symmetry.vectors(pair_means(centroid, weights, level)).reshape(len(excess), -1)
    compliance = centroid_compliance(state, u, residual, symmetry, weights, level)
    by_matrix, matrix_influence = matrix_decrease(state, u, residual, symmetry, weights, level)
    by_centroids, centroid_influence = quadratic_decrease(forces, compliance)
    inner, influence = by_matrix + by_centroids, matrix_influence + centroid_influence
    size = state.atoms.get_volume()
    parts, soft = np.zeros((len(excess), 0)), np.zeros((0, 0))
    if cell is not None:
        parts, soft = cell.relaxed_excess(stresses, forces @ compliance, size), cell.compliance
    by_cell, cell_influence = quadratic_decrease(parts, size * soft)
    influence = influence + cell_influence
    strain = -soft @ parts.mean(axis=0)
    misfit = 0.0 if cell is None else size * cell.misfit(strain)
    error_of = partial(standard_error, level=level)
    error = np.linalg.norm([float(error_of(excess - influence)), MISFIT * inner, misfit])
    return Averages(
        helmholtz=state.harmonic_free_energy + float(excess.mean()),
        helmholtz_error=float(error_of(excess)),
        predicted_decrease=inner + by_cell,
        minimum_error=float(error),
        stress=stresses.mean(axis=0),
        stress_error=error_of(stresses),
        force=forces.mean(axis=0).reshape(-1, 3),
        force_error=error_of(forces).reshape(-1, 3),
        shift=(compliance @ forces.mean(axis=0)).reshape(-1, 3),
        position_error=error_of(forces @ compliance).reshape(-1, 3),
        shift_covariance=covariance_of_mean(forces @ compliance),
        excess=parts.mean(axis=0),
        noise=covariance_of_mean(parts),
        strain=strain,
        strain_error=error_of(parts @ soft),
    )


def quadratic_decrease(gradients: np.ndarray, compliance: np.ndarray) -> tuple[float, np.ndarray]:
    """1/2 g C g of the true gradient g from the pairs' (n_pairs, k), and how each pair moves it,
    (n_pairs,).

    The mean over all products of two different pairs, so that noise does not add up to a decrease.
    """
    n_pairs = len(gradients)
    if n_pairs < 2:
        return np.inf, np.zeros(n_pairs)
    total = gradients.sum(axis=0)
    own = np.einsum("pi,ij,pj->", gradients, compliance, gradients, optimize=True)
    predicted_decrease = 0.5 * float(total @ compliance @ total - own) / (n_pairs * (n_pairs - 1))
    return predicted_decrease, (gradients - total / n_pairs) @ (compliance @ total) / n_pairs


def centroid_compliance(
    state: SschaState,
    u: np.ndarray,
    residual: np.ndarray,
    symmetry: Symmetry,
    weights: np.ndarray | None = None,
    level: np.ndarray | None = None,
) -> np.ndarray:
    """Inverse curvature of F along the centroid displacements that keep the symmetry, force
    constants relaxed, (3n, 3n) A^2/eV.

    The curvature is Phi + D L D (Bianco et al., PRB 96, 014111 (2017), Eq. 20,
    doi:10.1103/PhysRevB.96.014111): along a soft mode much less than Phi. D comes from the two
    halves of the ensemble, so that noise does not soften; no direction is taken for softer than
    `STIFFEST_REDUCTION` of its Phi leaves.
    """
    basis = symmetry.centroids()
    size = 3 * len(state.atoms)
    if basis.shape[1] == 0:
        return np.zeros((size, size))
    stiffness = basis.T @ state.gamma @ basis
    values, vectors = np.linalg.eigh(stiffness)
    scaled = basis @ vectors / np.sqrt(values)
    reduction = np.zeros((scaled.shape[1],) * 2)
    if len(u) >= 4:
        tiled = np.tile(scaled, (state.n_cells, 1))
        rows = _parts(np.zeros(len(u)) if level is None else level, 2)
        halves = _third_orders(state, u, residual, tiled, weights, rows)
        response = static_response(state.modes.hbar_omega, state.temperature)
        # -x (D L D) y of every two directions
        product = np.einsum("kij,lij,ij->kl", *halves, response, optimize=True)
        reduction = -0.5 * (product + product.T) / state.n_cells
    softer, turn = np.linalg.eigh(reduction)
    directions = scaled @ turn
    return (directions / (1.0 - np.clip(softer, 0.0, STIFFEST_REDUCTION))) @ directions.T


def curvature_along(state: SschaState, ensemble: Ensemble, unit: np.ndarray) -> tuple[float, float]:
    """Curvature of F, force constants relaxed, along a displacement ``unit`` (n, 3) of norm 1 of
    all cells; and its standard error.

    eV/A^2 per primitive cell. The error is that of the mean over `BLOCKS` parts of the ensemble,
    each against the others; fewer where a level has fewer pairs.
    """
    u, residual = ensemble.residual(state)
    stiffness = float(unit.ravel() @ state.gamma @ unit.ravel())
    direction = np.tile(unit.reshape(-1, 1) / np.sqrt(stiffness), (state.n_cells, 1))
    fewest = min(ensemble.n_truth, int((ensemble.level == 0).sum())) // 2
    rows = _parts(ensemble.level, min(BLOCKS, fewest) if ensemble.two_level else BLOCKS)
    parts = _third_orders(state, u, residual, direction, None, rows)[:, 0]
    response = static_response(state.modes.hbar_omega, state.temperature)
    # <d2V> of this very ensemble instead of the force constants, which come from another one
    own = -(u @ (state.precision @ direction))[:, 0] * (residual @ direction)[:, 0] / state.n_cells
    total = parts.sum(axis=0)
    mixed = [np.sum(part * (total - part) * response) for part in parts]
    against = np.array(mixed) / (len(parts) - 1) / state.n_cells
    linear = np.array([sum(own[chosen].mean() for chosen in part) for part in rows])
    error = float(standard_error(linear + 2.0 * against))
    return stiffness * float(1.0 + linear.mean() + against.mean()), stiffness * error


def _third_orders(
    state: SschaState,
    u: np.ndarray,
    residual: np.ndarray,
    directions: np.ndarray,
    weights: np.ndarray | None,
    rows: list[list[np.ndarray]],
) -> np.ndarray:
    """(n_parts, k, m, m): the third order along the columns of ``directions`` in modes, by the
    parts of the ensemble whose ``rows`` `_parts` gives."""
    vectors = state.patterns
    inside = u @ (state.precision @ vectors)
    forces = residual @ vectors
    along, along_u = residual @ directions, u @ (state.precision @ directions)
    share = np.ones(len(u)) if weights is None else weights
    stiffness = 1.0 / variance(state.modes.hbar_omega, state.temperature)
    metric = vectors.T @ state.precision @ directions
    parts: list[list[np.ndarray]] = []
    for levels in rows:
        chosen = np.concatenate(levels)
        part = np.concatenate([share[own, None] / share[own].sum() for own in levels])
        v, f = inside[chosen], forces[chosen]
        parts.append([])
        for force, u_along, row in zip(along[chosen].T, along_u[chosen].T, metric.T, strict=True):
            own = -(part * force[:, None] * v).T @ v
            crossed = -(part * u_along[:, None] * f).T @ v
            mean = np.outer(row, part[:, 0] @ f)
            constant = np.diag(stiffness) * float(part[:, 0] @ force) + mean + mean.T
            parts[-1].append((own + crossed + crossed.T) / 3.0 + constant / 3.0)
    return np.array(parts)


def matrix_decrease(
    state: SschaState,
    u: np.ndarray,
    residual: np.ndarray,
    symmetry: Symmetry,
    weights: np.ndarray | None = None,
    level: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Decrease of F, eV per primitive cell, by a full self-consistent step of the force constants,
    and how each pair moves it.

    With K = <d2V> - Phi in mass-weighted modes, dF = -1/4 sum K_mn^2 w_mn, where w is minus the
    divided difference of the variance with respect to omega^2; K^2 is the mean over the products of
    different blocks of the ensemble (`quadratic_decrease`), of two levels (K_0 + K_1)^2 with K_0^2
    and K_1^2 such means.
    """
    n_pairs = len(u) // 2
    if n_pairs < 2:
        return np.inf, np.zeros(n_pairs)
    vectors = state.patterns
    response = variance_response(state.modes.hbar_omega, state.temperature)
    scaled = u @ state.precision
    total, square = np.zeros(response.shape), 0.0
    for rows in _parts(np.zeros(len(u)) if level is None else level, 1)[0]:
        share = np.ones(len(u)) if weights is None else weights / weights[rows].mean()
        share = share / len(rows)
        mean, own, shares = np.zeros(response.shape), 0.0, 0.0
        for chosen in _blocks(rows, min(BLOCKS, len(rows) // 2)):
            curvature = -(share[chosen, None] * scaled[chosen]).T @ residual[chosen]
            compact = symmetry.force_constants(
                fold(0.5 * (curvature + curvature.T), state.supercell_matrix)
            )
            part = vectors.T @ expand(compact, state.supercell_matrix) @ vectors
            mean += part
            own += float(np.sum(part**2 * response))
            shares += float(share[chosen].sum()) ** 2
        square += (float(np.sum(mean * (mean * response))) - own) / (1.0 - shares)
        square += 2.0 * float(np.sum(total * mean * response))
        total += mean
    weighted = total * response
    predicted_decrease = 0.25 * square / state.n_cells
    slope = vectors @ weighted @ vectors.T
    pulls = np.einsum("ci,ci->c", scaled @ slope, residual)
    influence = -0.5 * pair_means(pulls, weights, level) / state.n_cells
    return predicted_decrease, influence - influence.mean()


def variance_response(hbar_omega: np.ndarray, temperature: float) -> np.ndarray:
    """-(A(w1) - A(w2)) / (w1^2 - w2^2) for all pairs of modes (..., m), in A^2 amu / (eV/A^2/amu);
    the limit for equal ones."""
    first, second = np.broadcast_arrays(hbar_omega[..., :, None], hbar_omega[..., None, :])
    close = np.abs(first - second) < 1e-4 * first
    first = np.where(close, second * (1.0 + 1e-4), first)
    difference = variance(first, temperature) - variance(second, temperature)
    return -difference / ((first**2 - second**2) / HBAR**2)


def static_response(hbar_omega: np.ndarray, temperature: float) -> np.ndarray:
    """-hbar^4/(4 w1 w2) [(n1 + n2 + 1)/(w1 + w2) - (n1 - n2)/(w1 - w2)] for all pairs of quanta in
    eV, Bose numbers n.

    Written so that equal quanta need no limit: n1 - n2 = -sinh(x) / (2 sinh(a) sinh(b)), a, b =
    w/2kT, x = a - b.
    """
    w1, w2 = hbar_omega[:, None], hbar_omega[None, :]
    if temperature == 0:
        return -(HBAR**4) / (4.0 * w1 * w2 * (w1 + w2))
    thermal = 2.0 * KELVIN * temperature
    a, b = np.maximum(w1, w2) / thermal, np.minimum(w1, w2) / thermal
    x = np.maximum(a - b, 1e-12)
    decay = -np.expm1(-2.0 * x) / x
    slope = decay * np.exp(-2.0 * b) / (np.expm1(-2.0 * a) * np.expm1(-2.0 * b)) / thermal
    occupied = 1.0 / np.expm1(2.0 * a) + 1.0 / np.expm1(2.0 * b) + 1.0
    return -(HBAR**4) / (4.0 * w1 * w2) * (occupied / (w1 + w2) + slope)
