"""Entropy of an SSCHA state: that of its Gaussian density matrix, which is what -dG/dT is at the minimum.

F[rho; T] = <K + V>_rho - T S[rho] is stationary in rho, so that dF/dT = -S[rho] (Hellmann-Feynman; Errea, Calandra, Mauri, PRB 89,
064302 (2014), doi:10.1103/PhysRevB.89.064302), and at the relaxed cell dG/dT at constant P is the same.
"""

from __future__ import annotations

import numpy as np

from magus_anharmonic.sscha.averages import Ensemble, pair_means, standard_error
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.units import HBAR, KELVIN


def oscillator_entropy(quantum: np.ndarray, temperature: float) -> np.ndarray:
    """k [x / (e^x - 1) - ln(1 - e^-x)] with x = hbar omega / kT, eV/K; zero at 0 K."""
    quantum = np.asarray(quantum, dtype=float)
    if temperature == 0:
        return np.zeros_like(quantum)
    x = quantum / (KELVIN * temperature)
    decay = np.exp(-x)
    return KELVIN * (x * decay / (-np.expm1(-x)) - np.log1p(-decay))


def entropy_slope(quantum: np.ndarray, temperature: float) -> np.ndarray:
    """dS/d(omega^2) = -k x^2 / (8 omega^2 sinh^2(x/2)), eV/K per (eV/A^2/amu); zero at 0 K."""
    quantum = np.asarray(quantum, dtype=float)
    if temperature == 0:
        return np.zeros_like(quantum)
    half = quantum / (2.0 * KELVIN * temperature)
    with np.errstate(over="ignore"):
        return -KELVIN * (half / np.sinh(half)) ** 2 / (2.0 * (quantum / HBAR) ** 2)


def entropy(state: SschaState) -> float:
    """Entropy of the auxiliary oscillators of the supercell, eV/K per atom; no finite-size term."""
    return float(oscillator_entropy(state.modes.quantum, state.temperature).sum()) / len(state.supercell)


def entropy_with_error(state: SschaState, ensemble: Ensemble, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Entropy (eV/K per atom) of the self-consistent force constants that an ensemble of ``state`` points to, and its standard error.

    The force constants of a state carry the noise of the ensembles it was minimised on. A fresh ensemble estimates what is left to the
    self-consistent ones, K = <d2V> - Phi (Eq. 7 of the paper), without that noise; to first order S changes by sum_m S'(omega_m^2) K_mm
    over the modes. One value per +u/-u pair gives mean and error. Left out: the answer of K to its own step, and the shift of the
    centroids, which is of second order. ``weights`` (n,): see `averages.average`.
    """
    n_configs = len(ensemble.energies)
    u = ensemble.displacements.reshape(n_configs, -1)
    residual = ensemble.forces.reshape(n_configs, -1) + u @ state.full
    vectors = state.modes.vectors / np.sqrt(np.repeat(state.supercell.get_masses(), 3))[:, None]
    curvature = -((u @ state.precision) @ vectors) * (residual @ vectors)
    changes = pair_means(curvature @ entropy_slope(state.modes.quantum, state.temperature), weights) / len(state.supercell)
    return entropy(state) + float(changes.mean()), float(standard_error(changes))
