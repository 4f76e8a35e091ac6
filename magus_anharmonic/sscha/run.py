"""One SSCHA run, population by population: for whoever decides after each one whether it deserves more.

Every population is a fresh ensemble of the state it was drawn from, so that its averages are free of the bias of the
minimisation: that bias (low, by about free parameters over configurations) shows in no error bar.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.averages import Averages, Ensemble, average, joined
from magus_anharmonic.sscha.begin import begin_run, state_digest
from magus_anharmonic.sscha.engines import Minimised, Population, engine
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.run_folder import RunFolder
from magus_anharmonic.sscha.start import (
    LARGEST_AMPLITUDE_LATER,
    VOIGT,
    CountingEvaluator,
    Start,
    cell_decrease,
    floor_modes,
    nearest_neighbour,
    strain_towards,
)
from magus_anharmonic.sscha.state import SschaState, displaced, sample
from magus_anharmonic.sscha.summary import finished_result, gibbs_energy
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import EV_PER_A3_IN_GPA

log = logging.getLogger(__name__)

SAMPLING_TAG = 7319
"""Separates the random numbers of the ensembles from those of other purposes with the same seed."""
VOLUME_LIMITS = (0.5, 2.0)
"""Volume over that of the start, outside of which a run has failed."""
NEIGHBOUR_LIMITS = (0.55, 1.6)
"""Nearest-neighbour distance of an atom over that at the start, outside of which a run has failed."""
NOT_OF_A_RUN = (
    "temperature", "when", "max_candidates", "window", "seed_back", "allocation", "confidence", "keep_best", "budget", "hessian"
)  # fmt: skip
"""Keys of `SschaSettings` that choose among runs, or stand in `Task` by themselves."""
TOGETHER = 8
"""Most populations of one cell that a minimisation uses."""
KEEP_CELL = 0.3
"""Part of ``pressure_tolerance``: with less excess stress than that, or less than its error, the cell stays (a step would
follow noise), and the populations can be used together."""
APPROACH = 0.25
"""Part of ``n_configs`` of a population that only shows the way: the first, and those after a minimisation that used its
sample up before it got to the minimum."""
SMALLEST_APPROACH = (20, 100)
"""Least configurations of such a population, where ``n_configs`` allows: 12 for every atom of the cell without symmetry (a
force component has to determine an eighth of a force constant), divided by the operations; not outside of these two."""
USED_UP = 1.2
"""Times ``min_effective_sample``: a minimisation that ended below it ended because of its sample."""


@dataclass(frozen=True)
class Task:
    """What to compute: a validated, immutable request."""

    atoms: Atoms
    pressure: float
    temperature: float
    settings: SschaSettings
    seed: int
    masses: Mapping[str, float] | None
    start: SschaState | None
    model_id: str

    def identity(self) -> dict[str, Any]:
        """Everything on which the numbers depend; two runs with the same identity are the same run."""
        ignored = {*NOT_OF_A_RUN, "max_populations", "error_tolerance"}
        return {
            "structure": structure_id(self.atoms),
            "formula": self.atoms.get_chemical_formula(),
            "model": self.model_id,
            "pressure": self.pressure,
            "temperature": self.temperature,
            "seed": self.seed,
            "masses": dict(self.masses or {}),
            "start": None if self.start is None else state_digest(self.start),
            "sscha": self.settings.model_dump(mode="json", exclude=ignored),
        }


@dataclass
class Progress:
    """Mutable record of a run: the table of ``convergence.csv``, and the free energies so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    gibbs: list[tuple[float, float]] = field(default_factory=list)
    n_evaluations: int = 0


class SschaRun:
    """A run that can be stopped after any population and finished, or left and taken up again from its folder.

    state : that of the last population (before the first: the start). averages : of the last population. reason : why the
    last population does not end the run, empty when it does. progress : the table and the free energies so far.
    """

    def __init__(self, task: Task, evaluator: Evaluator, folder: RunFolder, progress: Progress | None = None) -> None:
        """Read the start from the folder, or work it out. Raises ``InputError`` and ``SschaError`` as `begin_run` does."""
        self._began = time.perf_counter()
        self.task, self.folder = task, folder
        self._evaluator = evaluator
        self.progress = progress if progress is not None else Progress()
        self.start = self._begin()
        self.progress.n_evaluations = self.start.n_evaluations
        self.state = self.start.state
        self.symmetry = Symmetry(self.state.atoms, self.state.repeats)
        self.averages: Averages | None = None
        self.reason = "no population yet"
        self._response = self.start.stress_response
        self._populations: list[Population] = []
        self._predicted: tuple[np.ndarray, np.ndarray] | None = None
        self._promised = 0.0
        self._far = task.start is None
        self._approach = False
        self._size = 0

    def _usual_size(self) -> int:
        """Configurations of the next population: fewer while they only show the way."""
        settings = self.task.settings
        full, most = settings.configurations(self.n_populations + 1), settings.n_configs
        least = int(np.clip(12 * len(self.state.atoms) / len(self.symmetry), *SMALLEST_APPROACH))
        return 2 * (min(full, max(int(APPROACH * most), least)) // 2) if self._approach else full

    @property
    def n_populations(self) -> int:
        return len(self.progress.rows)

    @property
    def converged(self) -> bool:
        """Whether the last population meets every criterion of `SschaSettings`."""
        return not self.reason

    @property
    def precise(self) -> bool:
        """Whether the sampling error of G is as small as ``error_tolerance`` asks."""
        tolerance = self.task.settings.error_tolerance
        return tolerance is None or (bool(self.progress.gibbs) and self.progress.gibbs[-1][1] <= tolerance)

    def advance(self, n_configs: int | None = None) -> dict[str, Any]:
        """Minimise on the populations so far, then draw and average the next one, of ``n_configs`` (default: as many as the settings say).

        A run that has converged stays where it is: the next population is one more of the same state, and is averaged with
        the last, so that the error of G falls. Returns its row of ``convergence.csv``. Raises ``SschaError`` when the crystal
        falls apart, the sample collapses or the evaluator returns numbers that are not finite; what was done before stays in
        ``progress``.
        """
        if self.averages is not None and self.converged:
            return self._more(n_configs or self._missing())
        if self.averages is not None:
            self._minimise()
        self._approach = n_configs is None and self._far
        self._size = n_configs or self._usual_size()
        ensemble = self._draw(self._size)
        self._populations = [*self._populations, (self.state, ensemble)][-TOGETHER:]
        return self._average(ensemble)

    def finish(self, n_configs: int | None = None) -> SschaResult:
        """The result. With ``n_configs`` one more ensemble first: of the same state, and both together where the run has converged."""
        if n_configs is not None or self.averages is None:
            self.advance(n_configs)
        assert self.averages is not None
        result = finished_result(self.task, self.state, self.averages, self.progress, self.start, self.reason, self._began)
        self.folder.write_result(result)
        return result

    def _missing(self) -> int:
        """Configurations that bring the error of G below ``error_tolerance``, as far as ``n_configs`` allows."""
        tolerance, most = self.task.settings.error_tolerance, self.task.settings.n_configs
        if tolerance is None:
            return most
        wanted = len(self._populations[-1][1].energies) * (1.1 * (self.progress.gibbs[-1][1] / tolerance) ** 2 - 1.0)
        return 2 * (int(np.clip(wanted, min(SMALLEST_APPROACH[0], most), most)) // 2)

    def _more(self, n_configs: int) -> dict[str, Any]:
        """Another ensemble of the last state, averaged together with the last one."""
        state, last = self._populations[-1]
        more = self._draw(n_configs)
        together = joined([last, more])
        self._populations[-1] = (state, together)
        self._promised, self._predicted = 0.0, None
        return self._average(together)

    def _begin(self) -> Start:
        begin = self.folder.read_start()
        if begin is None:
            task = self.task
            begin = begin_run(
                task.atoms,
                self._evaluator,
                task.settings,
                pressure=task.pressure,
                temperature=task.temperature,
                masses=task.masses,
                start=task.start,
            )
            self.folder.write_start(begin)
        return begin

    def _minimise(self) -> None:
        """Move the state: centroids and force constants by the engine, the cell by the stress response."""
        settings = self.task.settings
        minimised = engine(settings.engine)(
            self._populations, self.symmetry, min_effective_sample=settings.min_effective_sample, log=self.folder.log
        )
        self.progress.rows[-1].update(_of_minimisation(minimised))
        self.folder.write_convergence(self.progress.rows)
        log.debug("%d steps to an effective sample of %.2f", minimised.n_steps, minimised.effective_sample)
        self.state = floor_modes(minimised.state, self.symmetry, LARGEST_AMPLITUDE_LATER)
        used_up = minimised.effective_sample < USED_UP * settings.min_effective_sample
        self._far = used_up and self.n_populations < settings.max_populations // 2
        self._predicted = None
        self._promised = minimised.decrease / len(self.state.atoms)
        if self._response is None:
            return
        assert self.averages is not None
        deviation = np.abs(minimised.stress * EV_PER_A3_IN_GPA + np.eye(3) * self.task.pressure)
        error = np.where(np.isfinite(self.averages.stress_error), self.averages.stress_error * EV_PER_A3_IN_GPA, 0.0)
        gain = cell_decrease(self.state, minimised.stress, self.averages.stress_error, self.task.pressure, self._response, self.symmetry)
        gain /= len(self.state.atoms)
        if gain > settings.free_energy_tolerance or np.any(deviation > np.maximum(KEEP_CELL * settings.pressure_tolerance, error)):
            self._promised += gain
            strain = strain_towards(minimised.stress, self.task.pressure, self._response, self.symmetry)
            self._predicted = (minimised.stress, strain)
            self.state = self.state.strained(strain)
            self._populations = []

    def _draw(self, n_configs: int) -> Ensemble:
        """The next ensemble of the state: from the folder if it is there, else drawn and evaluated in one call."""
        number = self.n_populations + 1
        stored = self.folder.read_population(number, self.state)
        if stored is not None:
            self.state, ensemble = stored
        else:
            ensemble = evaluate(self.state, n_configs, [self.task.seed, number, SAMPLING_TAG], self._evaluator, number)
            self.folder.write_population(number, self.state, ensemble)
        self.progress.n_evaluations += len(ensemble.energies)
        return ensemble

    def _average(self, ensemble: Ensemble) -> dict[str, Any]:
        self.averages = average(self.state, ensemble, self.symmetry)
        if self._response is not None:
            found = self.averages
            by_cell = cell_decrease(self.state, found.stress, found.stress_error, self.task.pressure, self._response, self.symmetry)
            self.averages = replace(found, decrease=found.decrease + by_cell)
        self.progress.gibbs.append(gibbs_energy(self.state, self.averages, self.task.pressure))
        number = self.n_populations + 1
        row = _row(number, self.state, self.averages, self.progress)
        self.progress.rows.append(row)
        self.folder.write_convergence(self.progress.rows)
        log.info(
            "population %d of at most %d: G = %.5f +- %.5f eV/atom, pressure %.2f GPa, may fall by %.2f meV/atom; ESS on the way %.2f",
            number, self.task.settings.max_populations, row["gibbs_eV_per_atom"], row["error_eV_per_atom"],
            row["pressure_GPa"], 1e3 * row["predicted_decrease_eV_per_atom"],
            self.progress.rows[-2]["effective_sample"] if number > 1 else 1.0,
        )  # fmt: skip
        _require_crystal(self.state, self.start.state)
        self.reason = _unconverged(self.state, self.averages, self.progress, self.task, self._promised)
        if self._approach and self._size < self.task.settings.n_configs and not self.reason:
            self.reason = f"a population of {self._size} configurations only"
        if self._response is not None and self._predicted is not None:
            self._response = _learn_response(self._response, self.averages, *self._predicted)
        return row


def evaluate(state: SschaState, n_configs: int, seed: list[int], evaluator: Evaluator, number: int) -> Ensemble:
    """Draw ``n_configs`` configurations of the state and evaluate them in one call; ``number`` is for the messages."""
    displacements = sample(state, n_configs, np.random.default_rng(seed))
    try:
        found = CountingEvaluator(evaluator).evaluate(displaced(state, displacements))
    except InputError as error:
        raise SschaError(f"population {number}: a sampled configuration cannot be evaluated: {error}") from error
    return Ensemble(
        displacements,
        np.asarray(found.energy, dtype=float),
        np.array(found.forces, dtype=float),
        np.array(found.stress, dtype=float).reshape(-1, 3, 3),
    )


def _require_crystal(state: SschaState, begin: SschaState) -> None:
    """Raise ``SschaError`` when the crystal has come apart."""
    ratio = state.atoms.get_volume() / begin.atoms.get_volume()
    if not VOLUME_LIMITS[0] < ratio < VOLUME_LIMITS[1]:
        raise SschaError(f"dissociated: the volume is {ratio:.2f} times that of the start")
    neighbours = nearest_neighbour(state.atoms) / nearest_neighbour(begin.atoms)
    worst = int(np.argmax(np.abs(np.log(neighbours))))
    if not NEIGHBOUR_LIMITS[0] < neighbours[worst] < NEIGHBOUR_LIMITS[1]:
        raise SschaError(
            f"dissociated: the nearest neighbour of atom {worst + 1} ({state.atoms.symbols[worst]}) "
            f"is at {neighbours[worst]:.2f} times its distance at the start"
        )


def _unconverged(state: SschaState, averages: Averages, progress: Progress, task: Task, promised: float) -> str:
    """Why the run has to go on; empty when it has converged.

    The last two populations agree when G neither rose nor fell by more than their errors, after what the step between them
    had ``promised`` (eV/atom): a fall that was foreseen is no sign of drift.
    """
    settings, n = task.settings, len(state.atoms)
    gibbs, error = progress.gibbs[-1]
    open_issues = []
    if settings.cell == "variable":
        deviation = np.abs(averages.stress * EV_PER_A3_IN_GPA + np.eye(3) * task.pressure).max()
        if deviation >= settings.pressure_tolerance:
            open_issues.append(f"stress {deviation:.2f} GPa off the target")
    if averages.decrease / n >= max(settings.free_energy_tolerance, error):
        open_issues.append(f"G may still fall by {averages.decrease / n * 1e3:.2f} meV/atom")
    if len(progress.gibbs) < 2:
        open_issues.append("one population")
    else:
        before, error_before = progress.gibbs[-2]
        noise = 2.0 * np.hypot(error, error_before) + 1e-6
        if not -noise - max(0.0, promised) <= gibbs - before <= noise:
            open_issues.append(f"G changed by {(gibbs - before) * 1e3:.2f} meV/atom in the last population")
    return "; ".join(open_issues)


def _learn_response(response: np.ndarray, averages: Averages, stress: np.ndarray, strain: np.ndarray) -> np.ndarray:
    """Broyden's rank-one update of d(stress)/d(strain), where the change of stress stands clear of its noise."""
    step = np.array([strain[row, column] * (1.0 if row == column else 2.0) for row, column in VOIGT])
    change = np.array([(averages.stress - stress)[row, column] for row, column in VOIGT])
    expected = response @ step
    noise = np.linalg.norm([averages.stress_error[row, column] for row, column in VOIGT])
    if np.linalg.norm(expected) < 10.0 * noise or not step @ step > 0:
        return response
    return response + np.outer(change - expected, step) / (step @ step)


def _row(number: int, state: SschaState, averages: Averages, progress: Progress) -> dict[str, Any]:
    """One line of ``convergence.csv``; the last four columns belong to the minimisation on this population, if any."""
    n = len(state.atoms)
    gibbs, error = progress.gibbs[-1]
    return {
        "population": number,
        "free_energy_eV_per_atom": averages.helmholtz / n,
        "gibbs_eV_per_atom": gibbs,
        "error_eV_per_atom": error,
        "pressure_GPa": -np.trace(averages.stress) / 3.0 * EV_PER_A3_IN_GPA,
        # the diagonal components taken as wholly correlated: an upper bound
        "pressure_error_GPa": float(np.trace(averages.stress_error)) / 3.0 * EV_PER_A3_IN_GPA,
        "volume_A3_per_atom": state.atoms.get_volume() / n,
        "predicted_decrease_eV_per_atom": averages.decrease / n,
        "centroid_force_eV_per_A": float(np.abs(averages.force).max()),
        "effective_sample": 1.0,
        "fc_gradient_eV_per_A2": None,
        "centroid_gradient_A": None,
        "n_steps": 0,
    }


def _of_minimisation(minimised: Minimised) -> dict[str, Any]:
    return {
        "effective_sample": minimised.effective_sample,
        "fc_gradient_eV_per_A2": minimised.fc_gradient,
        "centroid_gradient_A": minimised.centroid_gradient,
        "n_steps": minimised.n_steps,
    }
