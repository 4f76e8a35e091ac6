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

Averages of a trial state are reweighted (`Pool`), by matrix products over q points; nothing loops
over configurations. Formulas: Errea, Calandra, Mauri, PRB 89, 064302 (2014),
doi:10.1103/PhysRevB.89.064302; stress: Monacelli et al., PRB 98, 024106 (2018),
doi:10.1103/PhysRevB.98.024106. The same numbers as python-sscha on one population; several
populations of one cell are one sample of the mixture of their Gaussians (balance heuristic: Veach,
Guibas 1995, doi:10.1145/218380.218498). That pays: for an anharmonic eight-atom P1 cell the free
energy of the state that is found lies 4.5, 2.2 and 1.0 meV above the exact minimum with 1, 2 and 4
populations of 100 configurations used together, 1.1 meV with one of 400 (minimum of
`tests/sscha_models.py`'s AnharmonicCell); populations without overlap get no weight and do no harm.
Of ensembles of two levels (`ensemble`) each level is such a sample of its own, with weights
normalised by themselves; the populations of a pool are of one surrogate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np

from magus_anharmonic.errors import SschaError
from magus_anharmonic.sscha.ensemble import Ensemble, joined, variance_response
from magus_anharmonic.sscha.reciprocal import Reciprocal, Spectrum, without_translations
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR


@dataclass(frozen=True)
class Trial:
    """A point of the minimisation: ``shift`` (n, 3) A of the centroids from the pool's reference,
    D(q) in eV/A^2, its modes."""

    shift: np.ndarray
    matrices: np.ndarray
    spectrum: Spectrum


@dataclass(frozen=True)
class Reweighted:
    """What the pool says about a trial state.

    helmholtz : eV per primitive cell. weights :
    (n_configs,) density of the trial over that of the sample, and their `effective_sample`. force :
    (n, 3) eV/A on the centroids. curvature : (n_q, 3n, 3n) <d2V> - Phi, eV/A^2, not symmetrised.
    stress : (3, 3) eV/A^3, ASE's sign, symmetric.
    """

    helmholtz: float
    weights: np.ndarray
    effective_sample: float
    force: np.ndarray
    curvature: np.ndarray
    stress: np.ndarray


def effective_number(weights: np.ndarray) -> float:
    """Of how many configurations of equal weight the weighted ones (n,) are worth."""
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / squares if squares > 0.0 else 0.0


def effective_sample(weights: np.ndarray, level: np.ndarray) -> float:
    """The least part of a level's configurations that counts, times their number (n,); of one level
    `effective_number`."""
    if not level.any():
        return effective_number(weights)
    found = (weights[level == number] for number in (0, 1))
    return len(weights) * min(effective_number(own) / len(own) for own in found)


class Pool:
    """Evaluated populations of one cell and supercell, as one sample.

    Masses, temperature and reference centroids of what is asked about are those of ``target``, by
    default the last population's state.
    """

    def __init__(
        self, populations: Sequence[tuple[SschaState, Ensemble]], target: SschaState | None = None
    ) -> None:
        states, ensembles = zip(*populations, strict=True)
        self.reference = last = states[-1] if target is None else target
        self.reciprocal = Reciprocal(last.supercell_matrix)
        self.masses = last.atoms.get_masses()
        self.volume = last.supercell.get_volume()
        whole, root = joined(ensembles), np.sqrt(self.reciprocal.n_cells)
        offsets = [state.atoms.positions - last.atoms.positions for state in states]
        self.sizes = [len(ensemble.energies) for ensemble in ensembles]
        self.energies, self.stresses = whole.energies, whole.stresses
        self.level, levels = whole.level, range(1 + whole.two_level)
        self.rows = [np.flatnonzero(self.level == number) for number in levels]
        self.first = np.where(self.level == 0, 1.0, 0.0)
        """1 in the level where harmonic terms count."""
        self.mean_energy = float(self.energies[self.rows[0]].mean())
        moved = self.reciprocal.amplitudes(whole.displacements[0::2])
        self.half = moved[1:]
        gamma = moved[0].real
        own = np.repeat(np.stack(offsets), self.sizes, axis=0)
        flat = own.reshape(len(own), -1)
        self.gamma = np.stack([gamma, -gamma], axis=1).reshape(flat.shape) + root * flat
        transformed = self.reciprocal.amplitudes(whole.forces)
        self.gamma_forces = np.ascontiguousarray(transformed[0].real)
        self.forces = [np.ascontiguousarray(transformed[1:, sign::2]) for sign in (0, 1)]
        self.virials = np.matmul(whole.forces.transpose(0, 2, 1), whole.displacements)
        self.virials += np.matmul(
            self.gamma_forces.reshape(own.shape).transpose(0, 2, 1), root * own
        )
        # logarithm of the density from which the whole sample was drawn, up to the constant left
        # out in `Spectrum.log_volume`
        logs, counts = [], [[np.sum(one.level == k) for k in levels] for one in ensembles]
        for state, offset, count in zip(states, offsets, counts, strict=True):
            with np.errstate(divide="ignore"):
                parts = [np.log(n / len(rows)) for n, rows in zip(count, self.rows, strict=True)]
            spectrum = Spectrum.of(
                self.reciprocal.matrices(state.force_constants),
                state.atoms.get_masses(),
                self.reciprocal,
                state.temperature,
            )
            quadratic = self._quadratic(spectrum.precision, offset)[0]
            logs.append(np.array(parts)[self.level] - 0.5 * quadratic - spectrum.log_volume)
        self.log_density = np.logaddexp.reduce(np.stack(logs), axis=0)

    def _quadratic(
        self, matrices: np.ndarray, shift: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x M x of every configuration about the centroids at ``shift``, M x at Gamma, and M x of
        the +u at the other q."""
        about = self.gamma - np.sqrt(self.reciprocal.n_cells) * shift.ravel()
        at_gamma = about @ matrices[0].real
        elsewhere = self.half @ matrices[1:].transpose(0, 2, 1)
        products = (elsewhere * self.half.conj()).real.sum(axis=2)
        quadratic = np.einsum("ci,ci->c", at_gamma, about) + np.repeat(
            self.reciprocal.weights[1:] @ products, 2
        )
        return quadratic, at_gamma, elsewhere

    @cached_property
    def own(self) -> Trial:
        """The reference state itself."""
        return self.trial(
            np.zeros_like(self.reference.atoms.positions),
            self.reciprocal.matrices(self.reference.force_constants),
        )

    def trial(self, shift: np.ndarray, matrices: np.ndarray) -> Trial:
        """The trial state with these centroids and force constants."""
        return Trial(
            shift,
            matrices,
            Spectrum.of(matrices, self.masses, self.reciprocal, self.reference.temperature),
        )

    def effective_sample(self, trial: Trial) -> float:
        """Effective number of configurations for a trial state; much cheaper than everything else
        about it."""
        return effective_sample(self.weights(trial), self.level)

    def weights(self, trial: Trial, quadratic: np.ndarray | None = None) -> np.ndarray:
        """(n_configs,) density of the trial over that of the sample; up to a factor where their
        masses differ. ``quadratic`` : of its precision, where it is known."""
        if quadratic is None:
            quadratic = self._quadratic(trial.spectrum.precision, trial.shift)[0]
        return np.exp(
            np.minimum(-0.5 * quadratic - trial.spectrum.log_volume - self.log_density, 300.0)
        )

    def at(self, trial: Trial) -> Reweighted:
        """Weights, free energy, gradients and stress of a trial state."""
        n_cells, shift = self.reciprocal.n_cells, trial.shift
        quadratic, v_gamma, v_half = self._quadratic(trial.spectrum.precision, shift)
        weights = self.weights(trial, quadratic)
        twice_harmonic, h_gamma, h_half = self._quadratic(trial.matrices, shift)
        energies = self.energies - self.first * self.mean_energy
        excess = (energies - self.first * (0.5 * twice_harmonic)) / n_cells
        mean, share = 0.0, np.empty(len(weights))
        for rows in self.rows:
            total = weights[rows].sum()
            share[rows] = weights[rows] / total
            mean += float(weights[rows] @ excess[rows] / total)
        plus, minus = share[0::2, None], share[1::2, None]
        residual = self.gamma_forces + self.first[:, None] * h_gamma
        curvature = np.empty_like(trial.matrices)
        curvature[0] = -(v_gamma * share[:, None]).T @ residual
        pull = h_half * self.first[0::2, None]
        odd = plus * self.forces[0] - minus * self.forces[1] + (plus + minus) * pull
        curvature[1:] = -v_half.transpose(0, 2, 1) @ odd.conj()
        force = (share @ residual).reshape(-1, 3) / np.sqrt(n_cells)
        mean_force = (share @ self.gamma_forces).reshape(-1, 3) * np.sqrt(n_cells)
        virial = np.tensordot(share, self.virials, axes=1) - mean_force.T @ shift
        stress = (
            np.tensordot(share, self.stresses, axes=1) + 0.5 * (virial + virial.T) / self.volume
        )
        return Reweighted(
            helmholtz=trial.spectrum.free_energy + self.mean_energy / n_cells + mean,
            weights=weights,
            effective_sample=effective_sample(weights, self.level),
            force=force,
            curvature=curvature,
            stress=stress,
        )


def reweighted(
    own: SschaState, ensemble: Ensemble, state: SschaState
) -> tuple[Ensemble, np.ndarray]:
    """The ensemble of ``own`` as one about the centroids of ``state`` (the same cell), and the
    weights it has there."""
    pool = Pool([(own, ensemble)], target=state)
    shift = state.atoms.positions - own.atoms.positions
    about = replace(
        ensemble, displacements=ensemble.displacements - np.tile(shift, (state.n_cells, 1))
    )
    return about, pool.weights(pool.own)


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
USED_UP = 1.2
"""Times ``min_effective_sample``: below it a minimisation ended because of its sample."""
BISECTIONS = 3
"""Attempts to go as far as the sample allows."""


def minimise(
    populations: Sequence[Population],
    symmetry: Symmetry,
    *,
    min_effective_sample: float,
    log: Path | None = None,
    target: SschaState | None = None,
) -> Minimised:
    """Minimise F in centroids (where ``symmetry`` lets them move) and force constants at fixed cell
    on the populations that are of the last one's cell.

    Ends where the predicted decrease of a full step is less than `DECREASE`, or where
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
    memory = _Memory(_metric(pool.own.spectrum))
    n_steps, damping, converged = 1, 1.0, point.predicted_decrease < DECREASE * len(pool.masses)
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
        converged = point.predicted_decrease < DECREASE * len(pool.masses)
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
        force = symmetry.vectors(averages.force) * symmetry.movable
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


def _metric(spectrum: Spectrum) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Makes of a change of centroids and D(q) a vector whose square is about the predicted decrease
    of F of such a residual."""
    weights = spectrum.reciprocal.weights
    response = variance_response(spectrum.hbar_omega, spectrum.temperature)
    scale = np.sqrt(0.25 * response * (weights / weights.sum())[:, None, None])
    springs = np.where(spectrum.real[0], spectrum.hbar_omega[0] / HBAR, 0.0) * np.sqrt(0.5)
    centroid = (spectrum.vectors[0].real * spectrum.root_mass[:, None] * springs).T
    return lambda shift, matrices: _pack(
        centroid @ shift.ravel(), spectrum.in_modes(matrices) * scale
    )


class _Memory:
    """Anderson acceleration: the last changes of the trial, and how the residual (the plain step)
    changed with them."""

    def __init__(self, metric: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
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
    size = origin.shift.size
    shift = step[:size].reshape(origin.shift.shape)
    matrices = step[size:].view(origin.matrices.dtype).reshape(origin.matrices.shape)
    enough = min(needed, pool.effective_sample(origin))

    def at(part: float) -> Trial | None:
        trial = pool.trial(
            origin.shift + part * shift, without_translations(origin.matrices + part * matrices)
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

    def used_up(self, least: float) -> bool:
        """Whether it ended because of its sample; ``least`` : the ``min_effective_sample``."""
        return self.effective_sample < USED_UP * least


ENGINES = {
    "native": "magus_anharmonic.sscha.engines:minimise",
    "python-sscha": "magus_anharmonic.sscha.python_sscha:minimise",
}
"""Name in the settings -> where it is; imported when it is used."""


def engine(name: str) -> Callable[..., Minimised]:
    """The engine of that name."""
    module, function = ENGINES[name].split(":")
    return getattr(import_module(module), function)
