"""One SSCHA run, population by population: the caller decides after each whether to go on.

Every population is a fresh ensemble of the state it was drawn from, so that its averages are free
of the bias of the minimisation: that bias (low, by about free parameters over configurations) shows
in no error bar.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from magus_anharmonic.energy_surface import require_potential
from magus_anharmonic.errors import SschaError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.engines import Population, engine
from magus_anharmonic.sscha.ensemble import Averages, Ensemble, average, joined
from magus_anharmonic.sscha.result import Progress, RunFolder, SschaResult
from magus_anharmonic.sscha.start import evaluated, sample_ensemble, start_run, symmetry_of
from magus_anharmonic.sscha.state import (
    LARGEST_AMPLITUDE_LATER,
    MELTED,
    SschaState,
    floor_modes,
    lindemann_ratios,
    melted,
    nearest_neighbour,
    same_gaussian,
)
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import (
    SIGNIFICANT,
    Task,
    finished_result,
    gibbs_energy,
    open_issues,
    pressure_of,
    unconverged,
)
from magus_anharmonic.sscha.two_levels import FEWEST, Learner, Sample, Sampler
from magus_anharmonic.sscha.unstable import (
    EXACT,
    Answer,
    Higher,
    Question,
    answer,
    ask,
    symmetrised,
)
from magus_anharmonic.structures import space_group
from magus_anharmonic.units import ev_per_a3_to_gpa, ev_to_mev

log = logging.getLogger(__name__)

SAMPLING_TAG = 7319
"""Separates the random numbers of the ensembles from those of other purposes with the same seed."""
VOLUME_LIMITS = (0.5, 2.0)
"""Volume over that of the start, outside of which a run has failed."""
NEIGHBOUR_LIMITS = (0.55, 1.6)
"""Nearest-neighbour distance of an atom over that at the start, outside of which a run has
failed."""
MAX_POOLED = 8
"""Most populations of one cell that a minimisation pools."""
KEEP_CELL = 0.5
"""Part of the tolerances of energy and strain: with less than that left, or less than noise, the
cell stays, so that the populations can be pooled."""
BURN_IN_FRACTION = 0.25
"""Fraction of ``n_configs`` in a burn-in population: the first, and those after a minimisation that
used its sample up before it got to the minimum."""
SMALLEST_BURN_IN = (20, 100)
"""Least configurations of a burn-in population, where ``n_configs`` allows: 12 for every atom of
the cell without symmetry (a force component has to determine an eighth of a force constant),
divided by the operations; not outside of these two."""
RATIO = "lindemann_ratio"
"""Column of ``convergence.csv``: the largest of the state's."""


class SschaRun:
    """A run that can be stopped after any population and finished, or left and taken up again from
    its folder.

    progress : the table, the free energies and all else that is kept besides the populations. state
    : that of the last population (before the first: the start). averages : of the last population.
    """

    def __init__(
        self, task: Task, evaluator: Evaluator, folder: RunFolder, progress: Progress | None = None
    ) -> None:
        """Read the start from the folder, or work it out. Raises ``InputError`` and ``SschaError``
        as `start_run` does."""
        require_potential(evaluator, "SSCHA")
        self._began = time.perf_counter()
        self.task, self.folder = task, folder
        self._evaluator = evaluator
        self.progress = progress if progress is not None else Progress()
        start = folder.read_start()
        if start is None:
            start = start_run(task, evaluator)
            folder.write_start(start)
        self.start = start
        self.progress.n_evaluations = self.start.n_evaluations
        # the minimum of another model is only near that of this one, and a surrogate learns first
        teaches = task.surrogate is not None and task.surrogate.fit is not None
        near = task.start is not None and task.configurations is None
        self.progress.burn_in = teaches or not near
        self.averages: Averages | None = None
        self._learner = None if task.surrogate is None else Learner(task.surrogate)
        self._phase = Answer()
        self._question: Question | None = None
        state = self.start.state
        self._go_on_from(state, symmetry_of(state.atoms, state.supercell_matrix, task.settings))
        self._resume()

    def _go_on_from(self, state: SschaState, symmetry: Symmetry) -> None:
        """Take a state that no population is of, with what its symmetry leaves of the cell."""
        self.state, self.symmetry = state, symmetry
        self._cell = self.start.stiffness(symmetry, self.task.pressure)
        self._populations: list[Population] = []
        self.progress.pooled = []

    def _resume(self) -> None:
        """Take up a run after its last population; one that was kept in another way begins anew, on
        the populations it left."""
        stored = self.folder.read_progress()
        if stored is None or len(stored.rows) > self.task.settings.max_populations:
            return
        if stored.moved:
            # the few runs that were moved onto another symmetry go over their populations again:
            # there are two states to keep
            for request in stored.requests:
                self.advance(request)
            return
        found = [self.folder.read_pooled(numbers, self.state) for numbers in stored.pooled]
        populations = [one for one in found if one is not None]
        if len(populations) < len(found):
            return
        if self._learner is not None:
            numbers = range(1, len(stored.rows) + 1)
            truths = {number: self.folder.read_truth(number) for number in numbers}
            if None in truths.values():
                return
            known = {number: one for number, one in truths.items() if one is not None}
            self._learner = Learner(self._learner.source, known, stored.surrogate_failures)
        vars(self.progress).update(vars(stored))
        self._populations = populations
        self.state, ensemble = populations[-1]
        if stored.cell is not None and self._cell is not None:
            matrix, covariance = (np.array(array) for array in stored.cell)
            self._cell = replace(self._cell, matrix=matrix, covariance=covariance)
        self.averages = average(self.state, ensemble, self.symmetry, cell=self._cell)

    @property
    def n_populations(self) -> int:
        return len(self.progress.rows)

    @property
    def reason(self) -> str:
        """Why the last population does not end the run, empty when it does."""
        return self.progress.reason

    @property
    def converged(self) -> bool:
        """Whether the last population meets every criterion of `SschaSettings`."""
        return not self.reason

    @property
    def precise(self) -> bool:
        """Whether the sampling error of G is as small as ``error_tolerance`` asks."""
        tolerance = self.task.settings.error_tolerance
        return tolerance is None or any(error <= tolerance for _, error in self.progress.gibbs[-1:])

    def advance(self, n_configs: int | None = None) -> dict[str, Any]:
        """Minimise on the populations so far, then sample and average the next one, of
        ``n_configs`` (default: as many as the settings say).

        A run that has converged, but for the question which phase it is, stays where it is: the
        next population is one more of the same state, and is averaged with the last, so that the
        error of G falls. Returns its row of ``convergence.csv``. Raises ``SschaError`` when the
        crystal falls apart or melts, the sample collapses or the evaluator returns numbers that are
        not finite; what was done before stays in ``progress``.
        """
        self.progress.requests.append(n_configs)
        step, strained = self._phase.step, None
        if self.averages is not None and (self.converged or step == "once more"):
            return self._more(n_configs or self._missing())
        if isinstance(step, Higher):
            self._symmetrise(step)
        elif isinstance(step, Question):
            self._go_on_from(step.lower, step.symmetry)
            self.progress.group, self._question = step.group, None
        elif self._populations and not self._learns():
            strained = self._minimise()
        size = n_configs or self._usual_size()
        ensemble = self._sample(size)
        if any(one.two_level for one in (ensemble, *(one for _, one in self._populations))):
            # every state has a surrogate of its own
            self._populations, self.progress.pooled = [], []
        self._populations = [*self._populations, (self.state, ensemble)][-MAX_POOLED:]
        pooled = [*self.progress.pooled, [self.n_populations + 1]]
        self.progress.pooled = pooled[-MAX_POOLED:]
        burn_in = n_configs is None and self.progress.burn_in
        few = size if burn_in and size < self.task.settings.n_configs else None
        if not ensemble.two_level and len(ensemble.energies) < size:  # one to learn from first
            few = len(ensemble.energies)
        return self._average(ensemble, strained, few)

    def finish(self) -> SschaResult:
        """The result, of at least one population."""
        if self.averages is None:
            self.advance()
        assert self.averages is not None
        loose = melted(self.state)
        if loose and self.converged:
            raise SschaError(loose)
        both = self.progress.open
        reason = "; ".join(filter(None, ("" if both else self.reason, loose)))
        of = self.task, self.state, self.averages, self.progress, self.start
        result = finished_result(*of, reason, both or self.progress.group, self._began)
        if both and result.converged:
            result = replace(result, reason=self.reason)
        self.folder.write_result(result)
        return result

    def _usual_size(self) -> int:
        """Configurations of the next population: fewer in burn-in."""
        settings = self.task.settings
        full, most = settings.configurations(self.n_populations + 1), settings.n_configs
        least = int(np.clip(12 * len(self.state.atoms) / len(self.symmetry), *SMALLEST_BURN_IN))
        if not self.progress.burn_in:
            return full
        if self._learner and self._learner.source.fit and not self.n_populations:
            return 2 * (min(full, least) // 2)  # enough for a first surrogate
        return 2 * (min(full, max(int(BURN_IN_FRACTION * most), least)) // 2)

    def _missing(self) -> int:
        """Configurations that bring the error of G below ``error_tolerance``, as far as
        ``n_configs`` allows."""
        tolerance, most = self.task.settings.error_tolerance, self.task.settings.n_configs
        if tolerance is None:
            return most
        wanted = len(self._populations[-1][1].energies) * (
            1.1 * (self.progress.gibbs[-1][1] / tolerance) ** 2 - 1.0
        )
        return 2 * (int(np.clip(wanted, min(SMALLEST_BURN_IN[0], most), most)) // 2)

    def _more(self, n_configs: int) -> dict[str, Any]:
        """Another ensemble of the last state, averaged together with the last one."""
        state, last = self._populations[-1]
        ensemble, number = self._sample(n_configs, last), self.n_populations + 1
        if ensemble.two_level == last.two_level:
            ensemble = joined([last, ensemble])
            self.progress.pooled[-1] = [*self.progress.pooled[-1], number]
        else:  # a surrogate that fell away
            self.progress.pooled[-1] = [number]
        self._populations[-1] = (state, ensemble)
        return self._average(ensemble)

    def _minimise(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Move the state: centroids and force constants by the engine, the cell by the stress
        response; see `_strain`."""
        settings, progress = self.task.settings, self.progress
        minimised = engine(settings.engine)(
            self._populations,
            self.symmetry,
            min_effective_sample=settings.min_effective_sample,
            log=self.folder.log,
        )
        progress.rows[-1] |= {
            "effective_sample": minimised.effective_sample,
            "fc_gradient_eV_per_A2": minimised.fc_gradient,
            "centroid_gradient_A": minimised.centroid_gradient,
            "n_steps": minimised.n_steps,
        }
        self.folder.write_convergence(progress.rows)
        self.state = floor_modes(minimised.state, self.symmetry, LARGEST_AMPLITUDE_LATER)
        progress.limited = self.state is not minimised.state
        used_up = minimised.used_up(settings.min_effective_sample)
        helped = self._populations[-1][1].two_level
        progress.burn_in = used_up and self.n_populations < settings.max_populations // 2
        step = None if self._cell is None else self._strain(self._cell, minimised.stress)
        if used_up and self._learner is not None:
            self._further(self._learner, helped)
        return step

    def _learns(self) -> bool:
        """Whether the last population was one for the surrogate to learn from: the next is of the
        same state."""
        last = self._populations[-1][1]
        active = self._learner is not None and self._learner.active and self.n_populations > 1
        return active and not last.two_level and len(last.energies) <= FEWEST

    def _further(self, learner: Learner, helped: bool) -> None:
        """Go on where the sample was used up, at this cell, on the surrogate alone."""
        number, least = self.n_populations + 1, self.task.settings.min_effective_sample
        of = number, self.symmetry, SMALLEST_BURN_IN[1], least, helped
        if (found := learner.further(self._sampler(number), *of)) is not None:
            self.state, used, done = found
            self.progress.n_surrogate += used
            self.progress.burn_in &= not done

    def _sampler(self, number: int) -> Sampler:
        seed = [self.task.seed, number, SAMPLING_TAG]
        return Sampler(self.state, self._evaluator, seed, f"population {number}")

    def _strain(
        self, cell: CellStiffness, stress: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Take the step of the cell that removes the excess of ``stress`` (3, 3), unless it is
        noise or not worth a new sample; excess and step, where it was taken."""
        assert self.averages is not None
        settings, n = self.task.settings, len(self.state.atoms)
        excess = cell.excess(stress)
        left = cell.compliance @ excess
        noise = np.sum(cell.compliance * self.averages.noise)
        gain = 0.5 * self.state.atoms.get_volume() * (excess @ left - noise) / n
        worth = gain > KEEP_CELL * max(settings.free_energy_tolerance, self.progress.gibbs[-1][1])
        far = np.abs(left) > np.maximum(
            KEEP_CELL * settings.strain_tolerance, SIGNIFICANT * self.averages.strain_error
        )
        if not (worth or np.any(far)):
            return None
        step = cell.step(excess)
        compliance = np.linalg.pinv(self.state.gamma, rcond=1e-9)
        shift = (compliance @ (step @ cell.forces)).reshape(-1, 3)
        # of a single atom the compliance is rounding alone
        self.state = self.state.strained(cell.strain(step), shift - shift.mean(axis=0))
        self._populations, self.progress.pooled = [], []
        return excess, step

    def _sample(self, n_configs: int, last: Ensemble | None = None) -> Ensemble:
        """The next ensemble of the state: from the folder if it is there, else drawn and evaluated
        in one call; ``last`` : of the same state, which it is added to."""
        number = self.n_populations + 1
        stored = self.folder.read_population(number, self.state)
        if stored is not None:
            self.state, ensemble = stored
            truth = self.folder.read_truth(number)
        else:
            ensemble, own = self._drawn(number, n_configs, last)
            truth = self.state, own
            if ensemble.two_level:
                self.folder.write_truth(number, self.state, own)
            self.folder.write_population(number, self.state, ensemble)
        self.progress.n_evaluations += ensemble.n_truth
        if ensemble.two_level:
            self.progress.n_surrogate += len(ensemble.energies)
            of = number, ensemble.n_truth, len(ensemble.energies)
            log.info("population %d: %d evaluations, and %d of the surrogate", *of)
        if (learner := self._learner) is not None:
            learner.learned(number, truth, ensemble, last)
            self.progress.surrogate_failures = learner.failures
        return ensemble

    def _drawn(self, number: int, n_configs: int, last: Ensemble | None) -> Sample:
        """An ensemble of the state, of two levels where there is a surrogate that helps, and the
        truth in it."""
        fresh = partial(self._fresh, number)
        if self._learner is None or (last is not None and not last.two_level):
            truth = fresh(n_configs)
            return truth, truth
        goal = self.task.settings.error_tolerance
        if goal is not None and last is None:
            goal *= len(self.state.atoms) / 1.1**0.5
        elif goal is not None:
            goal = (goal / self.progress.gibbs[-1][1]) ** 2 / 1.1
        first = number if last is None else self.progress.pooled[-1][0]
        return self._learner.drawn(self._sampler(number), first, fresh, n_configs, last, goal)

    def _fresh(self, number: int, n_configs: int) -> Ensemble:
        """An ensemble of the state: the first one from the configurations that another model left,
        as far as they go."""
        seed, parts = [self.task.seed, number, SAMPLING_TAG], []
        by = self._evaluator, f"population {number}"
        earlier, start = self.task.configurations, self.task.start
        if number == 1 and earlier is not None and start and same_gaussian(start, self.state):
            parts = [evaluated(self.state, earlier[:n_configs], *by)]
            n_configs -= len(parts[0].energies)
            log.info("population 1: evaluates configurations of another model's run again")
        if n_configs:
            parts.append(sample_ensemble(self.state, n_configs, seed, *by))
        return joined(parts)

    def _average(
        self,
        ensemble: Ensemble,
        strained: tuple[np.ndarray, np.ndarray] | None = None,
        few: int | None = None,
    ) -> dict[str, Any]:
        """The row of an ensemble of the state, and what it says about the end of the run.

        ``strained`` : see `_strain`; ``few`` : its configurations, where they are too few to end a
        run.
        """
        progress = self.progress
        if self._cell is not None and strained is not None:
            excess, step = strained
            found = average(self.state, ensemble, self.symmetry, cell=self._cell)
            # the stress before the step was an average over a population of about this size too
            self._cell = self._cell.learned(step, found.excess - excess, 2.0 * found.noise)
        self.averages = average(self.state, ensemble, self.symmetry, cell=self._cell)
        progress.gibbs.append(gibbs_energy(self.state, self.averages, self.task.pressure))
        number = self.n_populations + 1
        row = _row(number, self.state, self.averages, progress)
        progress.rows.append(row)
        self.folder.write_convergence(progress.rows)
        before = progress.rows[-2] if number > 1 else {}
        log.info(
            "population %d of at most %d: G = %.5f +- %.5f eV/atom, pressure %.2f GPa, predicted"
            " decrease %.2f meV/atom; ESS of the minimisation %.2f",
            number,
            self.task.settings.max_populations,
            row["gibbs_eV_per_atom"],
            row["error_eV_per_atom"],
            row["pressure_GPa"],
            ev_to_mev(row["predicted_decrease_eV_per_atom"]),
            before.get("effective_sample", 1.0),
        )
        _require_crystal(self.state, self.start.state)
        # a state before convergence may be too wide; two in a row are where the run goes
        if (before.get(RATIO) or 0.0) > MELTED and (loose := melted(self.state)):
            raise SschaError(loose)
        reason = unconverged(self.averages, progress, len(self.state.atoms), self.task)
        limit = (
            "soft modes were kept from moving neighbours by more than"
            f" {LARGEST_AMPLITUDE_LATER:g} of their distance"
        )
        reason = "; ".join(filter(None, (reason, limit if progress.limited else "")))
        if few and not reason:
            reason = f"a population of {few} configurations only"
        # of two levels the first that is near the minimum is asked, which no other agrees with yet
        of = self.averages, progress.gibbs[-1][1], len(self.state.atoms), self.task
        near = ensemble.two_level and not (few or progress.limited or open_issues(*of))
        self._phase = self._identity(self.averages, ensemble) if near or not reason else Answer()
        progress.open, progress.group = self._phase.both, self._phase.group or progress.group
        progress.reason = reason or self._phase.reason
        progress.moved |= isinstance(self._phase.step, Higher)
        progress.cell = None if self._cell is None else [self._cell.matrix, self._cell.covariance]
        self.folder.write_progress(progress)
        return row

    def _identity(self, averages: Averages, ensemble: Ensemble) -> Answer:
        """What a relaxed run knows of the phase that it is in."""
        if self.progress.group or not self.symmetry.movable:
            return Answer(self.progress.group)
        self.progress.asked += 1
        if self._question is not None:
            return answer(self._question, self.state, ensemble, self.progress.asked)
        return ask(self.state, averages, self._cell, self.progress.asked)

    def _symmetrise(self, higher: Higher) -> None:
        """Go on from the higher symmetry, with the way back kept."""
        lower, symmetry = self.state, self.symmetry
        state, new = symmetrised(lower, higher)
        self._question = Question(lower, symmetry, space_group(lower.atoms, EXACT), higher.toward)
        self._go_on_from(floor_modes(state, new, LARGEST_AMPLITUDE_LATER), new)
        self.progress.limited = self.progress.burn_in = False


def _require_crystal(state: SschaState, start: SschaState) -> None:
    """Raise ``SschaError`` when the crystal has come apart."""
    ratio = state.atoms.get_volume() / start.atoms.get_volume()
    if not VOLUME_LIMITS[0] < ratio < VOLUME_LIMITS[1]:
        raise SschaError(f"dissociated: the volume is {ratio:.2f} times that of the start")
    neighbours = nearest_neighbour(state.atoms) / nearest_neighbour(start.atoms)
    worst = int(np.argmax(np.abs(np.log(neighbours))))
    if not NEIGHBOUR_LIMITS[0] < neighbours[worst] < NEIGHBOUR_LIMITS[1]:
        raise SschaError(
            f"dissociated: the nearest neighbour of atom {worst + 1} ({state.atoms.symbols[worst]})"
            f" is at {neighbours[worst]:.2f} times its distance at the start"
        )


def _row(number: int, state: SschaState, averages: Averages, progress: Progress) -> dict[str, Any]:
    """One line of ``convergence.csv``; the four columns from ``effective_sample`` on are of the
    minimisation on this population, if any."""
    n = len(state.atoms)
    gibbs, error = progress.gibbs[-1]
    return {
        "population": number,
        "free_energy_eV_per_atom": averages.helmholtz / n,
        "gibbs_eV_per_atom": gibbs,
        "error_eV_per_atom": error,
        "pressure_GPa": pressure_of(averages),
        # the diagonal components taken as wholly correlated: an upper bound
        "pressure_error_GPa": ev_per_a3_to_gpa(float(np.trace(averages.stress_error)) / 3.0),
        "volume_A3_per_atom": state.atoms.get_volume() / n,
        "predicted_decrease_eV_per_atom": averages.predicted_decrease / n,
        "centroid_force_eV_per_A": float(np.abs(averages.force).max()),
        "effective_sample": 1.0,
        "fc_gradient_eV_per_A2": None,
        "centroid_gradient_A": None,
        "n_steps": 0,
        RATIO: float(lindemann_ratios(state)[0].max()),
    }
