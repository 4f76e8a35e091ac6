"""Whether an ensemble from elsewhere is what it claims: finite, of pairs, drawn from its state at
its temperature, of one piece.

A sample tells its state: in every mode <Q^2> is the variance that phonon energy and temperature
give, u Psi^-1 u = 1 per mode, to 1/sqrt(pairs). So another temperature, other masses, or the
matrices that a minimisation led to instead of those that it began with, are seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import chi2

from magus_anharmonic.errors import InputError
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import SschaState, variance
from magus_anharmonic.units import BOHR, RYDBERG, ev_per_a3_to_gpa

log = logging.getLogger(__name__)

DOUBTFUL, SURE, SURE_OF_ONE = 1e-2, 1e-4, 1e-6
"""Probabilities below which a deviation is told, is none of chance over all modes, and is none of
chance in one mode."""
ENOUGH = 0.03
"""Part of the expected <u Psi^-1 u> by which it must be off to matter: it changes F by as small a
part of the anharmonic energy."""
SAME_POSITION = 1e-4
"""A."""
TEMPERATURES = np.concatenate([[0.0], np.geomspace(1.0, 2e4, 600)])
"""K, among which that of a sample is looked for."""
OUTLIER = 30.0
"""Robust standard deviations."""
HIGHEST_PRESSURE = 60.0
"""eV/A^3, 10 TPa."""
STEEPEST = 30.0
"""Of P V against the energy: a Grueneisen parameter of 15."""
STRANGE, IMPOSSIBLE = 1.6, 5.0
"""Factors between energies and -1/2 f u: a warning, and an end (quartic wells alone give 2)."""


def checked_ensemble(state: SschaState, ensemble: Ensemble, where: str) -> Ensemble:
    """The ensemble unwrapped, without drift, +u and -u next to each other; ``state`` is the one
    that drew it.

    Raises ``InputError`` that begins with ``where`` and says what is wrong, with the numbers (from
    1) of the configurations that are.
    """
    _require_finite(ensemble, where)
    u = _at_home(state, ensemble.displacements, where)
    order = _pairs(u, where)
    ensemble = replace(ensemble, displacements=u).part(order)
    require_sampled_from(state, ensemble.displacements, where)
    _require_one_surface(state, ensemble, order, where)
    problem = _stress_problem(state, ensemble)
    if problem:
        log.warning(
            "%s: its stresses are not used: %s; python-sscha keeps Ry/bohr^3, positive where the"
            " crystal is compressed",
            where,
            problem,
        )
        ensemble = replace(ensemble, stresses=np.full_like(ensemble.stresses, np.nan))
    return ensemble


def _stress_problem(state: SschaState, ensemble: Ensemble) -> str:
    """Why the stresses cannot be what they claim; empty where nothing says so.

    Of oscillators with the Grueneisen parameter gamma, P V changes by 2 gamma - 2/3 times the
    energy from one configuration to another (the atoms keep their fractional coordinates).
    """
    if not np.isfinite(ensemble.stresses).all():
        return ""
    pressures = -np.trace(ensemble.stresses, axis1=1, axis2=2) / 3.0
    if np.median(np.abs(pressures)) > HIGHEST_PRESSURE:
        return f"they are {ev_per_a3_to_gpa(np.median(pressures)):.2g} GPa, were they in GPa?"
    work = (pressures - pressures.mean()) * state.supercell.get_volume()
    energies = ensemble.energies - ensemble.energies.mean()
    norms = float(np.linalg.norm(work) * np.linalg.norm(energies))
    alike = float(work @ energies) / norms if norms > 0.0 else 0.0
    if abs(alike) < max(0.3, 5.0 / np.sqrt(len(work) / 2.0)):
        return ""
    slope = float(work @ energies) / float(energies @ energies)
    said = f"P V changes by {slope:.2g} of the change of the energy"
    if abs(slope) > STEEPEST:
        factors = {"eV/A^3": RYDBERG / BOHR**3, "GPa": ev_per_a3_to_gpa(RYDBERG / BOHR**3)}
        factors["kbar"] = 10.0 * factors["GPa"]
        unit = min(factors, key=lambda name: abs(np.log(abs(slope) / (2.0 * factors[name]))))
        return f"{said}, in crystals by -5 to 5: they are in another unit ({unit}?)"
    if slope < -0.3:
        return f"{said}, which falls in few crystals (those that shrink when heated): another sign?"
    return ""


def _require_finite(ensemble: Ensemble, where: str) -> None:
    for name, values in vars(ensemble).items():
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if name == "stresses" and not np.isfinite(values).any():
            continue  # there are none
        if not finite.all():
            raise InputError(f"{where}: {name} of {_listed(np.flatnonzero(~finite))}: not finite")


def _at_home(state: SschaState, displacements: np.ndarray, where: str) -> np.ndarray:
    """Displacements (n, N, 3) without the lattice vectors of wrapped atoms and without a shift of
    everything."""
    cell = state.supercell.cell.array
    shifts = np.round(displacements @ np.linalg.inv(cell))
    moved = np.flatnonzero(shifts.any(axis=(1, 2)))
    if len(moved):
        log.info(
            "%s: atoms of %d configurations were wrapped into the cell; taken back to their sites",
            where,
            len(moved),
        )
    masses = state.supercell.get_masses()
    u = displacements - shifts @ cell
    return u - (np.einsum("a,caj->cj", masses, u) / masses.sum())[:, None]


def _pairs(displacements: np.ndarray, where: str) -> np.ndarray:
    """(n,) order in which every configuration is followed by its mirror image."""
    flat = displacements.reshape(len(displacements), -1)
    points = flat @ np.random.default_rng(0).standard_normal((flat.shape[1], 3))
    tree = cKDTree(points)
    duplicates = tree.query(points, k=2)[1][:, 1] if len(points) > 1 else np.zeros(0, dtype=int)
    double = (
        np.flatnonzero(np.abs(flat[duplicates] - flat).max(axis=1) < SAME_POSITION)
        if len(duplicates)
        else duplicates
    )
    if len(double):
        raise InputError(f"{where}: {_listed(double)} are the same configuration")
    partner = tree.query(-points)[1]
    alone = np.flatnonzero(np.abs(flat[partner] + flat).max(axis=1) > SAME_POSITION)
    if len(alone):
        raise InputError(
            f"{where}: no mirror image -u (about the centroids of these dynamical matrices) of"
            f" {_listed(alone)}; averages are over pairs (python-sscha: generate(evenodd=True)),"
            " and a missing partner or another centroid spoils them"
        )
    first = np.flatnonzero(np.arange(len(partner)) < partner)
    return np.stack([first, partner[first]], axis=1).ravel()


def require_sampled_from(state: SschaState, displacements: np.ndarray, where: str) -> None:
    """Raise ``InputError`` unless pairs of displacements (n, N, 3) A have, mode by mode, the
    variances of ``state``.

    The message has the temperature that fits where one does.
    """
    if np.any(state.modes.hbar_omega <= 0):
        raise InputError(
            f"{where}: the dynamical matrices have imaginary modes; no ensemble can have been drawn"
            " from them"
        )
    root = np.sqrt(np.repeat(state.supercell.get_masses(), 3))
    squares = np.square(
        (displacements[0::2].reshape(len(displacements) // 2, -1) * root) @ state.modes.vectors
    ).mean(axis=0)
    n = len(displacements) // 2
    deviance = n * np.array(
        [
            np.sum(np.log(v := variance(state.modes.hbar_omega, t)) + squares / v)
            for t in TEMPERATURES
        ]
    )
    if _belongs(state.modes.hbar_omega, squares, n, state.temperature):
        likely = TEMPERATURES[deviance - deviance.min() < chi2.isf(0.05, 1)]
        log.info(
            "%s: its displacements fit %g K; by them alone it was made between %.0f and %.0f K"
            " (95 per cent)",
            where,
            state.temperature,
            likely[0],
            likely[-1],
        )
        _doubt(state, squares, n, where)
        return
    ratios = squares / variance(state.modes.hbar_omega, state.temperature)
    best = float(TEMPERATURES[int(np.argmin(deviance))])
    said = (
        f"{where}: was not drawn from these dynamical matrices at {state.temperature:g} K: <u"
        f" Psi^-1 u> is {ratios.mean():.2f} of what it should be, mode by mode {ratios.min():.2f}"
        f" to {ratios.max():.2f}"
    )
    if _belongs(state.modes.hbar_omega, squares, n, best):
        said = (
            f"{said}. {best:.0f} K would fit: give the temperature at which it was made"
            " (--temperature), if these matrices drew it"
        )
    else:
        said = (
            f"{said}. No temperature fits: these are not the matrices (or the masses) that drew it"
        )
    raise InputError(
        f"{said}; python-sscha draws ensemble N from dyn_gen_popN_, and dyn_popN_ is where it"
        " led to"
    )


def _doubt(state: SschaState, squares: np.ndarray, n: int, where: str) -> None:
    ratios = squares / variance(state.modes.hbar_omega, state.temperature)
    if _chance(n * ratios.sum(), n * len(ratios)) < DOUBTFUL and abs(ratios.mean() - 1.0) > ENOUGH:
        log.warning(
            "%s: <u Psi^-1 u> is %.2f of what it should be at %g K, hardly by chance: was it made"
            " at this temperature?",
            where,
            ratios.mean(),
            state.temperature,
        )


def _chance(value: float, degrees: int) -> float:
    """Probability that a chi squared is as far off, to either side."""
    return float(2.0 * min(chi2.sf(value, degrees), chi2.cdf(value, degrees)))


def _belongs(hbar_omega: np.ndarray, squares: np.ndarray, n: int, temperature: float) -> bool:
    """Whether ``squares``, means over n independent configurations, are those of oscillators at
    ``temperature`` (K)."""
    ratios = squares / variance(hbar_omega, temperature)
    by_mode = 2.0 * len(ratios) * np.minimum(chi2.sf(n * ratios, n), chi2.cdf(n * ratios, n))
    off = _chance(n * ratios.sum(), n * len(ratios)) < SURE and abs(ratios.mean() - 1.0) > ENOUGH
    return not off and not np.any((by_mode < SURE_OF_ONE) & (np.abs(ratios - 1.0) > 2.0 * ENOUGH))


def _require_one_surface(
    state: SschaState, ensemble: Ensemble, order: np.ndarray, where: str
) -> None:
    """Energies, forces and stresses that belong to the displacements, to each other, and to one
    energy surface in one unit."""
    u = ensemble.displacements.reshape(len(order), -1)
    work = -0.5 * np.einsum("ci,ci->c", ensemble.forces.reshape(len(order), -1), u)
    rest = ensemble.energies - work
    scale = max(_robust(rest), 0.05 * _robust(ensemble.energies), 1e-9)
    outside = np.flatnonzero(np.abs(rest - np.median(rest)) > OUTLIER * scale)
    if len(outside):
        raise InputError(
            f"{where}: energy and forces of {_listed(order[outside])} do not belong to the others"
        )
    strained = np.linalg.norm(ensemble.stresses - np.median(ensemble.stresses, axis=0), axis=(1, 2))
    outside = np.flatnonzero(strained > OUTLIER * max(float(np.median(strained)), 1e-9))
    if len(outside):
        raise InputError(
            f"{where}: the stresses of {_listed(order[outside])} do not belong to the others"
        )
    curvature = work.mean() / (
        0.5 * np.einsum("ci,ij,cj->c", u, state.full, u, optimize=True).mean()
    )
    if not 0.08 < curvature < 12.0:
        raise InputError(
            f"{where}: the forces are {curvature:.3g} times those of the dynamical matrices:"
            " another sign, another unit (they must be Ry/A, in text files Ry/bohr), or another"
            " order of atoms"
        )
    energies = ensemble.energies - ensemble.energies.mean()
    work = work - work.mean()
    alike = float(energies @ work / max(np.linalg.norm(energies) * np.linalg.norm(work), 1e-300))
    slope = float(energies @ work / max(work @ work, 1e-300))
    if len(order) >= 20 and (alike < 0.1 or not 1 / IMPOSSIBLE < slope < IMPOSSIBLE):
        raise InputError(
            f"{where}: the energies do not belong to the forces (they change by {slope:.3g} of -f"
            f" u/2, correlation {alike:.2f}): another order, another unit (Ry per supercell, Ry/A),"
            " or per cell instead of per supercell"
        )
    if len(order) >= 20 and not 1 / STRANGE < slope < STRANGE:
        log.warning(
            "%s: the energies change by %.2f of -f u/2 (1 if harmonic): strongly anharmonic, or"
            " forces in another unit",
            where,
            slope,
        )


def _robust(values: np.ndarray) -> float:
    """Standard deviation of the bulk of the values, from their median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _listed(indices: Iterable[int]) -> str:
    """``configurations 3, 8, 9 ... (12 in all)``, counted from 1."""
    numbers = sorted(int(index) + 1 for index in indices)
    more = f" ... ({len(numbers)} in all)" if len(numbers) > 4 else ""
    return (
        f"configuration{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:4]))}{more}"
    )
