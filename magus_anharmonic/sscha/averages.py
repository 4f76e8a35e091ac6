"""Averages over an ensemble that was drawn from the very state they describe: no weights, no bias.

Formulas: Errea, Calandra, Mauri, PRB 89, 064302 (2014), doi:10.1103/PhysRevB.89.064302; stress: Monacelli et al.,
PRB 98, 024106 (2018), doi:10.1103/PhysRevB.98.024106. Error bars are standard errors of +u/-u pair means, because
the two members of a pair are correlated; they do not contain the error of the energy surface or of the supercell.

Not used, because it was measured not to pay (AnharmonicCell of the tests, at its minimum): the harmonic energy as control
variate (V - V_0 is uncorrelated with every quadratic form there; (V_0 - <V_0>)^2 promises a tenth off the error bar, but the
scatter of 80 ensembles of 200 stays, so that it would only spoil the error bar); scrambled Sobol' numbers (from 8 scrambles,
which an error bar needs, the error of 256 pairs in 24 dimensions falls by 3 to 7 per cent, of 512 in 96 by 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magus_anharmonic.sscha.state import SschaState, expand, fold, variance
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR


@dataclass(frozen=True)
class Ensemble:
    """n configurations of the supercell, +u and -u next to each other.

    displacements (n, N, 3) A; energies (n,) eV; forces (n, N, 3) eV/A; stresses (n, 3, 3) eV/A^3, ASE's sign.
    """

    displacements: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    stresses: np.ndarray


@dataclass(frozen=True)
class Averages:
    """What one fresh ensemble says about its state.

    helmholtz, helmholtz_error : eV per primitive cell.
    stress, stress_error : (3, 3), eV/A^3, ASE's sign, symmetrised.
    force, position_error : (n, 3), force on the centroids in eV/A, and its standard error times the inverse of the
    force constants, in A.
    decrease : eV per primitive cell, predicted remaining decrease of the free energy by centroids and force constants; a run adds the
    cell's.
    """

    helmholtz: float
    helmholtz_error: float
    stress: np.ndarray
    stress_error: np.ndarray
    force: np.ndarray
    position_error: np.ndarray
    decrease: float


def joined(ensembles: Sequence[Ensemble]) -> Ensemble:
    """Ensembles of one state as one, in this order."""
    parts = zip(*(vars(ensemble).values() for ensemble in ensembles), strict=True)
    return Ensemble(*(np.concatenate(part) for part in parts))


def pair_means(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(n, ...) to (n/2, ...): the mean of each +u/-u pair.

    With ``weights`` (n,): numbers whose mean is sum(w x) / sum(w), and whose scatter is that of this ratio to first order.
    """
    if weights is None:
        return 0.5 * (values[0::2] + values[1::2])
    share = weights / weights.mean()
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    mean = (share * values).mean(axis=0)
    return mean + pair_means(share * (values - mean))


def standard_error(pairs: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; infinite for a single pair."""
    if len(pairs) < 2:
        return np.full(pairs.shape[1:], np.inf)
    return pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs))


def average(state: SschaState, ensemble: Ensemble, symmetry: Symmetry, weights: np.ndarray | None = None) -> Averages:
    """F = F_0 + <V - V_0>, stress = <sigma + f u / Omega>, gradients (Eqs. 5-8 of the paper) and their errors.

    ``weights`` (n,): density of the state over that from which the configurations were drawn; None: they were drawn from the state.
    """
    n_configs = len(ensemble.energies)
    u = ensemble.displacements.reshape(n_configs, -1)
    harmonic_forces = -u @ state.full
    harmonic_energies = -0.5 * np.einsum("ci,ci->c", u, harmonic_forces)
    excess = pair_means(ensemble.energies - harmonic_energies, weights) / state.n_cells
    volume = state.supercell.get_volume()
    virial = np.einsum("cai,caj->cij", ensemble.forces, ensemble.displacements) / volume
    stresses = pair_means(ensemble.stresses + 0.5 * (virial + virial.transpose(0, 2, 1)), weights)
    residual = ensemble.forces.reshape(n_configs, -1) - harmonic_forces
    centroid = residual.reshape(n_configs, state.n_cells, -1, 3).mean(axis=1)
    forces = symmetry.vectors(pair_means(centroid, weights))
    compliance = np.linalg.pinv(gamma_matrix(state), rcond=1e-9)
    force_error = standard_error(forces)
    return Averages(
        helmholtz=state.harmonic_free_energy + float(excess.mean()),
        helmholtz_error=float(standard_error(excess)),
        stress=symmetry.tensor(stresses.mean(axis=0)),
        stress_error=standard_error(symmetry.tensor(stresses)),
        force=forces.mean(axis=0),
        position_error=np.sqrt((compliance**2) @ (force_error.ravel() ** 2)).reshape(-1, 3),
        decrease=centroid_decrease(forces, compliance) + matrix_decrease(state, u, residual, symmetry, weights),
    )


def gamma_matrix(state: SschaState) -> np.ndarray:
    """Force constants for lattice-periodic displacements, (3n, 3n), eV/A^2 per primitive cell."""
    n = len(state.atoms)
    return state.force_constants.sum(axis=0).transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)


def centroid_decrease(forces: np.ndarray, compliance: np.ndarray) -> float:
    """1/2 f Phi^-1 f in eV per primitive cell from the pairs' forces (n_pairs, n, 3).

    The two factors come from the two halves of the ensemble, so that noise does not add up to a decrease.
    """
    if len(forces) < 2:
        return np.inf
    first, second = (forces[half::2].mean(axis=0).ravel() for half in (0, 1))
    return float(abs(0.5 * first @ compliance @ second))


def matrix_decrease(state: SschaState, u: np.ndarray, residual: np.ndarray, symmetry: Symmetry, weights: np.ndarray | None = None) -> float:
    """Decrease of F, eV per primitive cell, by a full self-consistent step of the force constants.

    With K = <d2V> - Phi in mass-weighted modes, dF = -1/4 sum K_mn^2 w_mn, where w is minus the divided difference of
    the variance with respect to omega^2; K^2 is the product of the two halves of the ensemble (`centroid_decrease`).
    """
    pairs = np.arange(len(u)) // 2
    if pairs[-1] < 1:
        return np.inf
    share = np.ones(len(u)) if weights is None else weights
    root = np.sqrt(np.repeat(state.supercell.get_masses(), 3))
    vectors = state.modes.vectors / root[:, None]
    quantum = state.modes.quantum
    halves = []
    for half in (0, 1):
        chosen = pairs % 2 == half
        part = share[chosen, None] / share[chosen].sum()
        curvature = -(part * (u[chosen] @ state.precision)).T @ residual[chosen]
        compact = symmetry.force_constants(fold(0.5 * (curvature + curvature.T), state.repeats))
        halves.append(vectors.T @ expand(compact, state.repeats) @ vectors)
    return float(abs(0.25 * np.sum(halves[0] * halves[1] * variance_response(quantum, state.temperature))) / state.n_cells)


def variance_response(quantum: np.ndarray, temperature: float) -> np.ndarray:
    """-(A(w1) - A(w2)) / (w1^2 - w2^2) for all pairs of modes (..., m), in A^2 amu / (eV/A^2/amu); the limit for equal ones."""
    first, second = np.broadcast_arrays(quantum[..., :, None], quantum[..., None, :])
    close = np.abs(first - second) < 1e-4 * first
    first = np.where(close, second * (1.0 + 1e-4), first)
    difference = variance(first, temperature) - variance(second, temperature)
    return -difference / ((first**2 - second**2) / HBAR**2)
