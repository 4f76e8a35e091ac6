"""Averages with a surrogate: a cheap energy surface over a large sample, corrected over a small
one.

<V - V_0> = <V_s - V_0> + <V - V_s>, and the same of stress, gradients and higher averages
(`ensemble`): the first over many configurations of the surrogate s, the second over a few of the
truth, all of them new draws of the state. The surrogate is fitted to configurations of earlier
states of the run, never to those that correct it (cross-fitting), so that it biases nothing: a bad
one has a large error bar, and costs evaluations.

How many: with deviations a of V_s - V_0 and b of V - V_s over pairs, and c the cost of the
surrogate in evaluations of the truth, the variance a^2/n_0 + b^2/n_1 is cheapest at n_1/n_0 = (b/a)
sqrt(c) (Neyman's allocation), where it costs (a sqrt(c) + b)^2 per unit of 1/variance instead of
the a^2 of the truth alone. c is declared, not measured: numbers do not depend on the clock. b is
that of the forces (`left_by_forces`), which decide whether a sample is kept and how large it
becomes: its own scatter must not, because a sample that is kept for its small scatter tells an
error that is too small.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from magus_anharmonic.errors import is_machine_error, typed_line
from magus_anharmonic.evaluator import Evaluation, Evaluator
from magus_anharmonic.sscha.engines import minimise
from magus_anharmonic.sscha.ensemble import Ensemble, joined
from magus_anharmonic.sscha.start import evaluated, sample_ensemble
from magus_anharmonic.sscha.state import (
    LARGEST_AMPLITUDE_LATER,
    SschaState,
    displaced,
    floor_modes,
    melted,
    sample,
)
from magus_anharmonic.sscha.surrogate import Surrogate
from magus_anharmonic.sscha.symmetry import Symmetry

log = logging.getLogger(__name__)

COST = 0.1
"""Cost of a surrogate over that of the truth, unless it has a ``relative_cost`` of its own."""
HELPS = 0.8
"""Of the cost of the truth alone for the same error: the most that two levels may cost."""
FEWEST = 20
"""Configurations of the truth in a population of two levels, at least: ten pairs tell a standard
deviation to a quarter of it."""
FEWEST_MORE = 4
"""The same of one that is added to another of its state."""
FAILURES = 3
"""Populations in which a surrogate that learns from each of them did not help, after which it is
left out for good; one that does not learn has one."""
FEWEST_LARGE = 200
"""Configurations of the surrogate in such a population, at least."""
AMPLE = 1.5
"""Pairs of the surrogate over those that the tolerance asks for: ten pairs of the truth, which it
is told by, know their scatter to a quarter."""
SOON = 2 * FEWEST
"""Configurations of the truth in a population, above which a surrogate first learns from those at
hand: the configurations of a new state make it better than the same number corrects it."""


def corrections(truth: Ensemble, surrogate: Ensemble) -> Ensemble:
    """Level 1: ``truth`` minus ``surrogate`` at the same configurations, which the surrogate has
    not seen."""
    names = ("energies", "forces", "stresses")
    differences = (getattr(truth, name) - getattr(surrogate, name) for name in names)
    return Ensemble(truth.displacements, *differences, np.ones(len(truth.energies)))


def deviation(state: SschaState, ensemble: Ensemble) -> float:
    """Standard deviation of the pair means of V - V_0, eV per primitive cell; of differences, of V
    - V_s."""
    return float(ensemble.excess(state).std(ddof=1))


MISMATCH = 2.0
"""Times what the forces say: a scatter of the energies beyond it is of forces that do not belong to
them."""


def left_by_forces(state: SschaState, differences: Ensemble) -> float:
    """Standard deviation of the pair means of V - V_s, from the forces of the `corrections`; eV per
    primitive cell.

    For a function of a Gaussian with covariance Psi, var g <= <g' Psi g'>, and half of that for an
    even one (Poincare's inequality, Hermite order by order; an equality for quadratic g): that of
    pair means, with the odd part of the forces. Ten pairs tell it to a tenth, where their scatter
    is known to a third.
    """
    forces = differences.forces.reshape(len(differences.energies), -1)
    odd = 0.5 * (forces[0::2] - forces[1::2])
    squares = np.einsum("pi,pi->p", odd @ state.covariance, odd)
    found = float(np.sqrt(0.5 * squares.mean())) / state.n_cells
    scatter = deviation(state, differences)
    return found if scatter < MISMATCH * found else scatter


def allocation(a: float, b: float, cost: float, variance: float) -> tuple[float, float]:
    """Pairs of the surrogate and of the difference that bring the variance of the mean down to
    ``variance``; see the module docstring."""
    per = (a * np.sqrt(cost) + b) / variance
    return per * a / np.sqrt(cost), per * b


class SurrogateFailed(Exception):
    """A surrogate that gives no usable numbers, or does not help; with the reason."""


class LearnsFirst(SurrogateFailed):
    """A surrogate that would need more than `SOON` configurations to be corrected."""


def guarded(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; ``SurrogateFailed`` for whatever it raises but machine errors."""
    try:
        return work()
    except SurrogateFailed:
        raise
    except Exception as error:  # of somebody else's code, which a run must survive
        if is_machine_error(error):
            raise
        raise SurrogateFailed(typed_line(error)) from error


@dataclass(frozen=True)
class Sampler:
    """Draws of one population of ``state``: every ``stream`` has random numbers of its own."""

    state: SschaState
    truth: Evaluator
    seed: list[int]
    what: str
    surrogate: Evaluator | None = None

    @property
    def cost(self) -> float:
        """Of the surrogate, in evaluations of the truth."""
        return float(getattr(self.surrogate, "relative_cost", COST))

    def of_truth(self, n_configs: int, stream: int) -> Ensemble:
        seed = [*self.seed, stream]
        return sample_ensemble(self.state, n_configs, seed, self.truth, self.what)

    def of_surrogate(self, n_configs: int, stream: int) -> Ensemble:
        """Raises ``SurrogateFailed``."""
        rng = np.random.default_rng([*self.seed, stream])
        return self.at(sample(self.state, n_configs, rng))

    def at(self, displacements: np.ndarray) -> Ensemble:
        """Of the surrogate; one without stress has zero stress: the correction is the stress then.
        Raises ``SurrogateFailed``."""
        assert self.surrogate is not None
        found = guarded(partial(evaluated, self.state, displacements, self.surrogate, "surrogate"))
        none = np.isnan(found.stresses).all()
        return replace(found, stresses=np.zeros_like(found.stresses)) if none else found

    def judged(self, truth: Ensemble) -> tuple[Ensemble, float]:
        """The `corrections` of ``truth``, and their deviation (`left_by_forces`) over that of V -
        V_0 in the truth; raises ``SurrogateFailed`` where two levels cost more than `HELPS`, and
        for a single pair."""
        if len(truth.energies) < FEWEST_MORE:
            raise SurrogateFailed("one pair of configurations says nothing")
        level = corrections(truth, self.at(truth.displacements))
        left = left_by_forces(self.state, level) / max(deviation(self.state, truth), 1e-12)
        if not (np.sqrt(self.cost) + left) ** 2 < HELPS:
            raise SurrogateFailed(f"it leaves {left:.2f} of the standard deviation of V - V_0")
        return level, left


Sample = tuple[Ensemble, Ensemble]
"""An ensemble of two levels, and the truth at the configurations of its level 1."""


def first_sample(
    sampler: Sampler, truth: Ensemble, n_configs: int, tolerance: float | None, most: int
) -> Sample:
    """A population of two levels whose error is that of ``n_configs`` of the truth, or where that
    is larger, ``tolerance`` (eV per primitive cell), with what is drawn besides the first
    ``truth``. Raises ``SurrogateFailed``, and ``LearnsFirst`` where more than ``most`` of the
    truth are needed.

    In the second case `AMPLE` pairs of the surrogate are drawn for each that the tolerance asks
    for, and `FEWEST_LARGE` configurations at least: minimisations live on them.
    """
    level, left = sampler.judged(truth)
    pairs, cost = n_configs // 2, sampler.cost
    if tolerance is not None:
        enough = AMPLE * (deviation(sampler.state, truth) / tolerance) ** 2
        pairs = min(pairs, max(FEWEST_LARGE // 2, int(np.ceil(enough))))
    large = sampler.of_surrogate(2 * int(np.ceil(pairs * (1.0 + left / np.sqrt(cost)))), 2)
    a, b = deviation(sampler.state, large), left_by_forces(sampler.state, level)
    wanted = max(a**2 / pairs, 0.0 if tolerance is None else tolerance**2)
    needed = b**2 / (wanted - a**2 / (len(large.energies) // 2)) if b > 0.0 else 0.0
    if 2.0 * needed > most:
        raise LearnsFirst(f"{2.0 * needed:.0f} configurations would correct it; it learns first")
    missing = 2 * int(np.ceil(min(needed, pairs))) - len(truth.energies)
    if missing >= FEWEST_MORE:
        more = sampler.of_truth(missing, 1)
        truth = joined([truth, more])
        level = joined([level, corrections(more, sampler.at(more.displacements))])
    return joined([large, level]), truth


def further_sample(sampler: Sampler, last: Ensemble, factor: float | None, most: int) -> Sample:
    """What brings the variance of the averages of ``last`` down by ``factor`` (None: a half) at the
    least cost, with ``most`` configurations of the truth, as many of the surrogate as cost the
    same."""
    small = last.level > 0
    n_0, n_1 = int((~small).sum()) // 2, int(small.sum()) // 2
    a = deviation(sampler.state, last.part(~small))
    b = left_by_forces(sampler.state, last.part(small))
    wanted = min(0.95, factor or 0.5) * (a**2 / n_0 + b**2 / n_1)
    large, few = allocation(a, b, sampler.cost, wanted)
    truth = sampler.of_truth(_even(few - n_1, FEWEST_MORE, most), 1)
    level = corrections(truth, sampler.at(truth.displacements))
    extra = sampler.of_surrogate(_even(large - n_0, FEWEST_MORE, int(most / sampler.cost)), 2)
    return joined([extra, level]), truth


def _even(pairs: float, least: int, most: int) -> int:
    return int(np.clip(2 * np.ceil(pairs), least, 2 * (most // 2)))


MOST_LEARNED = 4 * FEWEST
"""Newest configurations that a surrogate is fitted to: more take time and leave as much."""
ROUNDS = 6
"""Most samples of the surrogate between two populations, each twice as large as the one before."""


def minimised_on(
    sampler: Sampler, symmetry: Symmetry, n_configs: int, least: float, rounds: int = 1
) -> tuple[SschaState, int, bool]:
    """The state that the surrogate alone leads to, at this cell, by ``rounds`` or more samples,
    pooled, the first of ``n_configs``; how many configurations it took, and whether the last was
    not used up.

    least : the ``min_effective_sample``. Raises ``SurrogateFailed``, also where the crystal melts:
    a surrogate knows nothing of where no configuration was.
    """
    pool: list[tuple[SschaState, Ensemble]] = []
    for number in range(ROUNDS):
        pool.append((sampler.state, sampler.of_surrogate(n_configs << number, 3 + number)))
        found = guarded(partial(minimise, pool, symmetry, min_effective_sample=least))
        state = floor_modes(found.state, symmetry, LARGEST_AMPLITUDE_LATER)
        sampler = replace(sampler, state=state)
        if loose := melted(state):
            raise SurrogateFailed(loose)
        if (done := not found.used_up(least)) and number + 1 >= rounds:
            break
    return state, sum(len(one.energies) for _, one in pool), done


@dataclass
class Learner:
    """The surrogates of a run. truths : what it knows of the truth, by the number of the
    population; failures : populations in which the surrogate did not help."""

    source: Surrogate
    truths: dict[int, tuple[SschaState, Ensemble]] = field(default_factory=dict)
    failures: int = 0
    _fitted: dict[int, Evaluator] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.failures < (FAILURES if self.source.fit else 1)

    def before(self, number: int) -> Evaluator | None:
        """The surrogate that has seen the populations before ``number`` alone; None where there is
        none. Raises ``SurrogateFailed``."""
        known = [one for key, one in sorted(self.truths.items()) if key < number]
        if not self.active or (self.source.fixed is None and not known):
            return None
        if self.source.fixed is not None:
            return self.source.fixed
        if number not in self._fitted:
            self._fitted = {number: self._fit(known)}
        return self._fitted[number]

    def learned(
        self,
        number: int,
        truth: tuple[SschaState, Ensemble] | None,
        ensemble: Ensemble,
        last: Ensemble | None,
    ) -> None:
        """Take note of a population, and of whether a surrogate helped in it."""
        could = self.active and (self.source.fixed is not None or bool(self.truths))
        if could and not ensemble.two_level and (last is None or last.two_level):
            self.failures += 1  # those that it learns from first are counted too
            if not self.active:
                log.info("surrogate %s: is left out from here on", self.source.name)
        if truth is not None:
            self.truths[number] = truth

    def _fit(self, known: Sequence[tuple[SschaState, Ensemble]]) -> Evaluator:
        structures = [
            one for state, truth in known for one in displaced(state, truth.displacements)
        ][-MOST_LEARNED:]
        truth = joined([one for _, one in known]).part(slice(-MOST_LEARNED, None))
        found = Evaluation(truth.energies, list(truth.forces), truth.stresses)
        fit = self.source.fit
        assert fit is not None
        return guarded(partial(fit, structures, found))

    def drawn(
        self,
        sampler: Sampler,
        first: int,
        fresh: Callable[[int], Ensemble],
        n_configs: int,
        last: Ensemble | None,
        goal: float | None,
    ) -> Sample:
        """A population of the state whose first one is number ``first``, and the truth in it: of
        two levels where the surrogate helps, else of ``n_configs`` of the truth; of `FEWEST` of it
        where the surrogate is to learn from them first.

        ``fresh`` : draws the truth; ``last`` : see `SschaRun._sample`; ``goal`` : of
        `first_sample` or `further_sample`.
        """
        truth = None
        again = last is None and self.source.fit is not None and self.failures < FAILURES - 1
        try:
            surrogate = self.before(first)
            if surrogate is not None:
                sampler = replace(sampler, surrogate=surrogate)
                if last is not None:
                    return further_sample(sampler, last, goal, n_configs)
                truth = fresh(min(FEWEST, n_configs))
                return first_sample(sampler, truth, n_configs, goal, SOON if again else n_configs)
        except SurrogateFailed as error:
            log.info("%s: without the surrogate: %s", sampler.what, error)
        if truth is None:
            truth = fresh(min(FEWEST, n_configs) if again and self.truths else n_configs)
        if not again and (missing := n_configs - len(truth.energies)) > 0:
            truth = joined([truth, sampler.of_truth(missing, 1)])
        return truth, truth

    def further(
        self,
        sampler: Sampler,
        number: int,
        symmetry: Symmetry,
        n_configs: int,
        least: float,
        helped: bool,
    ) -> tuple[SschaState, int, bool] | None:
        """`minimised_on` the surrogate of population ``number``; None where there is none that
        holds on configurations that it has not seen. ``helped`` : the one before did, in the last
        population."""
        try:
            surrogate = self.before(number)
            if surrogate is None or not (helped or self.holds(number - 1)):
                return None
            return minimised_on(replace(sampler, surrogate=surrogate), symmetry, n_configs, least)
        except SurrogateFailed as error:
            log.info("%s: the surrogate does not minimise: %s", sampler.what, error)
            return None

    def holds(self, number: int) -> bool:
        """Whether what was fitted without the second half of population ``number`` helps there."""
        state, truth = self.truths[number]
        odd = np.arange(len(truth.energies)) // 2 % 2 == 1
        first, second = truth.part(~odd), truth.part(odd)
        try:
            known = [one for key, one in sorted(self.truths.items()) if key < number]
            surrogate = self.source.fixed or self._fit([*known, (state, first)])
            Sampler(state, surrogate, [], "", surrogate).judged(second)
        except SurrogateFailed as error:
            log.info("surrogate %s: not used to minimise: %s", self.source.name, error)
            return False
        return True
