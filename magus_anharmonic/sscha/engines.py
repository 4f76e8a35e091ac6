"""The engines: who minimises the free energy on the ensembles at hand. One entry in `ENGINES` each.

An engine is a function ``(populations, symmetry, min_effective_sample=..., log=...) -> Minimised``
of the evaluated populations of one cell, oldest first; the minimisation starts from the state of
the last.

The engine ``native`` takes self-consistent steps on reweighted averages, with Anderson
acceleration. At the minimum the force on the centroids vanishes and the force constants equal the
average curvature <d2V> (Bianco et al., PRB 96, 014111 (2017), doi:10.1103/PhysRevB.96.014111). A
step is Phi + (<d2V> - Phi), R + Phi^-1 f: for weak anharmonicity Newton's, and what is missing is
learned from the steps before (Anderson 1965, doi:10.1145/321296.321305; the plain iteration
oscillates or diverges in double wells). Lengths are measured by the decrease of the free energy
that a residual predicts, so that eV/A^2 and Angstrom compare. A step that would make a mode
imaginary or soft by too much, or leave too few effective configurations, is shortened; once the
sample is used up there, the minimisation ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from magus_anharmonic.errors import SschaError
from magus_anharmonic.sscha.ensemble import Ensemble, variance_response
from magus_anharmonic.sscha.reciprocal import Spectrum, without_translations
from magus_anharmonic.sscha.reweight import Pool, Reweighted, Trial
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR

STEPS = 60
"""Most steps on one sample."""
DECREASE = 2e-7
"""eV/atom: a predicted decrease of the free energy below it ends the minimisation."""
HISTORY = 6
"""Steps that the acceleration remembers."""
SOFTEST = 0.1
"""Part of its lowest squared frequency that a step must leave."""
WORSE = 4.0
"""A step after which this many times the decrease is predicted was a bad one: back, and shorter
ones from there."""
SMALLEST_DAMPING = 0.1
SHORTEST = 0.003
"""Part of a step below which the sample counts as used up."""
BISECTIONS = 3
"""Attempts to go as far as the sample allows."""


def minimise(
    populations: Sequence[Population],
    symmetry: Symmetry,
    *,
    min_effective_sample: float,
    log: Path | None = None,
    decrease: float = DECREASE,
    target: SschaState | None = None,
) -> Minimised:
    """Minimise F in centroids and force constants at fixed cell on the populations that are of the
    last one's cell.

    Ends where the predicted decrease of a full step is less than ``decrease`` (eV/atom), or where
    the effective number of configurations falls to ``min_effective_sample`` times the size of the
    last population. ``log`` is not used. ``target``: where to start, perhaps with other masses than
    the populations (default: the last one's state). Raises ``SschaError`` when the averages of the
    very first state are not finite.
    """
    pool = Pool(populations, target)
    needed = min_effective_sample * pool.sizes[-1]
    point = first = _Point.at(pool, pool.own, symmetry)
    if not np.isfinite(point.predicted_decrease) or not pool.own.spectrum.lowest > 0:
        raise SschaError(
            "native: the free energy, its gradient or a frequency of the first state is not a"
            " usable number"
        )
    memory = _Memory(_Metric(pool.own.spectrum))
    n_steps, damping, converged = 1, 1.0, point.predicted_decrease < decrease * len(pool.masses)
    while not converged and n_steps < STEPS:
        trial, part = _shortened(pool, point.trial, damping * memory.step(point), needed)
        if trial is None and n_steps == 1:
            raise SschaError(
                "native: the effective sample size collapses with every step; more configurations"
                " may help"
            )
        if trial is None:
            break
        found = _Point.at(pool, trial, symmetry)
        n_steps += 1
        if (
            found.predicted_decrease > WORSE * point.predicted_decrease
            and damping > SMALLEST_DAMPING
        ):
            damping *= 0.5
            memory.forget()
            continue
        point = found
        converged = point.predicted_decrease < decrease * len(pool.masses)
        if part < 1.0:
            memory.forget()
            if point.averages.effective_sample < 1.1 * needed:
                break
    return _result(pool, first, point, symmetry, n_steps, converged)


@dataclass(frozen=True)
class _Point:
    """A trial, its averages, the symmetrised self-consistent step, and its predicted decrease (eV
    per primitive cell)."""

    trial: Trial
    averages: Reweighted
    shift_step: np.ndarray
    curvature: np.ndarray
    predicted_decrease: float

    @classmethod
    def at(cls, pool: Pool, trial: Trial, symmetry: Symmetry) -> _Point:
        averages = pool.at(trial)
        curvature = without_translations(averages.curvature)
        if len(symmetry) > 1:
            curvature = without_translations(
                pool.reciprocal.matrices(
                    symmetry.force_constants(pool.reciprocal.compact(curvature))
                )
            )
        force = symmetry.vectors(averages.force)
        shift_step = (_compliance(trial.spectrum) @ force.ravel()).reshape(-1, 3)
        inside = trial.spectrum.in_modes(curvature)
        response = variance_response(np.abs(trial.spectrum.hbar_omega), trial.spectrum.temperature)
        by_matrices = (
            float(pool.reciprocal.weights @ (np.abs(inside) ** 2 * response).sum(axis=(1, 2)))
            / 4.0
            / pool.reciprocal.n_cells
        )
        return cls(
            trial,
            averages,
            shift_step,
            curvature,
            by_matrices + 0.5 * float(np.vdot(force, shift_step)),
        )


def _compliance(spectrum: Spectrum) -> np.ndarray:
    """Inverse of the force constants at Gamma without the translations, (3n, 3n), A^2/eV."""
    squares = (spectrum.hbar_omega[0] / HBAR) ** 2
    scaled = spectrum.vectors[0].real / spectrum.root_mass[:, None]
    inverse = (scaled * np.where(spectrum.real[0], 1.0 / squares, 0.0)) @ scaled.T
    projector = np.eye(len(inverse)) - np.tile(np.eye(3), (len(inverse) // 3,) * 2) * (
        3.0 / len(inverse)
    )
    return projector @ inverse @ projector


def _pack(shift: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Centroids (n, 3) and D(q) as one real vector."""
    return np.concatenate([shift.ravel(), np.ascontiguousarray(matrices).view(float).ravel()])


def _unpack(vector: np.ndarray, like: Trial) -> tuple[np.ndarray, np.ndarray]:
    size = like.shift.size
    return vector[:size].reshape(like.shift.shape), vector[size:].view(like.matrices.dtype).reshape(
        like.matrices.shape
    )


class _Metric:
    """Makes of a packed change a vector whose square is about the predicted decrease of F of such a
    residual."""

    def __init__(self, spectrum: Spectrum) -> None:
        weights = spectrum.reciprocal.weights
        response = variance_response(spectrum.hbar_omega, spectrum.temperature)
        self._spectrum = spectrum
        self._scale = np.sqrt(0.25 * response * (weights / weights.sum())[:, None, None])
        springs = np.where(spectrum.real[0], spectrum.hbar_omega[0] / HBAR, 0.0) * np.sqrt(0.5)
        self._centroid = (spectrum.vectors[0].real * spectrum.root_mass[:, None] * springs).T

    def __call__(self, shift: np.ndarray, matrices: np.ndarray) -> np.ndarray:
        return _pack(
            self._centroid @ shift.ravel(), self._spectrum.in_modes(matrices) * self._scale
        )


class _Memory:
    """Anderson acceleration: the last changes of the trial, and how the residual (the plain step)
    changed with them."""

    def __init__(self, metric: _Metric) -> None:
        self._metric = metric
        self.forget()

    def forget(self) -> None:
        """Begin anew: the next step is a plain one."""
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._moves: list[np.ndarray] = []
        self._changes: list[np.ndarray] = []

    def step(self, point: _Point) -> np.ndarray:
        """The next step from ``point``, packed."""
        packed = _pack(point.trial.shift, point.trial.matrices)
        residual = _pack(point.shift_step, point.curvature)
        measured = self._metric(point.shift_step, point.curvature)
        if self._last is not None:
            before, residual_before, measured_before = self._last
            self._moves = [*self._moves, packed - before + residual - residual_before][-HISTORY:]
            self._changes = [*self._changes, measured - measured_before][-HISTORY:]
        self._last = packed, residual, measured
        if not self._changes:
            return residual
        factors = np.linalg.lstsq(np.stack(self._changes, axis=1), measured, rcond=1e-6)[0]
        return residual - np.tensordot(factors, np.stack(self._moves), axes=1)


def _shortened(
    pool: Pool, origin: Trial, step: np.ndarray, needed: float
) -> tuple[Trial | None, float]:
    """The step, or about the longest part of it that keeps the modes firm and enough of the sample;
    None when there is none."""
    change = _unpack(step, origin)
    enough = min(needed, pool.effective_sample(origin))

    def at(part: float) -> Trial | None:
        trial = pool.trial(
            origin.shift + part * change[0],
            without_translations(origin.matrices + part * change[1]),
        )
        firm = trial.spectrum.lowest > np.sqrt(SOFTEST) * origin.spectrum.lowest
        return trial if firm and pool.effective_sample(trial) >= enough else None

    best, part, too_long = at(1.0), 1.0, 1.0
    while best is None and part > SHORTEST:
        too_long, part = part, 0.5 * part
        best = at(part)
    for _ in range(BISECTIONS if best is not None and part < 1.0 else 0):
        middle = 0.5 * (part + too_long)
        longer = at(middle)
        best, part, too_long = (
            (longer, middle, too_long) if longer is not None else (best, part, middle)
        )
    return best, part


def _result(
    pool: Pool, first: _Point, last: _Point, symmetry: Symmetry, n_steps: int, converged: bool
) -> Minimised:
    atoms = pool.reference.atoms.copy()
    atoms.positions = atoms.positions + last.trial.shift
    compact = symmetry.force_constants(pool.reciprocal.compact(last.trial.matrices))
    return Minimised(
        state=replace(pool.reference, atoms=atoms, force_constants=compact),
        effective_sample=last.averages.effective_sample / pool.sizes[-1],
        decrease=first.averages.helmholtz - last.averages.helmholtz,
        stress=symmetry.tensor(last.averages.stress),
        fc_gradient=float(
            np.sqrt(pool.reciprocal.weights @ (np.abs(last.curvature) ** 2).sum(axis=(1, 2)))
        ),
        centroid_gradient=float(np.linalg.norm(last.shift_step)),
        n_steps=n_steps,
        converged=converged,
    )


Population = tuple[SschaState, Ensemble]


@dataclass(frozen=True)
class Minimised:
    """The state after the minimisation, and how it went.

    effective_sample : effective sample size at the end over the number of configurations of the
    last population; decrease : eV per primitive cell, on this sample; stress : (3, 3) eV/A^3 in
    ASE's sign, reweighted; fc_gradient, centroid_gradient : moduli of the preconditioned gradients
    (eV/A^2, A); converged : ended at its own criterion, not because the sample was used up.
    """

    state: SschaState
    effective_sample: float
    decrease: float
    stress: np.ndarray
    fc_gradient: float
    centroid_gradient: float
    n_steps: int
    converged: bool


class Engine(Protocol):
    """See the module."""

    def __call__(
        self,
        populations: Sequence[Population],
        symmetry: Symmetry,
        *,
        min_effective_sample: float,
        log: Path,
    ) -> Minimised: ...


ENGINES = {
    "native": "magus_anharmonic.sscha.engines:minimise",
    "python-sscha": "magus_anharmonic.sscha.python_sscha:minimise",
}
"""Name in the settings -> where it is; imported when it is used."""


def engine(name: str) -> Engine:
    """The engine of that name."""
    module, function = ENGINES[name].split(":")
    return getattr(import_module(module), function)
